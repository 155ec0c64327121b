"""Snapshots: taken over several volumes at one point, renamed, removed, compared."""

import uuid as uuids
from collections.abc import Iterator, Sequence
from dataclasses import replace

from incfs.errors import AlreadyExists, LimitExceeded, UsageError
from incfs.extents import Extent, join_extents, page_entries
from incfs.model import HOLE, INHERIT, MAX_GENERATION, PAGE_BLOCKS, Generation, Snapshot, VolumeId, validate_name
from incfs.overlay import TableKey
from incfs.store import Store


def create(store: Store, wanted: Sequence[tuple[VolumeId, str]]) -> list[Snapshot]:
    """Take snapshots of several volumes: one point in time, one commit (I6).

    Cost: independent of the volumes' sizes.

    Raises:
        UsageError: A volume is named twice, or none.
        InvalidName, AlreadyExists: Of a name; then no snapshot is taken.
    """
    store.begin_change()
    if not wanted or len({volume_id for volume_id, _ in wanted}) != len(wanted):
        raise UsageError("name each volume once, and at least one")
    for volume_id, name in wanted:
        validate_name(name, what="snapshot")
        _require_free_name(store, volume_id, name)
    now = store.clock()
    taken = [_snapshot_of(store, volume_id, name, now) for volume_id, name in wanted]
    volumes = [
        replace(store.catalog.volume(s.volume_id), newest_generation=s.generation, last_generation=s.generation)
        for s in taken
    ]
    store.change(*taken, *volumes)
    return taken


def _snapshot_of(store: Store, volume_id: VolumeId, name: str, now: int) -> Snapshot:
    volume = store.catalog.volume(volume_id)
    generation = Generation(volume.last_generation + 1)
    if generation > MAX_GENERATION:
        raise LimitExceeded(f"volume {volume.name} has had all of its 2^32 - 2 snapshots")
    return Snapshot(volume_id, generation, str(uuids.uuid4()), name, volume.size_bytes, volume.mapped_blocks, now)


def _require_free_name(store: Store, volume_id: VolumeId, name: str) -> None:
    if store.catalog.has_snapshot_name(volume_id, name):
        volume = store.catalog.volume(volume_id).name
        raise AlreadyExists(f"volume {volume} has a snapshot {name!r} already", volume=volume, snapshot=name)


def rename(store: Store, volume_id: VolumeId, name: str, new_name: str) -> Snapshot:
    """Give a snapshot another name.

    Raises:
        SnapshotNotFound, InvalidName, AlreadyExists: Of the names.
    """
    store.begin_change()
    snapshot = store.catalog.snapshot(volume_id, name)
    validate_name(new_name, what="snapshot")
    if new_name != snapshot.name:
        _require_free_name(store, volume_id, new_name)
        store.change(replace(snapshot, name=new_name))
    return store.catalog.snapshot(volume_id, new_name)


def remove(store: Store, volume_id: VolumeId, name: str) -> None:
    """Take a snapshot out of the namespace; ``volume.reclaim`` frees its blocks later.

    Raises:
        SnapshotNotFound: No such snapshot.
    """
    store.begin_change()
    store.change(replace(store.catalog.snapshot(volume_id, name), name=""))


def _increments_between(store: Store, older: Snapshot, newer: Snapshot) -> list[TableKey]:
    if older.generation > newer.generation:
        raise UsageError(f"snapshot {older.name} is newer than {newer.name}; swap them")
    increments = store.catalog.increments(newer.volume_id, older.generation)
    return [table for table in increments if table.generation < newer.generation]


def changed_pages(store: Store, older: Snapshot | None, newer: Snapshot) -> list[int]:
    """List the map pages in which two snapshots may differ; without ``older``, those with data.

    Cost: proportional to what was written between the two (I7).

    Raises:
        UsageError: ``older`` is not older.
    """
    tables = store.catalog.chain(newer.map_id) if older is None else _increments_between(store, older, newer)
    return sorted({page for table in tables for page in store.log.page_indexes(table)})


def changed_extents(store: Store, older: Snapshot | None, newer: Snapshot, page_index: int) -> Iterator[Extent]:
    """Yield the stretches of one page that may differ, as ``newer`` has them."""
    entries = page_entries(store, newer.map_id, page_index)
    if older is None:
        changed = {index for index, (address, _) in entries.items() if address > HOLE}
    else:
        tables = _increments_between(store, older, newer)
        changed = {index for table in tables for index in store.log.entries(table, page_index)}
    joined: list[Extent] = []
    block = store.block_bytes
    for index in sorted(changed):
        start = (page_index * PAGE_BLOCKS + index) * block
        length = min(block, newer.size_bytes - start)
        if length > 0:
            join_extents(joined, Extent(start, length, entries.get(index, (INHERIT, 0))[0]), block)
    yield from joined
