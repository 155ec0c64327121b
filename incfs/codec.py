"""Bytes of the tables: sealed values, map pages, records.  Pure.

Owns the encodings that ``docs/FORMAT.md`` documents.  Decoding any bytes gives a value or
``FormatError``, never another exception.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgpack
from crc32c import crc32c as checksum

from incfs import _mappings
from incfs.errors import FormatError
from incfs.model import HOLE, PAGE_BLOCKS

__all__ = ["checksum", "decode_entries", "entry_runs", "fold_entries", "open_value", "pack", "seal_value", "unpack"]

Entries = dict[int, tuple[int, int]]
"""Mappings of one page: index -> (address, crc32c)."""

Record = TypeVar("Record")

_CRC = struct.Struct("<I")


def seal_value(key: bytes, body: bytes) -> bytes:
    """Append the CRC32C of key and body, so that a value under a wrong key is noticed too."""
    return body + _CRC.pack(checksum(body, checksum(key)))


def open_value(key: bytes, value: bytes) -> bytes:
    """Undo ``seal_value``.

    Raises:
        FormatError: The checksum does not match.
    """
    if len(value) < _CRC.size:
        raise FormatError(f"table value of key {key.hex()} is cut off at {len(value)} bytes", key=key.hex())
    body = value[: -_CRC.size]
    if _CRC.unpack_from(value, len(body))[0] != checksum(body, checksum(key)):
        raise FormatError(f"table value of key {key.hex()} is damaged: wrong checksum", key=key.hex())
    return body


def pack(value: Any) -> bytes:
    """Encode plain values with msgpack."""
    return bytes(msgpack.packb(value, use_bin_type=True))


def unpack(data: bytes) -> Any:
    """Decode msgpack.

    Raises:
        FormatError: Not one well-formed msgpack value, or nested or sized beyond its own bytes.
    """
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise FormatError(f"not valid msgpack: {error}") from error


def entry_runs(entries: Entries) -> Iterator[tuple[int, int, int]]:
    """Group mappings of consecutive indexes: consecutive addresses, or the same hole or inherit.

    Yields:
        (first index, number of entries, first address), ascending.
    """
    first = count = first_address = 0
    for index in sorted(entries):
        address = entries[index][0]
        expected = first_address if first_address <= HOLE else first_address + count
        if count and index == first + count and address == expected:
            count += 1
            continue
        if count:
            yield first, count, first_address
        first, count, first_address = index, 1, address
    if count:
        yield first, count, first_address


def decode_entries(data: bytes) -> Entries:
    """Decode a page as ``fold_entries`` makes it.

    Raises:
        FormatError: Wrong kind, length or index.
    """
    try:
        return _mappings.decode(data)
    except ValueError as error:
        raise FormatError(f"map page: {error}") from error


def fold_entries(stored: bytes | None, above: _mappings.Page, *, keep_inherited: bool) -> bytes | None:
    """Encode a stored page with changes above it: runs in msgpack when few, raw arrays when many.

    None when nothing is left.

    Args:
        stored: The page, encoded; None: without mappings.
        above: The changes.
        keep_inherited: Say of blocks too that they are inherited, as increments must.

    Raises:
        FormatError: What is stored is no page.
    """
    try:
        return _mappings.fold(stored, above, keep_inherited)
    except ValueError as error:
        raise FormatError(f"map page: {error}") from error


def slot_set(slots: Iterable[int]) -> bytes:
    """Make a bit set of blocks of a page."""
    return sum(1 << slot for slot in slots).to_bytes(PAGE_BLOCKS // 8, "little")


def encode_trail(entries: Entries) -> bytes:
    """Encode one page of a trail: which indexes are in it, as a bit set."""
    return slot_set(entries).rstrip(b"\0")


def decode_trail(data: bytes) -> Entries:
    """Undo ``encode_trail``.

    Raises:
        FormatError: Too long.
    """
    if len(data) > PAGE_BLOCKS // 8:
        raise FormatError(f"page of a trail has {len(data)} bytes")
    present = int.from_bytes(data, "little")
    return {index: (HOLE, 0) for index, bit in enumerate(reversed(f"{present:b}")) if bit == "1"}


def encode_record(record: Any) -> dict[str, Any]:
    """Turn a frozen record of ``model`` into a plain map for ``pack``."""
    # Not with asdict: its deep copies take 30 times as long, and a volume's record is in most commits.
    values = ((name, getattr(record, name)) for name in record.__dataclass_fields__)
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values}


def decode_record(kind: type[Record], value: Any) -> Record:
    """Undo ``encode_record``, checking the type of every field.

    Raises:
        FormatError: Not a map, a field unknown or of the wrong type, or one without a default missing.
    """
    if not isinstance(value, dict):
        raise FormatError(f"{kind.__name__} record is not a map")
    fits = _checks(kind)  # type: ignore[arg-type]  # mypy: a class is hashable, whatever its instances are
    if not _required(kind) <= value.keys() <= fits.keys():  # type: ignore[arg-type]  # as above
        wrong = sorted(map(str, (value.keys() - fits.keys()) | (_required(kind) - value.keys())))  # type: ignore[arg-type]
        raise FormatError(f"{kind.__name__} record has the wrong fields: {wrong}")
    for name, item in value.items():
        if not fits[name](item):
            raise FormatError(f"{kind.__name__} record: field {name} is {item!r}")
    return kind(**{name: _thaw(item) for name, item in value.items()})


@cache
def _checks(kind: type) -> dict[str, Callable[[Any], bool]]:
    """Looking annotations up takes 250 us, ten times the rest of decoding a record."""
    hints = get_type_hints(kind)
    return {field.name: _check_of(hints[field.name]) for field in fields(kind)}


@cache
def _required(kind: type) -> frozenset[str]:
    """Fields that came later have defaults: pools that were made before lack them."""
    return frozenset(f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)


def _check_of(hint: Any) -> Callable[[Any], bool]:
    hint = getattr(hint, "__supertype__", hint)
    origin, parts = get_origin(hint), [_check_of(part) for part in get_args(hint) if part is not ...]
    if origin is UnionType:
        return lambda item: any(fits(item) for fits in parts)
    if origin is tuple:  # of any length, of one kind
        return lambda item: isinstance(item, list) and all(map(parts[0], item))
    wanted = hint if origin is None else dict
    return lambda item: type(item) is wanted


def _thaw(item: Any) -> Any:
    """Undo that msgpack makes lists of tuples."""
    return tuple(_thaw(member) for member in item) if isinstance(item, list) else item
