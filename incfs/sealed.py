"""What a seal hands over: the mappings appended to a table, column by column.  Pure.

Columns and runs, not an object for each mapping: a 1 MiB write appends 256 of them, and who takes
them over has the interpreter's lock.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from incfs.codec import Entries
from incfs.model import HOLE, INHERIT, PAGE_BLOCKS, MapId


class Sealed(NamedTuple):
    """The mappings appended to one live volume since the last seal, each virtual block once, ascending."""

    map_id: MapId
    pages: list[tuple[int, int, int]]
    """(page index, first, end): its part of each column."""
    slots: "array[int]"
    """Indexes in the page."""
    addresses: "array[int]"
    checksums: "array[int]"
    old_addresses: "array[int]"
    """What was replaced, and its checksums."""
    old_checksums: "array[int]"
    runs: list[Any]
    """The same for the journal, as ``changes.map_runs`` reads it; empty for what is in the journal already."""

    def replacing(self, old: Iterable[tuple[int, int]]) -> "Sealed":
        """Give the same mappings with others as those that they replace."""
        addresses, checksums = _two_columns(old)
        return self._replace(old_addresses=addresses, old_checksums=checksums)


def seal_pages(map_id: MapId, pages: Iterable[tuple[int, Entries, Entries]]) -> Sealed:
    """Make the columns of pages, ascending.

    Args:
        map_id: The table.
        pages: (page index, new mappings, mappings before: those that are missing were inherited).
    """
    parts: list[tuple[int, int, int]] = []
    slots = array("H")
    new: list[tuple[int, int]] = []
    old: list[tuple[int, int]] = []
    for page_index, entries, before in pages:
        order = sorted(entries)
        parts.append((page_index, len(slots), len(slots) + len(order)))
        slots.extend(order)
        new += [entries[slot] for slot in order]
        old += [before.get(slot, (INHERIT, 0)) for slot in order]
    return Sealed(map_id, parts, slots, *_two_columns(new), *_two_columns(old), [])


def runs_of(sealed: Sealed) -> list[Any]:
    """Group the mappings of each page into runs of blocks: of one extent, or one kind of zeros."""
    flat: list[Any] = []
    for page_index, first, end in sealed.pages:
        base = page_index * PAGE_BLOCKS
        for start, count in _page_runs(sealed, first, end):
            address = sealed.addresses[start]
            checksums = sealed.checksums[start : start + count].tobytes() if address > HOLE else b""
            flat += (base + sealed.slots[start], count, address, checksums)
    return flat


def _page_runs(sealed: Sealed, first: int, end: int) -> Iterator[tuple[int, int]]:
    slots, addresses = sealed.slots, sealed.addresses
    while first < end:
        step = int(addresses[first] > HOLE)
        count = 1
        while (
            first + count < end
            and slots[first + count] == slots[first] + count
            and addresses[first + count] == addresses[first] + step * count
        ):
            count += 1
        yield first, count
        first += count


def _two_columns(entries: Iterable[tuple[int, int]]) -> "tuple[array[int], array[int]]":
    addresses, checksums = array("Q"), array("I")
    for address, crc in entries:
        addresses.append(address)
        checksums.append(crc)
    return addresses, checksums
