"""Removal of a set of snapshots of a volume: at once, and what it frees, told before."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from incfs.codec import Entries
from incfs.memory import one_step
from incfs.model import HOLE, Generation, Snapshot, VolumeId
from incfs.overlay import TableKey
from incfs.snapshot import require_removable
from incfs.store import Store


@one_step
def remove(store: Store, snapshots: Sequence[Snapshot]) -> None:
    """Take snapshots, of any volumes, out of the namespace; ``volume.reclaim`` frees their blocks later.

    Atomicity: all of them or none, in one change.

    Raises:
        Busy: One has clones, or is held.
        SnapshotNotFound: One has gone meanwhile.
    """
    # As they are now: the caller may have looked before somebody held them.
    snapshots = [store.catalog.snapshot_by_generation(taken.volume_id, taken.generation) for taken in snapshots]
    require_removable(store, snapshots)
    for snapshot in snapshots:
        store.amend(snapshot, name="")


@dataclass(slots=True)
class Freed:
    """How many blocks a removal frees, beyond what earlier ones still have to free."""

    together: int = 0
    alone: dict[Generation, int] = field(default_factory=dict)
    """What the removal of one of the set would free if the others stayed."""


def plan(store: Store, volume_id: VolumeId, doomed: Collection[Generation]) -> Iterator[Freed]:
    """Count what removing a set of snapshots of one volume frees; yields the growing counts, page by page.

    Cost: proportional to the increments of the set and of its older neighbours.
    """
    store.absorb()
    removed = {s.generation for s in store.catalog.snapshots(volume_id, removed=True) if not s.name}
    gone = removed.union(doomed)
    freed = Freed(0, dict.fromkeys(doomed, 0))
    pages = {page for g in gone for page in store.log.page_indexes(TableKey(volume_id, g))}
    needed = sorted(gone.union(*({store.catalog.older_generation(volume_id, g)} for g in gone)) - {0})
    for page in sorted(pages):
        undone = set(store.catalog.undone(volume_id))  # are unrolled, and empty, before anything is freed
        held = [(g, {} if g in undone else store.log.entries(TableKey(volume_id, g), page)) for g in needed]
        before = _count(held, removed)
        freed.together += _count(held, gone) - before
        for generation in doomed:
            freed.alone[generation] += _count(held, removed | {generation}) - before
        yield freed


def _count(held: Sequence[tuple[int, Entries]], gone: Collection[int]) -> int:
    """Count the blocks of one page that folding the increments of ``gone`` frees.

    Args:
        held: Increments, oldest first, with at least the next older one that stays of each that goes.
        gone: The generations that go.
    """
    freed = 0
    known: set[int] | None = None  # None: no older snapshot stays, so nobody needs anything
    for generation, entries in held:
        if generation not in gone:
            known = set(entries)
            continue
        freed += sum(address > HOLE for slot, (address, _) in entries.items() if known is None or slot in known)
        if known is not None:
            known.update(entries)
    return freed
