"""A day's work in minutes: everything at random, for as long as asked for; what the daemon uses must not grow.

``make soak`` runs it for INCFS_SOAK_MINUTES (10; ordinary tests give it seconds).  One daemon serves writes, fsyncs,
discards, resizes, snapshots, whole lives of other volumes, and is unmounted, terminated and killed now and then.
After each round the volumes are compared with the model, the pool is checked, and memory, descriptors, threads
and space are looked at.  INCFS_SOAK_SEED sets the randomness.
"""

import os
import random
import select
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from incfs.unmount import unmount
from tests.support.fire import SECTOR_COUNTS, VOLUMES, Setting, Target, killing
from tests.support.spawner import Spawner
from tests.support.stamps import SECTOR, Model
from tests.support.writer import Writer

MINUTES = float(os.environ.get("INCFS_SOAK_MINUTES", "0.1"))
SEED = os.environ.get("INCFS_SOAK_SEED", "1")
MIB = 1 << 20
LIVE_BYTES = sum(SECTOR_COUNTS) * SECTOR

MAX_GROWTH_BYTES = 48 * MIB
"""Of one daemon's memory between its first and its last sample: its caches fill, its allocator keeps some."""
MAX_DESCRIPTOR_GROWTH = 4
MAX_THREADS = 60
MAX_TABLES_BYTES = 32 * MIB
MAX_IMAGES_BYTES = 256 * MIB
END_TIMEOUT_S = 60


@dataclass
class Sample:
    """What the daemon uses."""

    resident_bytes: int
    descriptors: int
    threads: int
    used_bytes: int
    images_bytes: int
    tables_bytes: int


class Daemon(Target):
    """A pool whose daemon ends in every way."""

    def sample(self) -> Sample:
        """Look at the daemon while it has nothing to do."""
        process = Path(f"/proc/{self.pid}")
        facts = self.call("pool.show")["pool"]
        return Sample(
            resident_bytes=int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            descriptors=len(os.listdir(process / "fd")),
            threads=len(os.listdir(process / "task")),
            used_bytes=facts["used_bytes"],
            images_bytes=facts["allocated_bytes"],
            tables_bytes=facts["metadata_used_bytes"],
        )

    def end(self, *, by_signal: bool) -> None:
        """Unmount, or terminate, and wait for the end."""
        pidfd = os.pidfd_open(self.pid)
        try:
            if by_signal:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            else:
                unmount(self.mountpoint)
            ended, _, _ = select.select([pidfd], [], [], END_TIMEOUT_S)
        finally:
            os.close(pidfd)
        assert ended, "the daemon does not end"
        self.pid = 0

    def live_and_die(self, rng: random.Random) -> None:
        """The whole life of another volume."""
        path = self.mountpoint / f"churn{rng.randrange(5)}"
        with open(path, "wb", buffering=0) as file:
            for _ in range(rng.randint(1, 8)):
                os.pwrite(file.fileno(), rng.randbytes(rng.randint(1, 100_000)), rng.randrange(1 << 22))
            snapshot = self.mountpoint / ".snapshots" / path.name / "s"
            if rng.random() < 0.5:
                snapshot.touch()
                os.pwrite(file.fileno(), b"x" * 5000, 0)
                snapshot.unlink()
            if rng.random() < 0.3:
                os.fsync(file.fileno())
            if rng.random() < 0.5:
                path.unlink()
        path.unlink(missing_ok=True)
        self.counts["lives"] += 1


class TimedWriter(Writer):
    """Stops by itself."""

    def run_for(self, seconds: float) -> None:
        """Make changes for some time, all of which are acknowledged in the end."""
        until = time.monotonic() + seconds
        self.fds = [os.open(self.target.mountpoint / name, os.O_RDWR) for name in VOLUMES]
        try:
            while time.monotonic() < until:
                change = self.rng.choice(self.changes)
                change(self.rng.randrange(len(VOLUMES)))
                self.target.counts[change.__name__] += 1
        finally:
            for fd in self.fds:
                os.close(fd)
        self.model.acknowledge(range(len(VOLUMES)))


class Soak:
    """The loop."""

    def __init__(self, daemon: Daemon, rng: random.Random) -> None:
        self.daemon, self.rng = daemon, rng
        self.model = Model(SECTOR_COUNTS)
        self.first: Sample | None = None
        self.largest_growth_bytes = 0
        self.samples: list[Sample] = []

    def run(self, seconds: float) -> None:
        """Work until the time is over."""
        self.daemon.mount()
        for name, count in zip(VOLUMES, SECTOR_COUNTS, strict=True):
            self.daemon.call("volume.create", name=name, size_bytes=count * SECTOR)
        until = time.monotonic() + seconds
        while time.monotonic() < until or len(self.samples) < 3:
            self.one_round()
        self.daemon.end(by_signal=False)

    def one_round(self) -> None:
        writer = TimedWriter(self.daemon, self.model, self.rng)
        writer.run_for(self.rng.uniform(0.2, 2))
        for _ in range(self.rng.randrange(4)):
            self.daemon.live_and_die(self.rng)
        end = self.rng.choice(["stay"] * 7 + ["unmount", "terminate", "kill"])
        self.daemon.counts[end] += 1
        match end:
            case "unmount" | "terminate":
                self.daemon.end(by_signal=end == "terminate")
            case "kill":
                with killing(self.daemon, self.rng.uniform(0.02, 0.3)):
                    Writer(self.daemon, self.model, self.rng).run()
        if end != "stay":
            self.daemon.mount()
            self.first = None
        self.compare()

    def compare(self) -> None:
        """Everything is as the model says, and the daemon uses what it used before."""
        self.model.recover_exactly(self.daemon.found())
        self.daemon.check_snapshots(self.model)
        existing = {(v, name) for v in range(len(VOLUMES)) for name in self.model.snapshots(v)}
        self.model.frozen = {key: frozen for key, frozen in self.model.frozen.items() if key in existing}
        for name in os.listdir(self.daemon.mountpoint):  # a kill may leave one
            if name.startswith("churn"):
                with suppress(OSError):
                    (self.daemon.mountpoint / ".snapshots" / name / "s").unlink()
                (self.daemon.mountpoint / name).unlink()
        self.daemon.check_pool()
        sample = self.daemon.sample()
        self.samples.append(sample)
        self.first = self.first or sample
        self.require_bounded(self.first, sample)

    def require_bounded(self, first: Sample, sample: Sample) -> None:
        """Nothing grows beyond its bound.  Space: live data and at most four snapshots of each volume."""
        growth = sample.resident_bytes - first.resident_bytes
        self.largest_growth_bytes = max(self.largest_growth_bytes, growth)
        assert growth < MAX_GROWTH_BYTES, (first, sample)
        assert sample.descriptors <= first.descriptors + MAX_DESCRIPTOR_GROWTH, (first, sample)
        assert sample.threads < MAX_THREADS, sample
        assert sample.used_bytes < 6 * LIVE_BYTES, sample
        assert sample.images_bytes < MAX_IMAGES_BYTES, sample
        assert sample.tables_bytes < MAX_TABLES_BYTES, sample

    def report(self) -> str:
        """What was done and used."""
        last = self.samples[-1]
        most = max(sample.resident_bytes for sample in self.samples)
        return (
            f"soak of {MINUTES} minutes: {dict(self.daemon.counts)}\n"
            f"one daemon grew by up to {self.largest_growth_bytes / MIB:.1f} MiB to {most / MIB:.1f} MiB resident; "
            f"descriptors {min(s.descriptors for s in self.samples)} to {max(s.descriptors for s in self.samples)}, "
            f"threads up to {max(s.threads for s in self.samples)}; in the end {last}"
        )


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    """Starts daemons."""
    spawner = Spawner()
    yield spawner
    spawner.close()


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600 + 90 * MINUTES)
def test_soak(spawner: Spawner, pool_home: Path, tmp_path: Path) -> None:
    daemon = Daemon(pool_home, tmp_path / "mnt", Setting(4096, "none", 0), spawner)
    soak = Soak(daemon, random.Random(SEED))
    try:
        soak.run(60 * MINUTES)
    finally:
        daemon.take_down()
    print(soak.report())
