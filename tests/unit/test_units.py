"""Sizes and times: tables, and a size survives being written and read."""

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incfs.errors import UsageError
from incfs.units import format_size, format_time, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("4K", 4096),
        ("4k", 4096),
        ("4 KiB", 4096),
        ("4kib", 4096),
        ("4KB", 4000),
        ("1.5G", 3 << 29),
        ("100M", 100 << 20),
        ("10GB", 10**10),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("8E", 1 << 63),
        (" 7G ", 7 << 30),
    ],
)
def test_parse_size(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", "K", "-1", "+1", "1.G", ".5G", "1X", "1KBB", "1iB", "0x10", "1e9", "0.3", "1.0001K",
     "\u0661G", "1_000", "9" * 40, "1 0", "nan"],
)  # fmt: skip
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (100 << 30, "100.0 GiB"),
        (1 << 63, "8.0 EiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_format_size(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(0, 1 << 63))
def test_bare_bytes_round_trip(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == size_bytes


@given(st.integers(1024, 1 << 63))
def test_formatted_size_reads_back_within_its_precision(size_bytes: int) -> None:
    number, unit = format_size(size_bytes).split()
    shown = float(number) * parse_size("1" + unit)
    assert abs(shown - size_bytes) <= 0.051 * parse_size("1" + unit)


def test_format_time() -> None:
    assert format_time(0) == "1970-01-01T00:00:00.000000Z"
    assert format_time(1_700_000_000_123_456_789) == "2023-11-14T22:13:20.123456Z"


@given(st.integers(0, 4_000_000_000 * 10**9))
def test_format_time_is_what_datetime_reads(time_ns: int) -> None:
    assert abs(datetime.fromisoformat(format_time(time_ns)).timestamp() * 1e9 - time_ns) < 2000
