"""Changes made by command, taken through the mount itself.

What the kernel knows of sizes, names and pages is then right by itself.
"""

import contextlib
import errno
import logging
import os
import queue
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import pyfuse3

from incfs.errors import (
    AlreadyExists,
    Busy,
    IncfsError,
    LimitExceeded,
    NoSpace,
    NotFound,
    PoolReadOnly,
    UsageError,
)
from incfs.inodes import SNAPSHOTS_NAME
from incfs.kernels import waits_for_pages
from incfs.model import MapId
from incfs.mount_table import write_pages
from incfs.outside import Outside
from incfs.standstill import Standstill

logger = logging.getLogger(__name__)

T = TypeVar("T")


class KernelHook:
    """Changes made by command, taken through the mount itself: what the kernel knows is then right by itself.

    Args:
        mountpoint: Where the pool is mounted.
        outside: Makes the system calls, which wait for this process's own mount.
        writers: Gives the volumes that somebody has open for writing.
        find_name: Gives the name of a volume; raises VolumeNotFound.
        release: The kernel's, as ``uname -r`` has it; the running one's by default.
    """

    def __init__(
        self,
        mountpoint: Path,
        outside: Outside,
        writers: Callable[[], Collection[MapId]],
        find_name: Callable[[MapId], str],
        release: str | None = None,
    ) -> None:
        self._mountpoint = mountpoint
        self._outside = outside
        self._waits_for_pages = waits_for_pages(release)
        self._standstill = Standstill(self, writers, lambda table: mountpoint / find_name(table))

    def holds(self, path: Path) -> bool:
        """Tell whether a path lies in the mount."""
        return path.is_relative_to(self._mountpoint)

    async def sync_volume(self, name: str) -> None:
        """Have the kernel write its changed pages of a volume."""
        await self._call(_sync_file, self._mountpoint / name)

    async def at_standstill(self, tables: Collection[MapId], step: Callable[[], T]) -> T:
        """Do a step while nobody can write to volumes, and with all that was written to them; ``Standstill.do``."""
        return await self._standstill.do(tables, step)

    async def wait_to_answer_sync(self, table: MapId) -> None:
        """Wait, before FSYNC of a volume is answered, until the kernel may let go of its lock."""
        await self._standstill.wait(table)

    def is_ours(self, pid: int) -> bool:
        """Tell whether a process is the one that makes our system calls."""
        return self._outside.has_thread(pid)

    async def write_pages(self, files: Collection[tuple[Path, MapId]]) -> None:
        """Have the kernel write changed pages of files without their locks, as far as that is possible."""
        await self._outside.run(_write_all, [path for path, _ in files])

    async def open_files(self, files: Collection[tuple[Path, MapId]]) -> list[int] | None:
        """Open files over there, for ``sync_files``; None when one is not the volume that it was."""
        try:
            return await self._outside.run(_open_all, list(files))
        except OSError as error:
            raise _from_kernel(error) from error

    async def sync_files(self, descriptors: list[int]) -> None:
        """Fsync files all at once, and close them; over at the first that fails."""
        await self._call(_sync_all, descriptors)

    async def write_back(self, name: str, inode: int) -> bool:
        """Have the kernel write its changed pages of a volume, without its lock; whether all of them are here now.

        A kernel that does not wait for the writes without the lock is not asked: some would be on their way still.
        """
        if not self._waits_for_pages:
            return False
        try:
            await self._outside.run(_write_pages, self._mountpoint / name, inode)
        except OSError as error:
            logger.debug("%s: its pages are not written: %s", name, error)
            return False
        return True

    async def size_of(self, name: str, inode: int) -> int | None:
        """Return a volume's size as the kernel has it, also of what it has not written; None when it has gone."""
        try:
            return await self._outside.run(_size_of, self._mountpoint / name, inode)
        except OSError as error:
            logger.debug("%s: its size in the kernel is not known: %s", name, error)
            return None

    def forget_attributes(self, inode: int) -> None:
        """Have the kernel ask for an inode's attributes the next time; never blocks."""
        with contextlib.suppress(FileNotFoundError):
            pyfuse3.invalidate_inode(inode, attr_only=True)

    async def resize_volume(self, name: str, size_bytes: int) -> None:
        """Set a volume's size."""
        await self._call(os.truncate, self._mountpoint / name, size_bytes)

    async def refresh_volume(self, name: str, size_bytes: int) -> None:
        """Have the kernel forget the pages of a volume that was rolled back, and take its size."""
        await self._call(_open_and_truncate, self._mountpoint / name, size_bytes)

    async def rename_volume(self, old: str, new: str) -> None:
        """Rename a volume."""
        await self._call(os.rename, self._mountpoint / old, self._mountpoint / new)

    async def remove_volume(self, name: str) -> None:
        """Remove a volume."""
        await self._call(os.unlink, self._mountpoint / name)

    async def rename_snapshot(self, volume: str, old: str, new: str) -> None:
        """Rename a snapshot."""
        directory = self._mountpoint / SNAPSHOTS_NAME / volume
        await self._call(os.rename, directory / old, directory / new)

    async def _call(self, function: Callable[..., None], *args: object) -> None:
        try:
            await self._outside.run(function, *args)
        except OSError as error:
            raise _from_kernel(error) from error


def _write_pages(path: Path, inode: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _require_inode(os.fstat(fd), path, inode)
        write_pages(fd)
    finally:
        # Closing takes the file's lock: it may end only after the handler that asked has answered.
        threading.Thread(target=os.close, args=(fd,), daemon=True).start()


def _size_of(path: Path, inode: int) -> int:
    found = os.stat(path)
    _require_inode(found, path, inode)
    return found.st_size


def _require_inode(found: os.stat_result, path: Path, inode: int) -> None:
    """The name may belong to another volume since it was looked up."""
    if found.st_ino != inode:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(paths: list[Path]) -> None:
    _do_at_once(_open_and_close, paths)


def _open_and_close(path: Path) -> None:
    """Closing has all changed pages of the file written, without its lock."""
    with contextlib.suppress(OSError):  # fsync will tell
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _open_all(files: list[tuple[Path, MapId]]) -> list[int] | None:
    fds: list[int] = []
    try:
        for path, inode in files:
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            if os.fstat(fds[-1]).st_ino != inode:
                raise FileNotFoundError  # it was renamed, and another has its name
    except OSError as error:
        for fd in fds:
            os.close(fd)
        if error.errno in (None, errno.ENOENT):
            return None
        raise
    return fds


def _sync_all(fds: list[int]) -> None:
    _do_at_once(_sync_and_close, fds)


def _sync_and_close(fd: int) -> None:
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _do_at_once(function: Callable[[T], None], items: list[T]) -> None:
    """Call a function for each item, each in a thread; raise the first OSError without waiting for the others."""
    outcomes: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()

    def work(item: T) -> None:
        try:
            function(item)
        except OSError as error:
            outcomes.put(error)
        else:
            outcomes.put(None)

    for item in items:
        threading.Thread(target=work, args=(item,), daemon=True).start()
    for _ in items:
        if (error := outcomes.get()) is not None:
            raise error


def _open_and_truncate(path: Path, size_bytes: int) -> None:
    """The open is answered in a way that drops all pages; under write-back only a truncate changes the size."""
    os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    os.truncate(path, size_bytes)


def _from_kernel(error: OSError) -> IncfsError:
    """Return the error that a system call on our own mount stands for."""
    classes: dict[int | None, type[IncfsError]] = {
        errno.ENOENT: NotFound,
        errno.EBUSY: Busy,
        errno.EINVAL: UsageError,
        errno.EEXIST: AlreadyExists,
        errno.ENOSPC: NoSpace,
        errno.EROFS: PoolReadOnly,
        errno.EFBIG: LimitExceeded,
    }
    raised = classes.get(error.errno, IncfsError)
    return raised(f"{error.filename or 'the mount'}: {error.strerror}")
