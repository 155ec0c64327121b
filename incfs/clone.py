"""Clones: volumes that read from a snapshot where they have nothing of their own.

Invariants:
    1. A clone's tables own what was written to the clone, nothing else: inherited blocks belong to the origin
       and are freed with it, never by the clone.
    2. A snapshot with clones is not removed, and the origin's volume is older than the clone: no circles.
    3. What a clone inherits never changes: a snapshot is taken only when nothing lies behind its volume's end, so
       a clone that grows shows zeros there.
"""

from incfs import volume
from incfs.extents import page_entries
from incfs.memory import one_step
from incfs.model import HOLE, INHERIT, PAGE_BLOCKS, Snapshot, Volume, VolumeId
from incfs.overlay import TableKey
from incfs.ranges import StepsPending
from incfs.rollback import unroll
from incfs.store import Store

_STEP_BLOCKS = 64
"""Blocks that one step of flattening copies at most."""
_UNROLL_PAGES = 2


def create(store: Store, origin: Snapshot, name: str) -> Volume:
    """Add a volume that reads as a snapshot until it is written; mode, owner and size are its volume's.

    Atomicity: one change (I6).
    Cost: independent of the size.

    Raises:
        InvalidName, AlreadyExists, LimitExceeded: Of the name.
    """
    like = store.catalog.volume(origin.volume_id)
    return volume.create(
        store, name, origin.size_bytes, mode=like.mode, uid=like.uid, gid=like.gid, origin=origin.map_id
    )


def flatten_step(store: Store, volume_id: VolumeId, start_block: int, *, wait: bool = False) -> int | None:
    """Copy the next few inherited blocks of a clone into blocks of its own; one bounded step.

    Reading and writing are one step of the owner thread, and the data plane's own threads do not write meanwhile, so
    nothing that somebody writes is overwritten.

    Returns:
        The block to go on from; None when nothing is inherited from there on.

    Raises:
        StepsPending: A rollback is not unrolled.
        NoSpace: The pool is full; what was copied stays.
    """
    store.require_writable()
    clone = store.catalog.volume(volume_id)
    if clone.rollback_to:
        raise StepsPending(lambda _: unroll(store, volume_id, _UNROLL_PAGES))
    with store.quiet(clone.map_id):
        store.absorb()
        page_index = _next_inherited_page(store, clone, start_block // PAGE_BLOCKS)
        if page_index is None:
            return None
        first = max(start_block, page_index * PAGE_BLOCKS)
        slots = _inherited_slots(store, clone, page_index, first % PAGE_BLOCKS)
        if not slots:
            return (page_index + 1) * PAGE_BLOCKS
        first, count = page_index * PAGE_BLOCKS + slots[0], _consecutive(slots)
        data = store.plane.read(clone.map_id, first, count, wait=wait)
        keep_zeros = not store.account.settings_of(volume_id).zero_elision
        store.plane.write(clone.map_id, first * store.block_bytes, data, wait=wait, keep_zeros=keep_zeros)
    store.seal_if_large()
    return first + count


def count_inherited(store: Store, volume_id: VolumeId, start_page: int) -> tuple[int, int] | None:
    """Count what a clone inherits in its next page that has any; give the page and the blocks, None when none has."""
    clone = store.catalog.volume(volume_id)
    page_index = _next_inherited_page(store, clone, start_page)
    return None if page_index is None else (page_index, len(_inherited_slots(store, clone, page_index, 0)))


def _next_inherited_page(store: Store, clone: Volume, start: int) -> int | None:
    tables = [table for link in store.catalog.chain(clone.origin) for table in link] if clone.origin else []
    found = [page for table in tables for page in store.log.page_indexes(table, start, limit=1)]
    return min(found, default=None)


def _inherited_slots(store: Store, clone: Volume, page_index: int, start: int) -> list[int]:
    """List the indexes of a page from ``start`` on that have data of the origin."""
    own = store.log.entries(TableKey(clone.id), page_index)
    resolved = page_entries(store, clone.map_id, page_index)
    return sorted(
        slot
        for slot, entry in resolved.items()
        if slot >= start and entry[0] > HOLE and own.get(slot, (INHERIT, 0))[0] == INHERIT
    )


def _consecutive(slots: list[int]) -> int:
    count = 1
    while count < min(len(slots), _STEP_BLOCKS) and slots[count] == slots[0] + count:
        count += 1
    return count


@one_step
def cut_origin(store: Store, volume_id: VolumeId) -> bool:
    """Forget the origin of a clone whose current contents inherit nothing any more.

    Snapshots of the clone may inherit still: then the origin goes with the last of them.

    Returns:
        Whether the origin is cut.
    """
    clone = store.catalog.volume(volume_id)
    if not clone.origin:
        return True
    store.amend(clone, flat_generation=clone.last_generation)
    volume.cut_flat_origin(store, volume_id)
    return not store.catalog.volume(volume_id).origin
