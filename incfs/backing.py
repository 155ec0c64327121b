"""Files of the host: the only place where file descriptors are read, written and synced.

Owns short reads and writes, EINTR, sparse operations and the translation of ``OSError``:
ENOSPC, EDQUOT and EFBIG become ``NoSpace``, everything else ``BackingError``.  A crash simulator
or fault injector replaces ``Backing`` and is handed every operation in order.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from incfs.errors import NO_ROOM, AlreadyExists, BackingError, IncfsError, NoSpace, PoolLocked

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_BTRFS_IOC_START_SYNC = 0x80089418
_BTRFS_IOC_WAIT_SYNC = 0x40089416
_MOST_UNCOUNTED_BYTES = 1 << 20
"""By so much the host may be wrong in how much it has free."""
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
_MOST_THREADS = 64
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


Result = TypeVar("Result")


def translate(error: OSError, path: Path, action: str) -> IncfsError:
    """Turn an ``OSError`` of the host into an incfs error that names file and action."""
    text = f"cannot {action} {path}: {os.strerror(error.errno or errno.EIO)}"
    if error.errno in NO_ROOM:
        what = "let files be longer" if error.errno == errno.EFBIG else "free space"
        advice = f"{text}; {what} on the filesystem of {path.parent}"
        return NoSpace(advice, path=str(path), host_errno=error.errno, action=action)
    if error.errno == errno.EEXIST:
        return AlreadyExists(text, path=str(path))
    return BackingError(text, path=str(path), host_errno=error.errno, action=action)


@contextmanager
def translated(path: Path, action: str) -> Iterator[None]:
    """Turn an ``OSError`` of the body into an incfs error that names file and action."""
    try:
        yield
    except OSError as error:
        raise translate(error, path, action) from error


@contextmanager
def begun(works: Sequence[Callable[[], Result]], *, side_by_side: bool) -> Iterator[Sequence[Callable[[], Result]]]:
    """Begin works in threads of their own; give for each what waits for its result.

    On leaving all have ended.  Not side by side, each begins when its result is asked for.

    Cost: about 0.1 ms for each thread, of which there are at most 64.
    """
    if not side_by_side or len(works) < 2:
        yield works
        return
    with ThreadPoolExecutor(min(len(works), _MOST_THREADS)) as threads:
        yield [threads.submit(work).result for work in works]


class File:
    """One open file of the host.

    Concurrency: reads, writes and syncs may run in any thread.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._nowait_flag = os.RWF_NOWAIT
        self._syncing = threading.Lock()
        self._sync_failure: IncfsError | None = None
        self._counted_bytes = 0
        """What the file occupied when the host had surely counted that."""

    def fileno(self) -> int:
        """Give the descriptor, for locks and statistics."""
        return self._fd

    def filenos(self) -> dict[int, int]:
        """Give the descriptors of all files that this one stands for, by number."""
        return {0: self.fileno()}

    def pread(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Read exactly that range.

        Raises:
            BackingError: The host failed, or the file ends inside the range.
        """
        data = self._call("read", os.pread, self._fd, length_bytes, offset_bytes)
        if len(data) == length_bytes:
            return bytes(data)
        pieces = [data]
        missing = length_bytes - len(data)
        while missing and pieces[-1]:
            pieces.append(self._call("read", os.pread, self._fd, missing, offset_bytes + length_bytes - missing))
            missing -= len(pieces[-1])
        if missing:
            end = offset_bytes + length_bytes - missing
            raise BackingError(
                f"{self.path} ends at byte {end}, expected {end + missing}", path=str(self.path), action="read"
            )
        return b"".join(pieces)

    def pread_cached(self, offset_bytes: int, length_bytes: int) -> bytes | None:
        """Read the range if that needs no waiting for the disk, else return None."""
        buffer = bytearray(length_bytes)
        try:
            count = os.preadv(self._fd, [buffer], offset_bytes, self._nowait_flag)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _UNSUPPORTED and self._nowait_flag:
                self._nowait_flag = 0  # tmpfs and others: their reads do not wait anyway
                return self.pread(offset_bytes, length_bytes)
            raise translate(error, self.path, "read") from error
        return bytes(buffer) if count == length_bytes else None

    def pwrite(self, offset_bytes: int, data: bytes | memoryview) -> None:
        """Write all of ``data``.

        Durability: none until ``sync``.  A failure may leave any prefix written.
        """
        written = self._call("write", os.pwrite, self._fd, data, offset_bytes)
        while written < len(data):
            rest = memoryview(data)[written:]
            count = self._call("write", os.pwrite, self._fd, rest, offset_bytes + written)
            if not count:
                raise BackingError(f"cannot write {self.path}: the host wrote nothing", path=str(self.path))
            written += count

    @property
    def waits(self) -> bool:
        """Whether a sync waits for a disk, so that those of several files are worth threads of their own."""
        return True

    def sync(self) -> None:
        """Make everything written to this file durable, its length included.

        The kernel tells of pages that it could not write once, and drops them: whoever asks beside or after the one
        who was told is told the same (I10).

        Raises:
            BackingError: The sync failed, or an earlier one did.
        """
        with self._syncing:
            if self._sync_failure is not None:
                raise type(self._sync_failure)(self._sync_failure.message, **self._sync_failure.facts)
            try:
                self._call("sync", os.fdatasync, self._fd)
            except IncfsError as error:
                self._sync_failure = error
                raise

    def begin_anew(self) -> None:
        """Sync again after a failure: whatever was written since the sync before that will be written again."""
        self._sync_failure = None

    def truncate(self, length_bytes: int) -> None:
        """Set the file's length; the part that is new reads as zeros."""
        self._call("resize", os.ftruncate, self._fd, length_bytes)

    def allocate(self, offset_bytes: int, length_bytes: int, *, keep_size: bool = False) -> None:
        """Reserve host space for a range and make the file at least that long.

        A filesystem that cannot reserve only gets the length.
        """
        if self._fallocate("grow", _FALLOC_FL_KEEP_SIZE if keep_size else 0, offset_bytes, length_bytes):
            return
        if not keep_size and self.length_bytes() < offset_bytes + length_bytes:
            self.truncate(offset_bytes + length_bytes)

    def reserve(self, end_bytes: int) -> None:
        """Set host space aside for the file to grow to so many bytes; its length stays.

        Where the file is written in place (``keep_in_place``), such a write needs nothing else of the host.

        Raises:
            NoSpace: There is none; nothing was changed.
        """
        length = self.length_bytes()
        if end_bytes <= length:
            return
        try:
            self.allocate(length, end_bytes - length, keep_size=True)
        except NoSpace:
            if self.allocated_bytes() < end_bytes:  # XFS asks for room once more for what the file has
                raise

    def keep_in_place(self) -> None:
        """Have a new, empty file overwritten in place, by a host that would write elsewhere each time (btrfs)."""
        with contextlib.suppress(OSError):  # others have no such flag, and need none
            flags = bytearray(8)
            fcntl.ioctl(self._fd, _FS_IOC_GETFLAGS, flags)
            (found,) = struct.unpack_from("=I", flags)
            fcntl.ioctl(self._fd, _FS_IOC_SETFLAGS, struct.pack("=Q", found | _FS_NOCOW_FL))

    def punch(self, offset_bytes: int, length_bytes: int) -> bool:
        """Give a range back to the host; it reads as zeros.  False where the host cannot."""
        return self._fallocate(
            "punch a hole in", _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset_bytes, length_bytes
        )

    def data_ranges(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
        """List (offset, length) of what was written in a range and not punched since; reserved space is not in it.

        A host that cannot tell calls all of it data.
        """
        found: list[tuple[int, int]] = []
        end = offset_bytes + length_bytes
        while offset_bytes < end:
            try:
                start = os.lseek(self._fd, offset_bytes, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break  # nothing but holes up to the end
                raise translate(error, self.path, "examine") from error
            offset_bytes = min(end, self._call("examine", os.lseek, self._fd, start, os.SEEK_HOLE))
            if start < end:
                found.append((start, offset_bytes - start))
        return found

    def length_bytes(self) -> int:
        """Tell the file's length."""
        return int(self._call("examine", os.fstat, self._fd).st_size)

    def allocated_bytes(self) -> int:
        """Tell how much host space the file occupies."""
        return int(self._call("examine", os.fstat, self._fd).st_blocks) * 512

    def drop_cache(self, offset_bytes: int, length_bytes: int) -> None:
        """Let the next read of a range come from the disk, as far as it is not dirty."""
        self._call("advise on", os.posix_fadvise, self._fd, offset_bytes, length_bytes, os.POSIX_FADV_DONTNEED)

    def host_free_bytes(self) -> int:
        """Tell how much space the file's filesystem has left for us.

        Cost: on btrfs, 5 to 10 ms for a commit of its, if the file was given space, or gave some back, since the last.
        """
        allocated = self.allocated_bytes()
        if abs(allocated - self._counted_bytes) >= _MOST_UNCOUNTED_BYTES:
            self._have_counted()
            self._counted_bytes = allocated
        status = self._call("examine", os.fstatvfs, self._fd)
        return int(status.f_bavail * status.f_frsize)

    def _have_counted(self) -> None:
        """Have a filesystem that counts what is taken and given back when it commits (btrfs) commit now."""
        with contextlib.suppress(OSError):  # others count at once, and have no such call
            transaction = bytearray(8)
            fcntl.ioctl(self._fd, _BTRFS_IOC_START_SYNC, transaction)
            fcntl.ioctl(self._fd, _BTRFS_IOC_WAIT_SYNC, bytes(transaction))

    def host_total_bytes(self) -> int:
        """Tell how large the file's filesystem is."""
        status = self._call("examine", os.fstatvfs, self._fd)
        return int(status.f_blocks * status.f_frsize)

    def host_device(self) -> int:
        """Tell filesystems apart."""
        return int(self._call("examine", os.fstat, self._fd).st_dev)

    def lock(self) -> None:
        """Have the file alone until it is closed.

        Raises:
            PoolLocked: Somebody else has it.
        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PoolLocked(f"{self.path} is in use by another pool or process", path=str(self.path)) from error
        except OSError as error:
            if error.errno not in (*_UNSUPPORTED, errno.ENOLCK):
                raise translate(error, self.path, "lock") from error

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

    def _fallocate(self, action: str, mode: int, offset_bytes: int, length_bytes: int) -> bool:
        while _libc.fallocate(self._fd, mode, offset_bytes, length_bytes):
            code = ctypes.get_errno()
            if code in _UNSUPPORTED:
                return False
            if code != errno.EINTR:
                raise translate(OSError(code, os.strerror(code)), self.path, action)
        return True

    def _call(self, action: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            raise translate(error, self.path, action) from error


class Backing:
    """Opens files and changes directories on the host."""

    waits = True
    """Whether its files do (``File.waits``), also those that others write."""

    def open(self, path: Path) -> File:
        """Open an existing file for reading and writing."""
        return self._open(path, os.O_RDWR)

    def create(self, path: Path) -> File:
        """Create a file, mode 0600, that must not exist.

        Durability: the name is durable after ``sync_directory``.
        """
        return self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def _open(self, path: Path, flags: int) -> File:
        try:
            return File(path, os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        except OSError as error:
            raise translate(error, path, "create" if flags & os.O_CREAT else "open") from error

    def replace(self, source: Path, target: Path) -> None:
        """Rename atomically over ``target``."""
        try:
            source.replace(target)
        except OSError as error:
            raise translate(error, target, "replace") from error

    def replace_content(self, path: Path, content: bytes) -> None:
        """Let a small file hold this and nothing else, whether it was there or not.

        Durability: durable on return.
        Atomicity: after a crash it holds what it held before or all of this; ``.new`` may be left beside it.
        """
        scratch = path.with_name(path.name + ".new")
        if scratch.exists():
            self.remove(scratch)
        file = self.create(scratch)
        try:
            file.pwrite(0, content)
            file.sync()
        finally:
            file.close()
        self.replace(scratch, path)
        self.sync_directory(path.parent)

    def remove(self, path: Path) -> None:
        """Delete a file."""
        try:
            path.unlink()
        except OSError as error:
            raise translate(error, path, "remove") from error

    def make_directory(self, path: Path) -> None:
        """Create a directory and its missing parents, each with mode 0700, unless it exists.

        Durability: the names of all that were missing are durable on return.
        """
        with translated(path, "examine"):
            missing = [level for level in (path, *path.parents) if not level.is_dir()]
        for level in reversed(missing):
            try:
                level.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise translate(error, level, "create directory") from error
            self.sync_directory(level.parent)

    def measure_directory(self, path: Path) -> tuple[int, int, int]:
        """Tell (free bytes, all bytes, device) of a directory's filesystem."""
        try:
            status = os.statvfs(path)
            return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, path.stat().st_dev
        except OSError as error:
            raise translate(error, path, "examine") from error

    def sync_directory(self, path: Path) -> None:
        """Make creations, renames and removals in a directory durable."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise translate(error, path, "sync directory") from error


class _ReadOnlyFile(File):
    """A file that stays as it is: what is written to it is remembered, and read again, and not done."""

    def __init__(self, path: Path, fd: int) -> None:
        super().__init__(path, fd)
        self._written: list[tuple[int, bytes]] = []

    def pread(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Read, with what was written on top."""
        data = bytearray(super().pread(offset_bytes, length_bytes))
        for start, written in self._written:
            first, last = max(start, offset_bytes), min(start + len(written), offset_bytes + length_bytes)
            if first < last:
                data[first - offset_bytes : last - offset_bytes] = written[first - start : last - start]
        return bytes(data)

    def pread_cached(self, offset_bytes: int, length_bytes: int) -> bytes | None:
        """Always wait."""
        del offset_bytes, length_bytes
        return None

    def pwrite(self, offset_bytes: int, data: bytes | memoryview) -> None:
        """Remember."""
        self._written.append((offset_bytes, bytes(data)))

    def sync(self) -> None:
        """Nothing reaches the disk."""

    def punch(self, offset_bytes: int, length_bytes: int) -> bool:
        """Nothing is given back."""
        del offset_bytes, length_bytes
        return False

    def lock(self) -> None:
        """Reading needs no lock of its own; who reads has the pool's."""


class ReadingBacking(Backing):
    """Writes in one directory only, or nowhere; all other files are read."""

    def __init__(self, writable: Path | None = None) -> None:
        self._writable = writable

    def open(self, path: Path) -> File:
        """Open for reading only outside of the directory."""
        if path.parent == self._writable:
            return super().open(path)
        try:
            return _ReadOnlyFile(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise translate(error, path, "open") from error
