"""A backing that remembers every write and sync, and the disks that a power cut may leave.

``RecordingBacking`` does everything for real and keeps a list of events.  ``PowerCut`` takes
that list, a point in it and a choice for what was not synced yet, and makes the files that a
machine would find after the cut:

    what was synced is there; each later write to a file may be there, absent, or torn at 512
    bytes, independently of the others; a length may be as short as the last sync left it.

Simplification: names are durable at once (creating and renaming files is tested with pools
that are complete).  The tables' file is LMDB's own: each of its transactions is durable and
atomic by itself (measured: docs/design), so it is copied whole after each one.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from incfs.backing import Backing, File
from incfs.log import Tables

SECTOR = 512


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a file.

    ``kind`` is write, truncate, punch, sync or tables (the whole file after a transaction), or
    mark (something that the test wants to find again).
    """

    kind: str
    path: Path
    offset_bytes: int = 0
    length_bytes: int = 0
    data: bytes = b""
    note: Any = None


class RecordingFile(File):
    """A file that reports what is done to it."""

    def __init__(self, path: Path, fd: int, events: list[Event]) -> None:
        super().__init__(path, fd)
        self._events = events

    def pwrite(self, offset_bytes: int, data: bytes | memoryview) -> None:
        super().pwrite(offset_bytes, data)
        self._events.append(Event("write", self.path, offset_bytes, len(data), bytes(data)))

    def truncate(self, length_bytes: int) -> None:
        super().truncate(length_bytes)
        self._events.append(Event("truncate", self.path, length_bytes=length_bytes))

    def allocate(self, offset_bytes: int, length_bytes: int, *, keep_size: bool = False) -> None:
        before = self.length_bytes()
        super().allocate(offset_bytes, length_bytes, keep_size=keep_size)
        if self.length_bytes() != before:
            self._events.append(Event("truncate", self.path, length_bytes=self.length_bytes()))

    def punch(self, offset_bytes: int, length_bytes: int) -> bool:
        done = super().punch(offset_bytes, length_bytes)
        self._events.append(Event("punch", self.path, offset_bytes, length_bytes))
        return done

    def sync(self) -> None:
        super().sync()
        self._events.append(Event("sync", self.path))


class RecordingBacking(Backing):
    """Hands out files that report to one list of events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def _open(self, path: Path, flags: int) -> File:
        plain = super()._open(path, flags)
        fd = os.dup(plain.fileno())
        plain.close()
        return RecordingFile(path, fd, self.events)

    def mark(self, note: Any) -> None:
        """Put a mark into the list."""
        self.events.append(Event("mark", Path(), note=note))

    @contextmanager
    def recording_tables(self) -> Iterator[None]:
        """Copy the tables' file after each of its transactions, while this is entered."""
        original: Callable[..., None] = Tables.write

        def write(tables: Tables, *arguments: Any) -> None:
            original(tables, *arguments)
            self.events.append(Event("tables", tables._path, data=tables._path.read_bytes()))

        Tables.write = write  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Tables.write = original  # type: ignore[method-assign]


class Disk:
    """One file as a disk has it: what is durable, and what was done since."""

    def __init__(self, content: bytes) -> None:
        self._durable = bytearray(content)
        self._since: list[Event] = []

    def do(self, event: Event) -> None:
        """Note one event."""
        if event.kind == "tables":
            self._durable = bytearray(event.data)
        elif event.kind == "sync":
            for earlier in self._since:
                _apply(self._durable, earlier)
            self._since = []
        else:
            self._since.append(event)

    def after_cut(self, choose: "Choice") -> bytes:
        """Give the file that is found after the power was cut now."""
        content = bytearray(self._durable)
        for event in choose.order(self._since):
            for part in choose.parts(event):
                _apply(content, part)
        return bytes(content)


def _apply(content: bytearray, event: Event) -> None:
    end = event.offset_bytes + event.length_bytes
    if event.kind == "truncate":
        del content[event.length_bytes :]
        content.extend(bytes(event.length_bytes - len(content)))
    elif event.kind == "punch":
        end = min(end, len(content))
        content[event.offset_bytes : end] = bytes(max(0, end - event.offset_bytes))
    elif event.kind == "write":
        content.extend(bytes(max(0, end - len(content))))
        content[event.offset_bytes : end] = event.data


class Choice:
    """What a power cut does to unsynced writes: kept, dropped, torn, or each by chance."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.kind = kind
        self._random = Random(f"{kind}{seed}")

    def order(self, events: list[Event]) -> list[Event]:
        """Say in which order the writes reach the disk; changes of length keep their place."""
        if self.kind != "mixed" or any(event.kind != "write" for event in events):
            return events
        return self._random.sample(events, len(events))

    def parts(self, event: Event) -> list[Event]:
        """Say which parts of one unsynced event reach the disk."""
        if self.kind == "kept":
            return [event]
        if self.kind == "dropped":
            return []
        if event.kind != "write":
            return [event] if self._random.random() < 0.5 else []
        sectors = list(_sectors(event))
        if self.kind == "torn-head":
            return sectors[: len(sectors) // 2]
        if self.kind == "torn-tail":
            return sectors[len(sectors) // 2 :]
        whole = self._random.random()
        return sectors if whole < 0.3 else [s for s in sectors if self._random.random() < 0.5] if whole < 0.7 else []


CHOICES = ("kept", "dropped", "torn-head", "torn-tail", "mixed")


def _sectors(event: Event) -> Iterator[Event]:
    """Cut a write at the disk's sector borders."""
    position = 0
    while position < event.length_bytes:
        offset = event.offset_bytes + position
        size = min(SECTOR - offset % SECTOR, event.length_bytes - position)
        yield Event("write", event.path, offset, size, event.data[position : position + size])
        position += size


class PowerCut:
    """Plays events into the disks of a pool, and makes copies of it as after a power cut.

    Args:
        root: The directory that holds everything; its files now are durable.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._disks = {p: Disk(p.read_bytes()) for p in root.rglob("*") if p.is_file()}

    def play(self, event: Event) -> None:
        """Let one event happen."""
        if event.kind != "mark":
            self._disks.setdefault(event.path, Disk(b"")).do(event)

    def make(self, target: Path, choice: Choice) -> None:
        """Cut the power now: make ``target`` a copy of the root as it is found afterwards."""
        shutil.rmtree(target, ignore_errors=True)
        for path, disk in self._disks.items():
            copied = target / path.relative_to(self._root)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(disk.after_cut(choice))
