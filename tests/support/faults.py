"""Faults of the host: the n-th operation of a kind fails, once or from then on."""

import errno
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from incfs.backing import translate
from tests.support.media import Event, MemoryBacking

ACTIONS = ("read", "write", "sync", "resize", "grow", "punch", "reserve", "commit")
"""What may fail; ``reserve`` is room for LMDB, ``commit`` its transaction."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Fault:
    """What fails."""

    action: str
    number: int
    """From 0, among the operations of that kind."""
    host_errno: int
    lasts: bool = False
    """Every later one of that kind fails, too."""
    partly: bool = False
    """A write gets half of its bytes to the file before it fails."""

    def hits(self, action: str, number: int) -> bool:
        """Tell whether the operation of that number is one that fails."""
        return action == self.action and (number >= self.number if self.lasts else number == self.number)

    def __str__(self) -> str:
        how = (" and all later ones" if self.lasts else "") + (", half done" if self.partly else "")
        return f"{self.action} {self.number}{how}: {errno.errorcode[self.host_errno]}"


class FaultyBacking(MemoryBacking):
    """Files in memory, of which one operation fails once ``arm`` was called."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.counts: Counter[str] = Counter()
        self.met = 0
        """How often the fault has happened."""
        self.where = ""
        self._fault: Fault | None = None

    def arm(self, fault: Fault | None) -> None:
        """Begin to count, and let this fault happen."""
        self.counts.clear()
        self.met = 0
        self._fault = fault

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        fault, counts, self._fault = self._fault, self.counts.copy(), None
        try:
            yield
        finally:
            self._fault, self.counts = fault, counts

    def meet(self, action: str, path: Path, event: Event | None = None) -> None:
        number = self.counts[action]
        self.counts[action] += 1
        fault = self._fault
        if fault is None or not fault.hits(action, number):
            return
        self.met += 1
        self.where = path.name
        if fault.partly and event is not None:
            half = event.length_bytes // 2
            self.do(replace(event, length_bytes=half, data=event.data[:half]))
        raise translate(OSError(fault.host_errno, os.strerror(fault.host_errno)), path, action)
