"""Changes made by command, taken through the mount itself.

What the kernel knows of sizes, names and pages is then right by itself.
"""

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

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
from incfs.mount_table import write_pages
from incfs.outside import Outside

logger = logging.getLogger(__name__)


class KernelHook:
    """Changes made by command, taken through the mount itself: what the kernel knows is then right by itself.

    Args:
        mountpoint: Where the pool is mounted.
        outside: Makes the system calls, which wait for this process's own mount.
    """

    def __init__(self, mountpoint: Path, outside: Outside) -> None:
        self._mountpoint = mountpoint
        self._outside = outside

    def holds(self, path: Path) -> bool:
        """Tell whether a path lies in the mount."""
        return path.is_relative_to(self._mountpoint)

    async def sync_volume(self, name: str) -> None:
        """Have the kernel write its changed pages of a volume."""
        await self._call(_sync_file, self._mountpoint / name)

    async def write_back(self, name: str) -> bool:
        """Have the kernel write its changed pages of a volume, without its lock; whether that was possible."""
        try:
            await self._outside.run(_write_pages, self._mountpoint / name)
        except OSError as error:
            logger.debug("%s: its pages are not written: %s", name, error)
            return False
        return True

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


def _write_pages(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        write_pages(fd)
    finally:
        # Closing takes the file's lock: it may end only after the handler that asked has answered.
        threading.Thread(target=os.close, args=(fd,), daemon=True).start()


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
