"""Host files in memory that remember what was done to them: the seam of the crash simulator.

``MemoryBacking`` keeps images, journal and superblock in memory and notes each write, change of
length, sync and change of a name as an ``Event``.  Only LMDB needs a file that is real: what a
transaction changed in it is noted as LMDB wrote it.  Seen with strace, a transaction is

    the new pages (pwrite, writev), fdatasync, 120 bytes of the older meta page through O_DSYNC

and the two syncs are left out of the events when the environment was opened without them.

It also remembers what was read of the media it was given.  Recovery is deterministic, so two
media that agree in what the recovery of one of them has read are recovered alike.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from incfs.backing import Backing, File
from incfs.errors import AlreadyExists, BackingError, MetadataFull, NoSpace
from incfs.metadata import TABLES_NAME
from incfs.tables import Tables

SECTOR = 512
CHUNK = 64
"""Unit in which it is remembered what was written: the smallest block."""
PAGE = 4096
"""Of LMDB on this machine; asserted where it is used."""

Media = dict[str, bytes]
"""The files of a pool: name relative to its root -> content."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    ``kind`` is write, truncate, punch, sync (of a file); create, replace (to the name in
    ``note``), remove, sync-directory; or mark: something that the test wants to find again.
    """

    kind: str
    name: str = ""
    offset_bytes: int = 0
    length_bytes: int = 0
    data: bytes = b""
    note: Any = None


class MemoryFile(File):
    """One file in memory."""

    def __init__(self, path: Path, name: str, host: "MemoryBacking") -> None:
        super().__init__(path, -1)
        self._name = name
        self._host = host

    def pread(self, offset_bytes: int, length_bytes: int) -> bytes:
        self._host.meet("read", self.path)
        data = bytes(self._host.files[self._name][offset_bytes : offset_bytes + length_bytes])
        self._host.note_read(self._name, offset_bytes, data)
        if len(data) < length_bytes:
            raise BackingError(f"{self.path} ends at byte {offset_bytes + len(data)}", path=str(self.path))
        return data

    def pread_cached(self, offset_bytes: int, length_bytes: int) -> bytes | None:
        return self.pread(offset_bytes, length_bytes)

    def pwrite(self, offset_bytes: int, data: bytes | memoryview) -> None:
        event = Event("write", self._name, offset_bytes, len(data), bytes(data))
        self._host.meet("write", self.path, event)
        self._host.do(event)

    def truncate(self, length_bytes: int) -> None:
        self._host.meet("resize", self.path)
        self._host.do(Event("truncate", self._name, length_bytes=length_bytes))

    def allocate(self, offset_bytes: int, length_bytes: int, *, keep_size: bool = False) -> None:
        self._host.meet("grow", self.path)
        end = offset_bytes + length_bytes
        if not keep_size and end > self.length_bytes():
            self._host.do(Event("truncate", self._name, length_bytes=end))

    def punch(self, offset_bytes: int, length_bytes: int) -> bool:
        self._host.meet("punch", self.path)
        self._host.do(Event("punch", self._name, offset_bytes, length_bytes))
        return True

    @property
    def waits(self) -> bool:
        return False  # the order of events is part of a test

    def sync(self) -> None:
        self._host.meet("sync", self.path)
        self._host.do(Event("sync", self._name))

    def length_bytes(self) -> int:
        return len(self._host.files[self._name])

    def allocated_bytes(self) -> int:
        return self.length_bytes()

    def host_free_bytes(self) -> int:
        return 1 << 40

    def host_total_bytes(self) -> int:
        return 1 << 40

    def host_device(self) -> int:
        return 1

    def keep_in_place(self) -> None:
        """It is."""

    def drop_cache(self, offset_bytes: int, length_bytes: int) -> None:
        """There is none."""

    def lock(self) -> None:
        """One process has them all."""

    def close(self) -> None:
        """Nothing is open."""


class TablesFile(File):
    """LMDB's file, which is a real one."""

    def __init__(self, path: Path, name: str, fd: int, host: "MemoryBacking") -> None:
        super().__init__(path, fd)
        self._name = name
        self._host = host

    def allocate(self, offset_bytes: int, length_bytes: int, *, keep_size: bool = False) -> None:
        """There is room, unless a fault is injected."""
        self._host.meet("reserve", self.path)

    def pwrite(self, offset_bytes: int, data: bytes | memoryview) -> None:
        """A copy of the tables is made."""
        event = Event("write", self._name, offset_bytes, len(data), bytes(data))
        self._host.meet("write", self.path, event)
        super().pwrite(offset_bytes, data)
        self._host.events.append(event)

    def sync(self) -> None:
        self._host.meet("sync", self.path)
        self._host.events.append(Event("sync", self._name))
        self._host.tables[self._name] = self.path.read_bytes()


class MemoryBacking(Backing):
    """Hands out files in memory.

    Args:
        root: A real directory, where every file has an empty namesake: it is asked whether
            they exist.  The pool is in ``root / "pool"``.
    """

    waits = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, bytearray] = {}
        self.events: list[Event] = []
        self.reads: list[tuple[str, int, bytes]] = []
        """(name, offset, content) of what was read and not written here before, in order."""
        self._read_before: set[tuple[str, int, int]] = set()
        self._written: dict[str, set[int]] = {}
        self._prefix = len(str(root)) + 1
        self.tables: dict[str, bytes] = {}
        """What LMDB's files held when they were last looked at."""

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Let the test look at the pool without meeting faults."""
        yield

    # Media

    def load(self, media: Media) -> None:
        """Put these files in the place of what is there."""
        for name in self._placed() - media.keys():
            (self.root / name).unlink()
        for name, content in media.items():
            path = self.root / name
            if self._is_tables(name):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            elif not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        self.files = {name: bytearray(content) for name, content in media.items() if not self._is_tables(name)}
        self.tables = {name: content for name, content in media.items() if self._is_tables(name)}
        self.events, self.reads, self._written, self._read_before = [], [], {}, set()

    def _placed(self) -> set[str]:
        return {self._name(path) for path in self.root.rglob("*") if path.is_file() and not path.name.endswith("lock")}

    def _tables_names(self) -> set[str]:
        return {self._name(path) for path in self.root.glob(f"*/{TABLES_NAME}")}

    def media(self) -> Media:
        """Copy the files as a program sees them now."""
        found = {name: bytes(content) for name, content in self.files.items()}
        return found | {name: (self.root / name).read_bytes() for name in self._tables_names()}

    @staticmethod
    def _is_tables(name: str) -> bool:
        return name.endswith(TABLES_NAME)

    # What happens

    def meet(self, action: str, path: Path, event: Event | None = None) -> None:
        """Come to an operation that may fail; here none does."""

    def mark(self, note: Any) -> None:
        """Put a mark into the list."""
        self.events.append(Event("mark", note=note))

    def do(self, event: Event) -> None:
        """Let something happen to a file."""
        if event.kind != "sync":
            apply(self.files[event.name], event)
            first, end = -(-event.offset_bytes // CHUNK), (event.offset_bytes + event.length_bytes) // CHUNK
            if event.kind == "write":
                self._written.setdefault(event.name, set()).update(range(first, end))
        self.events.append(event)

    def note_read(self, name: str, offset_bytes: int, data: bytes) -> None:
        """Remember what was read, but for what was written here."""
        written = self._written.get(name, ())
        start: int | None = offset_bytes
        end = offset_bytes + len(data)
        for at in range(offset_bytes - offset_bytes % CHUNK, end, CHUNK) if written else ():
            here = max(at, offset_bytes)
            if at // CHUNK not in written:
                start = here if start is None else start
            elif start is not None:
                self._add_read(name, start, data[start - offset_bytes : here - offset_bytes])
                start = None
        if start is not None:
            self._add_read(name, start, data[start - offset_bytes :])

    def _add_read(self, name: str, offset_bytes: int, data: bytes) -> None:
        read = name, offset_bytes, len(data)
        if data and read not in self._read_before:
            self._read_before.add(read)
            self.reads.append((name, offset_bytes, data))

    # Backing

    def _name(self, path: Path) -> str:
        return str(path)[self._prefix :]

    def _open(self, path: Path, flags: int) -> File:
        name = self._name(path)
        if self._is_tables(name):
            if flags & os.O_CREAT:
                self.events.append(Event("create", name))
            return TablesFile(path, name, os.open(path, flags | os.O_CLOEXEC), self)
        if flags & os.O_CREAT:
            if name in self.files:
                raise AlreadyExists(f"cannot create {path}: it exists", path=str(path))
            path.touch()
            self.files[name] = bytearray()
            self.events.append(Event("create", name))
        if name not in self.files:
            raise BackingError(f"cannot open {path}: it does not exist", path=str(path))
        return MemoryFile(path, name, self)

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self.files[self._name(target)] = self.files.pop(self._name(source))
        self.events.append(Event("replace", self._name(source), note=self._name(target)))

    def remove(self, path: Path) -> None:
        super().remove(path)
        name = self._name(path)
        self.files.pop(name, None)
        if not name.endswith("-lock"):  # LMDB's, which it makes anew
            self.events.append(Event("remove", name))

    def sync_directory(self, path: Path) -> None:
        self.events.append(Event("sync-directory", self._name(path)))

    # LMDB

    @contextmanager
    def recording_tables(self) -> Iterator[None]:
        """Note what LMDB's transactions do to its file, while this is entered."""
        write: Callable[..., None] = Tables.write
        begin: Callable[..., None] = Tables.__init__

        def recorded_write(tables: Tables, *arguments: Any) -> None:
            with _as_lmdb_says():
                self.meet("commit", tables._path)
            write(tables, *arguments)
            self._note_tables(tables)

        def recorded_begin(tables: Tables, *arguments: Any, create: bool = False, **options: Any) -> None:
            begin(tables, *arguments, create=create, **options)
            if create:
                self.tables[self._name(tables._path)] = b""
                self._note_tables(tables)

        Tables.write = recorded_write  # type: ignore[method-assign, assignment]
        Tables.__init__ = recorded_begin  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Tables.write = write  # type: ignore[method-assign]
            Tables.__init__ = begin  # type: ignore[method-assign]

    def _note_tables(self, tables: Tables) -> None:
        name, after = self._name(tables._path), tables._path.read_bytes()
        before = self.tables[name]
        assert tables._env.stat()["psize"] == PAGE
        flags = tables._env.flags()
        self.tables[name] = after
        changed = [
            Event("write", name, at, PAGE, after[at : at + PAGE])
            for at in range(0, len(after), PAGE)
            if after[at : at + PAGE] != before[at : at + PAGE]
        ]
        metas = [event for event in changed if event.offset_bytes < 2 * PAGE]
        self.events += [event for event in changed if event.offset_bytes >= 2 * PAGE or not before]
        if flags["sync"]:
            self.events.append(Event("sync", name))
        for event in metas if before else ():
            self.events.append(Event("write", name, event.offset_bytes, SECTOR, event.data[:SECTOR]))
        if flags["sync"] and flags["metasync"]:
            self.events.append(Event("sync", name))


@contextmanager
def _as_lmdb_says() -> Iterator[None]:
    """Say it as ``Tables.write`` does when LMDB finds no room."""
    try:
        yield
    except NoSpace as error:
        raise MetadataFull(error.message, **error.facts) from error


def apply(content: bytearray, event: Event) -> None:
    """Do to a file's content what an event says."""
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


@contextmanager
def seeded_randomness(seed: int) -> Iterator[None]:
    """Let UUIDs and nonces be the same in every run."""
    original, random = os.urandom, Random(seed)
    os.urandom = random.randbytes
    try:
        yield
    finally:
        os.urandom = original
