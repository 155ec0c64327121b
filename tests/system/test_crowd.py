"""Many writers beside snapshots, clones, streams and readers of holes, and kills: judged from outside the daemon.

Every snapshot of the group must be a prefix of each writer's work, over both volumes, no older than what had been
answered when it was asked for, and must never change; its clone and its replica have the same bytes.  After a kill
each writer's work is there up to its last fsync at least, and without the kernel's cache exactly a prefix of it.

The same crowd works above a filesystem that records what reaches the disk; the power is cut at points of that record.

INCFS_CROWD_S sets for how long each setting runs, INCFS_CUT_STATES how many cuts are tried, INCFS_KILL_SEED the
randomness.
"""

import hashlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from incfs.options import Options
from incfs.recovery import create_pool, open_store
from tests.support import pools
from tests.support.cli import environment
from tests.support.crowd import SLOT_BYTES, VOLUMES, Board, Judge, at_work, content, place_of, read_acks, volume_bytes
from tests.support.fire import Setting, Target
from tests.support.recording import CHOICES, Choice, PowerCut
from tests.support.recording_fs import recording
from tests.support.spawner import Spawner

SECONDS = float(os.environ.get("INCFS_CROWD_S", "6"))
CUTS = int(os.environ.get("INCFS_CUT_STATES", "24"))
SEED = int(os.environ.get("INCFS_KILL_SEED", "1"))
ROUND_S = 4
CUT_LOAD_S = 3
CAPACITY_BYTES = 16 << 20
MAX_SNAPSHOTS = 6
KINDS = {"none": ["direct", "direct", "buffered"], "writeback": ["direct", "buffered", "buffered", "mapped"]}
ORDERED = ("direct", "buffered")


def test_a_judge_finds_what_is_wrong() -> None:
    """The test of the test: a write that is missing, one that is too new, one of two volumes at another point."""

    def images(upto: int, *, without: int = 0) -> list[bytes]:
        made = [bytearray(volume_bytes(1)) for _ in VOLUMES]
        for number in range(1, upto + 1):
            volume, slot = place_of(0, number)
            if number != without:
                made[volume][slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES] = content(0, volume, slot, number)
        return [bytes(image) for image in made]

    judge = Judge(["buffered"])
    judge.explain(images(300), [290], [310], exact=ORDERED)
    for wrong in (images(289), images(311), images(300, without=299)):
        with pytest.raises(AssertionError, match="writer 0"):
            judge.explain(wrong, [290], [310], exact=ORDERED)


class Round:
    """One life of the daemon, with a crowd at work."""

    def __init__(self, target: Target, replica: Path, judge: Judge, board: Board, rng: random.Random) -> None:
        self.target, self.replica, self.judge, self.board, self.rng = target, replica, judge, board, rng
        self.kept: dict[str, str] = {}
        """Snapshot of the group -> digest of its bytes."""
        self.sent: list[str] = []
        self.counts: Counter[str] = Counter()

    def act(self) -> None:
        """Do one thing beside the writers."""
        acts = [self.snapshot] * 6 + [self.look_again] * 3 + [self.clone] * 2 + [self.roll_back, self.send]
        act = self.rng.choice(acts if self.kept else [self.snapshot])
        if len(self.kept) >= MAX_SNAPSHOTS:
            act = self.remove
        act()
        self.counts[act.__name__] += 1

    def snapshot(self) -> None:
        name = f"s{time.monotonic_ns()}"
        before = self.board.read()
        self.target.call("snapshot.create", targets=[f"{volume}@{name}" for volume in VOLUMES])
        after = self.board.read()
        images = self.images(name)
        least = [durable if kind == "mapped" else answered for kind, (_, answered, durable) in self._by_kind(before)]
        self.judge.explain(images, least, [asked for asked, _, _ in after], exact=ORDERED)
        self.kept[name] = digest(images)

    def _by_kind(self, places: list[tuple[int, int, int]]) -> list[tuple[str, tuple[int, int, int]]]:
        return list(zip(self.judge.kinds, places, strict=True))

    def images(self, name: str) -> list[bytes]:
        return [(self.target.mountpoint / ".snapshots" / volume / name).read_bytes() for volume in VOLUMES]

    def look_again(self) -> None:
        name = self.rng.choice(list(self.kept))
        assert digest(self.images(name)) == self.kept[name], f"snapshot {name} changed"

    def remove(self) -> None:
        """The newest as often as any other: its increment is the one that writes go to."""
        names = sorted(self.kept)
        name = self.rng.choice([names[-1], *names])
        if name in self.sent[-1:]:
            return self.look_again()
        del self.kept[name]
        self.target.call("snapshot.remove", targets=[f"{volume}@{name}" for volume in VOLUMES])
        return None

    def clone(self) -> None:
        name, made = self.rng.choice(list(self.kept)), [f"{volume}-clone" for volume in VOLUMES]
        for volume, clone in zip(VOLUMES, made, strict=True):
            self.target.call("volume.clone", target=f"{volume}@{name}", name=clone)
        assert digest([(self.target.mountpoint / clone).read_bytes() for clone in made]) == self.kept[name]
        for clone in made:
            self.target.call("volume.remove", volume=clone)

    def roll_back(self) -> None:
        """Of a clone that was written to: the volumes themselves are open."""
        name, volume, clone = self.rng.choice(list(self.kept)), VOLUMES[0], "rolled"
        self.target.call("volume.clone", target=f"{volume}@{name}", name=clone)
        path = self.target.mountpoint / clone
        before = path.read_bytes()
        self.target.call("snapshot.create", targets=[f"{clone}@start"])
        with open(path, "r+b", buffering=0) as file:
            file.write(os.urandom(len(before) // 2))
        self.target.call("volume.rollback", target=f"{clone}@start")
        assert path.read_bytes() == before
        self.target.call("volume.remove", volume=clone, snapshots=True)

    def send(self) -> None:
        """What changed since the last one sent goes into another pool, which then has the same bytes."""
        name = max(self.kept)
        if self.sent and name <= self.sent[-1]:
            return self.look_again()
        base = ["-i", self.sent[-1]] if self.sent else []
        incfs = [sys.executable, "-m", "incfs", "-p"]
        for volume in VOLUMES:
            send = [*incfs, str(self.target.pool), "send", *base, f"{volume}@{name}"]
            with subprocess.Popen(send, stdout=subprocess.PIPE, env=environment()) as sender:
                receive = [*incfs, str(self.replica), "receive", volume]
                subprocess.run(receive, stdin=sender.stdout, env=environment(), check=True)
            assert not sender.returncode
        exported = []
        for volume in VOLUMES:
            path = self.replica.parent / f"{volume}-{name}.raw"
            command = [*incfs, str(self.replica), "export", f"{volume}@{name}", str(path)]
            subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
            exported.append(path.read_bytes())
            path.unlink()
        assert digest(exported) == self.kept[name], f"the replica of {name} differs"
        self.sent.append(name)
        return None

    def judge_end(self, *, is_killed: bool) -> None:
        """Mount again and look at everything."""
        places = self.board.read()
        self.target.mount()
        images = [(self.target.mountpoint / volume).read_bytes() for volume in VOLUMES]
        least = [
            durable if is_killed or kind == "mapped" else answered
            for kind, (_, answered, durable) in self._by_kind(places)
        ]
        exact = ORDERED if self.target.setting.cache == "none" or not is_killed else ()
        self.judge.explain(images, least, [asked for asked, _, _ in places], exact=exact)
        for name, expected in self.kept.items():
            assert digest(self.images(name)) == expected, f"snapshot {name} changed"
        for writer, (asked, _, _) in enumerate(places):
            self.board.note(writer, 1, asked)
            self.board.note(writer, 2, asked)
        self.judge.begin_anew(images)
        self.target.check_pool()


def digest(images: list[bytes]) -> str:
    return hashlib.sha256(b"".join(images)).hexdigest()


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600 + 3 * SECONDS)
@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_a_crowd_finds_one_point_in_time_and_nothing_lost(
    cache: str, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    rng, kinds = random.Random(f"{SEED} {cache}"), KINDS[cache]
    target = Target(pool_home, tmp_path / "mnt", Setting(4096, cache), spawner)
    replica = pool_home / "replica"
    create_pool(replica)
    board = Board(tmp_path / "board", len(kinds))
    life = Round(target, replica, Judge(kinds), board, rng)
    try:
        target.mount()
        for name in VOLUMES:
            target.call("volume.create", name=name, size_bytes=volume_bytes(len(kinds)))
        started, kills = time.monotonic(), 0
        while time.monotonic() < started + SECONDS:
            with at_work(target.mountpoint, tmp_path / "board", kinds):
                end = time.monotonic() + min(SECONDS, ROUND_S)
                while time.monotonic() < end:
                    life.act()
                target.kill()
            kills += 1
            life.judge_end(is_killed=True)
            for name in set(os.listdir(target.mountpoint)) - {*VOLUMES, ".snapshots", ".incfs"}:
                with suppress(FileNotFoundError):
                    target.call("volume.remove", volume=name, snapshots=True)
        writes = sum(asked for asked, _, _ in board.read())
        print(f"\n{cache}: {time.monotonic() - started:.0f} s, {kills} kills, {writes} writes, {dict(life.counts)}")
    finally:
        target.take_down()


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600 + CUTS)
def test_power_cuts_under_a_crowd_lose_no_fsync(spawner: Spawner, pool_home: Path, tmp_path: Path) -> None:
    rng, kinds, disk = random.Random(f"{SEED} cuts"), ["direct", "direct", "buffered"], pool_home / "disk"
    disk.mkdir()
    create_pool(disk / "pool", journal_bytes=256 << 10, capacity_bytes=CAPACITY_BYTES)
    cut, judge = PowerCut(disk), Judge(kinds)
    with recording(disk, tmp_path / "disk", pool_home / "record") as record:
        target = Target(pool_home, tmp_path / "mnt", Setting(4096, "none"), spawner, pool=tmp_path / "disk" / "pool")
        try:
            target.mount()
            for name in VOLUMES:
                target.call("volume.create", name=name, size_bytes=volume_bytes(len(kinds)))
            first = record.count
            with at_work(target.mountpoint, tmp_path / "board", kinds, record=pool_home / "record"):
                end = time.monotonic() + CUT_LOAD_S
                while time.monotonic() < end:
                    name = f"s{time.monotonic_ns()}"
                    target.call("snapshot.create", targets=[f"{volume}@{name}" for volume in VOLUMES])
                    time.sleep(0.05)
                    if rng.random() < 0.7:
                        target.call("snapshot.remove", targets=[f"{volume}@{name}" for volume in VOLUMES])
                target.kill()
        finally:
            target.take_down()
    most = [asked for asked, _, _ in Board(tmp_path / "board", len(kinds)).read()]
    acks, points = read_acks(tmp_path / "board"), sorted(rng.choices(range(first, record.count), k=CUTS))
    for number, event in enumerate(record.events(), 1):
        cut.play(event)
        for _ in range(points.count(number)):
            choice = Choice(rng.choice([*CHOICES, "mixed", "mixed"]), rng.randrange(1 << 30))
            cut.make(pool_home / "cut", choice)
            durable = [[n for events, w, n in acks if w == writer and events <= number] for writer in range(len(kinds))]
            least = [max(numbers, default=0) for numbers in durable]
            judge_cut(pool_home / "cut" / "pool", judge, least, most)
    print(f"\n{record.count} events, {len(acks)} fsyncs of {len(kinds)} writers, {CUTS} cuts")


def judge_cut(pool: Path, judge: Judge, least: list[int], most: list[int]) -> None:
    """Recover what a cut left: volumes and snapshots are prefixes, and every block has one owner."""
    store = open_store(pool, Options())
    try:
        volumes = [store.catalog.volume_named(name) for name in VOLUMES]
        judge.explain([pools.read(store, volume.map_id) for volume in volumes], least, most, exact=ORDERED)
        for taken in store.catalog.snapshots(volumes[0].id):
            group = [store.catalog.snapshot(volume.id, taken.name) for volume in volumes]
            judge.explain([pools.read(store, s.map_id) for s in group], [0] * len(most), most, exact=ORDERED)
        report = pools.run_check(store)
        assert report.is_clean, report.problems
    finally:
        store.abandon()
