"""The journal: committed but not yet checkpointed changes, in two alternating segments.

Owns ``journal.0`` and ``journal.1``: framing, scanning, the torn tail.  Knows nothing of
what a record means.

Invariants:
    1. Segment n lives in file n mod 2; its header is durable before any of its records.
    2. Record k+1 is written only after record k is durable, so a valid record behind an
       invalid one is damage, not a torn tail.  So is an acknowledgement, which is written
       (but not flushed) behind a record that is durable, for as long as none follows it.
    3. A record for which there is no room was not flushed anywhere; whoever has it writes it again before any other.
    4. A record carries its segment's random nonce: bytes of users that happen to look like
       a record, and records of an earlier use of the file, are never taken for one.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import UUID

from incfs.backing import Backing, File
from incfs.codec import checksum
from incfs.epoch import NEVER, Epoch
from incfs.errors import (
    BackingError,
    FormatError,
    JournalDamaged,
    LimitExceeded,
    MetadataFull,
    NoSpace,
)

SECTOR_BYTES = 512
MAX_RECORD_BYTES = 1 << 30
_SEGMENT = struct.Struct("<8sHxxI16sQQQQQ")
_SEGMENT_MAGIC = b"INCFSJN\0"
_VERSION = 1
_RECORD = struct.Struct("<4sIQQI")
_COPY_BYTES = 1 << 20
_SPARE_BYTES = 2 << 20
"""More than two commits of as many mappings as may wait for one."""
_RECORD_MAGIC = b"JREC"
_ACK_MAGIC = b"JACK"
_CRC = struct.Struct("<I")


class Borrower(Protocol):
    """Who may append records past Python: the native data plane."""

    @property
    def lent_end_bytes(self) -> int:
        """Where the records end, as far as they are durable."""

    def lend(
        self,
        *,
        fds: list[int],
        end_bytes: int,
        limit_bytes: int,
        nonce: int,
        sequence: int,
        folded: int,
        most_blocks: int,
    ) -> None:
        """Begin to append to each of several files that are alike; no record at or behind ``limit_bytes``."""

    def left(self) -> list[tuple[int, int]]:
        """Say which lent files failed while another has everything, as (position, errno): it goes no further then."""

    def reopen(self) -> None:
        """Go on appending after ``close_journal``."""

    def settle(self) -> None:
        """Stop, wait for the record under way, and write the one that found no room.

        Raises:
            MetadataFull: It finds none now, either.
            BackingError: A record could not be written or flushed.
        """

    def stop(self) -> None:
        """Stop for good, and wait for the record under way."""

    def reclaim(self) -> int:
        """Do as ``settle``, and give ``lent_end_bytes``.

        Raises:
            MetadataFull, BackingError: As ``settle``.
        """


class Survivors(Protocol):
    """Which copies of a journal are up to date; ``copies`` knows."""

    def leave(self, number: int, reason: str) -> bool:
        """Stop using a copy; False when no other is up to date."""

    def settle(self) -> None:
        """Make it known, durably, who was left behind."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One use of a journal file."""

    number: int
    start_sequence: int
    nonce: int
    epoch: Epoch = NEVER
    """In which it was started."""


@dataclass(frozen=True, slots=True)
class JournalRecord:
    """One committed record."""

    sequence: int
    body: bytes
    offset_bytes: int


def journal_paths(directory: Path) -> tuple[Path, Path]:
    """Name the two files."""
    return directory / "journal.0", directory / "journal.1"


@contextlib.contextmanager
def _finding_room() -> Iterator[None]:
    """Say of a write to the journal that found no room that it may be tried again: nothing of it was flushed."""
    try:
        yield
    except NoSpace as error:
        raise MetadataFull(error.message, **error.facts) from error


def encode_segment(pool: UUID, segment: Segment) -> bytes:
    """Make the header sector of a segment."""
    head = _SEGMENT.pack(
        _SEGMENT_MAGIC,
        _VERSION,
        SECTOR_BYTES,
        pool.bytes,
        segment.number,
        segment.start_sequence,
        segment.nonce,
        segment.epoch.counter,
        segment.epoch.nonce,
    )
    return (head + _CRC.pack(checksum(head))).ljust(SECTOR_BYTES, b"\0")


def decode_segment(pool: UUID, sector: bytes) -> Segment | None:
    """Undo ``encode_segment``; None for a header that is damaged or never was written.

    Raises:
        FormatError: A sound header, but of another pool or a newer version.
    """
    if len(sector) < _SEGMENT.size + _CRC.size:
        return None
    magic, version, sector_bytes, owner, number, start, nonce, *epoch = _SEGMENT.unpack_from(sector)
    if magic != _SEGMENT_MAGIC or _CRC.unpack_from(sector, _SEGMENT.size)[0] != checksum(sector[: _SEGMENT.size]):
        return None
    if owner != pool.bytes:
        raise FormatError(f"the journal belongs to pool {UUID(bytes=owner)}, not to {pool}")
    if version != _VERSION or sector_bytes != SECTOR_BYTES:
        raise FormatError(f"journal version {version} with sectors of {sector_bytes} bytes is not supported")
    return Segment(number, start, nonce, Epoch(*epoch))


def encode_ack(sequence: int, nonce: int) -> bytes:
    """Make the sector that says: all records up to ``sequence`` are durable."""
    head = _RECORD.pack(_ACK_MAGIC, 0, sequence, nonce, 0)
    return (head + _CRC.pack(checksum(head))).ljust(SECTOR_BYTES, b"\0")


def decode_ack(sector: bytes) -> int | None:
    """Undo ``encode_ack``: the sequence, or None for anything else."""
    if len(sector) < _HEAD_BYTES or _CRC.unpack_from(sector, _RECORD.size)[0] != checksum(sector[: _RECORD.size]):
        return None
    magic, _, sequence, _, _ = _RECORD.unpack_from(sector)
    return int(sequence) if magic == _ACK_MAGIC else None


def encode_record(sequence: int, nonce: int, body: bytes) -> bytes:
    """Frame one record, padded to whole sectors so that later appends never rewrite it.

    Raises:
        LimitExceeded: The body is longer than replay would accept.
    """
    if len(body) > MAX_RECORD_BYTES:
        raise LimitExceeded(f"a journal record of {len(body)} bytes; at most {MAX_RECORD_BYTES} are possible")
    head = _RECORD.pack(_RECORD_MAGIC, len(body), sequence, nonce, checksum(body))
    framed = head + _CRC.pack(checksum(head)) + body
    return framed.ljust(-len(framed) % SECTOR_BYTES + len(framed), b"\0")


_HEAD_BYTES = _RECORD.size + _CRC.size


def decode_record(
    file: File, offset_bytes: int, length_bytes: int, nonce: int | None
) -> tuple[JournalRecord, int] | None:
    """Read the record at ``offset_bytes``: (record, offset behind it), or None if none is sound.

    Without a nonce a record of any segment counts.
    """
    if offset_bytes + _HEAD_BYTES > length_bytes:
        return None
    head = file.pread(offset_bytes, _HEAD_BYTES)
    magic, size, sequence, found, body_crc = _RECORD.unpack_from(head)
    if magic != _RECORD_MAGIC or nonce not in (None, found) or size > MAX_RECORD_BYTES:
        return None
    if _CRC.unpack_from(head, _RECORD.size)[0] != checksum(head[: _RECORD.size]):
        return None
    start = offset_bytes + _HEAD_BYTES
    if start + size > length_bytes:
        return None
    body = file.pread(start, size)
    if checksum(body) != body_crc:
        return None
    end = start + size
    return JournalRecord(sequence, body, offset_bytes), end + -end % SECTOR_BYTES


def _sequence_at(file: File, offset_bytes: int, length_bytes: int, nonce: int | None) -> int | None:
    """Give the sequence of the sound record or acknowledgement at ``offset_bytes``, if there is one."""
    found = decode_record(file, offset_bytes, length_bytes, nonce)
    if found is not None:
        return found[0].sequence
    return decode_ack(file.pread(offset_bytes, min(_HEAD_BYTES, length_bytes - offset_bytes)))


class Journal:
    """The two segment files of one pool.

    Args:
        pool: Its UUID.
        files: Both; each may stand for several that are alike.
        survivors: Which of those count, if there are several.

    Concurrency: one caller at a time; any thread.
    """

    def __init__(self, pool: UUID, files: tuple[File, File], survivors: Survivors | None = None) -> None:
        self._pool = pool
        self._files = files
        self._survivors = survivors
        self._lent: list[int] = []
        """The copies whose files are lent, in that order."""
        self._segment = Segment(0, 0, 0)
        self._end_bytes = SECTOR_BYTES
        self._next_sequence = 0
        self._borrower: Borrower | None = None
        self._segment_bytes = min(file.length_bytes() for file in files)
        self.epoch = NEVER
        """Of the pool: segments that are started say it."""

    @classmethod
    def create(
        cls, backing: Backing, directory: Path, pool: UUID, *, segment_bytes: int, nonce: int, epoch: Epoch = NEVER
    ) -> None:
        """Make both files, written full of zeros, and start segment 1 at sequence 1.

        Zeros rather than holes: appending then changes no metadata of the host's filesystem,
        which halves the cost of a flush.
        """
        for number, path in enumerate(journal_paths(directory)):
            file = backing.create(path)
            try:
                file.keep_in_place()
                step = min(segment_bytes, 1 << 20)
                for offset in range(0, segment_bytes, step):
                    file.pwrite(offset, bytes(min(step, segment_bytes - offset)))
                if number == 1:
                    file.pwrite(0, encode_segment(pool, Segment(1, 1, nonce, epoch)))
                file.sync()
            finally:
                file.close()

    @classmethod
    def open(cls, backing: Backing, directory: Path, pool: UUID, *, segment_bytes: int = 0) -> "Journal":
        """Open both files; ``replay`` must follow.

        Raises:
            JournalDamaged: A file is shorter than it was made.
        """
        first, second = journal_paths(directory)
        with contextlib.ExitStack() as stack:
            opened = backing.open(first)
            stack.callback(opened.close)
            files = opened, backing.open(second)
            stack.callback(files[1].close)
            for file in files:
                if file.length_bytes() < segment_bytes:
                    raise JournalDamaged(f"{file.path} is cut off at byte {file.length_bytes()} of {segment_bytes}")
            stack.pop_all()
            return cls(pool, files)

    @property
    def files(self) -> tuple[File, File]:
        """Both files."""
        return self._files

    @property
    def segment(self) -> Segment:
        """The segment that takes new records."""
        return self._segment

    @property
    def next_sequence(self) -> int:
        """Of the record that follows the last one that ``replay`` found."""
        return self._next_sequence

    def catch_up(self, ahead: "Journal") -> None:
        """Append what another copy of this journal has beyond; both were replayed.

        Durability: durable on return.  Cut off, it has some of it, as if that were all.

        Raises:
            JournalDamaged: The two are not of one history.
        """
        ours, theirs = self._segment, ahead._segment
        if theirs.number == ours.number + 1 and theirs.start_sequence == self._next_sequence:
            self._begin_segment(theirs)
        elif theirs != ours:
            raise JournalDamaged(f"{self._file(ours.number).path} is at segment {ours}, another copy at {theirs}")
        source, target = ahead._file(theirs.number), self._file(theirs.number)
        if self._end_bytes < ahead._end_bytes:
            target.pwrite(self._end_bytes, source.pread(self._end_bytes, ahead._end_bytes - self._end_bytes))
            target.sync()
        self._end_bytes, self._next_sequence = ahead._end_bytes, ahead._next_sequence

    @property
    def used_bytes(self) -> int:
        """Size of the current segment so far."""
        return self._end_bytes if self._borrower is None else self._borrower.lent_end_bytes

    def replay(self, segment_number: int, sequence: int, *, cut: bool = False) -> Iterator[JournalRecord]:
        """Yield the committed records after ``sequence``, and be ready to append behind them.

        Args:
            segment_number: The segment that was current at the last checkpoint.
            sequence: The last one that the checkpoint contains.
            cut: End before the first damage rather than raise; nothing may be appended then.

        Raises:
            JournalDamaged: A segment is missing, or a record before the tail is damaged.
        """
        if cut:
            with contextlib.suppress(JournalDamaged):
                yield from self._replay(segment_number, sequence)
            return
        yield from self._replay(segment_number, sequence)
        if self._next_sequence <= sequence:
            raise JournalDamaged(
                f"{self._file(self._segment.number).path}: record {self._next_sequence} is damaged; "
                f"the tables have all up to {sequence}, but nothing can be appended behind it"
            )

    def _replay(self, segment_number: int, sequence: int) -> Iterator[JournalRecord]:
        segment = self._header(segment_number)
        if segment is None:
            path = self._file(segment_number).path
            raise JournalDamaged(f"{path} does not hold journal segment {segment_number}; it is damaged or stale")
        expected = sequence + 1
        following = self._header(segment_number + 1)
        for current in (segment, following):
            if current is None:
                # A header is durable before its records: without one there must be none.
                file = self._file(segment_number + 1)
                self._refuse_later_records(file, None, SECTOR_BYTES, file.length_bytes(), expected)
                return
            if current.start_sequence > expected:
                raise JournalDamaged(
                    f"journal record {expected} is missing: segment {current.number} starts at {current.start_sequence}"
                )
            self._segment = current
            for record in self._scan(current):
                if record.sequence >= expected:
                    yield record
                    expected = record.sequence + 1

    def _scan(self, segment: Segment) -> Iterator[JournalRecord]:
        file = self._file(segment.number)
        length = file.length_bytes()
        offset, expected = SECTOR_BYTES, segment.start_sequence
        while (found := decode_record(file, offset, length, segment.nonce)) and found[0].sequence == expected:
            record, offset = found
            expected += 1
            yield record
        self._end_bytes, self._next_sequence = offset, expected
        self._refuse_later_records(file, segment.nonce, offset, length, expected)

    def _refuse_later_records(self, file: File, nonce: int | None, offset: int, length: int, expected: int) -> None:
        """Refuse what proves that the record expected at ``offset`` was durable; without a nonce of any segment."""
        wanted = b"" if nonce is None else struct.pack("<Q", nonce)
        for chunk_offset in range(offset, length, 1 << 20):
            chunk = file.pread(chunk_offset, min(1 << 20, length - chunk_offset))
            for position in range(0, len(chunk), SECTOR_BYTES):
                magic = chunk[position : position + 4]
                if magic not in (_RECORD_MAGIC, _ACK_MAGIC) or not chunk[position + 16 :].startswith(wanted):
                    continue
                later = _sequence_at(file, chunk_offset + position, length, nonce)
                if later is not None and later >= expected:
                    raise JournalDamaged(
                        f"{file.path}: record {expected} at byte {offset} is damaged, "
                        f"but record {later} behind it is not"
                    )

    def sync(self) -> None:
        """Make durable what is there: somebody who was killed may have left the last record in the host's cache."""
        for file in self._files:
            file.sync()

    def records(self) -> Iterator[JournalRecord]:
        """Yield the records of the current segment, changing nothing.  Any thread."""
        segment, end = self._segment, self.used_bytes
        offset = SECTOR_BYTES
        while found := decode_record(self._file(segment.number), offset, end, segment.nonce):
            record, offset = found
            yield record

    def start_segment(self, start_sequence: int, nonce: int) -> None:
        """Send the records that follow to the other file.

        Durability: the header is durable on return.  The file's earlier segment must be
        contained in a checkpoint already.

        Raises:
            MetadataFull: There is no room; it may be tried again.
        """
        self._reclaim()
        self._begin_segment(Segment(self._segment.number + 1, start_sequence, nonce, self.epoch))

    def _begin_segment(self, segment: Segment) -> None:
        file = self._file(segment.number)
        with _finding_room():
            file.pwrite(0, encode_segment(self._pool, segment))
        file.sync()
        self._tell_survivors()
        self._segment = segment
        self._end_bytes = SECTOR_BYTES

    def append(self, sequence: int, body: bytes, *, is_last: bool = False) -> None:
        """Append one record.

        Args:
            sequence: Its number.
            body: What it says.
            is_last: The next segment follows: it may take what others leave for it.

        Durability: the record is durable on return.

        Raises:
            MetadataFull: There is no room for it; no other may be appended before it was, and it may be tried again.
        """
        self._reclaim()
        framed = encode_record(sequence, self._segment.nonce, body)
        file = self._file(self._segment.number)
        with _finding_room():
            if not is_last and self._end_bytes + len(framed) > self._segment_bytes:
                file.reserve(self._end_bytes + len(framed) + self.spare_bytes)
            file.pwrite(self._end_bytes, framed)
        file.sync()
        self._tell_survivors()
        self._end_bytes += len(framed)
        with contextlib.suppress(NoSpace):  # the record is durable all the same
            # Nobody waits for it: the host writes it some time, or with the record that replaces it.
            file.pwrite(self._end_bytes, encode_ack(sequence, self._segment.nonce))

    @property
    def spare_bytes(self) -> int:
        """What each segment can grow by for its last record, however full the host is."""
        return min(_SPARE_BYTES, self._segment_bytes)

    def reserve(self) -> None:
        """Set host space aside for the last record of each segment.

        Raises:
            NoSpace: There is none; nothing was changed.
        """
        for file in self._files:
            file.reserve(self._segment_bytes + self.spare_bytes)

    def copy_to(self, targets: tuple[File, File]) -> int:
        """Write all of it into two other files; records may be appended meanwhile, no segment may be begun.

        Durability: durable on return.

        Returns:
            Up to where they have the current segment; ``finish_copy`` goes on there.
        """
        end = self.used_bytes
        for source, target in zip(self._files, targets, strict=True):
            length = source.length_bytes()
            for offset in range(0, length, _COPY_BYTES):
                target.pwrite(offset, source.pread(offset, min(_COPY_BYTES, length - offset)))
            target.truncate(length)
            target.sync()
        return end

    def finish_copy(self, targets: tuple[File, File], copied_bytes: int) -> None:
        """Write what was appended since ``copy_to``; nothing may be appended meanwhile.

        Durability: durable on return.
        """
        self.take_back()
        source, target = self._file(self._segment.number), targets[self._segment.number % 2]
        end = min(self.used_bytes + SECTOR_BYTES, source.length_bytes())
        target.pwrite(copied_bytes, source.pread(copied_bytes, end - copied_bytes))
        target.sync()

    def take_back(self) -> None:
        """Have the journal's end back from whoever appends, for the next lending to be of other files.

        Raises:
            BackingError: A record could not be written or flushed.
        """
        self._reclaim()
        self._tell_survivors()

    def lend(self, borrower: "Borrower", *, sequence: int, folded: int, most_blocks: int) -> None:
        """Let native threads append records behind the one of ``sequence``, until the next call of ours that appends.

        Args:
            borrower: Who appends.
            sequence: Of the last record.
            folded: The last commit that the tables contain.
            most_blocks: In one record.
        """
        if self._borrower is not None:  # it knows where the journal ends, we do not
            return self._borrower.reopen()
        file = self._file(self._segment.number)
        lent = file.filenos()
        self._lent = list(lent)
        borrower.lend(
            fds=list(lent.values()),
            end_bytes=self._end_bytes,
            limit_bytes=self._segment_bytes // 2,
            nonce=self._segment.nonce,
            sequence=sequence,
            folded=folded,
            most_blocks=most_blocks,
        )
        self._borrower = borrower
        return None

    def settle(self) -> None:
        """Wait until every record that the borrower has begun is durable, and known who lacks it.

        Raises:
            MetadataFull: There is no room for the last one; it may be tried again.
            BackingError: One could not be written or flushed.
        """
        if self._borrower is not None:
            self._borrower.settle()
            if self._borrower.left():
                self._reclaim()
        self._tell_survivors()

    def _reclaim(self) -> None:
        """Wait until the borrower has stopped; leave behind what failed it."""
        if self._borrower is None:
            return
        self._end_bytes = self._borrower.reclaim()
        left, self._borrower = self._borrower.left(), None
        for position, host_errno in left:
            reason = f"cannot write the journal: {os.strerror(host_errno)}"
            if self._survivors is None or not self._survivors.leave(self._lent[position], reason):
                raise BackingError(reason, action="write")

    def _tell_survivors(self) -> None:
        """Make it durable who lacks what was just written, before anybody hears that it is durable.

        Raises:
            MetadataFull: There is no room to say so.  Whoever tries again writes the same to the same place.
        """
        if self._survivors is not None:
            with _finding_room():
                self._survivors.settle()

    def close(self) -> None:
        """Close both files, once nobody appends any more."""
        if self._borrower is not None:  # whoever waits for that commit is told; one that found no room stays unwritten
            self._borrower.stop()
        for file in self._files:
            file.close()

    def _file(self, segment_number: int) -> File:
        return self._files[segment_number % 2]

    def _header(self, segment_number: int) -> Segment | None:
        file = self._file(segment_number)
        if file.length_bytes() < SECTOR_BYTES:
            return None
        segment = decode_segment(self._pool, file.pread(0, SECTOR_BYTES))
        return segment if segment and segment.number == segment_number else None
