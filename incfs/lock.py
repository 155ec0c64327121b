"""The pool's lock: one process at a time.

An ``flock`` on ``POOL/lock``: the kernel drops it with the process, so a crash leaves
nothing to clean up.
"""

import contextlib
import fcntl
import os
from pathlib import Path

from incfs.backing import translate
from incfs.errors import PoolLocked

LOCK_NAME = "lock"
_PID_BYTES = 19


def read_holder(directory: Path) -> str:
    """Name the process that has the lock, or had it last."""
    try:
        with open(directory / LOCK_NAME, "rb") as stream:
            return _decode_holder(stream.read(_PID_BYTES))
    except OSError:
        return "unknown"


def _decode_holder(text: bytes) -> str:
    return text.strip().decode("ascii", "replace") or "unknown"


class PoolLock:
    """Holds the lock from creation to ``release``."""

    def __init__(self, directory: Path) -> None:
        path = directory / LOCK_NAME
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise translate(error, path, "open") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _decode_holder(os.pread(self._fd, _PID_BYTES, 0))
            os.close(self._fd)
            raise PoolLocked(f"pool {directory} is in use by process {holder}", pid=holder) from error
        # Without emptying it first: on a full disk what was there can be written over.  It is only for messages.
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, f"{os.getpid():<{_PID_BYTES}}\n".encode(), 0)

    def is_of(self, directory: Path) -> bool:
        """Whether it is the lock of what is at that path now: the disk may have been away."""
        try:
            found, held = os.stat(directory / LOCK_NAME), os.fstat(self._fd)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)

    def release(self) -> None:
        """Let the next process have the pool."""
        os.close(self._fd)
