"""The power is cut at every write and sync of a workload: what is found must be one commit point (I5)."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import lmdb
import pytest

from incfs import bookmarks, ranges, relocation
from incfs import clone as clones
from incfs import volume as volumes
from incfs.baseline import BaselineFacts, content_digest
from incfs.errors import Busy, NoSpace
from incfs.model import Snapshot, StorageId, StoredPolicy, VolumeId
from incfs.pool import Pool
from incfs.reuse import CHUNK_BYTES
from incfs.store import Store
from tests.support import pools, simulator
from tests.support.figures import Figures
from tests.support.media import MemoryFile
from tests.support.recorder import Recorder, make_media
from tests.support.simulator import Simulator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LONG = os.environ.get("INCFS_TEST_PROFILE") == "long"
LIMIT = 10240 if LONG else 2560
"""States of one cut; where there are not more, all of them are tried."""
SECOND = 40 if LONG else 300
"""After so many states one has its recovery cut off, too."""
SEEDS = int(os.environ.get("INCFS_CRASH_SEEDS", "3"))


def pattern(seed: int, length: int) -> bytes:
    return Random(seed).randbytes(length)


def write_and_commit(store: Store, volume_id: VolumeId, offset_bytes: int, data: bytes) -> None:
    pools.write(store, store.catalog.volume(volume_id).map_id, offset_bytes, data)
    store.commit()


def set_policy(store: Store, policy: StoredPolicy) -> None:
    with store.step():
        if store.catalog.policy is None:
            store.add(policy)
        else:
            store.amend(store.catalog.policy, text=policy.text, set_ns=policy.set_ns, runs=policy.runs)


@pytest.mark.parametrize("small_commit_bytes", [0, 65536], ids=["flush-images", "data-in-record"])
def test_every_cut_of_a_small_workload_gives_a_commit_point(pool_home: Path, small_commit_bytes: int) -> None:
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes)
    media = make_media(pool_home / "real")
    with Recorder(pool_home / "real", media, options) as recorder:
        store = recorder.store
        volume = pools.new_volume(store, "a", 5000)
        pools.write(store, volume.map_id, 100, pattern(1, 700))
        store.commit()
        pools.write(store, volume.map_id, 130, pattern(2, 300))
        pools.take_snapshots(store, [(volume.id, "s")])
        set_policy(store, StoredPolicy("", 1))
        pools.write(store, volume.map_id, 0, pattern(3, 200))
        store.commit()
        pools.write(store, volume.map_id, 32_700, pattern(4, 200))
        recorder.checkpoint(lambda: write_and_commit(store, volume.id, 64, pattern(len(recorder.points), 640)))
        pools.discard(store, volume.map_id, 0, 32_768)
        volumes.rename(store, volume.id, "b")
        set_policy(store, StoredPolicy("# later", 2, {"clock": 3}))
        store.commit()
        pools.remove_snapshot(store, volume.id, "s")
        store.commit()
        pools.reclaim(store)
        store.checkpoint()
        pools.write(store, volume.map_id, 0, pattern(9, 2000))
        store.commit()
    Simulator(pool_home / "cut", options).try_all(recorder.cuts(), LIMIT, second_cut_every=SECOND)


@pytest.mark.parametrize("small_commit_bytes", [0, 65536], ids=["flush-images", "data-in-record"])
def test_every_cut_of_a_full_pool_gives_a_commit_point(pool_home: Path, small_commit_bytes: int) -> None:
    """Each write needs blocks that an earlier one freed (I3)."""
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes)
    media = make_media(pool_home / "real", capacity_bytes=36 * pools.BLOCK)
    with Recorder(pool_home / "real", media, options) as recorder:
        volume = pools.new_volume(recorder.store, "a")
        for step in range(5):
            pools.write(recorder.store, volume.map_id, step % 2 * 64, pattern(step + 50, 15 * 64))
            recorder.store.absorb()
            write_and_commit(recorder.store, volume.id, step % 3 * 64, pattern(step, 15 * 64))
    Simulator(pool_home / "cut", options).try_all(recorder.cuts(), LIMIT, second_cut_every=SECOND)


@pytest.mark.parametrize("small_commit_bytes", [0, 500], ids=["flush-images", "both-ways"])
def test_every_cut_while_volumes_grow_shrink_and_go_gives_a_commit_point(
    pool_home: Path, small_commit_bytes: int
) -> None:
    """Images grow and are punched, a shrink is trimmed and a removed snapshot folded in steps, each committed."""
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes, extend_bytes=1024)
    media = make_media(pool_home / "real", storages=2)
    with Recorder(pool_home / "real", media, options) as recorder:
        store = recorder.store
        first, second = pools.new_volume(store, "a"), pools.new_volume(store, "b", 640)
        for step, start in enumerate((0, 1300, 32_768)):
            pools.take_snapshots(store, [(first.id, f"s{step}"), (second.id, f"s{step}")])
            write_and_commit(store, first.id, start, pattern(step, 1500))
        ranges.drive(store, lambda _: volumes.resize(store, first.id, 700, shrink=True))
        store.commit()
        while not ranges.drive(store, lambda wait: ranges.trim(store, first.id, wait=wait)):
            store.commit()
        for name in ("s1", "s0", "s2"):
            pools.remove_snapshot(store, first.id, name)
            store.commit()
        while not volumes.reclaim(store, first.id, 1):
            store.commit()
        recorder.checkpoint(lambda: write_and_commit(store, second.id, 0, pattern(len(recorder.points), 600)))
        volumes.remove(store, second.id, snapshots=True)
        pools.reclaim(store)
        store.checkpoint()
        write_and_commit(store, first.id, 0, pattern(7, 3000))
    Simulator(pool_home / "cut", options).try_all(recorder.cuts(), LIMIT, second_cut_every=SECOND)


@pytest.mark.parametrize("small_commit_bytes", [0, 65536], ids=["flush-images", "data-in-record"])
def test_every_cut_of_clone_and_rollback_gives_a_commit_point(pool_home: Path, small_commit_bytes: int) -> None:
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes)
    media = make_media(pool_home / "real")
    with Recorder(pool_home / "real", media, options) as recorder:
        store = recorder.store
        volume = pools.new_volume(store, "a")
        pools.write(store, volume.map_id, 0, pattern(1, 33_500))
        (taken,) = pools.take_snapshots(store, [(volume.id, "s")])
        made = clones.create(store, taken, "c")
        store.commit()
        pools.write(store, volume.map_id, 32_000, pattern(2, 2000))
        pools.write(store, made.map_id, 100, pattern(3, 300))
        pools.take_snapshots(store, [(volume.id, "t"), (made.id, "u")])
        pools.write(store, volume.map_id, 32_500, pattern(4, 200))
        pools.discard(store, made.map_id, 0, 640)
        store.commit()
        pools.roll_back(store, volume.id, "s", force=True)
        store.commit()
        write_and_commit(store, volume.id, 10, pattern(5, 200))
        recorder.checkpoint(lambda: write_and_commit(store, made.id, 64, pattern(len(recorder.points), 300)))
        pools.roll_back(store, made.id, "u")
        store.commit()
        pools.flatten(store, made.id)
        store.commit()
        pools.reclaim(store, page_count=1)
        store.checkpoint()
        volumes.remove(store, made.id, snapshots=True)
        store.commit()
        pools.reclaim(store)
        store.commit()
    Simulator(pool_home / "cut", options).try_all(recorder.cuts(), LIMIT // 40, second_cut_every=SECOND)


@pytest.mark.parametrize("small_commit_bytes", [0, 65536], ids=["flush-images", "data-in-record"])
def test_every_cut_over_a_baseline_gives_a_commit_point(pool_home: Path, small_commit_bytes: int) -> None:
    """A raw image below a volume, its clone and their snapshots, until both are independent of it."""
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes)
    media = make_media(pool_home / "real")
    with Recorder(pool_home / "real", media, options) as recorder:
        store = recorder.store
        volume = pools.new_volume_on(store, "a", pool_home, pattern(1, 6_400) + bytes(640) + pattern(2, 640))
        pools.write(store, volume.map_id, 100, pattern(3, 300))
        (taken,) = pools.take_snapshots(store, [(volume.id, "s")])
        pools.write(store, volume.map_id, 0, pattern(4, 500))
        pools.discard(store, volume.map_id, 1280, 1920)
        store.commit()
        made = clones.create(store, taken, "c")
        pools.write(store, made.map_id, 6_000, pattern(5, 400))
        recorder.checkpoint(lambda: write_and_commit(store, volume.id, 700, pattern(len(recorder.points), 300)))
        facts = BaselineFacts.decode(store.catalog.volume(volume.id).baseline)
        record_digest(store, volume.id, replace(facts, digest=content_digest(facts, lambda *_: None)))
        pools.roll_back(store, volume.id, "s", force=True)
        store.commit()
        pools.flatten(store, made.id)
        store.commit()
        pools.reclaim(store, page_count=1)
        store.checkpoint()
        pools.flatten(store, volume.id)
        store.commit()
        volumes.remove(store, made.id, snapshots=True)
        pools.remove_snapshot(store, volume.id, "s")
        pools.reclaim(store)
        store.commit()
    Simulator(pool_home / "cut", options).try_all(recorder.cuts(), LIMIT // 40, second_cut_every=SECOND)


def record_digest(store: Store, volume_id: VolumeId, facts: BaselineFacts) -> None:
    with store.step():
        store.amend(store.catalog.volume(volume_id), baseline=facts.encode())
    store.commit()


@pytest.mark.parametrize("small_commit_bytes", [0, 65536], ids=["flush-images", "data-in-record"])
def test_every_cut_while_bookmarks_outlive_their_snapshots_gives_a_commit_point(
    pool_home: Path, small_commit_bytes: int
) -> None:
    """Trails are filled by folds and by writes, and handed on, in steps, each committed."""
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes)
    media = make_media(pool_home / "real")
    with Recorder(pool_home / "real", media, options) as recorder:
        store = recorder.store
        volume = pools.new_volume(store, "a")
        for number in range(3):
            write_and_commit(store, volume.id, 32_600 + 128 * number, pattern(number, 300))
            (taken,) = pools.take_snapshots(store, [(volume.id, f"s{number}")])
            bookmarks.create(store, taken, f"m{number}")
            store.commit()
        write_and_commit(store, volume.id, 0, pattern(5, 200))
        for name in ("s1", "s2"):
            pools.remove_snapshot(store, volume.id, name)
            store.commit()
            while not volumes.reclaim(store, volume.id, 1):
                store.commit()
        recorder.checkpoint(lambda: write_and_commit(store, volume.id, 640, pattern(len(recorder.points), 200)))
        bookmarks.remove(store, volume.id, "m2")
        pools.remove_snapshot(store, volume.id, "s0")
        store.commit()
        while not volumes.reclaim(store, volume.id, 1):
            store.commit()
        write_and_commit(store, volume.id, 33_000, pattern(8, 100))
        (taken,) = pools.take_snapshots(store, [(volume.id, "t")])
        store.checkpoint()
        found = set(pools.diff(store, store.catalog.base(volume.id, "#m1"), taken))
        assert found
        pools.roll_back(store, volume.id, "t")
        bookmarks.remove(store, volume.id, "m1")
        store.commit()
        pools.reclaim(store)
        store.commit()
    Simulator(pool_home / "cut", options).try_all(recorder.cuts(), LIMIT // 40, second_cut_every=SECOND)


@pytest.mark.parametrize("small_commit_bytes", [0, 65536], ids=["flush-images", "data-in-record"])
def test_every_cut_of_an_evacuation_gives_a_commit_point(pool_home: Path, small_commit_bytes: int) -> None:
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes)
    media = make_media(pool_home / "real", storages=2)
    with Recorder(pool_home / "real", media, options) as recorder:
        store = recorder.store
        volume = pools.new_volume(store, "a")
        pools.write(store, volume.map_id, 0, pattern(1, 6_500))
        pools.take_snapshots(store, [(volume.id, "s")])
        pools.write(store, volume.map_id, 32_700, pattern(2, 700))
        store.commit()
        with store.step():
            store.amend(store.catalog.storage(StorageId(1)), is_evacuating=True)
        store.reclaim_leases()
        assert pools.relocate(store, relocation.leave(StorageId(1))) > 90
        pools.write(store, volume.map_id, 200, pattern(3, 300))
        store.commit()
        assert not store.pool.volumes[StorageId(1)].live_blocks
        recorder.checkpoint(lambda: write_and_commit(store, volume.id, 64, pattern(len(recorder.points), 300)))
        with store.step():
            store.drop(("storage", (StorageId(1),)))
        store.pool.retire(StorageId(1))
        store.commit()
        pools.write(store, volume.map_id, 0, pattern(4, 900))
        store.checkpoint()
    Simulator(pool_home / "cut", options).try_all(recorder.cuts(), LIMIT // 40, second_cut_every=SECOND)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_cuts_of_a_random_workload_give_commit_points(pool_home: Path, seed: int) -> None:
    random = Random(seed)
    options = pools.tiny_options(small_commit_bytes=random.choice([0, 500, 65536]), page_cache_pages=4)
    capacity = random.choice([None, 2 * CHUNK_BYTES])
    media = make_media(pool_home / "real", storages=1 + seed % 2, capacity_bytes=capacity)
    with Recorder(pool_home / "real", media, options) as recorder:
        for step in range(60):
            with contextlib.suppress(NoSpace, Busy):
                random_step(recorder, random, step)
    Simulator(pool_home / "cut", options).try_all(recorder.cuts(), LIMIT // 8, seed=seed, second_cut_every=SECOND)


def random_step(recorder: Recorder, random: Random, step: int) -> None:
    store = recorder.store
    live = [v for v in store.catalog.volumes.values() if v.name]
    if len(live) < 2:
        pools.new_volume(store, f"v{step}", random.randrange(40_000))
        return
    volume = random.choice(live)
    taken = store.catalog.snapshots(volume.id)
    start, data = random.randrange(40_000), pattern(random.randrange(99), random.randrange(1, 3000))
    match random.choice("wwwwwdzsxkbrRcccCp"):
        case "w":
            pools.write(store, volume.map_id, start, data)
        case "d":
            pools.discard(store, volume.map_id, start, start + 7 * len(data))
        case "z":
            pools.resize(store, volume.id, start)
        case "s":
            pools.take_snapshots(store, [(v.id, f"s{step}") for v in live])
        case "x" | "b" | "k" as kind if taken:
            branch_step(store, kind, random.choice(taken), step)
        case "r":
            volumes.remove(store, volume.id, snapshots=True)
        case "R":
            pools.reclaim(store, page_count=1)
        case "C":
            store.checkpoint()
        case "p" if store.pool.volumes[StorageId(1)].record.capacity_blocks > 1 << 20:
            recorder.checkpoint(lambda: write_and_commit(store, volume.id, start, data))
        case _:
            store.commit()


def branch_step(store: Store, kind: str, taken: Snapshot, step: int) -> None:
    match kind:
        case "x":
            pools.remove_snapshot(store, taken.volume_id, taken.name)
        case "b":
            pools.roll_back(store, taken.volume_id, taken.name, force=True)
        case _:
            clones.create(store, taken, f"k{step}")


def no_image_sync(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Pool, "sync", lambda pool: None)


def no_journal_sync(patched: pytest.MonkeyPatch) -> None:
    sync = MemoryFile.sync
    patched.setattr(MemoryFile, "sync", lambda file: None if "journal" in file.path.name else sync(file))


def no_sync_of_tables(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(lmdb, "open", partial(lmdb.open, sync=False))


def no_sync_of_roots(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(lmdb, "open", partial(lmdb.open, metasync=False))


@pytest.mark.parametrize("broken", [no_image_sync, no_journal_sync, no_sync_of_tables, no_sync_of_roots])
def test_the_simulator_notices(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None]
) -> None:
    monkeypatch.setattr(simulator, "FIGURES", Figures())  # these are not the product's
    monkeypatch.setitem(globals(), "LIMIT", 48)
    broken(monkeypatch)
    with pytest.raises(AssertionError, match="event"):
        test_every_cut_of_a_small_workload_gives_a_commit_point(pool_home, 0 if broken is no_image_sync else 65536)
