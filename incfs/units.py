"""Sizes and times as people and scripts write them.

Pure: no I/O, no clock.  A bare number is bytes; K, KiB, M, MiB, ... are powers of 1024 and
KB, MB, ... powers of 1000; letters may be upper or lower case.  A duration is a number with
s, m, h, d or w.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from typing import Final

from incfs.errors import UsageError

_PREFIXES: Final = "KMGTPE"
_PERCENT: Final = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s?%", re.ASCII)
_SIZE: Final = re.compile(rf"(\d{{1,20}}(?:\.\d{{1,18}})?)\s?(?:([{_PREFIXES}])(I?B)?|B)?", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s?([smhdw])?", re.ASCII)


def parse_size(text: str) -> int:
    """Read a size such as ``4096``, ``64K``, ``1.5GiB`` or ``10GB`` and return bytes.

    Raises:
        UsageError: It is no size, is negative, or is not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None:
        raise UsageError(
            f"{text!r} is not a size; write bytes or a number with K, M, G, T, P or E "
            "(powers of 1024) or KB, MB, ... (powers of 1000)",
            value=text,
        )
    number, prefix, suffix = match.groups()
    power = _PREFIXES.index(prefix) + 1 if prefix else 0
    size = Fraction(number) * (1000 if suffix == "B" else 1024) ** power
    if size.denominator != 1:
        raise UsageError(f"{text!r} is not a whole number of bytes", value=text)
    return int(size)


@dataclass(frozen=True, slots=True)
class SizeChange:
    """A size, or a difference to the size that is."""

    size_bytes: int
    is_relative: bool


def parse_size_change(text: str) -> SizeChange:
    """Read a size such as ``10G``, or a change of one such as ``+10G`` or ``-512M``.

    Raises:
        UsageError: It is neither.
    """
    sign = text.strip()[:1]
    if sign not in ("+", "-"):
        return SizeChange(parse_size(text), is_relative=False)
    size = parse_size(text.strip()[1:])
    return SizeChange(-size if sign == "-" else size, is_relative=True)


def parse_duration(text: str) -> float:
    """Read a time such as ``90s``, ``30m``, ``1.5h``, ``7d`` or ``2w`` and return seconds; a bare number is seconds.

    Raises:
        UsageError: It is none, or is negative.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise UsageError(f"{text!r} is not a time; write a number with s, m, h, d or w", value=text)
    number, unit = match.groups()
    return float(number) * _SECONDS[unit or "s"]


def format_size(size_bytes: int) -> str:
    """Write a size for people: whole bytes below 1 KiB, else one decimal and a binary unit."""
    size = float(abs(size_bytes))
    sign = "-" if size_bytes < 0 else ""
    if size < 1024:
        return f"{size_bytes} B"
    for prefix in _PREFIXES:
        size /= 1024
        # 1023.96 would be shown as 1024.0: it belongs to the next unit.
        if size < 1023.95 or prefix == _PREFIXES[-1]:
            break
    return f"{sign}{size:.1f} {prefix}iB"


def format_duration(duration_s: int) -> str:
    """Write a duration the shortest way that ``parse_duration`` reads back."""
    unit = next((u for u in "wdhm" if duration_s and duration_s % _SECONDS[u] == 0), "s")
    return f"{duration_s // _SECONDS[unit]}{unit}"


def parse_percent(text: str) -> Fraction:
    """Read a share such as ``15%`` or ``0.5%``, 0 to 100.

    Raises:
        UsageError: It is none.
    """
    match = _PERCENT.fullmatch(text.strip())
    percent = None if match is None else Fraction(match[1])
    if percent is None or percent > 100:
        raise UsageError(f"{text!r} is not a share; write 0% to 100%", value=text)
    return percent


def format_time(time_ns: int) -> str:
    """Write a time in ns since 1970 as RFC 3339, UTC, with microseconds."""
    seconds, rest_ns = divmod(time_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
    return f"{moment.isoformat()}.{rest_ns // 1000:06d}Z"
