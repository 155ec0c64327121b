"""``kill -9`` of the daemon at any moment: the volumes are exactly at a commit point, no older than the last fsync.

One writer writes stamped sectors to two volumes of one pool, discards, resizes, takes and removes snapshots, and
notes every fsync that returned.  The daemon is killed after 20 to 300 ms (in some rounds again while it recovers),
the pool is mounted again, and all that is found must be the state at *one* moment of the writer's history.

Without the kernel's write cache that moment is exact, over both volumes.  With it the kernel writes back in its own
order, as a disk with a volatile cache does: every sector then holds its acknowledged content or a later one, and
snapshots, which flush that cache, are exact still.

INCFS_KILL_ROUNDS sets the number of kills, INCFS_KILL_SEED the randomness.
"""

import errno
import os
import random
import re
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from incfs.control import connect_control
from incfs.mount_table import detach, find_mount
from incfs.recovery import create_pool
from tests.mount.test_fusext import KEEP_SIZE, PUNCH_HOLE, libc
from tests.support.spawner import Spawner
from tests.support.stamps import SECTOR, Cell, Model, random_range, read_sequences, split_discard

ROUNDS = int(os.environ.get("INCFS_KILL_ROUNDS", "108"))
SEED = int(os.environ.get("INCFS_KILL_SEED", "1"))
VOLUMES = ("first", "second")
SECTOR_COUNTS = [3000, 1500]
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV, errno.EIO)
"""What a system call says whose daemon was killed."""
START_TIMEOUT_S = 10
LAST_KILL_S = 0.3
MAX_SNAPSHOTS = 4
"""Of a volume, while the writer works; every one is compared in every round."""


@dataclass
class Setting:
    """A kind of pool and mount."""

    block_bytes: int
    cache: str
    share: int
    """Of nine rounds."""

    def __str__(self) -> str:
        return f"{self.block_bytes}-{self.cache}"


SETTINGS = [
    Setting(4096, "none", 3),
    Setting(512, "none", 2),
    Setting(65536, "none", 1),
    Setting(4096, "writeback", 2),
    Setting(512, "writeback", 1),
]


@dataclass
class Target:
    """A pool under fire."""

    home: Path
    """Of the pool: in memory if possible, for its thousands of syncs."""
    mountpoint: Path
    setting: Setting
    spawner: Spawner
    pid: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.pool, self.log = self.home / "pool", self.home / "log"
        self.mountpoint.mkdir()
        create_pool(self.pool, block_bytes=self.setting.block_bytes, journal_bytes=64 << 10)

    def begin_mount(self) -> socket.socket:
        """Start the daemon; the socket hears when it is ready."""
        notify = self.home / "notify"
        notify.unlink(missing_ok=True)
        heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        heard.bind(str(notify))
        heard.settimeout(START_TIMEOUT_S)
        self.pid = self.spawner.mount(self.pool, self.mountpoint, f"cache={self.setting.cache}", self.log, notify)
        return heard

    def mount(self) -> None:
        """Start the daemon and wait until the mount answers."""
        with self.begin_mount() as heard:
            assert heard.recv(100) == b"READY=1", self.log.read_text()

    def kill(self) -> None:
        """Kill the daemon and wait for its end."""
        if self.pid:
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(self.pid)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                ended, _, _ = select.select([pidfd], [], [], START_TIMEOUT_S)
                os.close(pidfd)
                assert ended, "the daemon does not die"
            self.pid = 0

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Have the daemon run a verb of the command line."""

        async def run() -> dict[str, Any]:
            async with connect_control(self.pool, lambda *_: None) as client:
                assert client is not None
                return await client.call(verb, **arguments)

        return trio.run(run)

    def take_down(self) -> None:
        """Leave nothing behind."""
        try:
            self.kill()
        finally:
            while find_mount(self.mountpoint):
                detach(self.mountpoint, lazy=True)

    def found(self) -> dict[Cell, int]:
        """Read everything: sectors, sizes, and the names of snapshots."""
        cells: dict[Cell, int] = {}
        for number, name in enumerate(VOLUMES):
            data = (self.mountpoint / name).read_bytes()
            cells["size", number] = len(data)
            cells |= {("sector", number, i): s for i, s in enumerate(read_sequences(number, data))}
            cells |= {("snapshot", number, s): 1 for s in os.listdir(self.mountpoint / ".snapshots" / name)}
        return cells

    def check_snapshots(self, model: Model) -> None:
        """Compare the content of every snapshot with the volume at its time."""
        for number, name in enumerate(VOLUMES):
            for snapshot in os.listdir(self.mountpoint / ".snapshots" / name):
                data = (self.mountpoint / ".snapshots" / name / snapshot).read_bytes()
                expected = model.frozen[number, snapshot]
                assert len(data) == expected.size_bytes, f"{name}@{snapshot}"
                assert read_sequences(number, data) == expected.sequences, f"{name}@{snapshot}"
                self.counts["snapshots compared"] += 1

    def check_pool(self) -> None:
        """Prove that each block has one owner and is what was written."""
        report = self.call("pool.check", data=True)["check"]
        assert report["is_clean"], report
        unexpected = re.findall(r".*(?:ERROR|CRITICAL|Traceback).*", self.log.read_text())
        assert not unexpected, unexpected


class Writer:
    """Makes random changes until the daemon is gone.

    Args:
        target: Where.
        model: What was asked for; volume numbers are indexes of ``VOLUMES``.
        rng: What to do next.
    """

    def __init__(self, target: Target, model: Model, rng: random.Random) -> None:
        self.target, self.model, self.rng = target, model, rng
        self.is_strict = target.setting.cache == "none"
        changes = [self.write] * 60 + [self.fsync] * 12 + [self.discard] * 8
        changes += [self.snapshot] * 3 + [self.snapshot_both] * 2 + [self.remove_snapshot] * 4
        self.changes = changes + [self.resize] * 3 * self.is_strict

    def run(self) -> None:
        """Work; returns when a system call failed because the daemon was killed."""
        fds: list[int] = []
        try:
            fds += (os.open(self.target.mountpoint / name, os.O_RDWR) for name in VOLUMES)
            self.fds = fds
            while True:
                change = self.rng.choice(self.changes)
                change(self.rng.randrange(len(VOLUMES)))
                self.target.counts[change.__name__] += 1
        except OSError as error:
            if error.errno not in GONE:
                raise
        finally:
            for fd in fds:
                with suppress(OSError):
                    os.close(fd)

    def write(self, volume: int) -> None:
        longest = self.rng.choice([1, 8, 8, 24, 24, 250])
        first, count = random_range(self.rng, SECTOR_COUNTS[volume], longest)
        data = self.model.write(volume, first, count)
        written = 0
        while written < len(data):  # a write that the kill cuts off is short, and the next one fails
            written += os.pwrite(self.fds[volume], data[written:], first * SECTOR + written)

    def fsync(self, volume: int) -> None:
        os.fsync(self.fds[volume])
        self.model.acknowledge([volume])

    def discard(self, volume: int) -> None:
        sectors = self.model.state["size", volume] // SECTOR
        if sectors:
            first, count = random_range(self.rng, sectors, 600)
            block_sectors = self.target.setting.block_bytes // SECTOR
            self.model.discard(volume, split_discard(first, count, block_sectors=block_sectors))
            if libc.fallocate(self.fds[volume], PUNCH_HOLE | KEEP_SIZE, first * SECTOR, count * SECTOR):
                # The C library's errno is not at hand; the next call fails if the daemon is gone.
                os.fstat(self.fds[volume])
                os.fsync(self.fds[volume])
                raise AssertionError("fallocate failed while the daemon lives")

    def resize(self, volume: int) -> None:
        size_bytes = self.rng.randint(SECTOR_COUNTS[volume] // 2, SECTOR_COUNTS[volume]) * SECTOR
        self.model.resize(volume, size_bytes)
        os.ftruncate(self.fds[volume], size_bytes)
        self.model.acknowledge()

    def snapshot(self, volume: int) -> None:
        if len(self.model.snapshots(volume)) >= MAX_SNAPSHOTS:
            return self.remove_snapshot(volume)
        name = f"s{self.model.sequence}"
        self.model.take_snapshots([volume], name)
        (self.target.mountpoint / ".snapshots" / VOLUMES[volume] / name).touch()
        return self.model.acknowledge([volume])

    def snapshot_both(self, volume: int) -> None:
        if any(len(self.model.snapshots(number)) >= MAX_SNAPSHOTS for number in range(len(VOLUMES))):
            return self.remove_snapshot(volume)
        name = f"g{self.model.sequence}"
        self.model.take_snapshots(range(len(VOLUMES)), name)
        self._command("snapshot.create", targets=[f"{volume}@{name}" for volume in VOLUMES])
        return self.model.acknowledge(range(len(VOLUMES)))

    def remove_snapshot(self, volume: int) -> None:
        names = self.model.snapshots(volume)
        if names:
            name = self.rng.choice(names)
            self.model.remove_snapshot(volume, name)
            (self.target.mountpoint / ".snapshots" / VOLUMES[volume] / name).unlink()
            self.model.acknowledge()

    def _command(self, verb: str, **arguments: Any) -> None:
        try:
            self.target.call(verb, **arguments)
        except Exception as error:
            os.fsync(self.fds[0])  # fails if the daemon is gone
            raise AssertionError(f"{verb} failed while the daemon lives") from error


@contextmanager
def killing(target: Target, delay_s: float) -> Iterator[None]:
    """Kill the daemon after a delay, while the body runs."""
    timer = threading.Timer(delay_s, target.kill)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@contextmanager
def committing(target: Target) -> Iterator[None]:
    """Commit all the time, while the body runs, at moments that the writer knows nothing of.

    Through the root directory: an fsync of a volume would wait for the write that is under way.
    """

    def commit() -> None:
        fd = -1
        with suppress(OSError):  # the daemon was killed
            fd = os.open(target.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
            while True:
                os.fsync(fd)
                target.counts["commits beside the writer"] += 1
        if fd >= 0:
            os.close(fd)

    thread = threading.Thread(target=commit)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def kill_while_recovering(target: Target, rng: random.Random) -> None:
    """Begin to mount and kill the daemon at a random moment before or soon after it is ready."""
    with target.begin_mount():
        time.sleep(rng.uniform(0, 0.15))
        target.kill()
    target.counts["kills"] += 1


def one_round(target: Target, model: Model, rng: random.Random) -> None:
    """Load, kill, mount again, compare."""
    beside = committing(target) if rng.random() < 0.6 else nullcontext()
    with killing(target, rng.uniform(0.02, LAST_KILL_S)), beside:
        Writer(target, model, rng).run()
    target.counts["kills"] += 1
    if rng.random() < 0.25:
        kill_while_recovering(target, rng)
    target.mount()
    if target.setting.cache == "none":
        target.counts["steps kept without fsync"] += model.recover_exactly(target.found())
    else:
        model.recover_loosely(target.found())
    target.check_snapshots(model)
    target.check_pool()


@pytest.mark.mount
@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.02, 0.05])
def test_killed_while_it_waits_for_its_own_mount(
    delay_s: float, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    """Snapshots flush the kernel's cache through the mount itself.

    When a thread of the daemon waited for that, SIGKILL could not end it: the mount hung and the pool stayed locked.
    """
    target = Target(pool_home, tmp_path / "mnt", Setting(4096, "writeback", 0), spawner)

    def take(number: int) -> None:
        volume = f"v{number}"
        with suppress(OSError), open(target.mountpoint / volume, "wb", buffering=0) as file:
            for _ in range(1000):
                file.write(b"x" * 100_000)
                (target.mountpoint / ".snapshots" / volume / f"s{time.monotonic_ns()}").touch()

    try:
        target.mount()
        threads = [threading.Thread(target=take, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.1 + delay_s)
        target.kill()
        for thread in threads:
            thread.join(START_TIMEOUT_S)
            assert not thread.is_alive(), "a write hangs on a mount whose daemon was killed"
        target.mount()
        target.check_pool()
    finally:
        target.take_down()


@pytest.mark.mount
def test_mounted_again_at_once(spawner: Spawner, pool_home: Path, tmp_path: Path) -> None:
    """The kernel answers ``stat`` of a dead mount from its cache for a while; it was taken for a live one."""
    target = Target(pool_home, tmp_path / "mnt", Setting(4096, "writeback", 0), spawner)
    try:
        for _ in range(3):
            target.mount()
            os.stat(target.mountpoint)
            target.kill()
        target.mount()
    finally:
        target.take_down()


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    """Starts daemons."""
    spawner = Spawner()
    yield spawner
    spawner.close()


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(20 + 3 * ROUNDS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_killed_daemon_leaves_exactly_a_commit_point(
    setting: Setting, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    rng = random.Random(f"{SEED} {setting}")
    target = Target(pool_home, tmp_path / "mnt", setting, spawner)
    model = Model(SECTOR_COUNTS)
    try:
        target.mount()
        for name, count in zip(VOLUMES, SECTOR_COUNTS, strict=True):
            target.call("volume.create", name=name, size_bytes=count * SECTOR)
        started = time.monotonic()
        for number in range(max(1, ROUNDS * setting.share // 9)):
            try:
                one_round(target, model, rng)
            except BaseException as error:
                error.add_note(f"in round {number} of {setting}, INCFS_KILL_SEED={SEED}")
                raise
        print(f"\n{setting}: {time.monotonic() - started:.1f} s, {dict(target.counts)}")
    finally:
        target.take_down()
