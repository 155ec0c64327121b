"""Byte ranges of virtual volumes: read, written, discarded.

Each function is one step of the owner thread.  They raise ``Refused`` before anything
happened when a page, a lease or the disk is missing (``drive`` sees to it).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from incfs import legs
from incfs.blocks import split_pages
from incfs.codec import entry_runs
from incfs.dataplane import LeaseExhausted, LegFailed, NotResident, ReadWouldWait, Refused
from incfs.errors import BackingError, ChecksumMismatch, LimitExceeded, NoSpace, NotSupported
from incfs.extents import next_page, page_entries
from incfs.model import HOLE, INHERIT, MAX_VOLUME_BYTES, PAGE_BLOCKS, MapId, StorageId, Volume, VolumeId, split_map_id
from incfs.overlay import TableKey
from incfs.space import Growth, Step, refused_storage
from incfs.store import Store

_CLOCK_TICK_NS = 4_000_000
"""Modification times advance in such steps, as the kernel's do: one record change less per write."""


class StepsPending(Refused):
    """Something that was begun must be finished first: ask for ``step`` until it says that it is."""

    def __init__(self, step: Callable[[bool], bool]) -> None:
        self.step = step


class TrimPending(StepsPending):
    """A shrink has not dropped everything behind the volume's end yet: finish ``trim`` first."""

    def __init__(self, store: Store, volume_id: VolumeId) -> None:
        super().__init__(lambda wait: trim(store, volume_id, wait=wait))


Result = TypeVar("Result")


def drive(store: Store, request: Callable[[bool], Result]) -> Result:
    """Ask until nothing is refused, doing here what is missing.

    For offline work and tests; the daemon waits in worker threads instead.

    Args:
        store: The pool.
        request: Called with whether it may wait for the disk.
    """
    wait = False
    mended: set[object] = set()
    needs: dict[MapId, int] = {}
    refused: set[StorageId] = set()
    while True:
        try:
            return request(wait)
        except LegFailed as refusal:
            legs.leave(store, refusal)
        except (ChecksumMismatch, BackingError) as error:
            is_mended = legs.plan_mend(store, error, mended)()
            store.note_failed_legs()
            if not is_mended:
                raise
        except NoSpace as error:
            storage_id = refused_storage(error)
            if storage_id is None or storage_id in refused:
                raise
            refused.add(storage_id)
            store.absorb()
            store.space.note_refused(storage_id)
        except NotResident as refusal:
            store.load(refusal.map_id, refusal.page_index)
        except LeaseExhausted as refusal:
            needs[refusal.map_id] = refusal.block_count  # of a striped volume each column has a lease
            make_space(store, needs, urgent=refusal.is_urgent)
        except ReadWouldWait:
            wait = True
        except StepsPending as refusal:
            while not drive(store, refusal.step):
                pass


def make_space(store: Store, needs: Mapping[MapId, int], *, urgent: bool = False) -> None:
    """Get the blocks that a request needs: lease -> how many.

    Raises:
        NoSpace: There are none.
    """
    store.absorb()
    for step in store.space.steps(needs, urgent=urgent):
        if isinstance(step, Growth):
            step.run()
            step.end()
        elif step is Step.CHECKPOINT and store.pool.freed_blocks:
            store.checkpoint()


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
    with store.step():
        store.amend(volume, trim_from_bytes=reached)
    return reached is None


def finish_trim(store: Store, volume_id: VolumeId) -> None:
    """Trim to the end."""
    while not drive(store, lambda wait: trim(store, volume_id, wait=wait)):
        pass


def read(
    store: Store, table: MapId, offset_bytes: int, length_bytes: int, *, wait: bool = False, verify: bool = True
) -> bytes:
    """Read a range; short at the end of the volume.

    Args:
        store: The pool.
        table: A volume or snapshot.
        offset_bytes: Where.
        length_bytes: How much.
        wait: Read the disk here rather than refuse.
        verify: Compare checksums; only what goes to the user and nowhere else may do without.

    Raises:
        ChecksumMismatch: A block in it is not what was written.
    """
    size = store.catalog.size_bytes(table)
    end = min(offset_bytes + length_bytes, size)
    if offset_bytes >= end:
        return b""
    block = store.block_bytes
    first = offset_bytes // block
    data = store.plane.read(table, first, -(-end // block) - first, wait=wait, verify=verify)
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
    store.require_room()
    end = offset_bytes + len(data)
    if end > MAX_VOLUME_BYTES:
        raise LimitExceeded(f"a volume can have at most {MAX_VOLUME_BYTES} bytes, the write ends at {end}")
    if volume.trim_from_bytes is not None and end > volume.size_bytes:
        raise TrimPending(store, volume.id)
    if not data:
        return 0
    if end > volume.size_bytes:
        store.plane.close_journal()  # no commit of theirs may have the blocks and not the size
    try:
        keep_zeros = not store.account.settings_of(volume.id).zero_elision
        _write_bytes(store, table, offset_bytes, data, wait=wait, keep_zeros=keep_zeros)
    except NoSpace:
        # Some of it may be written, and nothing stored may lie behind the end: it would come
        # to light when the volume grows.
        _note_write(store, volume.id, end)
        raise
    _note_write(store, volume.id, end)
    store.seal_if_large()
    return len(data)


def _write_bytes(
    store: Store, table: MapId, offset_bytes: int, data: bytes, *, wait: bool, keep_zeros: bool = False
) -> None:
    _require_quota(store, table, offset_bytes, data, keep_zeros=keep_zeros)
    try:
        store.plane.write(table, offset_bytes, data, wait=wait, keep_zeros=keep_zeros)
    except BackingError as error:
        if error.facts.get("action") != "read":  # the rest of a partly written block
            store.fail(error)
        raise


def _require_quota(store: Store, table: MapId, offset_bytes: int, data: bytes, *, keep_zeros: bool) -> None:
    """Refuse a write that would lead its volume over its quota; one that only replaces is none."""
    volume_id, _ = split_map_id(table)
    left = store.account.quota_left(volume_id)
    first, end = offset_bytes // store.block_bytes, -(-(offset_bytes + len(data)) // store.block_bytes)
    if left is None or end - first <= left or not (keep_zeros or any(data)):
        return
    store.absorb()
    gained = sum(_gained(store, volume_id, *part) for part in split_pages(first, end - first))
    store.account.require_quota(volume_id, gained)


def _gained(store: Store, volume_id: VolumeId, page_index: int, start: int, count: int) -> int:
    """Count the blocks that a volume and its snapshots occupy more when these are written."""
    newest = store.catalog.volume(volume_id).newest_generation
    live = store.log.entries(TableKey(volume_id), page_index)
    kept = store.log.entries(TableKey(volume_id, newest), page_index) if newest else None
    return sum(
        live.get(index, (INHERIT, 0))[0] <= HOLE or (kept is not None and index not in kept)
        for index in range(start, start + count)
    )


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
        store.touch(volume, size_bytes=size, modified_ns=now, changed_ns=now)


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
    if old[start : start + len(zeros)] == zeros:
        return
    try:
        _write_bytes(store, table, offset_bytes, zeros, wait=wait)
    except LeaseExhausted as refusal:
        refusal.is_urgent = True  # a full pool could never be emptied otherwise
        raise


def _discard_page(store: Store, table: MapId, first_block: int, end_block: int) -> int:
    """Discard within the first page from ``first_block`` on that has mappings; give where it ended."""
    store.absorb()
    found = next_page(store, table, first_block // PAGE_BLOCKS)
    if found is None or found * PAGE_BLOCKS >= end_block:
        return end_block
    start = max(first_block, found * PAGE_BLOCKS)
    stop = min(end_block, (found + 1) * PAGE_BLOCKS)
    for first, count in _to_discard(store, table, start, stop):
        store.plane.discard(table, first, count)
    return stop


def _to_discard(store: Store, table: MapId, first_block: int, end_block: int) -> Iterator[tuple[int, int]]:
    """Yield (first block, count) of what to discard within a page; of a clone only data: zeros need no cover."""
    if not store.catalog.volume(split_map_id(table)[0]).origin:
        yield first_block, end_block - first_block
        return
    base = first_block // PAGE_BLOCKS * PAGE_BLOCKS
    for slot, count, address in entry_runs(page_entries(store, table, base // PAGE_BLOCKS)):
        start, end = max(first_block, base + slot), min(end_block, base + slot + count)
        if address > HOLE and start < end:
            yield start, end - start
