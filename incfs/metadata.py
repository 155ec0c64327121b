"""The copies of a pool's metadata as one: journal and tables in several directories, behind the interface of one.

Every copy that is up to date is written and flushed, side by side; reads use the first.  One that
fails is left behind as long as another has everything, and ``settle`` makes that known, durably,
before anything is acknowledged that it lacks: the generation of the roster is raised on all others, and the
epoch of the pool, so that alone it fits no image any more.

Concurrency: any thread, unless a method says otherwise.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from incfs.backing import Backing, File
from incfs.errors import BackingError, IncfsError, TablesLost
from incfs.lock import PoolLock
from incfs.overlay import Layer
from incfs.roster import MAX_COPIES, Roster, first_roster, write_roster
from incfs.tables import DATABASES, Puts, Reader, Tables

logger = logging.getLogger(__name__)

TABLES_NAME = "tables.mdb"
SINGLE = 1
"""The number of the only copy of a pool that has no roster."""

Result = TypeVar("Result")


class Copies:
    """Which copies of one open pool's metadata are up to date.

    Args:
        backing: The host's files.
        directories: Of the copies that are there, by number.
        locks: Of these.
        roster: None for a pool whose metadata is in one directory only.
        here: The copy by which the pool was opened.
    """

    def __init__(
        self,
        backing: Backing,
        directories: Mapping[int, Path],
        locks: Mapping[int, PoolLock],
        roster: Roster | None = None,
        here: int = SINGLE,
    ) -> None:
        self.backing = backing
        self.directories = dict(directories)
        self.locks = dict(locks)
        self.roster = roster
        self.here = here
        self.current: list[int] = [here] if roster is None else [n for n in roster.current if n in directories]
        """Copies that are written and flushed; the first is read."""
        self._failed: dict[int, str] = {}
        """Copies that were left behind and why, until somebody has told."""
        self.reasons: dict[int, str] = {}
        """Why a copy is not up to date, as far as that is known."""
        self.on_left: Callable[[], None] = lambda: None
        """Ends the epoch of the pool, once the others know who was left behind; set by the store."""
        self._is_settled = True
        self._lock = threading.Lock()
        self._settling = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def path_of(self, number: int) -> Path:
        """Say where a copy is, or was last."""
        place = self.roster.place(number) if self.roster is not None else None
        return self.directories.get(number) or Path(place.path if place is not None else "?")

    @property
    def home(self) -> Path:
        """The directory from which relative paths of images start, whether it is there or not."""
        if self.roster is None:
            return self.directories[self.here]
        return self.path_of(self.roster.home)

    @property
    def is_settled(self) -> bool:
        """Whether everybody who was left behind is known to be, durably."""
        return self._is_settled

    @property
    def current_directories(self) -> list[Path]:
        """The directories of the copies that are up to date."""
        return [self.directories[number] for number in list(self.current)]

    def leave_directory(self, directory: Path, error: IncfsError) -> bool:
        """Leave the copy in a directory behind; False when no other is up to date."""
        return all(self.leave(n, str(error)) for n, path in list(self.directories.items()) if path == directory)

    def each_directory(self, work: Callable[[Path], None]) -> None:
        """Do something in each directory; those that fail are left behind.

        Raises:
            IncfsError: All failed.
        """
        self.each({n: partial(work, self.directories[n]) for n in list(self.current)}, side_by_side=self.backing.waits)

    def prefer(self, number: int) -> None:
        """Let this copy be read."""
        with self._lock:
            self.current.sort(key=lambda other: other != number)

    def leave(self, number: int, reason: str) -> bool:
        """Stop using a copy; False when no other is up to date."""
        with self._lock:
            if number not in self.current:
                return True
            if self.current == [number]:
                return False
            self.current = [other for other in self.current if other != number]
            self._failed[number] = self.reasons[number] = reason
            self._is_settled = False
        logger.warning("metadata copy %d in %s is left behind: %s", number, self.directories.get(number), reason)
        return True

    def note_missing(self, numbers: Iterable[int]) -> None:
        """Have copies told of that were up to date when the pool was last open, and cannot be used now."""
        with self._lock:
            for number in numbers:
                self._failed.setdefault(number, self.reasons.setdefault(number, "it is away"))

    def take_failed(self) -> dict[int, str]:
        """Give the copies that were left behind since the last call, and why."""
        with self._lock:
            failed, self._failed = self._failed, {}
        return failed

    def settle(self) -> None:
        """Make it known who was left behind: the others alone count from now on.

        Durability: durable on return, on all of the others.

        Raises:
            BackingError: None of them can be written.
        """
        with self._settling:
            while not self._is_settled:
                with self._lock:
                    self._is_settled, current = True, list(self.current)
                assert self.roster is not None
                self._write(self.roster.raised(current), current)
                self.on_left()

    def change(self, update: Callable[[Roster], Roster], *, current: Callable[[list[int]], list[int]] = list) -> None:
        """Let the roster be another one, of the next generation.

        Args:
            update: Makes it of the one that holds.
            current: Says which copies are up to date from now on, of those that are.

        Durability: as ``settle``.
        """
        with self._settling:
            with self._lock:
                before, self.current = self.current, current(self.current)
                now = list(self.current)
            assert self.roster is not None
            self._write(update(self.roster).raised(now), now)
            if set(before) - set(now):
                self.on_left()
        self.settle()

    def _write(self, roster: Roster, current: list[int]) -> None:
        self.roster = roster
        try:
            # One that begins to count is told first: as soon as another says so, it may be opened alone.
            self.each({n: self._roster_writer(roster, n) for n in reversed(current)}, side_by_side=False)
        except BaseException:
            self._is_settled = False
            raise

    def _roster_writer(self, roster: Roster, number: int) -> Callable[[], None]:
        return lambda: write_roster(self.backing, self.directories[number], roster, number)

    def begin_roster(self, uuid: str) -> None:
        """Have a roster, if there is none: of the one directory so far, and not written yet."""
        if self.roster is None:
            self.roster = first_roster(uuid, Path(os.path.realpath(self.directories[self.here])))

    def join(self, number: int) -> None:
        """Let a copy that has everything count from now on.

        Durability: as ``settle``.
        """
        self.change(lambda roster: roster, current=lambda current: [*current, number])
        self.reasons.pop(number, None)

    def each(self, works: Mapping[int, Callable[[], Result]], *, side_by_side: bool = True) -> dict[int, Result]:
        """Do something for several copies; those that fail are left behind.

        Returns:
            What the others gave, by number.

        Raises:
            IncfsError: All failed; none is left behind.
        """
        results: dict[int, Result] = {}
        errors: dict[int, IncfsError] = {}
        for number, end in self._begun(works, side_by_side=side_by_side):
            try:
                results[number] = end()
            except IncfsError as error:
                errors[number] = error
        if not results:
            raise next(iter(errors.values()))
        for number, failure in errors.items():
            if not self.leave(number, str(failure)):
                raise failure
        return results

    def _begun(
        self, works: Mapping[int, Callable[[], Result]], *, side_by_side: bool
    ) -> list[tuple[int, Callable[[], Result]]]:
        """Begin all but the first in threads of their own, which stay; give what waits for each."""
        if not side_by_side or len(works) < 2:
            return list(works.items())
        if self._threads is None:
            self._threads = ThreadPoolExecutor(MAX_COPIES, thread_name_prefix="copies")
        (first, work), *others = works.items()
        begun = [(number, self._threads.submit(other).result) for number, other in others]
        return [(first, work), *begun]

    def release(self) -> None:
        """Let the next process have the pool."""
        if self._threads is not None:
            self._threads.shutdown()
        for lock in self.locks.values():
            lock.release()
        self.locks.clear()


def _for_all(works: Iterable[Callable[[], None]]) -> None:
    """Do all of it; raise the first error when all was tried."""
    errors: list[IncfsError] = []
    for work in works:
        try:
            work()
        except IncfsError as error:
            errors.append(error)
    if errors:
        raise errors[0]


class CopiedFile(File):
    """One file of the journal, in every copy.

    Args:
        copies: Which copies count.
        files: By number.
        first: The one that is read, as long as it is up to date.
    """

    def __init__(self, copies: Copies, files: Mapping[int, File], first: int) -> None:
        super().__init__(files[first].path, -1)
        self._copies = copies
        self._files = dict(files)
        self._preferred = first

    def _current(self) -> dict[int, File]:
        return {number: self._files[number] for number in self._copies.current if number in self._files}

    def _first(self) -> File:
        current = self._current()
        return current.get(self._preferred) or next(iter(current.values()))

    def add(self, number: int, file: File) -> None:
        """Have the file of another copy, too; it is used once the copy is up to date."""
        self.drop(number)
        self._files[number] = file

    def drop(self, number: int) -> None:
        """Close the file of a copy that is not up to date, if there is one."""
        if number in self._files:
            self._files.pop(number).close()

    def filenos(self) -> dict[int, int]:
        """Give the descriptors of the copies that are up to date, by number."""
        return {number: file.fileno() for number, file in self._current().items()}

    def fileno(self) -> int:
        """Give the descriptor of the copy that is read."""
        return self._first().fileno()

    def pread(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Read from the first copy that can."""
        errors = []
        for file in dict.fromkeys([self._first(), *self._current().values()]):
            try:
                return file.pread(offset_bytes, length_bytes)
            except BackingError as error:
                errors.append(error)
        raise errors[0]

    def pwrite(self, offset_bytes: int, data: bytes | memoryview) -> None:
        """Write to every copy."""
        self._copies.each(
            {n: lambda f=f: f.pwrite(offset_bytes, data) for n, f in self._current().items()},  # type: ignore[misc]
            side_by_side=False,
        )

    @property
    def waits(self) -> bool:
        """Whether any copy's sync does."""
        return any(file.waits for file in self._current().values())

    def sync(self) -> None:
        """Sync every copy, side by side."""
        self._copies.each({n: f.sync for n, f in self._current().items()}, side_by_side=self.waits)

    def reserve(self, end_bytes: int) -> None:
        """Set host space aside for every copy; one that has none is not left behind for that.

        Raises:
            NoSpace: One has none; the others have it set aside.
        """
        _for_all(partial(file.reserve, end_bytes) for file in self._current().values())

    def length_bytes(self) -> int:
        """Tell the length, the same in all."""
        return self._first().length_bytes()

    def close(self) -> None:
        """Close all of them."""
        for file in self._files.values():
            file.close()


class TableCopies:
    """The tables of every copy.

    Args:
        copies: Which copies count.
        tables: By number.
    """

    def __init__(self, copies: Copies, tables: Mapping[int, Tables]) -> None:
        self._copies = copies
        self._tables = dict(tables)

    def _current(self) -> dict[int, Tables]:
        return {number: self._tables[number] for number in self._copies.current if number in self._tables}

    @property
    def first(self) -> Tables:
        """The ones that are read."""
        return next(iter(self._current().values()))

    def verify(self, number: int) -> None:
        """Prove the tables of one copy, and read every value.

        Raises:
            FormatError, BackingError: They are damaged.
        """
        tables = self._current().get(number)
        if tables is None:
            return
        with tables.reading() as reader:
            reader.prove()
            for database in DATABASES:
                for _ in reader.bodies(database):
                    pass

    def add(self, number: int, tables: Tables) -> None:
        """Have the tables of another copy, too; they are used once it is up to date."""
        self._tables[number] = tables

    def drop(self, number: int) -> None:
        """Close the tables of a copy that is not up to date, when nobody reads from them any more."""
        if number in self._tables:
            self._tables.pop(number).close_when_idle()

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """Give a consistent view of the last checkpoint; a copy that cannot be read is left behind.

        Raises:
            TablesLost, BackingError: It was this one: whoever asks again reads another.
        """
        number, tables = next(iter(self._current().items()))
        try:
            with tables.reading() as reader:
                yield reader
        except (TablesLost, BackingError) as error:
            self._copies.leave(number, str(error))
            raise

    def write(self, layer: Layer, puts: Puts) -> None:
        """Fold a frozen layer and other values into the tables of each copy, in one transaction each.

        What the layer says holds whatever a copy has had of it before, so copies that a crash left
        one checkpoint apart are the same afterwards.

        Durability: durable on return in every copy that is still up to date.
        """
        current = self._current()
        works: dict[int, Callable[[], None]] = {n: self._writer(t, layer, puts) for n, t in current.items()}
        self._copies.each(works, side_by_side=all(tables.waits for tables in current.values()))
        self._copies.settle()

    @staticmethod
    def _writer(tables: Tables, layer: Layer, puts: Puts) -> Callable[[], None]:
        return lambda: tables.write(layer, puts)

    def set_aside(self, length_bytes: int) -> None:
        """Have every copy's host set space aside for its tables; one that has none is not left behind for that.

        Raises:
            NoSpace: One has none; the others have it set aside.
        """
        _for_all(self._reserver(t, length_bytes) for t in self._current().values())

    @property
    def reserved_bytes(self) -> int:
        """Tell how much the tables of each copy can surely grow by."""
        return min(tables.reserved_bytes for tables in self._current().values())

    def reserve(self, length_bytes: int) -> None:
        """Make sure that the hosts have room for the tables to grow; a copy that lacks it is left behind.

        Raises:
            NoSpace: None has room.
        """
        works = {n: self._reserver(t, length_bytes) for n, t in self._current().items()}
        self._copies.each(works, side_by_side=False)

    @staticmethod
    def _reserver(tables: Tables, length_bytes: int) -> Callable[[], None]:
        return lambda: tables.reserve(length_bytes)

    def used_bytes(self) -> int:
        """Tell how much of the map has ever been used."""
        return self.first.used_bytes()

    def map_bytes(self) -> int:
        """Tell the size of the map."""
        return self.first.map_bytes()

    def close(self) -> None:
        """Close all of them."""
        for tables in self._tables.values():
            tables.close()
