"""The power is cut at every write and sync of a workload: what is found must be one commit point (I5)."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Self

import pytest

from incfs import clone as clones
from incfs import relocation
from incfs import volume as volumes
from incfs.checkpoint import Commit
from incfs.errors import Busy, NoSpace
from incfs.model import Snapshot, StorageId, StoredPolicy, VolumeId
from incfs.pool import PUNCH_BYTES
from incfs.store import Options, Store, new_nonce
from tests.support import pools
from tests.support.recording import CHOICES, Choice, PowerCut, RecordingBacking

Picture = dict[str, bytes]
"""Everything a user can see: the bytes of each volume and snapshot by name, and the policy."""


def picture(store: Store) -> Picture:
    seen: Picture = {"[policy]": repr(store.catalog.policy).encode()}
    for volume in store.catalog.volumes.values():
        if volume.name:
            seen[volume.name] = pools.read(store, volume.map_id)
            for taken in store.catalog.snapshots(volume.id):
                seen[f"{volume.name}@{taken.name}"] = pools.read(store, taken.map_id)
    return seen


class Recorder:
    """Runs a workload and notes what each commit must bring back."""

    def __init__(self, home: Path, options: Options, *, storages: int = 1, capacity_bytes: int | None = None) -> None:
        self.backing = RecordingBacking()
        self.pool = pools.make_pool(home, storages=storages, capacity_bytes=capacity_bytes)
        self.cut = PowerCut(home)
        self.points: list[Picture] = [{"[policy]": b"None"}]
        self._recording = self.backing.recording_tables()
        self._recording.__enter__()
        self.store = pools.open_tiny(self.pool, options, self.backing)
        self._watch_commits(self.store)

    def _watch_commits(self, store: Store) -> None:
        """Commits happen inside other operations too, to make space."""
        begin_commit, end_commit = store.begin_commit, store.end_commit

        def begin() -> Commit | None:
            commit = begin_commit()
            if commit is not None:
                self.points.append(picture(store))
                self.backing.mark(("begun", len(self.points) - 1))
            return commit

        def end(commit: Commit) -> None:
            end_commit(commit)
            self.backing.mark(("durable", len(self.points) - 1))

        store.begin_commit = begin  # type: ignore[method-assign]
        store.end_commit = end  # type: ignore[method-assign]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._recording.__exit__(None, None, None)
        self.store.abandon()

    def checkpoint(self, between: Callable[[], None]) -> None:
        """A checkpoint, with work and commits between its parts."""
        checkpoint = self.store.begin_checkpoint(new_nonce())
        checkpoint.run_commit()
        self.store.end_checkpoint_commit(checkpoint)
        between()
        checkpoint.run_fold()
        plan = self.store.end_checkpoint(checkpoint)
        between()
        self.store.pool.punch(plan)
        self.store.pool.punched(plan)


def cut_everywhere(recorder: Recorder, target: Path, seeds: int, every: int = 1, skip: int = 0) -> int:
    """Cut the power after each event in each way; give how many states were tried."""
    oldest = newest = tried = 0
    for number, event in enumerate(recorder.backing.events):
        recorder.cut.play(event)
        if event.kind == "mark":
            kind, point = event.note
            oldest, newest = (point, newest) if kind == "durable" else (oldest, point)
        if number % every != skip % every:
            continue
        for kind in CHOICES:
            for seed in range(seeds if kind == "mixed" else 1):
                recorder.cut.make(target, Choice(kind, number * 1000 + seed))
                where = f"event {number} ({event.kind} {event.path.name}), unsynced writes {kind}, seed {seed}"
                verify(recorder, target, recorder.points[oldest : newest + 1], where)
                tried += 1
    return tried


def verify(recorder: Recorder, target: Path, allowed: list[Picture], where: str) -> None:
    pool = target / recorder.pool.name
    first = None
    for _ in range(2):
        try:
            store = pools.open_tiny(pool, recorder.store.options)
        except Exception as error:
            raise AssertionError(f"{where}: cannot be opened") from error
        try:
            report = pools.run_check(store)
            assert report.is_clean, f"{where}: {report.problems}"
            found = picture(store)
            assert found in allowed, f"{where}: no allowed commit point"
            pools.check_memory(store)
        finally:
            store.abandon()
        assert first in (None, found), f"{where}: a second recovery gives something else"
        first = found


def pattern(seed: int, length: int) -> bytes:
    return Random(seed).randbytes(length)


@pytest.mark.parametrize("small_commit_bytes", [0, 65536], ids=["flush-images", "data-in-record"])
def test_every_cut_of_a_small_workload_gives_a_commit_point(pool_home: Path, small_commit_bytes: int) -> None:
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes)
    with Recorder(pool_home / "real", options) as recorder:
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
    tried = cut_everywhere(recorder, pool_home / "cut", seeds=4)
    print(f"{len(recorder.backing.events)} events, {tried} states")


@pytest.mark.parametrize("small_commit_bytes", [0, 65536], ids=["flush-images", "data-in-record"])
def test_every_cut_of_clone_and_rollback_gives_a_commit_point(pool_home: Path, small_commit_bytes: int) -> None:
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes)
    with Recorder(pool_home / "real", options) as recorder:
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
    tried = cut_everywhere(recorder, pool_home / "cut", seeds=2)
    print(f"{len(recorder.backing.events)} events, {tried} states")


@pytest.mark.parametrize("small_commit_bytes", [0, 65536], ids=["flush-images", "data-in-record"])
def test_every_cut_of_an_evacuation_gives_a_commit_point(pool_home: Path, small_commit_bytes: int) -> None:
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes)
    with Recorder(pool_home / "real", options, storages=2) as recorder:
        store = recorder.store
        volume = pools.new_volume(store, "a")
        pools.write(store, volume.map_id, 0, pattern(1, 6_500))
        pools.take_snapshots(store, [(volume.id, "s")])
        pools.write(store, volume.map_id, 32_700, pattern(2, 700))
        store.commit()
        store.begin_change()
        store.change(replace(store.catalog.storage(StorageId(1)), is_evacuating=True))
        store.reclaim_leases()
        assert pools.relocate(store, relocation.leave(StorageId(1))) > 90
        pools.write(store, volume.map_id, 200, pattern(3, 300))
        store.commit()
        assert not store.pool.volumes[StorageId(1)].live_blocks
        recorder.checkpoint(lambda: write_and_commit(store, volume.id, 64, pattern(len(recorder.points), 300)))
        store.drop(("storage", (StorageId(1),)))
        store.pool.retire(StorageId(1))
        store.commit()
        pools.write(store, volume.map_id, 0, pattern(4, 900))
        store.checkpoint()
    tried = cut_everywhere(recorder, pool_home / "cut", seeds=2, every=2)
    print(f"{len(recorder.backing.events)} events, {tried} states")


@pytest.mark.parametrize("small_commit_bytes", [0, 65536], ids=["flush-images", "data-in-record"])
def test_every_cut_of_a_full_pool_gives_a_commit_point(pool_home: Path, small_commit_bytes: int) -> None:
    """Each write needs blocks that an earlier one freed (I3)."""
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes)
    with Recorder(pool_home / "real", options, capacity_bytes=36 * pools.BLOCK) as recorder:
        volume = pools.new_volume(recorder.store, "a")
        for step in range(5):
            pools.write(recorder.store, volume.map_id, step % 2 * 64, pattern(step + 50, 15 * 64))
            recorder.store.absorb()
            write_and_commit(recorder.store, volume.id, step % 3 * 64, pattern(step, 15 * 64))
    tried = cut_everywhere(recorder, pool_home / "cut", seeds=2)
    print(f"{len(recorder.backing.events)} events, {tried} states")


def set_policy(store: Store, policy: StoredPolicy) -> None:
    store.begin_change()
    store.change(policy)


def write_and_commit(store: Store, volume_id: VolumeId, offset_bytes: int, data: bytes) -> None:
    pools.write(store, store.catalog.volume(volume_id).map_id, offset_bytes, data)
    store.commit()


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SEEDS = int(os.environ.get("INCFS_CRASH_SEEDS", "3"))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_cuts_of_a_random_workload_give_commit_points(pool_home: Path, seed: int) -> None:
    random = Random(seed)
    options = pools.tiny_options(small_commit_bytes=random.choice([0, 500, 65536]), page_cache_pages=4)
    capacity = random.choice([None, 2 * PUNCH_BYTES])
    with Recorder(pool_home / "real", options, storages=1 + seed % 2, capacity_bytes=capacity) as recorder:
        for step in range(60):
            with contextlib.suppress(NoSpace, Busy):
                random_step(recorder, random, step)
    every = max(1, len(recorder.backing.events) // 60)
    tried = cut_everywhere(recorder, pool_home / "cut", seeds=3, every=every, skip=seed)
    print(f"{len(recorder.backing.events)} events, {tried} states")


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
