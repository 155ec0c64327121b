"""``incfs umount``: returns when everything is on disk and the pool is free for the next."""

import errno
import logging
import os
import select
from pathlib import Path

from incfs.errors import IncfsError, NotFound
from incfs.mount_table import FILESYSTEM_TYPE, detach, find_mount, is_dead, sync_filesystem

logger = logging.getLogger(__name__)


def unmount(mountpoint: Path) -> None:
    """Unmount; returns when everything is on disk and the pool is free for the next.

    Raises:
        NotFound: No incfs is mounted there.
        Busy: Somebody uses the mount; the message says who.
        IncfsError: It is unmounted, but not everything could be written.
    """
    mounted = find_mount(mountpoint)
    if mounted is None or mounted.filesystem_type != FILESYSTEM_TYPE:
        raise NotFound(f"no incfs is mounted at {mountpoint}", mountpoint=str(mountpoint))
    if is_dead(mountpoint):
        detach(mountpoint, lazy=True)
        logger.warning("the daemon of %s had died; its pool recovers when it is mounted again", mountpoint)
        return
    daemon = _open_daemon(mountpoint)
    failure = _flush(mountpoint)
    detach(mountpoint)
    if daemon is not None:
        _wait_for_end(daemon)
    if failure is not None:
        raise IncfsError(
            f"{mountpoint} is unmounted, but not everything could be written: {failure.strerror}; see the daemon's log"
        ) from failure


def _open_daemon(mountpoint: Path) -> int | None:
    """Return a pidfd of the daemon; None when it lives where this process cannot see it."""
    try:
        return os.pidfd_open(int(os.getxattr(mountpoint, "user.incfs.pid")))
    except (OSError, ValueError):
        return None


def _flush(mountpoint: Path) -> OSError | None:
    """Write everything and commit, while there is still somebody to tell of a failure."""
    try:
        if not _has_synced(mountpoint):
            sync_filesystem(mountpoint)
            _sync_volumes(mountpoint)
        _sync(mountpoint)
    except OSError as error:
        if error.errno == errno.EROFS and os.statvfs(mountpoint).f_flag & os.ST_RDONLY:
            return None  # mounted read-only, as a degraded pool is: nobody could write anything
        return error
    return None


def _has_synced(mountpoint: Path) -> bool:
    """Have the kernel write what it holds; False when it says that something failed, now or at any time before."""
    try:
        sync_filesystem(mountpoint)
    except OSError as error:
        logger.info("%s: %s", mountpoint, error.strerror)
        return False
    return True


def _sync_volumes(mountpoint: Path) -> None:
    """Hear of failed writes that nobody was told of: the kernel remembers that for each file, but not for all of them.

    Whoever had his fsync fail, and wrote again since, knows; to him it is over.
    """
    for entry in os.scandir(mountpoint):
        if entry.is_file(follow_symlinks=False):
            _sync(Path(entry.path))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _wait_for_end(pidfd: int) -> None:
    """Return when the process has ended: it closes the pool before that."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()
    os.close(pidfd)
