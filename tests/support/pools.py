"""Tiny pools for tests: made, driven synchronously, and proved consistent."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from incfs import clone as clones
from incfs import extents, groups, ranges, relocation, removal, rollback
from incfs import snapshot as snapshots
from incfs import volume as volumes
from incfs.backing import Backing
from incfs.baseline import describe
from incfs.blocks import set_runs, split_address
from incfs.check import Checker, CheckReport
from incfs.codec import Entries, slot_set
from incfs.dataplane import PlaneState
from incfs.errors import NoSpace
from incfs.model import HOLE, Base, Generation, MapId, Snapshot, Volume, VolumeId, map_id, split_map_id
from incfs.options import Options
from incfs.overlay import TableKey
from incfs.recovery import MIN_JOURNAL_BYTES, create_pool, open_store
from incfs.relocation import Relocation, Wish
from incfs.reuse import PunchPlan
from incfs.settings import VolumeSettings
from incfs.store import Store

BLOCK = 64
"""The smallest block: a map page then covers 32 KiB."""


def make_pool(
    directory: Path,
    *,
    block_bytes: int = BLOCK,
    capacity_bytes: int | None = None,
    storages: int = 1,
    backing: Backing | None = None,
) -> Path:
    """Create a pool in ``directory / "pool"``."""
    places = [directory / "pool" / f"disk{number}" for number in range(storages)] if storages > 1 else []
    create_pool(
        directory / "pool",
        block_bytes=block_bytes,
        capacity_bytes=capacity_bytes,
        directories=places,
        journal_bytes=MIN_JOURNAL_BYTES,
        backing=backing,
    )
    return directory / "pool"


def tiny_options(
    *,
    extend_bytes: int = 4096,
    page_cache_pages: int = 64,
    small_commit_bytes: int = 65536,
    overlay_pages: int = 64,
    host_reserve_bytes: int = 0,
    reserve_blocks: int = 0,
    dump_interval_s: float | None = 86400.0,
) -> Options:
    """Options that make everything happen early."""
    return Options(
        extend_bytes=extend_bytes,
        page_cache_pages=page_cache_pages,
        small_commit_bytes=small_commit_bytes,
        overlay_pages=overlay_pages,
        dump_interval_s=dump_interval_s,
        host_reserve_bytes=host_reserve_bytes,
        reserve_blocks=reserve_blocks,
    )


def ticking_clock(step_ns: int = 1_000_000) -> Callable[[], int]:
    """A clock that advances by itself, the same in every run."""
    return itertools.count(1_000_000_000, step_ns).__next__


def open_tiny(pool: Path, options: Options | None = None, backing: Backing | None = None) -> Store:
    """Open a pool with tiny options and a deterministic clock."""
    store = open_store(pool, options or tiny_options(), backing)
    store.clock = ticking_clock()
    return store


def new_volume(store: Store, name: str, size_bytes: int = 0) -> Volume:
    """Create a volume."""
    return volumes.create(store, name, size_bytes, mode=0o600, uid=0, gid=0)


def new_volume_on(store: Store, name: str, directory: Path, data: bytes) -> Volume:
    """Create a volume over a raw image with the data, whole blocks."""
    number = store.baselines.new_id()
    path = directory / f"baseline-{number}"
    path.write_bytes(data)
    facts = describe(path, number)
    return volumes.create(
        store, name, len(data), mode=0o600, uid=0, gid=0, origin=map_id(VolumeId(0), Generation(facts.id)),
        baseline=facts.encode(),
    )  # fmt: skip


def write(store: Store, table: MapId, offset_bytes: int, data: bytes) -> None:
    """Write a range, doing what is missing."""
    ranges.drive(store, lambda wait: ranges.write(store, table, offset_bytes, data, wait=wait))


def read(store: Store, table: MapId, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
    """Read a range, all of it by default."""
    length = store.catalog.size_bytes(table) if length_bytes is None else length_bytes
    return ranges.drive(store, lambda wait: ranges.read(store, table, offset_bytes, length, wait=wait))


def discard_steps(store: Store, table: MapId, offset_bytes: int, end_bytes: int) -> Iterator[int]:
    """Discard a range, yielding how far each step came."""
    while offset_bytes < end_bytes:
        start = offset_bytes
        offset_bytes = ranges.drive(
            store,
            lambda wait, start=start: ranges.discard(store, table, start, end_bytes, wait=wait),  # type: ignore[misc]
        )
        assert start < offset_bytes <= end_bytes
        yield offset_bytes


def discard(store: Store, table: MapId, offset_bytes: int, end_bytes: int) -> None:
    """Discard a range."""
    for _ in discard_steps(store, table, offset_bytes, end_bytes):
        pass


def resize(store: Store, volume_id: VolumeId, size_bytes: int) -> None:
    """Set the size and finish a trim that this begins."""
    ranges.drive(store, lambda wait: volumes.resize(store, volume_id, size_bytes, shrink=True))
    ranges.finish_trim(store, volume_id)


def take_snapshots(store: Store, wanted: Sequence[tuple[VolumeId, str]]) -> list[Snapshot]:
    """Take snapshots of several volumes, finishing trims first."""
    return ranges.drive(store, lambda _: snapshots.create(store, wanted))


def flatten(store: Store, volume_id: VolumeId, *, steps: int | None = None) -> None:
    """Let a clone have everything of its own, or take a few steps towards it."""
    block: int | None = 0
    for step in itertools.count():
        if step == steps:
            return
        if block is None:
            break
        start = block
        block = ranges.drive(
            store,
            lambda wait, start=start: clones.flatten_step(store, volume_id, start, wait=wait),  # type: ignore[misc]
        )
    clones.cut_origin(store, volume_id)


def remove_snapshot(store: Store, volume_id: VolumeId, name: str) -> None:
    """Remove one snapshot."""
    removal.remove(store, [store.catalog.snapshot(volume_id, name)])


def roll_back(store: Store, volume_id: VolumeId, name: str, *, force: bool = False) -> list[Snapshot]:
    """Go back to a snapshot."""
    return ranges.drive(store, lambda _: rollback.roll_back(store, volume_id, name, force=force))


def reclaim(store: Store, *, page_count: int = 64) -> None:
    """Free everything that was removed."""
    for volume_id in sorted(store.catalog.volumes, reverse=True):
        while not volumes.reclaim(store, volume_id, page_count):
            pass


def relocate(store: Store, wish: Wish) -> int:
    """Move what a wish says, walking every table once; give the blocks moved."""
    moved = 0
    for table in relocation.tables(store):
        for page_index in store.log.page_indexes(table):
            store.absorb()
            if (planned := relocation.plan(store, table, page_index, wish)) is not None:
                moved += _carry_out(store, planned)
    return moved


def _carry_out(store: Store, planned: Relocation) -> int:
    for lease, slots in planned.slots.items():
        while len([slot for slot in slots if slot in planned.targets]) < len(slots):
            try:
                ranges.make_space(store, {lease: len(slots)})
            except NoSpace:
                relocation.abandon(store, planned)
                return 0
            relocation.take_targets(store, planned, lease)
    planned.copy(store)
    return relocation.finish(store, planned)


def crash(store: Store, options: Options | None = None) -> Store:
    """Let the process die and open the pool again; the page cache survives."""
    store.abandon()
    return open_tiny(store.directory, options or store.options)


def diff(store: Store, older: Base | None, newer: Snapshot) -> Iterator[extents.Extent]:
    """Yield what may differ between two snapshots."""
    for page_index in snapshots.changed_pages(store, older, newer):
        yield from snapshots.changed_extents(store, older, newer, page_index)


def run_check(store: Store, *, data: bool = True) -> CheckReport:
    """Check the last checkpoint."""
    with store.tables.reading() as reader:
        return Checker(reader, store.pool.volumes, store.block_bytes, data=data).run()


def give_back(store: Store, between: Callable[[], None] = lambda: None) -> None:
    """Give host space of everything that is free back, as the service does in turns.

    Args:
        store: The pool.
        between: What happens while the first pieces are held.
    """
    reuse = store.pool.reuse
    reuse.settle()
    for number in itertools.count():
        plan = reuse.plan(16, 4096)
        if not plan.held:
            break
        if not number:
            between()
        reuse.punch(plan)
        reuse.punched(plan)


def check_clean(store: Store) -> None:
    """Checkpoint, then prove that the tables and the memory are consistent."""
    store.checkpoint()
    report = run_check(store)
    assert report.is_clean, report.problems
    check_memory(store)


def check_memory(store: Store, punching: PunchPlan | None = None) -> None:
    """Prove the merged view of tables, overlay, data plane and bitmaps (I9).

    Every stored block has one owner, ``live`` is what the log's tables own, and ``busy`` is
    that plus what is leased, fresh, dropped, freed, being punched or unbacked, each block once.

    Args:
        store: The pool, between two steps.
        punching: What is being given back to the host.
    """
    store.catch_up()  # what the data plane's own threads committed is in the log only from then on
    owned = list(_owned_addresses(store))
    live, busy, unbacked = _members(store, "live"), _members(store, "busy"), _unbacked(store)
    assert len(owned) == len(set(owned)), f"two owners: {_repeated(owned)}"
    assert set(owned) == live, f"owned but not live {set(owned) - live}, live but not owned {live - set(owned)}"
    plane = store.plane.inspect()
    others = [*_lease_addresses(plane), *_fresh_addresses(plane), *plane.dropped, *_freed_addresses(store)]
    for storage_id, block_index, count in punching.runs if punching else ():
        others += [storage_id << 48 | block_index + i for i in range(count)]
    accounted = owned + others
    assert len(accounted) == len(set(accounted)), f"two states: {_repeated(accounted)}"
    assert unbacked <= busy, f"unbacked and free {unbacked - busy}"
    given = busy - unbacked
    assert set(accounted) == given, f"lost {given - set(accounted)}, given out but free {set(accounted) - given}"
    for storage in store.pool.volumes.values():
        assert storage.live_blocks == sum(bits.bit_count() for bits in storage.live)
        assert storage.busy_blocks == sum(bits.bit_count() for bits in storage.busy)
        assert storage.grown_blocks <= storage.record.capacity_blocks
        assert max((bits.bit_length() for bits in storage.busy), default=0) <= max(storage.grown_blocks, 0)
    _check_counters(store)
    _check_resident_pages(store)
    _check_replaced_cache(store)


def _repeated(values: list[int]) -> list[tuple[int, int]]:
    seen: set[int] = set()
    return [split_address(v) for v in values if v in seen or seen.add(v)]  # type: ignore[func-returns-value]


def _tables(store: Store) -> Iterator[TableKey]:
    for volume_id in store.catalog.volumes:
        yield TableKey(volume_id)
        for snapshot in store.catalog.snapshots(volume_id, removed=True):
            yield TableKey(volume_id, snapshot.generation)


def _stored(store: Store, table: TableKey) -> list[int]:
    entries = (store.log.entries(table, page) for page in store.log.page_indexes(table))
    return [address for page in entries for address, _ in page.values() if address > HOLE]


def _owned_addresses(store: Store) -> Iterator[int]:
    for table in _tables(store):
        yield from _stored(store, table)


def _unbacked(store: Store) -> set[int]:
    found = set()
    for storage_id, storage in store.pool.volumes.items():
        unbacked = storage.unbacked
        assert all(bits and not bits & ~unbacked.bits.get(group, 0) for group, bits in unbacked.hollow.items())
        assert unbacked.count == sum(bits.bit_count() for bits in unbacked.bits.values())
        assert unbacked.hollow_count == sum(bits.bit_count() for bits in unbacked.hollow.values())
        for group_index, bits in unbacked.bits.items():
            first = storage_id << 48 | groups.group_start(group_index)
            found |= {first + run + i for run, count in set_runs(bits) for i in range(count)}
    return found


def _members(store: Store, kind: str) -> set[int]:
    return {
        storage_id << 48 | group_index * groups.GROUP_BLOCKS + i
        for storage_id, storage in store.pool.volumes.items()
        for group_index, bits in enumerate(getattr(storage, kind))
        for i in range(bits.bit_length())
        if bits >> i & 1
    }


def _lease_addresses(plane: PlaneState) -> list[int]:
    return [address + i for _, address, count in plane.leases for i in range(count)]


def _fresh_addresses(plane: PlaneState) -> Iterator[int]:
    for entries, replaced in plane.pages.values():
        for index, (old, _) in replaced.items():
            if HOLE < entries[index][0] != old:
                yield entries[index][0]


def _freed_addresses(store: Store) -> list[int]:
    running = store._checkpoint.freed if store._checkpoint else []
    return [*store.pool._freed, *store.pool.reuse.quarantine, *running]


def _check_counters(store: Store) -> None:
    for volume in store.catalog.volumes.values():
        if volume.name and not volume.rollback_to:
            assert volume.mapped_blocks == len(_stored(store, TableKey(volume.id))), volume
        snapshots = store.catalog.snapshots(volume.id, removed=True)
        assert volume.newest_generation == max((s.generation for s in snapshots), default=0)
        for snapshot in snapshots:
            if snapshot.name:
                assert snapshot.held_blocks == len(_stored(store, TableKey(volume.id, snapshot.generation))), snapshot


def _check_resident_pages(store: Store) -> None:
    """What is resident, unsealed writes taken back, is what the log says."""
    for (table, page_index), (entries, replaced) in store.plane.inspect().pages.items():
        volume_id, generation = split_map_id(table)
        volume = store.catalog.volumes.get(volume_id)
        assert volume is not None, f"page of volume {volume_id} is resident, but it is gone"
        if not volume.name or (generation and not store.catalog.snapshot_by_generation(volume_id, generation).name):
            continue  # being reclaimed: nobody reads it any more
        sealed = extents.page_entries(store, table, page_index)
        assert _without_holes(entries | replaced) == _without_holes(sealed), f"{volume_id}.{generation}, {page_index=}"


def _without_holes(entries: Entries) -> Entries:
    return {index: entry for index, entry in entries.items() if entry != (0, 0)}


def _check_replaced_cache(store: Store) -> None:
    for (volume_id, page_index), (generation, slots) in store.log._replaced.items():
        volume = store.catalog.volumes.get(VolumeId(volume_id))
        if volume is not None and generation == volume.newest_generation:
            entries = store.log.entries(TableKey(volume_id, generation), page_index)
            assert slots == slot_set(entries)


def by_name(settings: Mapping[str, VolumeSettings]) -> Callable[[str], VolumeSettings]:
    """Rule volumes by name; one that is not in the table gets the defaults."""
    return lambda name: settings.get(name, VolumeSettings())
