"""The writer of a pool under fire: random changes of two volumes, each noted before it is asked for."""

import errno
import os
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tests.mount.test_fusext import KEEP_SIZE, PUNCH_HOLE, libc
from tests.support.fire import SECTOR_COUNTS, VOLUMES, Target
from tests.support.stamps import SECTOR, Model, random_range, split_discard

GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV, errno.EIO)
"""What a system call says whose daemon was killed."""
MAX_SNAPSHOTS = 4
"""Of a volume, while the writer works; every one is compared in every round."""


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
        self.refusals: tuple[int, ...] = GONE
        """What a system call may say at the end."""
        self.completed = 0
        """Steps whose system calls returned."""
        changes = [self.write] * 60 + [self.fsync] * 12 + [self.discard] * 8
        changes += [self.snapshot] * 3 + [self.snapshot_both] * 2 + [self.remove_snapshot] * 4
        self.changes = changes + [self.resize] * 3 * self.is_strict

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Work; returns when a system call failed because the daemon has gone, or when ``until`` says so."""
        fds: list[int] = []
        try:
            fds += (os.open(self.target.mountpoint / name, os.O_RDWR) for name in VOLUMES)
            self.fds = fds
            while not until():
                change = self.rng.choice(self.changes)
                change(self.rng.randrange(len(VOLUMES)))
                self.completed = len(self.model.steps)
                self.target.counts[change.__name__] += 1
        except OSError as error:
            if error.errno not in self.refusals:
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
                raise self._failure("fallocate")

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
            raise self._failure(verb) from error

    def _failure(self, what: str) -> Exception:
        """Say what failed while the daemon lives."""
        if errno.ENOMEM in self.refusals:
            return OSError(errno.ENOMEM, f"{what} was refused")
        return AssertionError(f"{what} failed while the daemon lives")
