"""Finds the copies of a pool's metadata, takes their locks, and chooses those that may be opened.

A copy may be opened when the newest roster says that it is up to date and its tables and journal
are proved.  A crash may leave copies apart by what was under way: the last record or the next
segment's header, and one checkpoint.  So the journal is read from the copy that has most of it,
and folded over the tables of the copy that have least; afterwards they are alike.  Nothing is
written before ``Gathered.agree``.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from incfs.backing import Backing
from incfs.changes import decode_body
from incfs.epoch import Standing
from incfs.errors import BackingError, FormatError, IncfsError, JournalDamaged, MetadataStale, NotAPool, PoolLocked
from incfs.journal import Journal
from incfs.lock import PoolLock
from incfs.metadata import SINGLE, TABLES_NAME, CopiedFile, Copies, TableCopies
from incfs.parts import read_standing
from incfs.roster import ROSTER_NAME, Roster, read_roster
from incfs.superblock import Superblock, read_superblock
from incfs.tables import Tables

_TRIES = 3
"""Looks for the copies, when another process changes them meanwhile."""


@dataclass(slots=True)
class Found:
    """What was found in the directories that rosters name."""

    here: int
    newest: Roster
    directories: dict[int, Path]
    """Of the copies that are there."""
    rosters: dict[int, Roster]
    """Their own."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Why the others are not."""


@dataclass(slots=True)
class Sound:
    """A copy whose tables and journal are proved."""

    tables: Tables
    journal: Journal
    standing: Standing
    """The epoch that it is in."""
    segment: int
    """The tables' checkpoint: the journal segment that follows."""
    sequence: int
    """The last commit that they contain."""

    @property
    def end(self) -> tuple[int, int]:
        """How far the journal comes."""
        return self.journal.segment.number, self.journal.next_sequence

    def close(self) -> None:
        """Let go of the files."""
        self.tables.close()
        self.journal.close()


@dataclass(slots=True)
class Gathered:
    """What a pool is opened with."""

    superblock: Superblock
    copies: Copies
    tables: TableCopies
    journal: Journal
    journal_files: tuple[CopiedFile, CopiedFile]
    """Of that journal."""
    behind: dict[int, Journal] = field(default_factory=dict)
    """Journals that lack the last record, or the last header."""
    ahead: Journal | None = None

    def close(self) -> None:
        """Let go of every file and lock."""
        self.journal.close()
        self.tables.close()
        self.copies.release()

    def agree(self) -> None:
        """Let the copies that are opened be alike, and be the only ones that count: the first thing that is written."""
        copies, roster = self.copies, self.copies.roster
        if roster is None or self.ahead is None:
            return
        moved = roster
        for number, directory in copies.directories.items():
            moved = moved.moved(number, real_directory(directory))
        if moved != roster or sorted(roster.current) != sorted(copies.current):
            copies.note_missing(set(roster.current) - set(copies.current))
            copies.change(lambda _: moved)
        ahead = self.ahead
        for number, journal in self.behind.items():
            try:
                journal.catch_up(ahead)
            except IncfsError as error:
                if not copies.leave(number, str(error)):
                    raise
        self.behind = {}
        copies.settle()


def find(backing: Backing, directory: Path) -> Found | None:
    """Look for all copies of the pool that one of them is in; None for a pool that has no roster.

    Raises:
        FormatError: The roster is damaged.
        MetadataStale: Two copies were used without each other, or this one is not the pool's any more.
    """
    own = read_roster(backing, directory)
    if own is None:
        return None
    roster, here = own
    found = Found(here, roster, {here: directory}, {here: roster})
    while unknown := [p for p in found.newest.places if p.number not in found.directories | found.reasons]:
        for place in unknown:
            _look(backing, Path(place.path), place.number, found)
        found.newest = max(found.rosters.values(), key=lambda known: known.generation)
    _require_one_history(found)
    return found


def _look(backing: Backing, directory: Path, number: int, found: Found) -> None:
    try:
        own = read_roster(backing, directory)
    except IncfsError as error:
        found.reasons[number] = str(error)
        return
    if own is None:
        found.reasons[number] = f"{directory} has no {ROSTER_NAME} file" if directory.is_dir() else "it is away"
    elif own[0].uuid != found.newest.uuid or own[1] != number:
        found.reasons[number] = f"{directory} is of another pool, or another copy"
    else:
        found.directories[number], found.rosters[number] = directory, own[0]


def _require_one_history(found: Found) -> None:
    newest = found.newest
    if newest.place(found.here) is None:
        raise MetadataStale(
            f"{found.directories[found.here]} is no copy of the pool's metadata any more; "
            f"the pool is in {', '.join(place.path for place in newest.places)}"
        )
    for number, own in found.rosters.items():
        place = newest.place(number)
        if place is not None and number in own.current and own.generation > place.seen and own != newest:
            others = [str(found.directories[n]) for n in newest.current if n in found.directories]
            raise MetadataStale(
                f"the metadata in {found.directories[number]} and in {', '.join(others)} were each used without the "
                f"other; take the directory away (rename it) whose changes are to be given up, then open the other"
            )


def gather(directory: Path, backing: Backing) -> Gathered:
    """Take the locks of all copies that are there, and open those that may be.

    Raises:
        NotAPool, UnsupportedFormat, FormatError, JournalDamaged: No copy can be read; what is wrong with the first.
        PoolLocked: Another process has the pool open.
        MetadataStale: The newest copies are away.
    """
    with contextlib.ExitStack() as stack:
        found = find(backing, directory)
        if found is None:
            superblock = read_superblock(backing, directory)
            copies = Copies(backing, {SINGLE: directory}, {SINGLE: PoolLock(directory)})
            stack.callback(copies.release)
            gathered = _open_single(superblock, copies)
        else:
            found, locks = _lock(backing, directory, found)
            copies = Copies(backing, found.directories, locks, found.newest, found.here)
            stack.callback(copies.release)
            copies.reasons |= found.reasons
            gathered = _open_several(found, copies)
        stack.pop_all()
        return gathered


def _lock(backing: Backing, directory: Path, found: Found) -> tuple[Found, dict[int, PoolLock]]:
    """Lock every copy that is there, in the order of their numbers; then look again."""
    for _ in range(_TRIES):
        with contextlib.ExitStack() as stack:
            locks: dict[int, PoolLock] = {}
            for number in sorted(found.directories):
                try:
                    lock = locks[number] = PoolLock(found.directories[number])
                except PoolLocked:
                    raise
                except IncfsError as error:
                    found.reasons[number] = str(error)
                else:
                    stack.callback(lock.release)
            again = find(backing, directory)
            if again is not None and again.directories.keys() - found.reasons.keys() == locks.keys():
                again.directories = {number: again.directories[number] for number in locks}
                again.reasons = found.reasons | again.reasons
                stack.pop_all()
                return again, locks
            found = again or found
    raise PoolLocked(f"the copies of the metadata of {directory} are being changed by another process", pid="unknown")


def _open_single(superblock: Superblock, copies: Copies) -> Gathered:
    directory, backing = copies.directories[copies.here], copies.backing
    tables = Tables(directory / TABLES_NAME, backing)
    try:
        journal = Journal.open(backing, directory, UUID(superblock.uuid), segment_bytes=superblock.journal_bytes)
    except BaseException:
        tables.close()
        raise
    one, two = (CopiedFile(copies, {copies.here: file}, copies.here) for file in journal.files)
    return Gathered(
        superblock,
        copies,
        TableCopies(copies, {copies.here: tables}),
        Journal(UUID(superblock.uuid), (one, two), copies),
        (one, two),
    )


def _open_several(found: Found, copies: Copies) -> Gathered:
    newest = found.newest
    there = [number for number in newest.current if number in found.directories]
    there.sort(key=lambda number: number != found.here)
    if not there:
        names = [place.path for place in newest.places if place.seen == newest.generation]
        raise MetadataStale(
            f"the newest metadata of this pool is in {', '.join(names)}, which cannot be read; bring the disk back"
        )
    superblock = _read_any_superblock(copies, there)
    with contextlib.ExitStack() as stack:
        sound, errors = _examine_all(superblock, copies, there)
        for copy in sound.values():
            stack.callback(copy.close)
        if not sound:
            raise errors[there[0]]
        errors |= _drop_older_epochs(copies, sound)
        gathered = _join(superblock, copies, sound, errors)
        stack.pop_all()
        return gathered


def _read_any_superblock(copies: Copies, numbers: list[int]) -> Superblock:
    assert copies.roster is not None
    errors: list[IncfsError] = []
    for number in numbers:
        try:
            superblock = read_superblock(copies.backing, copies.directories[number])
            if superblock.uuid == copies.roster.uuid:
                return superblock
            raise FormatError(f"the superblock in {copies.directories[number]} is of another pool")
        except (NotAPool, FormatError, BackingError) as error:
            errors.append(error)
    raise errors[0]


def _examine_all(
    superblock: Superblock, copies: Copies, numbers: list[int]
) -> tuple[dict[int, Sound], dict[int, IncfsError]]:
    sound: dict[int, Sound] = {}
    errors: dict[int, IncfsError] = {}
    for number in numbers:
        try:
            sound[number] = _examine(superblock, copies.backing, copies.directories[number])
        except IncfsError as error:
            errors[number] = error
    return sound, errors


def _examine(superblock: Superblock, backing: Backing, directory: Path) -> Sound:
    """Prove one copy: superblock, tables, and the journal behind them."""
    if read_superblock(backing, directory) != superblock:
        raise FormatError(f"{directory} has another superblock than the other copies")
    with contextlib.ExitStack() as stack:
        tables = Tables(directory / TABLES_NAME, backing)
        stack.callback(tables.close)
        journal = Journal.open(backing, directory, UUID(superblock.uuid), segment_bytes=superblock.journal_bytes)
        stack.callback(journal.close)
        segment, sequence = tables.facts()
        for record in journal.replay(segment, sequence):
            if decode_body(record.body).folded_sequence > sequence:
                raise FormatError(f"{directory / TABLES_NAME} is older than the journal beside it")
        standing = read_standing(backing, directory, UUID(superblock.uuid))
        stack.pop_all()
        return Sound(tables, journal, standing, segment, sequence)


def _drop_older_epochs(copies: Copies, sound: dict[int, Sound]) -> dict[int, IncfsError]:
    """Take copies out that are in an earlier epoch than another: they were put back from an older time.

    Raises:
        MetadataStale: Two are forks of one pool.
    """
    newest = max((copy.standing for copy in sound.values()), key=lambda s: (s.newest.counter, s.settled.counter))
    errors: dict[int, IncfsError] = {}
    for number, copy in list(sound.items()):
        epoch = copy.standing.newest
        if epoch in newest.epochs:
            continue
        if epoch.counter == newest.newest.counter:
            raise MetadataStale(f"the metadata in {copies.directories[number]} is of another fork of the pool")
        errors[number] = FormatError(f"it is at epoch {epoch}, another copy at {newest.newest}")
        sound.pop(number).close()
    return errors


def _join(
    superblock: Superblock, copies: Copies, sound: dict[int, Sound], errors: Mapping[int, IncfsError]
) -> Gathered:
    """Let the sound copies be one: what they lack of each other is at most what was under way."""
    first = max(sound, key=lambda number: sound[number].end)
    oldest = min(sound, key=lambda number: (sound[number].sequence, number != first))
    if not _reaches_back(sound[first], sound[oldest]):
        oldest = first
    reasons = {number: str(error) for number, error in errors.items()}
    for number, copy in sound.items():
        if copy.sequence < sound[oldest].sequence:
            reasons[number] = f"its tables end at commit {copy.sequence}, before the journal of copy {first} begins"
        elif not _is_beginning_of(copy, sound[first]):
            reasons[number] = f"its journal is not that of copy {first}"
    for number, reason in reasons.items():
        copies.leave(number, reason)
        if number in sound:
            sound[number].close()
    joined = {number: copy for number, copy in sound.items() if number not in reasons}
    copies.prefer(oldest)
    behind = {n: copy.journal for n, copy in joined.items() if copy.end != sound[first].end}
    ahead = sound[first].journal
    files = _joined_files(copies, joined, first)
    tables = TableCopies(copies, {number: copy.tables for number, copy in joined.items()})
    journal = Journal(UUID(superblock.uuid), files, copies)
    return Gathered(superblock, copies, tables, journal, files, behind, ahead)


def _reaches_back(ahead: Sound, behind: Sound) -> bool:
    """Whether a journal has all that tables of an earlier checkpoint lack."""
    if ahead.sequence == behind.sequence:
        return True
    try:
        for _ in ahead.journal.replay(behind.segment, behind.sequence):
            pass
    except JournalDamaged:
        for _ in ahead.journal.replay(ahead.segment, ahead.sequence):
            pass
        return False
    return True


def _is_beginning_of(copy: Sound, ahead: Sound) -> bool:
    """Whether a journal is the other one, up to what was under way."""
    ours, theirs = copy.journal.segment, ahead.journal.segment
    if ours == theirs:
        return True
    return theirs.number == ours.number + 1 and theirs.start_sequence == copy.journal.next_sequence


def _joined_files(copies: Copies, joined: Mapping[int, Sound], first: int) -> tuple[CopiedFile, CopiedFile]:
    both = ({n: copy.journal.files[i] for n, copy in joined.items()} for i in (0, 1))
    one, two = (CopiedFile(copies, files, first) for files in both)
    return one, two


def real_directory(directory: Path) -> Path:
    """Give a copy's directory as the roster has it."""
    return Path(os.path.realpath(directory))
