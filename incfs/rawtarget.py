"""Raw images and block devices that snapshots are exported to."""

import contextlib
import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Final, Protocol

from incfs.backing import File, translate
from incfs.errors import AlreadyExists, Busy, NoSpace, NotSupported
from incfs.rawfile import NOTE_SUFFIX, RawFile
from incfs.stream.records import Member, Record, Resize, SnapBegin, SnapEnd, StreamBegin, Write, Zero

_ZEROS_BYTES: Final = 1 << 20


class RawTarget(Protocol):
    """Takes ranges.  Any thread, one at a time."""

    is_empty: bool
    """It reads as zeros where nothing is written."""

    def begin(self, volume: Member, snapshot: SnapBegin) -> None:
        """Begin with a snapshot, or with what changed since its base."""

    def write(self, offset_bytes: int, data: bytes) -> None:
        """Take data."""

    def clear(self, offset_bytes: int, length_bytes: int) -> None:
        """Let a range read as zeros."""

    def end(self) -> None:
        """Make all of it durable."""

    def close(self) -> None:
        """Let go of it."""


def open_target(path: Path, *, is_incremental: bool, force: bool, forbidden: Collection[Path]) -> RawTarget:
    """Open what an export goes to.

    Args:
        path: A regular file, which is made, or a block device.
        is_incremental: Only what changed is going to be written.
        force: Replace a file; write to a device that is in use.
        forbidden: Files of the pool.

    Raises:
        AlreadyExists: The file is there, and nothing says that it may be replaced.
        Busy: The device is mounted or otherwise in use, or the file belongs to the pool.
        BaseMismatch: The file is not the older export that an incremental one needs.
    """
    path = path.resolve()
    require_foreign(path, forbidden)
    if path.is_block_device():
        return DeviceTarget(path, force=force)
    if path.exists() and not is_incremental:
        if not force or not path.is_file():
            raise AlreadyExists(f"{path} is there already; replace it with --force", path=str(path))
        for old in (path, path.with_name(path.name + NOTE_SUFFIX)):
            old.unlink(missing_ok=True)
    if is_incremental and not path.exists():
        raise translate(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), path, "open")
    return FileTarget(path)


def require_foreign(path: Path, forbidden: Collection[Path]) -> None:
    """Refuse files of the pool.

    Raises:
        Busy: It is one.
    """
    for other in forbidden:
        if path.exists() and other.exists() and path.samefile(other):
            raise Busy(f"{path} belongs to this pool; use another file", path=str(path))


class FileTarget:
    """A regular file, with the note beside it that says which snapshot it holds: see ``rawfile``."""

    def __init__(self, path: Path) -> None:
        self.is_empty = not path.exists()
        self._raw = RawFile(path)

    def begin(self, volume: Member, snapshot: SnapBegin) -> None:
        """Begin with a snapshot, whose base the file must hold.

        Raises:
            BaseMismatch: It does not.
        """
        self._apply(StreamBegin((volume,), ((snapshot.link,),)), snapshot, Resize(snapshot.size_bytes))

    def write(self, offset_bytes: int, data: bytes) -> None:
        """Take data."""
        self._apply(Write(offset_bytes, data))

    def clear(self, offset_bytes: int, length_bytes: int) -> None:
        """Let a range read as zeros."""
        self._apply(Zero(offset_bytes, length_bytes))

    def end(self) -> None:
        """Make all of it durable, and say so in the note."""
        self._apply(SnapEnd(0, 0, 0, 0, b""))

    def _apply(self, *records: Record) -> None:
        self._raw.apply(iter(records))

    def close(self) -> None:
        """Close the file."""
        self._raw.close()


class DeviceTarget:
    """A block device.  Nothing says what it holds: that is for the caller to know.

    Raises:
        Busy: It is in use, and ``force`` is false.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        self.is_empty = False
        # For a block device O_EXCL means: nobody has it mounted or uses it otherwise.
        flags = os.O_RDWR | os.O_CLOEXEC | (0 if force else os.O_EXCL)
        try:
            self._file = File(path, os.open(path, flags))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Busy(f"{path} is mounted or in use; unmount it first", path=str(path)) from error
            raise translate(error, path, "open") from error

    def begin(self, volume: Member, snapshot: SnapBegin) -> None:
        """Begin with a snapshot.

        Raises:
            NoSpace: It does not fit.
            NotSupported: The device has gone.
        """
        if not stat.S_ISBLK(os.fstat(self._file.fileno()).st_mode):
            raise NotSupported(f"{self._file.path} is no block device any more")
        size = os.lseek(self._file.fileno(), 0, os.SEEK_END)
        if size < snapshot.size_bytes:
            raise NoSpace(f"{self._file.path} has {size} bytes, {volume.name} needs {snapshot.size_bytes}")

    def write(self, offset_bytes: int, data: bytes) -> None:
        """Take data."""
        self._file.pwrite(offset_bytes, data)

    def clear(self, offset_bytes: int, length_bytes: int) -> None:
        """Let a range read as zeros."""
        with contextlib.suppress(NotSupported):
            if self._file.punch(offset_bytes, length_bytes):
                return
        for start in range(offset_bytes, offset_bytes + length_bytes, _ZEROS_BYTES):
            self._file.pwrite(start, bytes(min(_ZEROS_BYTES, offset_bytes + length_bytes - start)))

    def end(self) -> None:
        """Make all of it durable."""
        self._file.sync()

    def close(self) -> None:
        """Close the device."""
        self._file.close()
