"""Snapshots: taken over several volumes at one point, renamed, removed, compared."""

import uuid as uuids
from collections.abc import Iterator, Sequence
from dataclasses import replace

from incfs.errors import AlreadyExists, LimitExceeded, UsageError
from incfs.model import HOLE, PAGE_BLOCKS, Generation, Snapshot, VolumeId, validate_name
from incfs.overlay import TableKey
from incfs.store import Store
from incfs.volume import Extent, extents, page_entries


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
    if generation >= 1 << 32:
        raise LimitExceeded(f"volume {volume.name} has had 2^32 snapshots")
    return Snapshot(volume_id, generation, str(uuids.uuid4()), name, volume.size_bytes, volume.mapped_blocks, now)


def _require_free_name(store: Store, volume_id: VolumeId, name: str) -> None:
    if any(snapshot.name == name for snapshot in store.catalog.snapshots(volume_id)):
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


def diff(store: Store, volume_id: VolumeId, older: Snapshot | None, newer: Snapshot) -> Iterator[Extent]:
    """Yield the stretches that may differ between two snapshots, as ``newer`` has them.

    Without ``older``: everything that is stored in ``newer``.
    Each step looks at one page; do not keep the iterator across other changes.
    Cost: proportional to what was written between the two (I7).

    Raises:
        UsageError: ``older`` is not older.
    """
    if older is None:
        yield from (extent for extent in extents(store, newer.map_id) if extent.address > HOLE)
        return
    if older.generation > newer.generation:
        raise UsageError(f"snapshot {older.name} is newer than {newer.name}; swap them")
    tables = [
        TableKey(volume_id, snapshot.generation)
        for snapshot in store.catalog.snapshots(volume_id, removed=True)
        if older.generation <= snapshot.generation < newer.generation
    ]
    pages = sorted({page for table in tables for page in store.log.page_indexes(table)})
    for page_index in pages:
        changed = {index for table in tables for index in store.log.entries(table, page_index)}
        yield from _changed_extents(store, newer, page_index, changed)


def _changed_extents(store: Store, newer: Snapshot, page_index: int, changed: set[int]) -> Iterator[Extent]:
    if not changed:
        return
    block = store.block_bytes
    entries = page_entries(store, newer.map_id, page_index)
    run: Extent | None = None
    for index in sorted(changed):
        start = (page_index * PAGE_BLOCKS + index) * block
        length = min(block, newer.size_bytes - start)
        if length <= 0:
            break
        address = entries.get(index, (0, 0))[0]
        if run and _continues(run, start, address, block):
            run = replace(run, length_bytes=run.length_bytes + length)
            continue
        if run:
            yield run
        run = Extent(start, length, address)
    if run:
        yield run


def _continues(run: Extent, start: int, address: int, block: int) -> bool:
    if run.offset_bytes + run.length_bytes != start:
        return False
    if run.address <= HOLE or address <= HOLE:
        return run.address <= HOLE and address <= HOLE
    return address == run.address + run.length_bytes // block
