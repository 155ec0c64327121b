"""A pool under fire: a mounted daemon that may end at any moment.

The daemon is started by a ``Spawner``; how it is brought to its end is the test's business.  A ``Writer`` works on two
volumes until a system call says that the daemon has gone.  What is found afterwards is compared by the writer's
``Model``.
"""

import errno
import os
import re
import select
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from incfs.client import connect_control
from incfs.mount_table import detach, find_mount
from incfs.recovery import create_pool
from tests.support.beside import beside
from tests.support.spawner import Preparation, Spawner
from tests.support.stamps import SECTOR, Cell, Model, read_sequences

VOLUMES = ("first", "second")
SECTOR_COUNTS = [3000, 1500]
START_TIMEOUT_S = 60
"""Of what takes less than a second: a busy machine may be very slow, and what hangs hangs for ever."""


@dataclass
class Setting:
    """A kind of pool and mount."""

    block_bytes: int
    cache: str
    share: int = 0
    """Of nine rounds."""
    options: str = ""
    """Further mount options."""

    def __str__(self) -> str:
        return f"{self.block_bytes}-{self.cache}"

    @property
    def mount_options(self) -> str:
        """All of them."""
        return f"cache={self.cache}" + (f",{self.options}" if self.options else "")


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
    restarts_s: list[float] = field(default_factory=list)
    """From the start of a daemon, its predecessor killed, to the answer of the mount."""

    pool: Path = Path()
    """``home / "pool"`` if not given."""

    def __post_init__(self) -> None:
        self.pool = self.home / "pool" if self.pool == Path() else self.pool
        self.log = self.home / "log"
        self.mountpoint.mkdir(exist_ok=True)
        if not self.pool.exists():
            create_pool(self.pool, block_bytes=self.setting.block_bytes, journal_bytes=64 << 10)

    def begin_mount(self, *preparations: Preparation) -> socket.socket:
        """Start the daemon; the socket hears when it is ready."""
        assert not self.pid
        notify = self.home / "notify"
        notify.unlink(missing_ok=True)
        heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        heard.bind(str(notify))
        options = self.setting.mount_options
        self.pid = self.spawner.mount(self.pool, self.mountpoint, options, self.log, notify, preparations)
        return heard

    def mount(self, *preparations: Preparation) -> None:
        """Start the daemon and wait until the mount answers."""
        began = time.monotonic()
        with self.begin_mount(*preparations) as heard:
            assert self.answers(heard), self.log.read_text()
            assert heard.recv(100) == b"READY=1", self.log.read_text()
        self.restarts_s.append(time.monotonic() - began)

    def answers(self, heard: socket.socket) -> bool:
        """Wait until the mount answers, or the daemon has ended before that; tell which."""
        pidfd = os.pidfd_open(self.pid)
        told, _, _ = select.select([heard.fileno(), pidfd], [], [], START_TIMEOUT_S)
        os.close(pidfd)
        assert told, "the daemon neither starts nor ends"
        return heard.fileno() in told

    def has_ended(self, timeout_s: float) -> bool:
        """Wait for the daemon's end."""
        if self.pid:
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(self.pid)
                ended, _, _ = select.select([pidfd], [], [], timeout_s)
                os.close(pidfd)
                return bool(ended)
        return True

    def wait_for_end(self) -> None:
        """Wait until the daemon has ended."""
        assert self.has_ended(START_TIMEOUT_S), "the daemon does not end"
        self.pid = 0

    def signal(self, number: int) -> None:
        """Send the daemon a signal."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the daemon and wait for its end."""
        self.signal(signal.SIGKILL)
        self.wait_for_end()

    def create_volumes(self) -> None:
        """Make the volumes that the writer works on."""
        for name, count in zip(VOLUMES, SECTOR_COUNTS, strict=True):
            self.call("volume.create", name=name, size_bytes=count * SECTOR)

    def recover(self, model: Model) -> None:
        """Mount again, and compare everything with what the writer was promised."""
        self.mount()
        if self.setting.cache == "none":
            self.counts["steps kept without fsync"] += model.recover_exactly(self.found())
        else:
            model.recover_loosely(self.found())
        self.check_snapshots(model)
        self.check_pool()

    def report(self) -> str:
        """Say in one line what was done."""
        median_ms = 1000 * statistics.median(self.restarts_s)
        return f"{self.setting} {self.setting.options}: restart {median_ms:.0f} ms in the median, {dict(self.counts)}"

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Have the daemon run a verb of the command line."""

        async def run() -> dict[str, Any]:
            async with connect_control(self.pool, lambda *_: None) as client:
                if client is None:
                    raise ConnectionRefusedError(errno.ECONNREFUSED, "the daemon has gone")
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


@contextmanager
def killing(target: Target, delay_s: float) -> Iterator[None]:
    """Kill the daemon after a delay, while the body runs."""
    timer = threading.Timer(delay_s, target.kill)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def committing(target: Target) -> AbstractContextManager[None]:
    """Commit all the time, while the body runs, at moments that the writer knows nothing of.

    Through the root directory: an fsync of a volume would wait for the write that is under way.
    """

    def commit(is_over: threading.Event) -> None:
        fd = -1
        with suppress(OSError):  # the daemon was killed
            fd = os.open(target.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
            while not is_over.is_set():
                os.fsync(fd)
                target.counts["commits beside the writer"] += 1
        if fd >= 0:
            os.close(fd)

    return beside(commit)
