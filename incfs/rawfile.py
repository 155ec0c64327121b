"""A plain file as the target of streams: the image of one volume at one snapshot.

Owns the note beside it, ``FILE.incfs``, which says which snapshot the file holds.  A stream is
applied only to a file whose note names its base and which nobody has changed since.

Invariants:
    1. The note is durable before the first byte of a step is written, and says that the file is
       between two snapshots until all of the step is durable.
    2. What the note says is done is durable in the file.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from incfs.backing import Backing, File
from incfs.errors import BaseMismatch, FormatError, NotSupported, StreamCorrupt, StreamTruncated
from incfs.stream.chain import count_present
from incfs.stream.records import (
    Checkpoint,
    Link,
    Range,
    Record,
    Resize,
    SnapBegin,
    SnapEnd,
    StreamBegin,
    Write,
    Zero,
)

NOTE_SUFFIX: Final = ".incfs"
_ZEROS_BYTES: Final = 1 << 20
_MAX_NOTE_BYTES: Final = 65536


@dataclass(frozen=True, slots=True)
class Note:
    """What a file holds."""

    snapshot: str | None
    """UUID of the snapshot; of the base, while the next one is being written; None: of nothing."""
    size_bytes: int = 0
    modified_ns: int = 0
    writing: str | None = None
    """UUID of the snapshot that is being written."""
    offset_bytes: int = 0
    """Up to where that is done."""
    digest: str = ""
    """Of the ranges before that, in hexadecimal."""
    is_spoiled: bool = False
    """Ranges of a stream that turned out to be corrupt may be in the file: nothing goes on from here."""


class RawFile:
    """Applies the records of a stream to a file, which is made when it is missing.

    Args:
        path: The file.
        backing: The host's files, unless a test brings its own.
        base: UUID of the snapshot that the caller knows the file to hold, when there is no note yet.

    Raises:
        BaseMismatch: The file was changed since its note was written, or has none.
        FormatError: The note is damaged.
    """

    def __init__(self, path: Path, backing: Backing | None = None, *, base: str | None = None) -> None:
        self._backing = backing = backing or Backing()
        self._note_path = path.with_name(path.name + NOTE_SUFFIX)
        existed = path.exists()
        if existed and not path.is_file():
            raise NotSupported(f"{path} is not a regular file")
        self._file: File = backing.open(path) if existed else backing.create(path)
        try:
            self.note = self._read_note(base)
        except BaseException:
            self._file.close()
            raise
        self._snap: SnapBegin | None = None
        self._skip_count = 0
        self.applied: list[str] = []
        """UUIDs of the snapshots that were applied."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def apply(self, records: Iterator[Record]) -> None:
        """Apply a whole stream.

        Durability: each snapshot is durable once it is complete.
        Atomicity: cut off anywhere, the note says so, and the same stream, or one that resumes it, goes on.

        Raises:
            BaseMismatch: The file does not hold the base.
            StreamCorrupt: As the reader of ``records``.
        """
        try:
            for record in records:
                match record:
                    case StreamBegin():
                        self._begin(record)
                    case SnapBegin():
                        self._begin_snapshot(record)
                    case _ if self._snap is not None:
                        self._apply(record, self._snap)
        except StreamCorrupt as error:
            if self._snap is not None and not isinstance(error, StreamTruncated):
                self._write_note(replace(self.note, is_spoiled=True))
            raise

    def _begin(self, begin: StreamBegin) -> None:
        if len(begin.members) != 1:
            raise NotSupported("the stream is of several volumes; a file holds one")
        skipped = count_present(begin, lambda link: link.uuid == self.note.snapshot)
        self._skip_count = skipped
        for step in begin.steps[skipped : skipped + 1]:
            self._require_base(step[0])

    def _require_base(self, link: Link) -> None:
        note = self.note
        if note.is_spoiled:
            raise BaseMismatch(
                f"{self._file.path} was half written from a corrupt stream; start again from a full one in another file"
            )
        if link.base != note.snapshot:
            raise BaseMismatch(
                f"{self._file.path} holds snapshot {note.snapshot}, the stream starts from {link.base}",
                found=note.snapshot,
                expected=link.base,
            )
        if note.writing not in (None, link.uuid):
            raise BaseMismatch(
                f"{self._file.path} is half way to snapshot {note.writing}, the stream leads to {link.uuid}; "
                f"go on with the first one's stream"
            )

    def _begin_snapshot(self, snap: SnapBegin) -> None:
        if self._skip_count:
            self._skip_count -= 1
            return
        self._require_base(snap.link)
        note = self.note
        if snap.start_bytes and (snap.start_bytes, snap.digest.hex()) != (note.offset_bytes, note.digest):
            raise BaseMismatch(
                f"{self._file.path} is complete up to {note.offset_bytes} of snapshot {snap.name}, "
                f"the stream goes on at {snap.start_bytes}"
            )
        self._note_progress(snap, snap.start_bytes, snap.digest)
        self._snap = snap

    def _apply(self, record: Record, snap: SnapBegin) -> None:
        match record:
            case Resize(size):
                self._file.truncate(size)
            case Write(offset, data):
                self._file.pwrite(offset, data)
            case Zero():
                self._clear(record)
            case Checkpoint(offset, digest):
                self._file.sync()
                self._note_progress(snap, offset, digest)
            case SnapEnd():
                self._end_snapshot(snap)

    def _note_progress(self, snap: SnapBegin, offset_bytes: int, digest: bytes) -> None:
        self._write_note(Note(snap.link.base, writing=snap.link.uuid, offset_bytes=offset_bytes, digest=digest.hex()))

    def _end_snapshot(self, snap: SnapBegin) -> None:
        self._file.sync()
        size, modified = self._state()
        self._write_note(Note(snap.link.uuid, size, modified))
        self._snap = None
        self.applied.append(snap.link.uuid)

    def _clear(self, found: Range) -> None:
        position, end = found.offset_bytes, found.offset_bytes + found.length_bytes
        if self._file.punch(position, end - position):
            return
        while position < end:
            step = min(_ZEROS_BYTES, end - position)
            self._file.pwrite(position, bytes(step))
            position += step

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _read_note(self, base: str | None) -> Note:
        size, modified = self._state()
        if not self._note_path.exists():
            if base is None and size:
                raise BaseMismatch(
                    f"{self._file.path} is not empty and no {self._note_path.name} says which snapshot it holds; "
                    f"if you know that it holds one exactly, say --base UUID"
                )
            return Note(base, size, modified)
        note = _decode_note(self._note_path)
        if note.writing is None and (note.size_bytes, note.modified_ns) != (size, modified):
            raise BaseMismatch(
                f"{self._file.path} was changed since snapshot {note.snapshot} was written to it; "
                f"start again from a full stream in another file"
            )
        return note

    def _write_note(self, note: Note) -> None:
        self.note = note
        self._backing.replace_content(self._note_path, (json.dumps(asdict(note)) + "\n").encode())


def _decode_note(path: Path) -> Note:
    try:
        with path.open("rb") as stream:
            value: Any = json.loads(stream.read(_MAX_NOTE_BYTES))
        match value:
            case {"snapshot": str() | None as snapshot, "size_bytes": int(size), "modified_ns": int(modified),
                  "writing": str() | None as writing, "offset_bytes": int(offset), "digest": str(digest),
                  "is_spoiled": bool(is_spoiled)}:  # fmt: skip
                return Note(snapshot, size, modified, writing, offset, digest, is_spoiled)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}; it says which snapshot the file beside it holds") from error
    raise FormatError(f"{path} is not a note of incfs; it should say which snapshot the file beside it holds")
