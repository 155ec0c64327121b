"""Virtual volumes: their life, and byte ranges read, written and discarded.

Each function is one step of the owner thread.  Those on ranges raise ``Refused`` before
anything happened when a page, a lease or the disk is missing (``drive`` sees to it).
"""

import uuid as uuids
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from incfs.codec import Entries, entry_runs
from incfs.dataplane import LeaseExhausted, NotResident, ReadWouldWait, Refused
from incfs.errors import AlreadyExists, BackingError, Busy, LimitExceeded, NoData, NoSpace, NotSupported, UsageError
from incfs.model import (
    HOLE,
    INHERIT,
    MAX_VOLUME_BYTES,
    MAX_XATTR_BYTES,
    PAGE_BLOCKS,
    Generation,
    MapId,
    Volume,
    VolumeId,
    split_map_id,
    validate_name,
)
from incfs.overlay import TableKey
from incfs.store import Store

_CLOCK_TICK_NS = 4_000_000
"""Modification times advance in such steps, as the kernel's do: one record change less per write."""
_SEEK_PAGES = 32
"""Pages that one step of a search may look at."""


class TrimPending(Refused):
    """A shrink has not dropped everything behind the volume's end yet: finish ``trim`` first."""

    def __init__(self, volume_id: VolumeId) -> None:
        self.volume_id = volume_id


Result = TypeVar("Result")


def drive(store: Store, request: Callable[[bool], Result]) -> Result:
    """Ask until nothing is refused, doing here what is missing.

    For offline work and tests; the daemon waits in worker threads instead.

    Args:
        store: The pool.
        request: Called with whether it may wait for the disk.
    """
    wait = False
    while True:
        try:
            return request(wait)
        except NotResident as refusal:
            store.load(refusal.map_id, refusal.page_index)
        except LeaseExhausted as refusal:
            store.make_space(refusal.map_id, refusal.block_count)
        except ReadWouldWait:
            wait = True
        except TrimPending as refusal:
            finish_trim(store, refusal.volume_id)


def finish_trim(store: Store, volume_id: VolumeId) -> None:
    """Trim to the end."""
    while not drive(store, lambda wait: trim(store, volume_id, wait=wait)):
        pass


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of a volume that is stored, or reads as zeros."""

    offset_bytes: int
    length_bytes: int
    address: int
    """First storage address; HOLE or INHERIT where nothing is stored."""


# Life


def create(store: Store, name: str, size_bytes: int, *, mode: int, uid: int, gid: int) -> Volume:
    """Add a volume that reads as zeros.

    Raises:
        InvalidName, AlreadyExists, LimitExceeded: Of the name, and of the size.
    """
    store.begin_change()
    validate_name(name)
    _require_free_name(store, name)
    _require_size(size_bytes)
    volume_id = VolumeId(store.catalog.last_volume_id + 1)
    if volume_id >= 1 << 32:
        raise LimitExceeded("the pool has given out all 2^32 volume ids")
    now = store.clock()
    volume = Volume(volume_id, str(uuids.uuid4()), name, size_bytes, 0, mode & 0o7777, uid, gid, now, now, now, now)
    store.change(volume)
    return volume


def _require_free_name(store: Store, name: str) -> None:
    if store.catalog.has_name(name):
        raise AlreadyExists(f"there is a volume {name!r} already", volume=name)


def _require_size(size_bytes: int) -> None:
    if not 0 <= size_bytes <= MAX_VOLUME_BYTES:
        raise LimitExceeded(f"a volume can have 0 to {MAX_VOLUME_BYTES} bytes, not {size_bytes}")


def resize(store: Store, volume_id: VolumeId, size_bytes: int, *, shrink: bool) -> Volume:
    """Set the size.  A smaller one loses what lies behind it, once ``trim`` has run.

    Raises:
        UsageError: Smaller, without ``shrink``.
        LimitExceeded: Beyond the largest volume.
        TrimPending: An earlier shrink is not finished.
    """
    store.begin_change()
    _require_size(size_bytes)
    volume = store.catalog.volume(volume_id)
    if size_bytes < volume.size_bytes and not shrink:
        raise UsageError(
            f"volume {volume.name} has {volume.size_bytes} bytes; to cut it to {size_bytes} and lose the rest, "
            f"say --shrink",
            volume=volume.name,
        )
    if volume.trim_from_bytes is not None:
        raise TrimPending(volume_id)
    now = store.clock()
    trim_from = size_bytes if size_bytes < volume.size_bytes else None
    volume = replace(volume, size_bytes=size_bytes, modified_ns=now, changed_ns=now, trim_from_bytes=trim_from)
    store.change(volume)
    return volume


def trim(store: Store, volume_id: VolumeId, *, wait: bool = False) -> bool:
    """Drop mappings behind the end of a shrunk volume; one bounded step.

    Whole blocks go first: in a full pool they make room for the new version of the last block.

    Returns:
        Whether the volume is trimmed.
    """
    volume = store.catalog.volume(volume_id)
    if volume.trim_from_bytes is None:
        return True
    whole_end = -(-volume.size_bytes // store.block_bytes) * store.block_bytes
    reached: int | None = None
    if volume.trim_from_bytes < MAX_VOLUME_BYTES:
        start = max(volume.trim_from_bytes, whole_end)
        reached = discard(store, volume.map_id, start, MAX_VOLUME_BYTES, wait=wait, to_end=True)
    elif volume.size_bytes < whole_end:
        _zero_part(store, volume.map_id, volume.size_bytes, whole_end, wait=wait)
    store.begin_change()
    store.change(replace(store.catalog.volume(volume_id), trim_from_bytes=reached))
    return reached is None


def rename(store: Store, volume_id: VolumeId, new_name: str, *, over: bool = False) -> Volume:
    """Give a volume another name.

    Args:
        store: The pool.
        volume_id: The volume.
        new_name: Its new name.
        over: Remove a volume that has that name, in the same commit.

    Raises:
        InvalidName, AlreadyExists: Of the name.
        Busy: The volume to remove has snapshots.
    """
    store.begin_change()
    validate_name(new_name)
    volume = store.catalog.volume(volume_id)
    if volume.name == new_name:
        return volume
    renamed = replace(volume, name=new_name, changed_ns=store.clock())
    if over and store.catalog.has_name(new_name):
        doomed = store.catalog.volume_named(new_name)
        _require_no_snapshots(store, doomed)
        store.change(replace(doomed, name=""), renamed)
    else:
        _require_free_name(store, new_name)
        store.change(renamed)
    return store.catalog.volume(volume_id)


def exchange(store: Store, first_id: VolumeId, second_id: VolumeId) -> None:
    """Swap the names of two volumes."""
    store.begin_change()
    first, second = store.catalog.volume(first_id), store.catalog.volume(second_id)
    store.change(replace(first, name=""), replace(second, name=first.name), replace(first, name=second.name))


def _require_no_snapshots(store: Store, volume: Volume) -> None:
    names = [snapshot.name for snapshot in store.catalog.snapshots(volume.id)]
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise Busy(
            f"volume {volume.name} has snapshots ({shown}); remove them first, or remove it with --snapshots",
            volume=volume.name,
            snapshots=names,
        )


def remove(store: Store, volume_id: VolumeId, *, snapshots: bool) -> None:
    """Take a volume out of the namespace; ``reclaim`` frees its blocks later.

    Raises:
        Busy: It has snapshots and ``snapshots`` is false.
    """
    store.begin_change()
    volume = store.catalog.volume(volume_id)
    if not snapshots:
        _require_no_snapshots(store, volume)
    doomed = [replace(snapshot, name="") for snapshot in store.catalog.snapshots(volume_id)]
    store.change(*doomed, replace(volume, name=""))


def set_attributes(store: Store, volume_id: VolumeId, **attributes: int) -> Volume:
    """Change mode, uid, gid, accessed_ns or modified_ns; durable with the next commit."""
    store.require_writable()
    volume = replace(store.catalog.volume(volume_id), changed_ns=store.clock(), **attributes)  # type: ignore[arg-type]
    store.touch(volume)
    return volume


def set_xattrs(store: Store, volume_id: VolumeId, xattrs: Mapping[str, bytes]) -> None:
    """Replace a volume's extended attributes.

    Raises:
        LimitExceeded: Together they are too large.
    """
    store.require_writable()
    total = sum(len(name.encode()) + len(value) for name, value in xattrs.items())
    if total > MAX_XATTR_BYTES:
        raise LimitExceeded(f"extended attributes of {total} bytes; at most {MAX_XATTR_BYTES} fit")
    store.touch(replace(store.catalog.volume(volume_id), xattrs=dict(xattrs), changed_ns=store.clock()))


# Bytes


def read(store: Store, table: MapId, offset_bytes: int, length_bytes: int, *, wait: bool = False) -> bytes:
    """Read a range; short at the end of the volume.

    Raises:
        ChecksumMismatch: A block in it is not what was written.
    """
    size = store.catalog.size_bytes(table)
    end = min(offset_bytes + length_bytes, size)
    if offset_bytes >= end:
        return b""
    block = store.block_bytes
    first = offset_bytes // block
    data = store.plane.read(table, first, -(-end // block) - first, wait=wait)
    start = offset_bytes - first * block
    return data if start == 0 and len(data) == end - offset_bytes else data[start : start + end - offset_bytes]


def write(store: Store, table: MapId, offset_bytes: int, data: bytes, *, wait: bool = False) -> int:
    """Write a range; the volume grows when it ends behind the size.

    Durability: none until the next commit.
    Atomicity: of each block.

    Raises:
        NotSupported: The table is a snapshot.
        PoolReadOnly, NoSpace, LimitExceeded: As they say; nothing is harmed.
    """
    volume = _writable_volume(store, table)
    end = offset_bytes + len(data)
    if end > MAX_VOLUME_BYTES:
        raise LimitExceeded(f"a volume can have at most {MAX_VOLUME_BYTES} bytes, the write ends at {end}")
    if volume.trim_from_bytes is not None and end > volume.size_bytes:
        raise TrimPending(volume.id)
    if not data:
        return 0
    try:
        _write_bytes(store, table, offset_bytes, data, wait=wait)
    except NoSpace:
        # Some of it may be written, and nothing stored may lie behind the end: it would come
        # to light when the volume grows.
        _note_write(store, volume.id, end)
        raise
    _note_write(store, volume.id, end)
    store.seal_if_large()
    return len(data)


def _write_bytes(store: Store, table: MapId, offset_bytes: int, data: bytes, *, wait: bool) -> None:
    try:
        store.plane.write(table, offset_bytes, data, wait=wait)
    except BackingError as error:
        if error.facts.get("action") != "read":  # the rest of a partly written block
            store.fail(error)
        raise


def _writable_volume(store: Store, table: MapId) -> Volume:
    store.require_writable()
    volume_id, generation = split_map_id(table)
    if generation:
        raise NotSupported("a snapshot cannot be written to")
    return store.catalog.volume(volume_id)


def _note_write(store: Store, volume_id: VolumeId, end_bytes: int) -> None:
    volume, now = store.catalog.volume(volume_id), store.clock()
    if end_bytes > volume.size_bytes or now - volume.modified_ns >= _CLOCK_TICK_NS:
        size = max(volume.size_bytes, end_bytes)
        store.touch(replace(volume, size_bytes=size, modified_ns=now, changed_ns=now))


def discard(
    store: Store, table: MapId, offset_bytes: int, end_bytes: int, *, wait: bool = False, to_end: bool = False
) -> int:
    """Let a range read as zeros and give its space back; one bounded step.

    Args:
        store: The pool.
        table: A live volume.
        offset_bytes: Where to go on.
        end_bytes: End of the range; a part behind the volume's size is ignored.
        wait: Read the disk here rather than refuse.
        to_end: Do not stop at the volume's size.

    Returns:
        How far it came; call again until that is ``end_bytes``.
    """
    volume = _writable_volume(store, table)
    limit = end_bytes if to_end else min(end_bytes, -(-volume.size_bytes // store.block_bytes) * store.block_bytes)
    if offset_bytes >= limit:
        return end_bytes
    block = store.block_bytes
    first, head = divmod(offset_bytes, block)
    if head or limit - offset_bytes < block:
        stop = min(limit, (first + 1) * block)
        _zero_part(store, table, offset_bytes, stop, wait=wait)
    else:
        stop = _discard_page(store, table, first, limit // block) * block
    _note_write(store, volume.id, 0)
    store.seal_if_large()
    return stop if stop < limit else end_bytes


def _zero_part(store: Store, table: MapId, offset_bytes: int, end_bytes: int, *, wait: bool) -> None:
    old = store.plane.read(table, offset_bytes // store.block_bytes, 1, wait=wait)
    start = offset_bytes % store.block_bytes
    zeros = bytes(end_bytes - offset_bytes)
    if old[start : start + len(zeros)] != zeros:
        _write_bytes(store, table, offset_bytes, zeros, wait=wait)


def _discard_page(store: Store, table: MapId, first_block: int, end_block: int) -> int:
    """Discard within the first page from ``first_block`` on that has mappings; give where it ended."""
    store.absorb()
    found = store.log.page_indexes(store.catalog.chain(table)[-1], first_block // PAGE_BLOCKS, limit=1)
    if not found or found[0] * PAGE_BLOCKS >= end_block:
        return end_block
    start = max(first_block, found[0] * PAGE_BLOCKS)
    stop = min(end_block, (found[0] + 1) * PAGE_BLOCKS)
    store.plane.discard(table, start, stop - start)
    return stop


# Where data is


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


def page_entries(store: Store, table: MapId, page_index: int) -> Entries:
    """Resolve one page of a live volume or a snapshot, as sealed."""
    chain = store.catalog.chain(table)
    return store.log.resolve(chain, page_index, store.log.fetch(chain, page_index))


def next_page(store: Store, table: MapId, page_index: int) -> int | None:
    """Find the first page at or after ``page_index`` that may hold mappings."""
    found = [index for key in store.catalog.chain(table) for index in store.log.page_indexes(key, page_index, limit=1)]
    return min(found, default=None)


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
    for _ in range(_SEEK_PAGES):
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


# Reclaim


def reclaim(store: Store, volume_id: VolumeId, page_count: int) -> bool:
    """Free blocks of removed snapshots, and of the volume itself if it was removed; one bounded step.

    Returns:
        Whether nothing is left to do.
    """
    store.begin_change()
    volume = store.catalog.volume(volume_id)
    removed = [s for s in store.catalog.snapshots(volume_id, removed=True) if not s.name]
    if removed:
        _fold_some(store, volume, min(s.generation for s in removed), page_count)
        return False
    if volume.name:
        return True
    pages = store.log.occupied_pages(TableKey(volume_id), page_count)
    if pages:
        store.empty(volume_id, pages)
        return False
    store.evict(volume.map_id)
    store.drop(("volume", (volume_id,)))
    return True


def _fold_some(store: Store, volume: Volume, generation: Generation, page_count: int) -> None:
    snapshot = store.catalog.snapshot_by_generation(volume.id, generation)
    pages = store.log.occupied_pages(TableKey(volume.id, generation), page_count)
    older = store.catalog.older_generation(volume.id, generation)
    for page in pages if older else ():
        store.log.entries(TableKey(volume.id, older), page)  # a damaged one is noticed before anything changes
    if pages:
        store.fold(volume.id, generation, pages)
        return
    store.evict(snapshot.map_id)
    store.drop(("snapshot", (volume.id, generation)))
    newest = max((s.generation for s in store.catalog.snapshots(volume.id, removed=True)), default=Generation(0))
    store.change(replace(store.catalog.volume(volume.id), newest_generation=newest))
