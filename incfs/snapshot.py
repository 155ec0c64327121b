"""Snapshots: taken over several volumes at one point, renamed, removed, compared."""

import uuid as uuids
from collections.abc import Iterable, Iterator, Sequence

from incfs.errors import AlreadyExists, Busy, LimitExceeded, UsageError
from incfs.extents import Extent, join_extents, page_entries
from incfs.holds import require_not_held
from incfs.memory import one_step
from incfs.model import (
    HOLE,
    INHERIT,
    MAX_GENERATION,
    PAGE_BLOCKS,
    Base,
    Generation,
    Snapshot,
    Volume,
    VolumeId,
    validate_name,
)
from incfs.overlay import TableKey
from incfs.ranges import TrimPending
from incfs.store import Store
from incfs.transfers import require_not_receiving, require_ordinary

_LISTED_PAGES = 512
"""Pages of each table that one step of a diff lists."""


@one_step
def create(store: Store, wanted: Sequence[tuple[VolumeId, str]], *, tag: str = "") -> list[Snapshot]:
    """Take snapshots of several volumes: one point in time, one commit (I6).

    Cost: independent of the volumes' sizes.

    Raises:
        UsageError: A volume is named twice, or none.
        InvalidName, AlreadyExists: Of a name; then no snapshot is taken.
        Busy, ReplicaReadOnly: A volume changes by streams only.
        TrimPending: A shrink is not finished: what lies behind the end would come to light in a clone that grows.
    """
    require_takeable(store, wanted)
    now = store.clock()
    return adopt(store, [_snapshot_of(store, volume_id, name, now, tag) for volume_id, name in wanted])


def require_takeable(store: Store, wanted: Sequence[tuple[VolumeId, str]]) -> None:
    """Refuse snapshots that cannot be taken, or not yet; raises as ``create``."""
    store.require_room()
    if not wanted or len({volume_id for volume_id, _ in wanted}) != len(wanted):
        raise UsageError("name each volume once, and at least one")
    for volume_id, name in wanted:
        validate_name(name, what="snapshot")
        _require_free_name(store, volume_id, name)
        require_ordinary(store.catalog.volume(volume_id), "get a snapshot")
        if store.catalog.volume(volume_id).trim_from_bytes is not None:
            raise TrimPending(store, volume_id)


def next_generation(volume: Volume) -> Generation:
    """Give the number of a volume's next snapshot.

    Raises:
        LimitExceeded: It has had all that there can be.
    """
    generation = Generation(volume.last_generation + 1)
    if generation > MAX_GENERATION:
        raise LimitExceeded(f"volume {volume.name} has had all of its 2^32 - 2 snapshots")
    return generation


def adopt(store: Store, taken: list[Snapshot]) -> list[Snapshot]:
    """Let snapshots be those of their volumes as they are now: within a step."""
    store.add(*taken)
    for made in taken:
        volume = store.catalog.volume(made.volume_id)
        store.amend(volume, newest_generation=made.generation, last_generation=made.generation)
    return taken


def _snapshot_of(store: Store, volume_id: VolumeId, name: str, now: int, tag: str) -> Snapshot:
    volume = store.catalog.volume(volume_id)
    generation = next_generation(volume)
    size, mapped = volume.size_bytes, volume.mapped_blocks
    return Snapshot(volume_id, generation, str(uuids.uuid4()), name, size, mapped, now, tag=tag)


def _require_free_name(store: Store, volume_id: VolumeId, name: str) -> None:
    if store.catalog.has_snapshot_name(volume_id, name):
        volume = store.catalog.volume(volume_id).name
        raise AlreadyExists(f"volume {volume} has a snapshot {name!r} already", volume=volume, snapshot=name)


@one_step
def rename(store: Store, volume_id: VolumeId, name: str, new_name: str) -> Snapshot:
    """Give a snapshot another name.

    Raises:
        SnapshotNotFound, InvalidName, AlreadyExists: Of the names.
    """
    snapshot = store.catalog.snapshot(volume_id, name)
    validate_name(new_name, what="snapshot")
    if new_name != snapshot.name:
        _require_free_name(store, volume_id, new_name)
        store.amend(snapshot, name=new_name)
    return store.catalog.snapshot(volume_id, new_name)


def require_removable(store: Store, snapshots: Iterable[Snapshot]) -> None:
    """Refuse to remove snapshots that something needs.

    Raises:
        Busy: One has clones or is held; it names them.
    """
    for snapshot in snapshots:
        require_not_held(store, snapshot)
        volume = store.catalog.volume(snapshot.volume_id)
        if volume.receive_lead and snapshot == store.catalog.snapshots(volume.id)[-1]:
            require_not_receiving(volume, f"lose snapshot {snapshot.name}")
        clones = [volume.name for volume in store.catalog.clones(snapshot.map_id) if volume.name]
        if clones:
            whose = f"{store.catalog.volume(snapshot.volume_id).name}@{snapshot.name}"
            raise Busy(
                f"snapshot {whose} is the origin of {', '.join(clones)}; remove or flatten "
                f"{'it' if len(clones) == 1 else 'them'} first",
                snapshot=whose,
                clones=clones,
            )


def _tables_between(store: Store, older: Base, newer: Snapshot) -> list[TableKey]:
    """List the increments and trails that say what was written between two points."""
    if older.generation > newer.generation:
        raise UsageError(f"{older.name} is newer than {newer.name}; swap them")
    mark = store.catalog.volume(newer.volume_id).rollback_mark
    undone = store.catalog.undone(newer.volume_id) if newer.generation >= mark else []
    increments = store.catalog.increments(newer.volume_id, older.generation)
    tables = [table for table in increments if table.generation not in undone]
    tables += store.catalog.trails(newer.volume_id, older.generation)
    return [table for table in tables if table.generation < newer.generation]


def changed_pages(store: Store, older: Base | None, newer: Snapshot, start: int = 0) -> Iterator[int]:
    """Yield the map pages, from one on, in which two points may differ; without ``older``, those with data.

    It may be kept across other changes while neither is removed.

    Cost: proportional to what was written between the two (I7).

    Raises:
        UsageError: ``older`` is not older.
    """
    while True:
        if older is None:
            tables = [table for link in store.catalog.chain(newer.map_id) for table in link]
        else:
            tables = _tables_between(store, older, newer)
        listed = [store.log.page_indexes(table, start, limit=_LISTED_PAGES) for table in tables]
        end = min((pages[-1] for pages in listed if len(pages) == _LISTED_PAGES), default=None)
        yield from sorted({page for pages in listed for page in pages if end is None or page <= end})
        if end is None:
            return
        start = end + 1


def changed_extents(store: Store, older: Base | None, newer: Snapshot, page_index: int) -> Iterator[Extent]:
    """Yield the stretches of one page that may differ, as ``newer`` has them."""
    entries = page_entries(store, newer.map_id, page_index)
    if older is None:
        changed = {index for index, (address, _) in entries.items() if address > HOLE}
    else:
        tables = _tables_between(store, older, newer)
        changed = {index for table in tables for index in store.log.keys(table, page_index)}
    joined: list[Extent] = []
    block = store.block_bytes
    for index in sorted(changed):
        start = (page_index * PAGE_BLOCKS + index) * block
        length = min(block, newer.size_bytes - start)
        if length > 0:
            join_extents(joined, Extent(start, length, entries.get(index, (INHERIT, 0))[0]), block)
    yield from joined
