"""Another program on a host filesystem: takes the rest of the disk and gives it back, as it likes."""

import os
import random
import threading
from contextlib import AbstractContextManager
from pathlib import Path

from tests.support.beside import beside
from tests.support.loop import run

MIB = 1 << 20
_PAUSE_S = 0.02


class Ballast:
    """One file that grows and shrinks.

    Args:
        directory: On the filesystem.
        rng: How much, and when.
    """

    def __init__(self, directory: Path, rng: random.Random) -> None:
        self._path = directory / "ballast"
        self._rng = rng
        self._path.touch()

    @property
    def free_bytes(self) -> int:
        """Tell what the filesystem has left."""
        found = os.statvfs(self._path.parent)
        return found.f_bavail * found.f_frsize

    def leave(self, free_bytes: int) -> None:
        """Take or give back until about so much is left, as the filesystem counts in the end; 0: nothing at all."""
        self._have_counted()
        self._take_but(free_bytes)
        self._have_counted()

    def _have_counted(self) -> None:
        """Btrfs counts what is taken and freed when it commits."""
        run("sync", "-f", self._path.parent)

    def _take_but(self, free_bytes: int) -> None:
        with open(self._path, "r+b", buffering=0) as file:
            length = file.seek(0, os.SEEK_END)
            lacking = free_bytes - self.free_bytes
            if lacking > 0:
                file.truncate(max(0, length - lacking))
                return
            step = MIB
            while step and (free_bytes == 0 or self.free_bytes > free_bytes):
                try:
                    os.posix_fallocate(file.fileno(), length, step)
                    length += step
                except OSError:
                    step = step // 16 // 4096 * 4096

    def restless(self, most_bytes: int) -> AbstractContextManager[None]:
        """Take and give back all the time, while the body runs."""

        def work(is_over: threading.Event) -> None:
            while not is_over.wait(self._rng.uniform(0, 5 * _PAUSE_S)):
                self._take_but(self._rng.choice([0, 0, self._rng.randrange(most_bytes)]))

        return beside(work)
