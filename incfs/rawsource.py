"""Raw images and block devices that are read: their data and holes, and lists of ranges in them.

Owns a descriptor that is open for reading only.  Any thread, one at a time.
"""

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Protocol

from incfs.backing import translate
from incfs.errors import FormatError, NotSupported
from incfs.model import MAX_VOLUME_BYTES

MAX_LIST_BYTES: Final = 64 << 20


class Source(Protocol):
    """Whatever an image's content is read from."""

    path: Path
    size_bytes: int

    def close(self) -> None:
        """Let go of it."""

    def stamp(self) -> tuple[int, int]:
        """Give size and time of modification of the file: what tells that somebody writes to it."""

    def stretch(self, start_bytes: int, end_bytes: int) -> tuple[bool, int]:
        """Say whether there is data at an offset, and up to where it is all the same."""

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Read a range."""


class RawSource:
    """A regular file or a block device.

    Raises:
        NotSupported: The path is something else, or larger than a volume can be.
        BackingError: It cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise translate(error, path, "open") from error
        try:
            mode = os.fstat(self._fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise NotSupported(f"{path} is neither a regular file nor a block device")
            self.size_bytes = self._seek(0, os.SEEK_END)
            if self.size_bytes > MAX_VOLUME_BYTES:
                raise NotSupported(f"{path} has {self.size_bytes} bytes, a volume can have {MAX_VOLUME_BYTES}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def duplicate(self) -> int:
        """Give another descriptor of the same file."""
        return os.dup(self._fd)

    def stamp(self) -> tuple[int, int]:
        """Give size and time of modification: what tells that somebody writes to it."""
        return self._seek(0, os.SEEK_END), os.fstat(self._fd).st_mtime_ns

    def stretch(self, start_bytes: int, end_bytes: int) -> tuple[bool, int]:
        """Say whether there is data at an offset, and up to where it is all the same."""
        data = self._seek_kind(start_bytes, os.SEEK_DATA)
        if data is None or data >= end_bytes:
            return False, end_bytes
        if data > start_bytes:
            return False, data
        hole = self._seek_kind(start_bytes, os.SEEK_HOLE)
        return True, end_bytes if hole is None else min(hole, end_bytes)

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Read a range.

        Raises:
            BackingError: The host failed, or the file ends in it.
        """
        pieces, left = [], length_bytes
        while left:
            try:
                piece = os.pread(self._fd, left, offset_bytes + length_bytes - left)
            except OSError as error:
                raise translate(error, self.path, "read") from error
            if not piece:
                raise translate(OSError(errno.EIO, "it ends sooner than when it was opened"), self.path, "read")
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _seek_kind(self, offset_bytes: int, whence: int) -> int | None:
        """Look for data or a hole; None when none follows.  What cannot tell (devices) is all data."""
        try:
            return os.lseek(self._fd, offset_bytes, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            if error.errno == errno.EINVAL:
                return offset_bytes if whence == os.SEEK_DATA else None
            raise translate(error, self.path, "look for holes in") from error

    def _seek(self, offset_bytes: int, whence: int) -> int:
        try:
            return os.lseek(self._fd, offset_bytes, whence)
        except OSError as error:
            raise translate(error, self.path, "examine") from error


def read_ranges(path: Path, size_bytes: int) -> list[tuple[int, int]]:
    """Read a list of changed ranges, in a form that ``snapshot diff --json`` prints.

    Returns:
        (start, end) of each, ascending, joined where they touch.

    Raises:
        FormatError: It is no such list, or a range ends behind ``size_bytes``.
        BackingError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        raise translate(error, path, "read") from error
    if len(data) > MAX_LIST_BYTES:
        raise FormatError(f"{path} is longer than {MAX_LIST_BYTES} bytes")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON") from error
    if isinstance(document, dict):
        document = document.get("block_metadata", document.get("ranges"))
    if not isinstance(document, list):
        raise FormatError(f'{path} is no list of ranges: expected "block_metadata" or "ranges"')
    return join_ranges(sorted(_range(path, item, size_bytes) for item in document))


def _range(path: Path, item: Any, size_bytes: int) -> tuple[int, int]:
    match item:
        case {"byte_offset": int(offset), "size_bytes": int(length)} | {"offset": int(offset), "length": int(length)}:
            if offset >= 0 and length >= 0 and offset + length <= size_bytes:
                return offset, offset + length
    raise FormatError(f"{path}: no range within the source's {size_bytes} bytes: {str(item)[:80]}")


def join_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ascending ranges (start, end) that touch or overlap; empty ones go."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        elif end > start:
            joined.append((start, end))
    return joined
