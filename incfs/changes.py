"""The body of a journal record: an ordered list of changes, and small blocks' data.  Pure.

A body is msgpack ``[changes, data, folded]``.  A change is one of

    ["map", volume id, [first virtual block, count, address, checksums, ...]]
    ["put", kind, record]
    ["drop", kind, [numbers]]
    ["fold", volume id, generation, older generation, [page indexes]]
    ["note", volume id, generation, bookmark, [page indexes]]
    ["forget", volume id, bookmark, older bookmark, [page indexes]]
    ["empty", volume id, [page indexes]]
    ["unroll", volume id, [generations], [page indexes]]
    ["move", volume id, generation, page index, [index, old address, new address, ...]]
    ["written", volume id, time of the last write in nanoseconds]

``data`` holds the blocks of all stored runs in order, or is empty: then they are in the
images already.  ``folded`` is the last commit that the tables were known to contain: blocks
that it freed may have been reused since, so older tables do not go with this record.
Applying the same list to the same tables always gives the same result.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from incfs.codec import pack, unpack
from incfs.errors import FormatError
from incfs.model import HOLE, PAGE_BLOCKS, split_map_id
from incfs.sealed import Sealed

Change = list[Any]
_MAX_BLOCK = 1 << 62


@dataclass(frozen=True, slots=True)
class MapRun:
    """Consecutive virtual blocks that were mapped together."""

    first_block: int
    block_count: int
    address: int
    checksums: tuple[int, ...]


def map_change(sealed: Sealed) -> Change:
    """Describe the mappings appended to one volume."""
    return ["map", split_map_id(sealed.map_id)[0], sealed.runs]


def map_runs(flat: Any) -> Iterator[MapRun]:
    """Decode the runs of a "map" change.

    Raises:
        FormatError: Not runs.
    """
    if not isinstance(flat, list) or len(flat) % 4:
        raise FormatError("journal: map change is not a list of quadruples")
    for position in range(0, len(flat), 4):
        first, count, address, packed = flat[position : position + 4]
        if not (isinstance(first, int) and isinstance(count, int) and isinstance(address, int)):
            raise FormatError("journal: map run holds something other than integers")
        in_page = 0 <= first < _MAX_BLOCK and 0 < count <= PAGE_BLOCKS - first % PAGE_BLOCKS
        if not in_page or not 0 <= address <= (1 << 64) - count:
            raise FormatError(f"journal: map run out of range: {first}, {count}, {address}")
        if not isinstance(packed, bytes) or len(packed) != (4 * count if address > HOLE else 0):
            raise FormatError("journal: map run has the wrong number of checksums")
        yield MapRun(first, count, address, struct.unpack(f"<{len(packed) // 4}I", packed))


def move_triples(flat: Any) -> list[tuple[int, int, int]]:
    """Decode the (index, old address, new address) of a "move" change.

    Raises:
        FormatError: Not such triples.
    """
    if not isinstance(flat, list) or len(flat) % 3 or not all(isinstance(value, int) for value in flat):
        raise FormatError("journal: move change is not a list of triples of integers")
    triples = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    addresses = [address for _, old, new in triples for address in (old, new)]
    if not all(0 <= slot < PAGE_BLOCKS for slot, _, _ in triples) or not all(HOLE < a < 1 << 64 for a in addresses):
        raise FormatError("journal: move change out of range")
    return triples


class Body(NamedTuple):
    """What a journal record says."""

    changes: list[Change]
    data: bytes
    folded_sequence: int


def encode_body(changes: list[Change], data: bytes, folded_sequence: int) -> bytes:
    """Make the body of a journal record."""
    return pack([changes, data, folded_sequence])


def decode_body(body: bytes) -> Body:
    """Undo ``encode_body``.

    Raises:
        FormatError: Not a list of changes.
    """
    value = unpack(body)
    match value:
        case [list(changes), bytes(data), int(folded)]:
            pass
        case _:
            raise FormatError("journal: record body is not [changes, data, folded]")
    for change in changes:
        if not (isinstance(change, list) and change and isinstance(change[0], str) and change[0] in _LENGTHS):
            raise FormatError(f"journal: unknown change {str(change)[:80]}")
        if len(change) != _LENGTHS[change[0]]:
            raise FormatError(f"journal: change {change[0]} has {len(change)} parts")
    return Body(changes, data, folded)


_LENGTHS = {
    "map": 3, "put": 3, "drop": 3, "fold": 5, "note": 5, "forget": 5, "empty": 3, "move": 5, "unroll": 4, "written": 3,
}  # fmt: skip
