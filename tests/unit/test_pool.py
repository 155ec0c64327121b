"""Storage volumes: growth, allocation, the states of a block, what goes back to the host."""

import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from incfs import stripes
from incfs.backing import Backing, File
from incfs.errors import BackingError, ImageMismatch, NoSpace, PoolLocked
from incfs.groups import GROUP_BLOCKS
from incfs.image import DATA_OFFSET_BYTES
from incfs.model import StorageId
from incfs.recovery import make_storage
from incfs.reuse import CHUNK_BYTES
from incfs.space import Growth, Step
from incfs.storage import StorageVolume
from incfs.store import Store
from tests.support import pools
from tests.support.media import MemoryBacking

ONE = StorageId(1)


@pytest.fixture
def store(pool_home: Path) -> Iterator[Store]:
    opened = pools.open_tiny(pools.make_pool(pool_home))
    yield opened
    opened.abandon()


def grow(store: Store, blocks: int) -> None:
    store.pool.volumes[ONE].grow(blocks, reserve=lambda _: 0)


def test_an_image_whose_growth_fails_half_way_has_what_it_got(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are short, since nobody can write to the image meanwhile."""
    volume, allocate, steps = store.pool.volumes[ONE], File.allocate, list[int]()

    def give_nine(file: File, offset_bytes: int, length_bytes: int, *, keep_size: bool = False) -> None:
        steps.append(length_bytes)
        if offset_bytes + length_bytes > DATA_OFFSET_BYTES + (9 << 20):
            raise NoSpace("the host is full")
        allocate(file, offset_bytes, length_bytes, keep_size=keep_size)

    monkeypatch.setattr(type(volume.file), "allocate", give_nine)
    grow(store, 10 * (1 << 20) // pools.BLOCK)
    assert steps == [4 << 20, 4 << 20, 2 << 20, 1 << 20]
    assert volume.grown_blocks == (9 << 20) // pools.BLOCK
    with pytest.raises(NoSpace):
        grow(store, 1)
    assert store.pool.allocate(1, 10) == [(1 << 48, 10)]


def test_one_writer_gets_consecutive_blocks_beside_another(store: Store) -> None:
    grow(store, 100)
    first = [store.pool.allocate(1, 10), store.pool.allocate(1, 10)]
    assert first == [[(1 << 48, 10)], [((1 << 48) + 10, 10)]]
    assert store.pool.allocate(2, 5) == [((1 << 48) + 20, 5)]


def test_allocation_wraps_round_and_ends(store: Store) -> None:
    grow(store, 20)
    assert store.pool.allocate(1, 20) == [(1 << 48, 20)]
    store.pool.release(range((1 << 48) + 3, (1 << 48) + 6))
    assert store.pool.allocate(1, 20) == [((1 << 48) + 3, 3)]
    assert store.pool.allocate(1, 1) == []


def test_scattered_space_comes_in_one_go(store: Store) -> None:
    """One piece at a time, each write into a pool that has been overwritten at random needed a lease of its own."""
    grow(store, 40)
    store.pool.allocate(1, 40)
    first = 1 << 48
    store.pool.release([first + block for block in (2, 3, 7, 11, 12, 13, 30)])
    assert store.pool.allocate(1, 6, most_runs=3) == [(first + 2, 2), (first + 7, 1), (first + 11, 3)]
    assert store.pool.allocate(1, 6, most_runs=3) == [(first + 30, 1)]
    assert store.pool.volumes[ONE].busy_blocks == 40
    assert store.pool.allocate(1, 1) == []


def test_allocation_crosses_groups(store: Store) -> None:
    grow(store, GROUP_BLOCKS + 100)
    assert store.pool.allocate(1, GROUP_BLOCKS + 50) == [(1 << 48, GROUP_BLOCKS)]
    assert store.pool.allocate(1, 200) == [((1 << 48) + GROUP_BLOCKS, 100)]
    store.pool.commit(range((1 << 48) + GROUP_BLOCKS - 5, (1 << 48) + GROUP_BLOCKS + 5))
    assert store.pool.volumes[ONE].highest_live_block() == GROUP_BLOCKS + 4


def test_a_freed_block_waits_for_the_checkpoint(store: Store) -> None:
    grow(store, 1)
    ((address, _),) = store.pool.allocate(1, 1)
    store.pool.commit([address])
    store.pool.free([address])
    assert store.pool.allocate(1, 1) == []
    _, freed = store.pool.freeze()
    assert store.pool.allocate(1, 1) == []
    store.pool.reuse.make_free(freed)
    assert store.pool.allocate(1, 1) == [(address, 1)]


def test_whole_chunks_go_back_to_the_host(store: Store) -> None:
    chunk = CHUNK_BYTES // pools.BLOCK
    volume = pools.new_volume(store, "a")
    pools.write(store, volume.map_id, 0, b"x" * 4 * CHUNK_BYTES)
    store.checkpoint()
    file = store.pool.volumes[ONE].file
    before = file.allocated_bytes()
    pools.discard(store, volume.map_id, 0, 3 * CHUNK_BYTES)
    store.checkpoint()
    assert before == file.allocated_bytes()
    pools.give_back(store)
    assert before - file.allocated_bytes() >= 2 * CHUNK_BYTES
    assert store.pool.volumes[ONE].live_blocks == chunk
    pools.check_clean(store)


def test_growth_stops_at_the_capacity(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home, capacity_bytes=640)) as store:
        grow(store, 100)
        assert store.pool.volumes[ONE].grown_blocks == 10
        with pytest.raises(NoSpace):
            grow(store, 1)


def test_growth_leaves_the_hosts_reserve(store: Store) -> None:
    with pytest.raises(NoSpace):
        store.pool.volumes[ONE].grow(1, reserve=lambda _: 1 << 60)


def test_the_second_storage_volume_takes_over(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home, storages=2, capacity_bytes=2 * 640)) as store:
        volume = pools.new_volume(store, "a")
        pools.write(store, volume.map_id, 0, b"x" * 15 * 64)
        store.commit()
        assert [s.live_blocks for s in store.pool.volumes.values()] == [10, 5]
        pools.check_clean(store)


def test_a_truncated_missing_or_foreign_image_is_refused(pool_home: Path) -> None:
    pool = pools.make_pool(pool_home)
    with pools.open_tiny(pool) as store:
        volume = pools.new_volume(store, "a")
        pools.write(store, volume.map_id, 0, b"x" * 640)
    (image,) = (pool / "images").iterdir()
    content = image.read_bytes()
    (foreign,) = (pools.make_pool(pool_home / "other") / "images").iterdir()
    other = foreign.read_bytes().ljust(len(content), b"\0")
    for bad in (content[: 65536 + 100], content[:100], b"\0" * len(content), other, None):
        image.unlink()
        if bad is not None:
            image.write_bytes(bad)
        else:
            image.symlink_to("/nowhere")
        with pytest.raises(ImageMismatch):
            pools.open_tiny(pool)
    image.unlink()
    image.write_bytes(content)
    with pools.open_tiny(pool) as store:
        assert pools.read(store, volume.map_id) == b"x" * 640


def test_one_process_at_a_time(store: Store) -> None:
    with pytest.raises(PoolLocked, match="in use by process"):
        pools.open_tiny(store.directory)


class NamingBacking(Backing):
    """Knows the directories whose changes a power cut could undo."""

    def __init__(self) -> None:
        self.unsynced: set[Path] = set()

    def create(self, path: Path) -> File:
        self.unsynced.add(path.parent)
        return super().create(path)

    def replace(self, source: Path, target: Path) -> None:
        self.unsynced.add(target.parent)
        super().replace(source, target)

    def make_directory(self, path: Path) -> None:
        self.unsynced |= {level.parent for level in (path, *path.parents) if not level.exists()}
        super().make_directory(path)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.unsynced.discard(path)


def test_every_name_is_durable_once_a_pool_is_made(pool_home: Path) -> None:
    backing = NamingBacking()
    pools.make_pool(pool_home / "a" / "b", storages=2, backing=backing)
    assert not backing.unsynced


def test_every_byte_is_durable_once_a_pool_is_made(pool_home: Path) -> None:
    backing = MemoryBacking(pool_home)
    pools.make_pool(pool_home, storages=2, backing=backing)
    events = [event for event in backing.events if event.kind in ("write", "truncate", "sync")]
    unsynced: set[str] = set()
    for event in events:
        (unsynced.discard if event.kind == "sync" else unsynced.add)(event.name)
    assert len({event.name for event in events}) == 6
    assert not unsynced


def test_nobody_else_may_read_a_file_of_a_pool(store: Store) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in store.directory.rglob("*")}
    assert len(modes) > 5
    assert {name: mode for name, mode in modes.items() if mode & 0o077} == {}


def test_freed_blocks_are_held_while_somebody_verifies(store: Store) -> None:
    """A check reads what the last checkpoint's tables name."""
    volume = pools.new_volume(store, "a")
    pools.write(store, volume.map_id, 0, b"x" * 640)
    store.checkpoint()
    store.pool.reuse.held += 1
    pools.discard(store, volume.map_id, 0, 640)
    store.checkpoint()
    assert not store.pool.volumes[ONE].live_blocks
    assert store.pool.volumes[ONE].is_busy(0, 10)
    store.pool.reuse.held -= 1
    store.checkpoint()
    store.reclaim_leases()
    assert not store.pool.volumes[ONE].is_busy(0, 10)


def test_what_is_freed_block_by_block_goes_back_to_the_host_too(pool_home: Path) -> None:
    """Every second small file is deleted: whole 64 KiB chunks are never free."""
    store = pools.open_tiny(pools.make_pool(pool_home, block_bytes=4096))
    volume = pools.new_volume(store, "db")
    pools.write(store, volume.map_id, 0, b"x" * 4096 * 256)
    store.checkpoint()
    before = store.pool.volumes[ONE].file.allocated_bytes()
    for block in range(0, 256, 2):
        pools.discard(store, volume.map_id, block * 4096, (block + 1) * 4096)
    store.checkpoint()
    assert store.pool.volumes[ONE].file.allocated_bytes() == before
    pools.write(store, volume.map_id, 0, b"y" * 4096 * 3)
    store.reclaim_leases()
    assert not store.pool.reuse.plan(1000, 1000).runs, "what was freed a moment ago may be in use again soon"
    pools.give_back(store)
    assert before - store.pool.volumes[ONE].file.allocated_bytes() >= 120 * 4096
    assert not store.pool.reuse.plan(1000, 1000).runs
    pools.check_clean(store)
    assert pools.read(store, volume.map_id, 4096 * 3, 4096) == b"x" * 4096
    store.abandon()


def test_punched_blocks_are_leased_once_the_host_has_given_their_space_again(pool_home: Path) -> None:
    with freed_chunks(pool_home) as store:
        storage = store.pool.volumes[ONE]
        pools.give_back(store)
        store.reclaim_leases()
        before, at_hand = storage.file.allocated_bytes(), storage.grown_blocks - storage.live_blocks - 96
        leased = sum(count for _, count in store.pool.allocate(1, 1 << 20, most_runs=1 << 20))
        assert (leased, storage.file.allocated_bytes()) == (at_hand, before)
        growth = store.space.next_growth(store.catalog.volume_named("db").map_id)
        assert growth is not None
        growth.run()
        assert not store.pool.allocate(1, 1)
        growth.end()
        backed = sum(count for _, count in store.pool.allocate(1, 1 << 20, most_runs=1 << 20))
        assert storage.file.allocated_bytes() - before == backed * 4096 == min(96 * 4096, store.account.extend_bytes)


def test_what_goes_back_to_the_host_while_space_is_made_is_got_again(pool_home: Path) -> None:
    """The last checkpoint's blocks were punched before they were leased: a full pool, although they were free."""
    pool = pools.make_pool(pool_home, block_bytes=4096, capacity_bytes=40 * 4096)
    with pools.open_tiny(pool, pools.tiny_options(extend_bytes=1 << 20)) as store:
        volume = pools.new_volume(store, "db")
        pools.write(store, volume.map_id, 0, b"x" * 40 * 4096)
        pools.discard(store, volume.map_id, 0, 30 * 4096)
        store.absorb()
        for step in store.space.steps({volume.map_id: 20}):
            if isinstance(step, Growth):
                step.run()
                step.end()
            elif step is Step.CHECKPOINT:
                store.checkpoint()
                pools.give_back(store)
        assert store.plane.leased_blocks(volume.map_id) >= 20


def freed_chunks(pool_home: Path) -> Store:
    """A pool in which four chunks of a volume, and every second block of four others, became free just now."""
    store = pools.open_tiny(pools.make_pool(pool_home, block_bytes=4096))
    volume = pools.new_volume(store, "db")
    pools.write(store, volume.map_id, 0, b"x" * 9 * CHUNK_BYTES)
    store.checkpoint()
    pools.discard(store, volume.map_id, 0, 4 * CHUNK_BYTES)
    for block in range(64, 128, 2):
        pools.discard(store, volume.map_id, block * 4096, (block + 1) * 4096)
    store.checkpoint()
    return store


def test_what_is_given_back_at_once_is_bounded(pool_home: Path) -> None:
    with freed_chunks(pool_home) as store:
        reuse = store.pool.reuse
        reuse.settle()
        seen: list[tuple[StorageId, int, int]] = []
        while (plan := reuse.plan(3, 24)).held:
            assert len(plan.runs) <= 3
            assert sum(count for _, _, count in plan.runs) <= 24
            assert all(store.pool.volumes[ONE].is_busy(first, count) for _, first, count in plan.runs)
            seen += plan.runs
            reuse.punch(plan)
            reuse.punched(plan)
        blocks = [first + i for _, first, count in seen for i in range(count)]
        assert len(set(blocks)) == len(blocks) == 64 + 32
        pools.check_clean(store)


def test_a_slice_ends_when_its_time_is_over_and_the_rest_waits(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever needed space waited for sixteen pieces, however long the host took for each."""
    now_s, pieces = [0.0], list[tuple[int, int]]()
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])

    def punch(volume: StorageVolume, block_index: int, count: int) -> bool:
        now_s[0] += 0.3
        pieces.append((block_index, count))
        return volume.file.punch(volume._offset(block_index), count * 4096)

    with freed_chunks(pool_home) as store:
        monkeypatch.setattr(StorageVolume, "punch", punch)
        reuse = store.pool.reuse
        reuse.settle()
        slices = 0
        while (plan := reuse.plan(1000, 1000)).held:
            before = len(pieces)
            assert reuse.punch(plan, limit_s=1.0) == pytest.approx(0.3)
            assert 1 <= len(pieces) - before <= 4
            reuse.punched(plan)
            slices += 1
        assert slices > 4
        blocks = [first + i for first, count in pieces for i in range(count)]
        assert len(set(blocks)) == len(blocks) == 64 + 32
        pools.check_clean(store)


def test_a_host_that_is_short_of_space_gets_whole_chunks_without_waiting(pool_home: Path) -> None:
    with freed_chunks(pool_home) as store:
        reuse = store.pool.reuse
        reuse.hurry([StorageId(7)])
        assert not reuse.plan(1000, 1000).held
        reuse.hurry([ONE])
        plan = reuse.plan(1000, 1000)
        assert plan.runs == [(ONE, 0, 64)]
        reuse.punch(plan)
        reuse.punched(plan)
        reuse.settle()
        assert sum(count for _, _, count in reuse.plan(1000, 1000).runs) == 32


def test_what_was_leased_and_comes_back_unused_goes_back_to_the_host(pool_home: Path) -> None:
    """Blocks that became free are leased at once; the table does not use them."""
    with freed_chunks(pool_home) as store:
        leased = [address + i for address, count in store.pool.allocate(1, 64) for i in range(count)]
        before = store.pool.volumes[ONE].file.allocated_bytes()
        pools.give_back(store)
        store.pool.release(leased)
        after = store.pool.volumes[ONE].file.allocated_bytes()
        pools.give_back(store)
        given_back = after - store.pool.volumes[ONE].file.allocated_bytes()
        assert (before - after, given_back) == ((96 - len(leased)) * 4096, len(leased) * 4096)


@pytest.mark.parametrize("kind", ["stripes", "mirror"])
def test_images_are_synced_side_by_side(pool_home: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Each sync waits for the other: one after the other they would never end."""
    home = pools.make_pool(pool_home, storages=2)
    store = pools.open_tiny(home)
    if kind == "mirror":
        legs = [pool_home / "a.img", pool_home / "b.img"]
        record = make_storage(store, legs[0], mirrors=legs[1:], force=True)
        with store.step():
            store.pool.attach(record)
            store.add(record)
        store.pool.commit([(record.id << 48) + i for i in range(grow_and_lease(store, record.id))])
    else:
        volume = pools.new_volume(store, "a")
        stripes.set_count(store, volume.id, 2, unit_bytes=pools.BLOCK)
        pools.write(store, volume.map_id, 0, b"x" * 4 * pools.BLOCK)
        store.absorb()
    both, sync = threading.Barrier(2), File.sync
    synced: list[Path] = []

    def sync_together(file: File) -> None:
        both.wait(10)
        sync(file)
        synced.append(file.path)

    monkeypatch.setattr(File, "sync", sync_together)
    store.pool.sync()
    assert len(synced) == 2
    monkeypatch.setattr(File, "sync", sync)
    store.abandon()


def grow_and_lease(store: Store, storage_id: StorageId) -> int:
    store.pool.volumes[storage_id].grow(8, reserve=lambda _: 0)
    ((_, count),) = store.pool.allocate(7, 8, [storage_id])
    return count


def test_a_sync_that_fails_is_told_when_all_have_ended(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = pools.open_tiny(pools.make_pool(pool_home, storages=2))
    volume = pools.new_volume(store, "a")
    stripes.set_count(store, volume.id, 2, unit_bytes=pools.BLOCK)
    pools.write(store, volume.map_id, 0, b"x" * 4 * pools.BLOCK)
    store.absorb()
    failed = threading.Event()
    synced: list[Path] = []

    def sync(file: File) -> None:
        if not synced and not failed.is_set() and "disk0" in str(file.path):
            failed.set()
            raise BackingError("cannot sync")
        failed.wait(10)
        synced.append(file.path)

    monkeypatch.setattr(File, "sync", sync)
    with pytest.raises(BackingError):
        store.pool.sync()
    assert len(synced) == 1
    store.abandon()


def test_a_flush_waits_for_one_that_is_under_way(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit beside a checkpoint's fold: neither takes for durable what the other is still flushing."""
    store = pools.open_tiny(pools.make_pool(pool_home))
    volume = pools.new_volume(store, "a")
    pools.write(store, volume.map_id, 0, b"x" * 640)
    store.absorb()
    begun, may_end, sync = threading.Event(), threading.Event(), File.sync
    ended: list[str] = []

    def slow(file: File) -> None:
        begun.set()
        may_end.wait(10)
        sync(file)
        ended.append("flush")

    monkeypatch.setattr(File, "sync", slow)
    first = threading.Thread(target=store.pool.sync)
    first.start()
    begun.wait(10)

    def ask() -> None:
        store.pool.sync()
        ended.append("told")

    second = threading.Thread(target=ask)
    second.start()
    second.join(0.05)
    assert second.is_alive(), "it was told that everything is durable, and nothing is"
    may_end.set()
    first.join()
    second.join()
    assert "flush" in ended[: ended.index("told")]
    monkeypatch.undo()
    store.abandon()
