"""Real host files whose power can be cut: for a pool whose data plane is the native one.

``OutageBacking`` hands out real files, since C code writes to their descriptors.  What is durable of them it learns
at each sync: what a file holds then is compared with what it held at the one before, and the sectors that differ are
played to a ``power.Machine``, which knows what a cut may leave.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from incfs.backing import Backing, File
from incfs.metadata import TABLES_NAME
from incfs.tables import Tables
from tests.support.media import SECTOR, Event, Media
from tests.support.power import Machine


class _OutageFile(File):
    """A real file that tells what is done to it."""

    def __init__(self, path: Path, fd: int, host: "OutageBacking") -> None:
        super().__init__(path, fd)
        self._host = host

    def _call(self, action: str, function: Callable[..., Any], *arguments: Any) -> Any:
        self._host.meet(action)
        result = super()._call(action, function, *arguments)
        if action == "sync":
            self._host.note_sync(self.path)
        return result

    def _fallocate(self, action: str, mode: int, offset_bytes: int, length_bytes: int) -> bool:
        self._host.meet(action)
        return super()._fallocate(action, mode, offset_bytes, length_bytes)

    @property
    def waits(self) -> bool:
        return False  # the order of events is part of a test


class OutageBacking(Backing):
    """Hands out the files below a directory, and can cut the power of its machine.

    Args:
        root: The directory; everything that is there is durable.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.meet: Callable[[str], None] = lambda _: None
        """Called before each operation on a file."""
        self.restart()

    def restart(self) -> None:
        """Begin anew with what is there, as after a boot."""
        self._known = read_media(self._root)
        self._machine = Machine(self._known)

    # What happens

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._root))

    def note_sync(self, path: Path) -> None:
        """Note that everything in a file is durable."""
        name = self._name(path)
        if name in self._known:
            self._note_writes(name)
            self._machine.play(Event("sync", name))

    def note_sync_of(self, fd: int) -> None:
        """Note the same of the file of a descriptor."""
        self.note_sync(Path(os.readlink(f"/proc/self/fd/{fd}")))

    def _note_writes(self, name: str) -> None:
        before, now = self._known[name], (self._root / name).read_bytes()
        if now == before:
            return
        if len(now) != len(before):
            self._machine.play(Event("truncate", name, length_bytes=len(now)))
        before = before[: len(now)].ljust(len(now), b"\0")
        for at in range(0, len(now), SECTOR):
            if (sector := now[at : at + SECTOR]) != before[at : at + SECTOR]:
                self._machine.play(Event("write", name, at, len(sector), sector))
        self._known[name] = now

    def cuts(self, limit: int, random: Random) -> Iterator[Media]:
        """Give what may be found when the power fails now: everything, only what is durable, or some of the rest."""
        for name in self._known:
            self._note_writes(name)
        yield from self._machine.cuts(limit, random)

    # Backing

    def _open(self, path: Path, flags: int) -> File:
        self.meet("open")
        plain = super()._open(path, flags)
        if flags & os.O_CREAT:
            self._known[self._name(path)] = b""
            self._machine.play(Event("create", self._name(path)))
        return _OutageFile(path, plain.fileno(), self)

    def replace(self, source: Path, target: Path) -> None:
        self.meet("replace")
        self._note_writes(self._name(source))
        super().replace(source, target)
        self._known[self._name(target)] = self._known.pop(self._name(source))
        self._machine.play(Event("replace", self._name(source), note=self._name(target)))

    def remove(self, path: Path) -> None:
        self.meet("remove")
        super().remove(path)
        del self._known[self._name(path)]
        self._machine.play(Event("remove", self._name(path)))

    def sync_directory(self, path: Path) -> None:
        self.meet("sync directory")
        super().sync_directory(path)
        self._machine.play(Event("sync-directory", self._name(path)))

    # LMDB

    @contextmanager
    def watching_tables(self) -> Iterator[None]:
        """Learn of LMDB's transactions, each durable when it has ended."""
        write: Callable[..., None] = Tables.write
        begin: Callable[..., None] = Tables.__init__

        def watched_write(tables: Tables, *arguments: Any) -> None:
            if tables._path.is_relative_to(self._root):
                self.meet("commit")
            write(tables, *arguments)
            self._note_tables(tables)

        def watched_begin(tables: Tables, *arguments: Any, **options: Any) -> None:
            begin(tables, *arguments, **options)
            self._note_tables(tables)

        Tables.write = watched_write  # type: ignore[method-assign, assignment]
        Tables.__init__ = watched_begin  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Tables.write = write  # type: ignore[method-assign]
            Tables.__init__ = begin  # type: ignore[method-assign]

    def _note_tables(self, tables: Tables) -> None:
        if tables._path.is_relative_to(self._root):
            self.note_sync(tables._path)


def read_media(root: Path) -> Media:
    """Read the files of a pool that matter after a power cut."""
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths if _is_medium(path)}


def _is_medium(path: Path) -> bool:
    is_metadata = path.name in ("superblock", "epoch", "copies", TABLES_NAME) or path.name.startswith("journal.")
    return is_metadata or path.suffix == ".img"


def place_media(root: Path, media: Media) -> None:
    """Let these files, and no others, be the pool's below a directory."""
    for name in read_media(root).keys() - media.keys():
        (root / name).unlink()
    for name, content in media.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
