"""Rollback: a volume becomes again what it was at a snapshot, in one commit.

The commit only says so in the volume's record.  From then on the volume resolves through the snapshot's tables, and
each map page is *unrolled*, before it becomes resident or in the background: what the undone increments say of it
goes back into the lookup table, what it replaces there is freed, and the increments are empty for that page.

Invariants:
    1. Until a page is unrolled nothing of it is resident and nothing is written to it.
    2. Writes after the rollback displace into a generation of their own, the *mark*, a snapshot without a name that is
       made with the rollback.  So an increment that is to be unrolled never gains an entry, and unrolling a page
       again, after a crash, changes nothing.
    3. No increment of the volume is folded before all pages are unrolled: ``reclaim`` does that first.
"""

import uuid as uuids
from collections.abc import Iterator
from dataclasses import replace

from incfs import bookmarks
from incfs.errors import Busy, LimitExceeded
from incfs.memory import one_step
from incfs.model import MAX_GENERATION, Generation, Snapshot, VolumeId, map_id
from incfs.overlay import TableKey
from incfs.ranges import StepsPending
from incfs.snapshot import require_removable
from incfs.store import Store

_STEP_PAGES = 2


def roll_back(store: Store, volume_id: VolumeId, name: str, *, force: bool = False) -> list[Snapshot]:
    """Let a volume be what it was at a snapshot; snapshots and bookmarks that are newer go, if ``force`` says so.

    Nothing of the volume's live table may be read or written in the same step.

    Returns:
        The snapshots that were removed.

    Atomicity: one change (I6).
    Cost: independent of the size; what was written since is freed by ``unroll``, later.

    Raises:
        SnapshotNotFound: No such snapshot.
        Busy: There are newer snapshots or bookmarks, and ``force`` is false or one is held or has clones.
        StepsPending: An older rollback, to before this snapshot, is not unrolled.
    """
    # Hot writes are stopped first: what they wrote is sealed when the step begins, and no page stays behind.
    with store.quiet(map_id(volume_id)), store.step():
        volume, target = store.catalog.volume(volume_id), store.catalog.snapshot(volume_id, name)
        doomed = require_newest(store, target, force=force)
        if volume.rollback_to and target.generation > volume.rollback_to:
            raise StepsPending(lambda _: unroll(store, volume_id, _STEP_PAGES))
        store.evict(volume.map_id)
        for snapshot in doomed:
            store.amend(snapshot, name="")
        for bookmark in bookmarks.newer_than(store, target):
            store.amend(bookmark, names={})
        _become(store, target)
    return doomed


def _become(store: Store, target: Snapshot) -> None:
    volume, now = store.catalog.volume(target.volume_id), store.clock()
    if volume.last_generation >= MAX_GENERATION:
        raise LimitExceeded(f"volume {volume.name} has had all of its 2^32 - 2 snapshots")
    generation = Generation(volume.last_generation + 1)
    inherits = volume.flat_generation is not None and target.generation <= volume.flat_generation
    mark = replace(target, generation=generation, uuid=str(uuids.uuid4()), name="", held_blocks=0, tag="", holds={})
    store.add(mark)
    store.amend(
        volume,
        size_bytes=target.size_bytes,
        mapped_blocks=target.mapped_blocks,
        trim_from_bytes=None,
        modified_ns=now,
        changed_ns=now,
        newest_generation=generation,
        last_generation=generation,
        flat_generation=None if inherits else volume.flat_generation,
        rollback_to=target.generation,
        rollback_mark=generation,
    )


def require_newest(store: Store, target: Snapshot, *, force: bool) -> list[Snapshot]:
    """Give the snapshots that are newer and must go with a rollback.

    Raises:
        Busy: There are some, or newer bookmarks, and ``force`` is false, or one of them is held or has clones.
    """
    newer = [s for s in store.catalog.snapshots(target.volume_id, removed=True) if s.generation > target.generation]
    doomed = [snapshot for snapshot in newer if snapshot.name]
    volume = store.catalog.volume(target.volume_id)
    marked = [f"#{name}" for bookmark in bookmarks.newer_than(store, target) for name in bookmark.names]
    if (doomed or marked) and not force:
        names = ", ".join([*(snapshot.name for snapshot in doomed), *marked][-5:])
        raise Busy(
            f"volume {volume.name} has snapshots or bookmarks that are newer than {target.name} ({names}); "
            f"remove them first, or lose them with --force",
            volume=volume.name,
            snapshots=[snapshot.name for snapshot in doomed],
            bookmarks=marked,
        )
    require_removable(store, doomed)
    if any(store.catalog.clones(snapshot.map_id) for snapshot in newer):
        raise Busy(f"a removed clone of a newer snapshot of {volume.name} is still open or being reclaimed; try later")
    return doomed


@one_step
def unroll(store: Store, volume_id: VolumeId, page_count: int) -> bool:
    """Carry out a rollback for pages that nobody has asked for; one bounded step.

    Returns:
        Whether nothing is left to do.
    """
    for generation in store.catalog.undone(volume_id):
        pages = store.log.occupied_pages(TableKey(volume_id, generation), page_count)
        if pages:
            store.moves.unroll(volume_id, pages)
            return False
    volume = store.catalog.volume(volume_id)
    if volume.rollback_to:
        store.amend(volume, rollback_to=Generation(0), rollback_mark=Generation(0))
    return True


def freed_blocks(store: Store, target: Snapshot) -> Iterator[int]:
    """Yield, page by page, how many blocks a rollback would free."""
    store.absorb()
    volume_id = target.volume_id
    undone = [s.generation for s in store.catalog.snapshots(volume_id, removed=True)]
    undone = [generation for generation in undone if generation >= target.generation]
    pages = {page for generation in undone for page in store.log.page_indexes(TableKey(volume_id, generation))}
    for page in sorted(pages):
        yield len(store.log.plan_unroll(volume_id, undone, page).freed)
