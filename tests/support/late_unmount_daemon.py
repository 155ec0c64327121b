"""A daemon that hears of its own unmounting late: the mount has ended long before.  Called as: POOL MNT."""

import sys
import time
from pathlib import Path

import incfs.mount
import incfs.mount_table

_detach = incfs.mount_table.detach


def detach(mountpoint: Path, *, lazy: bool = False) -> None:
    _detach(mountpoint, lazy=lazy)
    time.sleep(0.5)


detach.__module__ = _detach.__module__  # it is called by name, in another process
incfs.mount.detach = incfs.mount_table.detach = detach  # type: ignore[attr-defined]
incfs.mount.mount_pool(Path(sys.argv[1]), Path(sys.argv[2]), "", foreground=True)
