"""Encodings: round trips, and no bytes that do anything but decode or raise FormatError."""

from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incfs import changes, codec
from incfs._mappings import Page
from incfs.errors import FormatError, IncfsError
from incfs.model import HOLE, INHERIT, PAGE_BLOCKS, Generation, MapId, Snapshot, Storage, Volume
from incfs.sealed import runs_of, seal_pages
from incfs.superblock import Superblock, decode_superblock, encode_superblock

addresses = st.one_of(st.sampled_from([INHERIT, HOLE]), st.integers(1 << 48, (1 << 64) - 1))
entries = st.dictionaries(st.integers(0, PAGE_BLOCKS - 1), st.tuples(addresses, st.integers(0, (1 << 32) - 1))).map(
    lambda page: {i: (a, crc if a > HOLE else 0) for i, (a, crc) in page.items()}
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=20) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.integers(0, 9) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


def stored_and_read(page: codec.Entries) -> codec.Entries:
    body = codec.fold_entries(None, Page(page), keep_inherited=True)
    return codec.decode_entries(body) if body is not None else {}


@given(entries)
def test_pages_survive_encoding(page: codec.Entries) -> None:
    assert stored_and_read(page) == page


@given(st.integers(0, PAGE_BLOCKS - 1), st.integers(1, PAGE_BLOCKS), st.integers(1 << 48, 1 << 49))
def test_runs_and_raw_pages_decode_to_the_same(first: int, count: int, address: int) -> None:
    page = {i: (address + i * (i % 3), i) for i in range(first, min(first + count, PAGE_BLOCKS))}
    assert stored_and_read(page) == page


@given(st.binary(max_size=200), st.sampled_from([b"", b"\1", b"\2"]))
def test_any_bytes_decode_as_a_page_or_raise_format_error(data: bytes, kind: bytes) -> None:
    decode_or_refuse(lambda: codec.decode_entries(kind + data))


@given(st.lists(st.one_of(st.integers(-2, 600), st.integers(0, (1 << 64) - 1), st.binary(max_size=12)), max_size=8))
def test_any_runs_decode_as_a_page_or_raise_format_error(flat: list[object]) -> None:
    page = decode_or_refuse(lambda: codec.decode_entries(b"\1" + msgpack.packb(flat)))
    for index, (address, crc) in (page or {}).items():
        assert 0 <= index < PAGE_BLOCKS
        assert 0 <= address < 1 << 64
        assert 0 <= crc < 1 << 32


def decode_or_refuse(decode):
    try:
        return decode()
    except FormatError:
        return None


def test_a_run_behind_the_last_address_is_refused() -> None:
    """Addresses beyond 64 bits came out and broke the resident page later."""
    with pytest.raises(FormatError):
        codec.decode_entries(b"\1" + msgpack.packb([0, 2, (1 << 64) - 1, bytes(8)]))


@given(st.binary(max_size=60))
def test_any_bytes_unpack_or_raise_format_error(data: bytes) -> None:
    decode_or_refuse(lambda: codec.unpack(data))


@pytest.mark.parametrize("data", [b"\x81\x90\xc0", b"\x81\x80\xc0", b"\xd6\xff", b"\xc1", b"\x91" * 5000])
def test_odd_msgpack_is_refused(data: bytes) -> None:
    """A map whose key is a list raised TypeError."""
    with pytest.raises(FormatError):
        codec.unpack(data)


@given(plain)
def test_any_value_is_a_record_or_refused(value: object) -> None:
    for kind in (Volume, Snapshot, Storage):
        decode_or_refuse(lambda kind=kind: codec.decode_record(kind, value))


volumes = st.builds(
    Volume,
    id=st.integers(1, 99),
    uuid=st.text(max_size=9),
    name=st.text(max_size=9),
    **dict.fromkeys(
        ("size_bytes", "mapped_blocks", "mode", "uid", "gid", "created_ns", "modified_ns", "changed_ns", "accessed_ns"),
        st.integers(0, (1 << 63) - 1),
    ),
    last_generation=st.integers(0, 9).map(Generation),
    trim_from_bytes=st.none() | st.integers(0, 1 << 62),
    newest_generation=st.integers(0, 9).map(Generation),
    xattrs=st.dictionaries(st.text(max_size=5), st.binary(max_size=5)),
)


@given(volumes)
def test_volumes_survive_encoding(volume: Volume) -> None:
    assert codec.decode_record(Volume, codec.unpack(codec.pack(codec.encode_record(volume)))) == volume


@given(st.binary(max_size=9), st.binary(max_size=40), st.integers(0, 400), st.integers(1, 255))
def test_a_damaged_or_misplaced_value_is_noticed(key: bytes, body: bytes, place: int, flip: int) -> None:
    value = bytearray(codec.seal_value(key, body))
    assert codec.open_value(key, bytes(value)) == body
    value[place % len(value)] ^= flip
    with pytest.raises(FormatError):
        codec.open_value(key, bytes(value))
    with pytest.raises(FormatError):
        codec.open_value(key + b"x", codec.seal_value(key, body))


@given(entries)
def test_map_changes_say_what_was_appended(page: codec.Entries) -> None:
    sealed = seal_pages(MapId(1 << 32), [(3, page, {})])
    change = changes.map_change(sealed._replace(runs=runs_of(sealed)))
    found: codec.Entries = {}
    for run in changes.map_runs(codec.unpack(codec.pack(change))[2]):
        for i in range(run.block_count):
            stored = run.address > HOLE
            found[run.first_block - 3 * PAGE_BLOCKS + i] = (
                (run.address + i, run.checksums[i]) if stored else (run.address, 0)
            )
    assert found == page


@given(st.one_of(st.binary(max_size=60), plain.map(codec.pack), st.lists(plain).map(lambda v: codec.pack([v, b""]))))
def test_any_bytes_are_a_journal_body_or_refused(data: bytes) -> None:
    decoded = decode_or_refuse(lambda: changes.decode_body(data))
    for change in decoded[0] if decoded else ():
        if change[0] == "map":
            decode_or_refuse(lambda change=change: list(changes.map_runs(change[2])))


@pytest.mark.parametrize("change", [[[], 1, 2], [{}, 1, 2], ["map", 1], ["jump", 1, 2], 7])
def test_odd_changes_are_refused(change: object) -> None:
    """A change whose kind is a list raised TypeError."""
    with pytest.raises(FormatError):
        changes.decode_body(codec.pack([[change], b""]))


@pytest.mark.parametrize("flat", [[500, 20, HOLE, b""], [0, 2, (1 << 64) - 1, bytes(8)], [0, 1], [0, 0, 0, b""]])
def test_map_runs_out_of_range_are_refused(flat: list[object]) -> None:
    """A run across a page border, or behind the last address, was taken."""
    with pytest.raises(FormatError):
        list(changes.map_runs(flat))


@given(st.binary(max_size=80), st.integers(0, 3))
def test_any_bytes_are_a_superblock_or_refused(data: bytes, version: int) -> None:
    text = b"incfs-pool %d\n" % version + data + b"\n"
    for candidate in (data, text, text + b"crc32c %08x\n" % codec.checksum(text)):
        try:
            decode_superblock(candidate, Path("superblock"))
        except IncfsError:
            continue


def test_a_superblock_survives_encoding() -> None:
    superblock = Superblock("12345678-1234-5678-1234-567812345678", 4096, 65536, 0, 7, compatible=("x",))
    assert decode_superblock(encode_superblock(superblock), Path("superblock")) == superblock
