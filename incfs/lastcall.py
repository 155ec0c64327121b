"""The last seconds before a machine goes down: what lies on the mount's loop devices goes, so that the mount can.

When systemd has stopped its units it sends SIGTERM and then SIGKILL to whatever is left, and unmounts and detaches
what remains only after that.  A filesystem on a volume would then be unmounted without the daemon that writes it.
"""

import contextlib
import ctypes
import fcntl
import os
from pathlib import Path
from typing import Final

from incfs.mount_table import loop_devices, read_mounts, resolve_mountpoint

LOOP_CLR_FD: Final = 0x4C01
_FINAL: Final = "systemd-shutdow"
"""What PID 1 becomes when all units are stopped; the kernel keeps 15 letters."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


def is_last_call() -> bool:
    """Tell whether the machine is about to go down, and whoever is left is told to end."""
    try:
        return Path("/proc/1/comm").read_text(encoding="utf-8").strip() == _FINAL
    except OSError:
        return False


def release_devices(mountpoint: Path) -> None:
    """Unmount what is mounted from loop devices on the mount's files, and detach those that nobody uses.

    What is in use stays: it is tried again when those who use it have gone.
    """
    prefix = f"{resolve_mountpoint(mountpoint)}/"
    for device in [device for device, file in loop_devices() if file.startswith(prefix)]:
        with contextlib.suppress(OSError):  # it has gone by itself
            number = os.stat(device).st_rdev
            name = f"{os.major(number)}:{os.minor(number)}"
            for mounted in reversed([mounted for mounted in read_mounts() if mounted.device == name]):
                _libc.umount2(os.fsencode(mounted.mountpoint), 0)
            _detach(device)


def _detach(device: str) -> None:
    """Detach a loop device that nobody uses; O_EXCL is what mounts and mappings hold."""
    fd = os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        fcntl.ioctl(fd, LOOP_CLR_FD)
    finally:
        os.close(fd)
