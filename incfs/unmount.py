"""``incfs umount``: returns when everything is on disk and the pool is free for the next."""

import errno
import logging
import os
import select
from dataclasses import dataclass
from pathlib import Path

from incfs.client import connect
from incfs.errors import Busy, DaemonError, IncfsError, NotFound, PermissionRefused
from incfs.lock import read_holder
from incfs.mount_table import FILESYSTEM_TYPE, Mounted, busy_error, detach, find_mount, is_dead, sync_filesystem
from incfs.namespaces import find_elsewhere
from incfs.patience import PATIENCE_S, process_words, telling

logger = logging.getLogger(__name__)


def unmount(mountpoint: Path) -> None:
    """Unmount; returns when everything is on disk and the pool is free for the next.

    Raises:
        NotFound: No incfs is mounted there.
        Busy: Somebody uses the mount, or it is mounted elsewhere, too; the message says who.  Nothing was unmounted
            if that was seen before; else the daemon serves the other place until that is free.
        IncfsError: It is unmounted, but not everything could be written.
    """
    mounted = find_mount(mountpoint)
    if mounted is None or mounted.filesystem_type != FILESYSTEM_TYPE:
        raise NotFound(f"no incfs is mounted at {mountpoint}", mountpoint=str(mountpoint))
    with telling(lambda: _daemon_words(mounted)):
        if is_dead(mountpoint):
            detach(mountpoint, lazy=True)
            logger.warning("the daemon of %s had died; its pool recovers when it is mounted again", mountpoint)
            return
        require_sole(mountpoint)
        daemon = _open_daemon(mountpoint)
        failure = _flush(mountpoint)
        detach(mountpoint)
    if daemon is not None:
        daemon.await_end()
    if failure is not None:
        raise IncfsError(
            f"{mountpoint} is unmounted, but not everything could be written: {failure.strerror}; see the daemon's log"
        ) from failure


def _daemon_words(mounted: Mounted) -> str:
    """Name the daemon without asking the mount, which may answer nobody."""
    pool = Path(mounted.source)
    return f"the daemon of {pool}, {process_words(read_holder(pool))}"


def require_sole(mountpoint: Path) -> None:
    """Make sure that an unmounting ends the daemon: nobody has the mount at another place or in another namespace.

    Raises:
        Busy: Somebody has; it is named.
    """
    elsewhere = find_elsewhere(mountpoint)
    if elsewhere:
        raise busy_error(mountpoint, elsewhere)


def _open_daemon(mountpoint: Path) -> "_Daemon | None":
    """Find the daemon; None when it lives where this process cannot see it."""
    try:
        pid = int(os.getxattr(mountpoint, "user.incfs.pid"))
        pool = Path(os.fsdecode(os.getxattr(mountpoint, "user.incfs.pool")))
        return _Daemon(os.pidfd_open(pid), pid, pool, mountpoint)
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


@dataclass(frozen=True, slots=True)
class _Daemon:
    """The process behind a mount."""

    pidfd: int
    pid: int
    pool: Path
    mountpoint: Path

    def await_end(self) -> None:
        """Return when the process has ended: it closes the pool before that.

        Raises:
            Busy: It serves the mount still: somebody that this process cannot see has it.
        """
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        try:
            while not poll.poll(PATIENCE_S * 1000):
                if self._serves():
                    raise Busy(
                        f"{self.mountpoint} is unmounted here, but somebody has it still, where this command cannot "
                        f"see it (another mount namespace); process {self.pid} serves it until it is free",
                        mountpoint=str(self.mountpoint),
                    )
                logger.warning("waiting for %s, which closes the pool %s", process_words(self.pid), self.pool)
        finally:
            os.close(self.pidfd)

    def _serves(self) -> bool:
        """Tell whether it takes commands: it does until it has answered the last request of the mount."""
        try:
            connected = connect(self.pool)
        except DaemonError:
            return True  # it listens, and is slow
        except PermissionRefused:
            return False
        if connected is None:
            return False
        connected.close()
        return True
