"""Where the data of a volume or snapshot is: its stored stretches and the gaps between.

Each function is one step of the owner thread.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from incfs.codec import Entries, entry_runs
from incfs.errors import NoData
from incfs.model import HOLE, INHERIT, PAGE_BLOCKS, MapId
from incfs.store import Store

_SEEK_TABLES = 1024
"""Tables that one step of a search may look into for pages, about 4 us each: many for an old snapshot's page."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of a volume that is stored, or reads as zeros."""

    offset_bytes: int
    length_bytes: int
    address: int
    """First storage address; HOLE or INHERIT where nothing is stored."""


def extents(store: Store, table: MapId, start_bytes: int = 0) -> Iterator[Extent]:
    """Yield the stored stretches of a table and the gaps between, up to its size, page by page.

    Each step looks at one page; do not keep the iterator across other changes.
    """
    store.absorb()
    block, size = store.block_bytes, store.catalog.size_bytes(table)
    position = start_bytes
    page_index = start_bytes // block // PAGE_BLOCKS
    while (found := next_page(store, table, page_index)) is not None and found * PAGE_BLOCKS * block < size:
        for first, count, address in entry_runs(page_entries(store, table, found)):
            start = (found * PAGE_BLOCKS + first) * block
            end = min(start + count * block, size)
            if address <= HOLE or end <= max(start, position):
                continue
            if start > position:
                yield Extent(position, start - position, INHERIT)
            skipped = max(0, position - start) // block
            start = max(start, position)
            yield Extent(start, end - start, address + skipped)
            position = end
        page_index = found + 1
    if position < size:
        yield Extent(position, size - position, INHERIT)


def join_extents(extents: list[Extent], following: Extent, block_bytes: int) -> None:
    """Append an extent, or lengthen the last one when it goes on there."""
    last = extents[-1] if extents else None
    if last is not None and last.offset_bytes + last.length_bytes == following.offset_bytes:
        is_stored = last.address > HOLE
        expected = last.address + last.length_bytes // block_bytes
        if is_stored == (following.address > HOLE) and (not is_stored or following.address == expected):
            extents[-1] = replace(last, length_bytes=last.length_bytes + following.length_bytes)
            return
    extents.append(following)


def cut(extent: Extent, start_bytes: int, block_bytes: int) -> Extent:
    """Drop the whole blocks of an extent that end before an offset."""
    blocks = max(0, start_bytes - extent.offset_bytes) // block_bytes
    address = extent.address + blocks if extent.address > HOLE else extent.address
    return Extent(extent.offset_bytes + blocks * block_bytes, extent.length_bytes - blocks * block_bytes, address)


def page_entries(store: Store, table: MapId, page_index: int) -> Entries:
    """Resolve one page of a live volume or a snapshot, as sealed."""
    chain = store.catalog.chain(table)
    return store.log.resolve(chain, page_index, store.log.fetch(chain, page_index))


def next_page(store: Store, table: MapId, page_index: int) -> int | None:
    """Find the first page at or after ``page_index`` that may hold mappings."""
    return store.log.next_page(store.catalog.chain(table), page_index)


def seek(store: Store, table: MapId, offset_bytes: int, *, data: bool) -> tuple[bool, int]:
    """Look for the next data, or hole, at or after an offset; one bounded step.

    Returns:
        (found, offset): where it is, or where to go on.

    Raises:
        NoData: The offset is at or behind the end, or no data follows.
    """
    store.absorb()
    block, size = store.block_bytes, store.catalog.size_bytes(table)
    if offset_bytes >= size:
        raise NoData(f"offset {offset_bytes} is at or behind the end of {size} bytes")
    position = offset_bytes // block
    for _ in range(1 + _SEEK_TABLES // (32 + len(store.catalog.chain(table)))):
        page_index = position // PAGE_BLOCKS
        if data:
            following = next_page(store, table, page_index)
            if following is None or following * PAGE_BLOCKS * block >= size:
                raise NoData(f"no data at or after offset {offset_bytes}")
            position = max(position, following * PAGE_BLOCKS)
            page_index = following
        index = _find(page_entries(store, table, page_index), position % PAGE_BLOCKS, data=data)
        position = page_index * PAGE_BLOCKS + index
        if index < PAGE_BLOCKS or position * block >= size:
            return _found(position * block, offset_bytes, size, data=data)
    return False, position * block


def _find(entries: Entries, start: int, *, data: bool) -> int:
    for index in range(start, PAGE_BLOCKS):
        if (entries.get(index, (INHERIT, 0))[0] > HOLE) == data:
            return index
    return PAGE_BLOCKS


def _found(position_bytes: int, offset_bytes: int, size_bytes: int, *, data: bool) -> tuple[bool, int]:
    if data and position_bytes >= size_bytes:
        raise NoData(f"no data at or after offset {offset_bytes}")
    return True, min(max(position_bytes, offset_bytes), size_bytes)
