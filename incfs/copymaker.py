"""Copies of a pool's metadata are made, brought up to date and removed.

A copy is made in two parts: ``begin`` writes tables and journal while commits go on, but no
checkpoint; ``finish`` adds what was committed meanwhile, and lets it count.  Until then the roster
everywhere, the copy's own included, says that it is not up to date, so a half-made one is never opened.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from incfs.backing import Backing, File, translated
from incfs.epoch import EPOCH_NAME
from incfs.errors import AlreadyExists, IncfsError, LimitExceeded, NotFound, UsageError
from incfs.gather import real_directory
from incfs.journal import journal_paths
from incfs.lock import LOCK_NAME, PoolLock
from incfs.metadata import TABLES_NAME
from incfs.parts import write_standing
from incfs.roster import MAX_COPIES, ROSTER_NAME, Place, read_roster, write_roster
from incfs.store import Store
from incfs.superblock import SUPERBLOCK_NAME, encode_superblock
from incfs.tables import Tables

logger = logging.getLogger(__name__)

_TABLE_NAMES = (TABLES_NAME, f"{TABLES_NAME}-lock")


@dataclass(slots=True)
class Begun:
    """A copy that lacks what is being committed."""

    number: int
    files: tuple[File, File]
    copied_bytes: int
    """How much of the journal's current segment it has."""
    tables: Tables

    def abandon(self) -> None:
        """Let go of its files; it stays a copy that does not count."""
        self.tables.close()
        for file in self.files:
            file.close()


def announce(store: Store, directory: Path, *, force: bool = False) -> int:
    """Note that a directory is to hold a copy; give its number.  Nobody commits meanwhile.

    Args:
        store: The pool.
        directory: Made if missing; otherwise empty, or what an addition left that was cut off.
        force: Also on a filesystem that has a copy already.

    Raises:
        AlreadyExists: The directory is not empty.
        UsageError: It is on the filesystem of another copy, whose failure would take both.
        LimitExceeded: There are four copies.
    """
    copies, backing = store.copies, store.backing
    copies.begin_roster(store.superblock.uuid)
    assert copies.roster is not None
    directory = real_directory(directory)
    known = next((place for place in copies.roster.places if place.path == str(directory)), None)
    if known is not None:
        return known.number
    if len(copies.roster.places) >= MAX_COPIES:
        raise LimitExceeded(f"a pool has at most {MAX_COPIES} copies of its metadata; remove one first")
    if not _is_left_over(store, directory):
        require_free(directory)
    require_separate(backing, [*(copies.directories[n] for n in copies.current), directory], force=force)
    backing.make_directory(directory)
    copies.change(lambda roster: roster.with_place(directory))
    return copies.roster.places[-1].number


def require_free(directory: Path) -> None:
    """Refuse a directory that holds files; directories may be in it, for images.

    Raises:
        AlreadyExists: It does.
    """
    with translated(directory, "examine"):
        found = [path.name for path in directory.iterdir() if not path.is_dir()] if directory.exists() else []
    if any(name != LOCK_NAME for name in found):
        raise AlreadyExists(f"{directory} is not empty; choose another directory", path=str(directory))


def require_separate(backing: Backing, directories: Sequence[Path], *, force: bool) -> None:
    """Refuse directories of which one failure would take two.

    Raises:
        UsageError: Two are the same or lie on one filesystem, and nobody insists.
        LimitExceeded: There are too many.
    """
    if len(directories) > MAX_COPIES:
        raise LimitExceeded(f"a pool has at most {MAX_COPIES} copies of its metadata")
    devices: dict[int, Path] = {}
    for directory in directories:
        above = next(path for path in (directory, *directory.parents) if path.is_dir())
        other = devices.setdefault(backing.measure_directory(above)[2], directory)
        is_same = sum(real_directory(directory) == real_directory(d) for d in directories) > 1
        if is_same or (other is not directory and not force):
            raise UsageError(
                f"{directory} and {other} lie on one filesystem, whose failure would take both; "
                f"choose directories on different disks, or say --force"
            )


def _is_left_over(store: Store, directory: Path) -> bool:
    """Whether an earlier copy of this pool is there that never counted, or was removed."""
    try:
        own = read_roster(store.backing, directory)
    except IncfsError:
        return False
    return own is not None and own[0].uuid == store.superblock.uuid and own[1] not in own[0].current


def begin(store: Store, number: int) -> Begun:
    """Write tables and journal into a copy's directory.  Any thread; no checkpoint runs meanwhile.

    Raises:
        PoolLocked: Another process uses the directory.
        BackingError, NoSpace: It cannot be written.
    """
    copies, backing = store.copies, store.backing
    place = _place(store, number)
    assert copies.roster is not None
    assert number not in copies.current, "a copy that counts is never written over"
    directory = Path(place.path)
    backing.make_directory(directory)
    _lock(store, number, directory)
    _drop(store, number)
    write_roster(backing, directory, copies.roster, number)  # first: from now on it is nothing that may be opened
    for name in _TABLE_NAMES:
        if (directory / name).exists():
            backing.remove(directory / name)
    store.table_copies.first.copy_to(directory / TABLES_NAME)
    files = _open_files(store, directory)
    try:
        copied_bytes = store.journal.copy_to(files)
        backing.replace_content(directory / SUPERBLOCK_NAME, encode_superblock(store.superblock))
        return Begun(number, files, copied_bytes, Tables(directory / TABLES_NAME, backing))
    except BaseException:
        for file in files:
            file.close()
        raise


def _place(store: Store, number: int) -> Place:
    roster = store.copies.roster
    place = roster.place(number) if roster is not None else None
    if place is None:
        raise NotFound(f"there is no metadata copy {number}")
    return place


def _lock(store: Store, number: int, directory: Path) -> None:
    locks = store.copies.locks
    if number in locks and not locks[number].is_of(directory):
        locks.pop(number).release()
    if number not in locks:
        locks[number] = PoolLock(directory)
    store.copies.directories[number] = directory


def _open_files(store: Store, directory: Path) -> tuple[File, File]:
    backing = store.backing
    first, second = (backing.open(p) if p.exists() else backing.create(p) for p in journal_paths(directory))
    for file in (first, second):
        file.keep_in_place()
    return first, second


def finish(store: Store, begun: Begun) -> None:
    """Add what was committed since ``begin``, and let the copy count.  Any thread; nobody commits meanwhile.

    Durability: durable on return.
    """
    try:
        store.journal.finish_copy(begun.files, begun.copied_bytes)
    except BaseException:
        begun.abandon()
        raise
    for file, other in zip(store.journal_files, begun.files, strict=True):
        file.add(begun.number, other)
    store.table_copies.add(begun.number, begun.tables)
    directory = store.copies.directories[begun.number]
    write_standing(store.backing, directory, UUID(store.superblock.uuid), store.standing)
    store.copies.join(begun.number)
    store.look_at_metadata()


def _drop(store: Store, number: int) -> None:
    """Close the files of a copy that does not count."""
    store.table_copies.drop(number)
    for file in store.journal_files:
        file.drop(number)


def bring_back(store: Store, number: int) -> None:
    """Do both, while nothing else happens to the pool."""
    finish(store, begin(store, number))
    tell_restored(store, number)


def tell_restored(store: Store, number: int) -> None:
    """Note that a copy counts again."""
    store.events.record("metadata-restored", f"metadata {_place(store, number).path}", "it has everything")


def bring_all_back(store: Store) -> None:
    """Bring copies up to date that were left behind and are there; what cannot be is said and harms nothing."""
    roster = store.copies.roster
    for place in roster.places if roster is not None else ():
        if place.number in store.copies.current or not is_there(store, place):
            continue
        try:
            bring_back(store, place.number)
        except IncfsError as error:
            store.copies.reasons[place.number] = str(error)
            logger.warning("metadata copy in %s cannot be brought up to date: %s", place.path, error)


def is_there(store: Store, place: Place) -> bool:
    """Whether a copy's directory is there, and that copy's: a disk that is away leaves an empty mount point."""
    try:
        own = read_roster(store.backing, Path(place.path))
    except IncfsError:
        return os.path.exists(Path(place.path) / ROSTER_NAME)  # damaged: it is written over
    return own is not None and (own[0].uuid, own[1]) == (store.superblock.uuid, place.number)


def remove(store: Store, number: int) -> Path:
    """Let a copy be no part of the pool any more; give its directory.  Any thread; nobody commits meanwhile.

    Raises:
        NotFound: There is no such copy.
        UsageError: The pool cannot do without it.
    """
    copies, place = store.copies, _place(store, number)
    assert copies.roster is not None
    if number == copies.here:
        raise UsageError(f"the pool is open by its copy in {place.path}; name another one with -p to remove this one")
    if number == copies.roster.home and (inside := _relative_images(store)):
        raise UsageError(f"images of the pool lie in {place.path}: {', '.join(inside)}; move them first")
    copies.change(
        lambda roster: roster.without(number), current=lambda current: [other for other in current if other != number]
    )
    copies.reasons.pop(number, None)
    store.journal.take_back()
    _drop(store, number)
    return Path(place.path)


def _relative_images(store: Store) -> list[str]:
    paths = (path for storage in store.catalog.storages.values() for path in storage.leg_paths)
    return [path for path in paths if not Path(path).is_absolute()]


def delete(store: Store, number: int, directory: Path) -> None:
    """Delete the files of a copy that was removed, the roster last.  Any thread.

    Raises:
        BackingError: The host failed; the copy is no part of the pool all the same.
    """
    backing = store.backing
    doomed = [
        directory / SUPERBLOCK_NAME,
        directory / EPOCH_NAME,
        *(directory / name for name in _TABLE_NAMES),
        *journal_paths(directory),
    ]
    for path in (*doomed, directory / ROSTER_NAME, directory / LOCK_NAME):
        with translated(path, "remove"):
            if path.exists():
                backing.remove(path)
    with translated(directory, "sync directory"):
        if directory.is_dir():
            backing.sync_directory(directory)
    lock = store.copies.locks.pop(number, None)
    store.copies.directories.pop(number, None)
    if lock is not None:
        lock.release()
