"""A pool on a disk that is full again and again, since another program takes the rest of it and gives it back.

Each round fills the pool, punches, takes and removes snapshots, makes checkpoints, kills or unmounts the daemon, mounts
and checks.  Nothing ever waits for ever, is read-only, says EIO or anything but ENOSPC, or takes the host's reserve;
what an fsync acknowledged is there; what is said to be free is what can be written.

INCFS_FULL_ROUNDS sets the number of rounds over all settings, INCFS_FULL_SEED the randomness.
"""

import errno
import mmap
import os
import random
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from incfs.recovery import create_pool
from tests.mount.test_fusext import KEEP_SIZE, PUNCH_HOLE, fallocate
from tests.support.ballast import MIB, Ballast
from tests.support.fire import Setting, Target
from tests.support.loop import small_disk
from tests.support.spawner import Spawner

ROUNDS = int(os.environ.get("INCFS_FULL_ROUNDS", "0"))
SEED = int(os.environ.get("INCFS_FULL_SEED", "1"))
DISK_BYTES = 300 * MIB
STEP = 4 * MIB
RESERVE = 16 * MIB
BLOCK = 4096
VOLUME_BLOCKS = 160 * MIB // BLOCK
VOLUMES = ("a", "b")
FILLER = "filler"
"""Empty when a fill begins, so that it takes what it writes."""
LONGEST_S = 30
"""Of an operation that takes milliseconds, or as long as the policy lets it wait."""
_HEAD = struct.Struct("<QQ")
ZEROS = bytes(BLOCK)


@dataclass(frozen=True)
class Way:
    """A kind of disk, what lies on it, what a full pool does, and what the kernel caches."""

    kind: str
    images: str
    when_full: str
    cache: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.images}-{self.when_full.partition(':')[0]}-{self.cache}"


WAYS = [
    Way(kind, images, when_full, cache)
    for kind in ("tmpfs", "ext4", "xfs", "btrfs")
    for images in ("together", "apart")
    for when_full, cache in (("error", "none"), ("queue:1s", "writeback"))
]
SHORT = {"tmpfs-together-queue-writeback": 1, "ext4-apart-error-none": 1}
"""Rounds where none are asked for."""


def content(version: int, index: int) -> bytes:
    return _HEAD.pack(version, index) * (BLOCK // _HEAD.size) if version else ZEROS


@dataclass
class Volume:
    """What a volume may hold, block by block."""

    may: dict[int, set[int]] = field(default_factory=dict)
    """Block -> versions that may be found; one that is not here is zeros."""
    since: dict[int, int] = field(default_factory=dict)
    """Written, but not acknowledged by an fsync."""

    def note(self, indexes: range, version: int, *, is_done: bool = True) -> None:
        """Something was asked for; it may be there, and the older contents, too."""
        for index in indexes:
            self.may.setdefault(index, {0}).add(version)
            if is_done:
                self.since[index] = version
            else:
                self.since.pop(index, None)

    def acknowledge(self) -> None:
        """An fsync returned."""
        for index, version in self.since.items():
            self.may[index] = {version}
        self.since = {}

    def compare(self, path: Path) -> int:
        """Compare a file with what may be there; give how many blocks hold something."""
        found = 0
        with open(path, "rb", buffering=0) as file:
            for first in range(0, VOLUME_BLOCKS, 256):
                data = file.read(MIB)
                for index in range(first, first + len(data) // BLOCK):
                    block = data[(index - first) * BLOCK : (index - first + 1) * BLOCK]
                    version, place = _HEAD.unpack_from(block)
                    assert block == content(version, index), f"{path}: block {index} is torn or of block {place}"
                    may = self.may.get(index, {0})
                    assert version in may, f"{path}: block {index} holds {version}, not one of {may}"
                    found += bool(version)
        return found


class Full:
    """The pool of one way, over many rounds."""

    def __init__(self, target: Target, disk: Path, rng: random.Random, way: Way) -> None:
        self.target, self.rng, self.way = target, rng, way
        self.ballast = Ballast(disk, rng)
        self.volumes = {name: Volume() for name in (*VOLUMES, FILLER)}
        self.snapshots: dict[str, Volume] = {}
        self.fds: dict[str, int] = {}
        self.version = 0
        self.counts: Counter[str] = Counter()
        self.longest: dict[str, float] = {}
        # The kernel cuts direct writes where the caller's pages end, which must be where blocks end.
        self.buffer = memoryview(mmap.mmap(-1, MIB))

    # Operations

    def may_refuse(self, what: str, function: Callable[..., object], *arguments: object) -> bool:
        """Do something that may find no space; tell whether it did it."""
        began = time.monotonic()
        try:
            function(*arguments)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                error.add_note(what)
                raise
            self.counts[f"{what} refused"] += 1
            return False
        finally:
            took = time.monotonic() - began
            self.longest[what] = max(took, self.longest.get(what, 0))
            assert took < LONGEST_S, f"{what} took {took:.1f} s"
        self.counts[what] += 1
        return True

    def must(self, what: str, function: Callable[..., object], *arguments: object) -> None:
        """Do what works in a full pool; what became of the kernel's pages may be told first, once to a descriptor."""
        tries = 4 if self.way.cache == "writeback" else 1
        assert any(self.may_refuse(what, function, *arguments) for _ in range(tries)), f"{what}: no space"

    def write(self, name: str, length: int = MIB) -> bool:
        count = length // BLOCK
        first = self.rng.randrange(VOLUME_BLOCKS - count)
        return self.write_at(name, range(first, first + count))

    def write_at(self, name: str, indexes: range) -> bool:
        self.version += 1
        data = self.buffer[: len(indexes) * BLOCK]
        data[:] = b"".join(content(self.version, index) for index in indexes)
        at, fd = indexes.start * BLOCK, self.fds[name]

        def write_all() -> None:
            done = 0
            while done < len(data):
                done += os.pwrite(fd, data[done:], at + done)

        self.volumes[name].note(indexes, self.version, is_done=False)
        is_done = self.may_refuse("write", write_all)
        self.volumes[name].note(indexes, self.version, is_done=is_done)
        return is_done

    def sync(self, name: str) -> bool:
        if self.may_refuse("fsync", os.fsync, self.fds[name]):
            self.volumes[name].acknowledge()
            return True
        self.volumes[name].since = {}  # whatever was lost, it is not told again
        return False

    def punch(self, name: str, indexes: range) -> None:
        at, length = indexes.start * BLOCK, len(indexes) * BLOCK
        self.volumes[name].note(indexes, 0, is_done=False)
        self.must("punch", fallocate, self.fds[name], PUNCH_HOLE | KEEP_SIZE, at, length)
        self.volumes[name].note(indexes, 0)

    def punch_somewhere(self, name: str) -> None:
        first = self.rng.randrange(VOLUME_BLOCKS)
        self.punch(name, range(first, min(VOLUME_BLOCKS, first + self.rng.choice([1, 16, 256, 4096]))))

    def snapshot(self, name: str) -> None:
        snapshot = f"{name}/{len(self.snapshots)}-{self.version}"
        held = Volume({index: set(may) for index, may in self.volumes[name].may.items()})
        if len(self.snapshots) < 4 and self.may_refuse(
            "snapshot", (self.target.mountpoint / ".snapshots" / snapshot).touch
        ):
            self.snapshots[snapshot] = held

    def remove_snapshot(self, name: str) -> None:
        if mine := [snapshot for snapshot in self.snapshots if snapshot.startswith(f"{name}/")]:
            snapshot = self.rng.choice(mine)
            self.must("remove", (self.target.mountpoint / ".snapshots" / snapshot).unlink)
            del self.snapshots[snapshot]

    def checkpoint(self, _: str) -> None:
        self.target.call("debug.dump")
        self.counts["checkpoint"] += 1

    # Phases

    def begin(self) -> None:
        began = time.monotonic()
        self.target.mount()
        self.longest["mount"] = max(time.monotonic() - began, self.longest.get("mount", 0))
        self.compare()
        for volume in self.volumes.values():
            volume.since = {}  # whatever close and the end of the daemon made of it
        self.fds = {name: os.open(self.target.mountpoint / name, os.O_RDWR) for name in self.volumes}

    def compare(self) -> None:
        mountpoint = self.target.mountpoint
        for name, volume in self.volumes.items():
            volume.compare(mountpoint / name)
            found = {f"{name}/{snapshot}" for snapshot in os.listdir(mountpoint / ".snapshots" / name)}
            assert found == {snapshot for snapshot in self.snapshots if snapshot.startswith(f"{name}/")}
        for name, held in self.snapshots.items():
            held.compare(mountpoint / ".snapshots" / name)

    def work(self, count: int) -> None:
        """Do all kinds of things."""
        kinds: list[Callable[[str], object]] = [self.write] * 10 + [self.sync] * 4 + [self.punch_somewhere] * 2
        kinds += [self.snapshot] * 2 + [self.remove_snapshot] * 2 + [self.checkpoint]
        for _ in range(count):
            self.rng.choice(kinds)(self.rng.choice(VOLUMES))

    def fill(self) -> int:
        """Write until there is no space; give the bytes."""
        for first in range(0, VOLUME_BLOCKS, 256):
            if not self.write_at(FILLER, range(first, first + 256)) or not self.sync(FILLER):
                return first * BLOCK
        raise AssertionError("the pool is never full")

    def free_bytes(self) -> int:
        """Tell what is said to be free."""
        self.target.call("storage.list")  # looks at the hosts
        time.sleep(0.5)  # so that the kernel's writers are refused no more
        found = os.statvfs(self.target.mountpoint)
        said = self.target.call("pool.show")["pool"]["free_bytes"]
        assert abs(found.f_bfree * found.f_frsize - said) <= MIB
        return int(said)

    def fill_and_compare(self) -> None:
        """What is said to be free can be written, no more, and the host keeps its reserve."""
        self.settle()
        self.ballast.leave(self.rng.randrange(RESERVE + 8 * MIB, 96 * MIB))
        metadata, before = self.metadata_bytes(), self.ballast.free_bytes
        self.say("before the fill")
        said = self.free_bytes()
        written = self.fill()
        lacking = self.metadata_bytes() - metadata
        left = self.ballast.free_bytes
        self.say(
            f"said {said / MIB:.1f}, written {written / MIB:.1f}, left {left / MIB:.1f}, metadata {lacking / MIB:.1f}"
        )
        self.counts["MiB wrong"] = max(self.counts["MiB wrong"], abs(said - written) // MIB)
        assert abs(said - written) <= 2 * STEP + MIB, (said, written)
        slack = 4 * MIB if self.way.kind == "btrfs" else 2 * MIB  # its own metadata takes chunks
        assert left >= min(RESERVE, before) - lacking - slack, (before, left)
        assert self.free_bytes() <= STEP + MIB

    def settle(self) -> None:
        """Wait until what was removed is taken apart, and free: what waits for that is not said to be."""
        before = -1
        while before != (used := self.target.call("pool.show")["pool"]["used_bytes"]):
            before = used
            time.sleep(0.3)
            self.target.call("debug.dump")

    def say(self, what: str) -> None:
        print(f"{self.way} {what}: host free {self.ballast.free_bytes / MIB:.1f} {dict(self.counts)}", flush=True)

    def metadata_bytes(self) -> int:
        return sum(
            path.stat().st_blocks * 512
            for path in self.target.pool.iterdir()
            if path.is_file() and path.suffix != ".img"
        )

    def go_on_in_a_full_pool(self) -> None:
        """Whatever gives space back works, and then writes go on."""
        self.ballast.leave(RESERVE)  # what comes back before is the reserve's
        name = self.rng.choice(VOLUMES)
        self.snapshot(name)
        for snapshot in list(self.snapshots):
            self.must("remove", (self.target.mountpoint / ".snapshots" / snapshot).unlink)
            del self.snapshots[snapshot]
        self.punch(FILLER, range(VOLUME_BLOCKS))
        deadline = time.monotonic() + LONGEST_S
        while not (self.write_at(name, range(256)) and self.sync(name)):
            assert time.monotonic() < deadline, "space was freed, and a write finds none"
            time.sleep(0.1)

    def end(self) -> None:
        facts = self.target.call("pool.show")["pool"]
        assert not facts["read_only"], facts
        self.target.check_pool()
        for name, fd in self.fds.items():
            if self.rng.random() < 0.7:
                self.sync(name)
            with suppress(OSError):  # what became of pages, once more
                os.close(fd)
        how = self.rng.choice([signal.SIGTERM, signal.SIGKILL])
        self.counts[how.name] += 1
        began = time.monotonic()
        self.target.signal(how)
        self.target.wait_for_end()
        self.longest[how.name] = max(time.monotonic() - began, self.longest.get(how.name, 0))

    def round(self) -> None:
        self.begin()
        with self.ballast.restless(64 * MIB):
            self.work(self.rng.randrange(20, 60))
        self.fill_and_compare()
        if self.rng.random() < 0.5:
            self.ballast.leave(0)
            self.work(self.rng.randrange(10))
        self.go_on_in_a_full_pool()
        with self.ballast.restless(64 * MIB):
            self.end()


@contextmanager
def full_pool(way: Way, spawner: Spawner, home: Path, tmp_path: Path, rng: random.Random) -> Iterator[Full]:
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(way.kind, DISK_BYTES, home / "disk.img", tmp_path / "disk"))
        pool = disk / "pool"
        if way.images == "apart":
            pool = (
                stack.enter_context(small_disk(way.kind, DISK_BYTES, home / "other.img", tmp_path / "other")) / "pool"
            )
        create_pool(pool, directories=[disk / "images"] if way.images == "apart" else [], journal_bytes=MIB)
        setting = Setting(BLOCK, way.cache, options="dump=off")
        target = Target(home, tmp_path / "mnt", setting, spawner, pool=pool)
        try:
            target.mount()
            text = f'[pool]\nextend_by = "4M"\nreserve = "16M"\nlow_water = "20M"\nwhen_full = "{way.when_full}"\n'
            target.call("policy.set", text=text)
            for name in (*VOLUMES, FILLER):
                target.call("volume.create", name=name, size_bytes=VOLUME_BLOCKS * BLOCK)
            target.signal(signal.SIGTERM)
            target.wait_for_end()
            yield Full(target, disk, rng, way)
        except BaseException as error:
            error.add_note(target.log.read_text()[-4000:])
            raise
        finally:
            target.take_down()


@pytest.mark.mount
@pytest.mark.loop
@pytest.mark.slow
@pytest.mark.timeout(20_000)
@pytest.mark.parametrize("way", [way for way in WAYS if ROUNDS or str(way) in SHORT], ids=str)
def test_full_again_and_again(way: Way, spawner: Spawner, pool_home: Path, tmp_path: Path) -> None:
    rounds = -(-ROUNDS // len(WAYS)) if ROUNDS else SHORT[str(way)]
    with full_pool(way, spawner, pool_home, tmp_path, random.Random(f"{SEED}{way}")) as full:
        for _ in range(rounds):
            full.round()
        full.begin()
        full.end()
        full.say("at the end")
        longest = {what: round(took, 2) for what, took in full.longest.items()}
        print(f"\n{way}: {rounds} rounds, {dict(full.counts)}, longest in s: {longest}")
