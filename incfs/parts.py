"""The parts of a pool: which of them belong together, read and raised from one epoch to the next (I14).

Owns the epoch file of each metadata directory and the order of a raise.  What fits and what does not,
``epoch`` says; what becomes of it, ``recovery`` decides.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from uuid import UUID

from incfs.backing import Backing, File, begun
from incfs.epoch import (
    EPOCH_NAME,
    NEVER,
    SLOT_BYTES,
    SLOT_STEP_BYTES,
    Epoch,
    Point,
    Stamp,
    Standing,
    decode_standing,
    encode_standing,
    next_counter,
)
from incfs.errors import BackingError, FormatError, IncfsError, NoSpace
from incfs.image import write_stamp
from incfs.model import StorageId

_RAISING_OFFSET, _SETTLED_OFFSET = SLOT_STEP_BYTES, 0


@dataclass(frozen=True, slots=True)
class Part:
    """An image, or a leg of a mirror, that is stamped."""

    storage_id: StorageId
    leg: int
    file: File


def first_epoch() -> Epoch:
    """Make the epoch that a new pool begins in."""
    return next_epoch(NEVER)


def next_epoch(*seen: Epoch) -> Epoch:
    """Make an epoch above all these."""
    return Epoch(next_counter(*seen), int.from_bytes(os.urandom(8), "little"))


# --------------------------------------------------------------------- a directory's epoch file


def create_standing(backing: Backing, directory: Path, pool: UUID, standing: Standing) -> None:
    """Make the epoch file of a new metadata directory.

    Durability: durable on return, but for its name.
    """
    file = backing.create(directory / EPOCH_NAME)
    file.keep_in_place()
    try:
        file.pwrite(_SETTLED_OFFSET, encode_standing(pool, standing, 0).ljust(SLOT_STEP_BYTES, b"\0") * 2)
        file.sync()
    finally:
        file.close()


def read_standing(backing: Backing, directory: Path, pool: UUID) -> Standing:
    """Read what a metadata directory says of itself.

    Raises:
        FormatError: The file is missing, both its slots are damaged, or it is another pool's.
    """
    path = directory / EPOCH_NAME
    if not path.is_file():
        raise FormatError(
            f"{path} is missing: it says which images belong to this directory; bring it back, "
            f"or go on without it: mount with -o force_older",
            path=str(path),
        )
    with _opened(backing, directory) as file:
        _, standing = _newest(file, pool)
        return standing


def write_standing(backing: Backing, directory: Path, pool: UUID, standing: Standing) -> None:
    """Let a metadata directory say this of itself from now on.

    Durability: durable on return.
    Atomicity: torn, it says what it said before.
    """
    if not (directory / EPOCH_NAME).is_file():
        create_standing(backing, directory, pool, standing)
        return backing.sync_directory(directory)
    with _opened(backing, directory) as file:
        serial = _last_serial(file, pool) + 1
        slot = encode_standing(pool, standing, serial)
        if standing.raising is not None:
            file.pwrite(_RAISING_OFFSET, slot)
            file.sync()
        else:
            file.pwrite(_SETTLED_OFFSET, slot)
            file.sync()
            # Nobody waits for it: damage of one of the two is harmless once the host has written it.
            file.pwrite(_RAISING_OFFSET, slot)
    return None


@contextmanager
def _opened(backing: Backing, directory: Path) -> Iterator[File]:
    file = backing.open(directory / EPOCH_NAME)
    try:
        yield file
    finally:
        file.close()


def _slots(file: File, pool: UUID) -> list[tuple[int, Standing]]:
    if file.length_bytes() < _RAISING_OFFSET + SLOT_BYTES:
        return []
    found = (decode_standing(pool, file.pread(offset, SLOT_BYTES)) for offset in (_SETTLED_OFFSET, _RAISING_OFFSET))
    return [slot for slot in found if slot is not None]


def _newest(file: File, pool: UUID) -> tuple[int, Standing]:
    slots = _slots(file, pool)
    if not slots:
        raise FormatError(
            f"{file.path} is damaged: it says which images belong to this directory; bring it back, "
            f"or go on without it: mount with -o force_older",
            path=str(file.path),
        )
    return max(slots, key=lambda slot: slot[0])


def _last_serial(file: File, pool: UUID) -> int:
    return max((serial for serial, _ in _slots(file, pool)), default=0)


# --------------------------------------------------------------------------------------- raising


@dataclass(frozen=True, slots=True)
class Raise:
    """One raise of a pool's epoch.  Any thread.

    Cut off anywhere, parts and directories fit each other as before: the next raise ends it first.

    Args:
        backing: The host's files.
        pool: UUID of the pool.
        directories: Its metadata directories, which all say the same.
        parts: Its sound images and legs.
        point: How far the directories are, durably.
        leave: Leaves a directory behind that failed; False when there is no other.
    """

    backing: Backing
    pool: UUID
    directories: Sequence[Path]
    parts: Sequence[Part]
    point: Point
    leave: Callable[[Path, IncfsError], bool] = lambda path, error: False

    def settle_host(self, *others: Callable[[], None]) -> None:
        """Have the host write what a process that was killed left in its cache: a raise relies upon it.

        Args:
            others: Flushes of what else is relied upon.
        """
        self._side_by_side([*others, *(part.file.sync for part in self.parts)])
        self._each(list(self.directories), self._flush)

    def _flush(self, directory: Path) -> Callable[[], None]:
        def flush() -> None:
            if not (directory / EPOCH_NAME).is_file():
                return
            with _opened(self.backing, directory) as file:
                file.sync()

        return flush

    def run(self, before: Standing, to: Epoch) -> tuple[Standing, dict[Part, IncfsError]]:
        """Raise to an epoch, or end a raise to it.

        Durability: parts and directories are at it, durably, on return.

        Returns:
            What the directories say now, and why legs could not be stamped whose fellows could.

        Raises:
            BackingError, NoSpace: The host failed; the next raise ends this one.
        """
        directories = list(self.directories)
        self._write(directories, replace(before, raising=to))
        failed = self._stamp(Stamp(to, self.point))
        after = Standing(to, is_unproved=before.is_unproved or before.is_adopting)
        self._write(directories, after)
        return after, failed

    @property
    def _waits(self) -> bool:
        return all(part.file.waits for part in self.parts)

    def _side_by_side(self, works: Sequence[Callable[[], None]]) -> None:
        with begun(works, side_by_side=self._waits) as ends:
            for end in ends:
                end()

    def _write(self, directories: list[Path], standing: Standing) -> None:
        write = partial(write_standing, self.backing, pool=self.pool, standing=standing)
        self._each(directories, lambda path: partial(write, path))

    def _each(self, directories: list[Path], work_for: Callable[[Path], Callable[[], None]]) -> None:
        """Do something in each directory; take those out of the list that failed and were left behind."""
        errors: dict[Path, IncfsError] = {}
        with begun([work_for(path) for path in directories], side_by_side=self._waits) as ends:
            for path, end in zip(directories, ends, strict=True):
                try:
                    end()
                except IncfsError as error:
                    errors[path] = error
        for path, failure in errors.items():
            if not self.leave(path, failure):
                raise failure
            directories.remove(path)

    def _stamp(self, stamp: Stamp) -> dict[Part, IncfsError]:
        failed: dict[Part, IncfsError] = {}
        works = [partial(_stamp_part, part.file, stamp) for part in self.parts]
        with begun(works, side_by_side=self._waits) as ends:
            for part, end in zip(self.parts, ends, strict=True):
                try:
                    end()
                except NoSpace:
                    raise
                except BackingError as error:
                    failed[part] = error
        stamped = {part.storage_id for part in self.parts if part not in failed}
        for part, reason in failed.items():
            if part.storage_id not in stamped:
                raise reason
        return failed


def _stamp_part(file: File, stamp: Stamp) -> None:
    write_stamp(file, stamp)
    file.sync()
