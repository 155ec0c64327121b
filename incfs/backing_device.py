"""What the kernel's page cache may hold of a mount: the limits of its backing device (``/sys/class/bdi``).

A FUSE filesystem begins with limits that are made for programs nobody trusts: 1 % of the changed pages that the machine
may have, and 128 KiB read ahead.  A pool is mounted like a disk, and gets more.
"""

import logging
from pathlib import Path
from typing import Final

from incfs.mount_table import FILESYSTEM_TYPE, find_mount

logger = logging.getLogger(__name__)

MAX_RATIO_PERCENT: Final = 10
"""Of the changed pages that the machine may have.  With more, a database that syncs through a buffered loop device was
slower, not faster; and a block that the kernel writes back becomes a changed page of an image, which counts, too."""
READ_AHEAD_KIB: Final = 1024
"""As much as one request carries, or one for each of two hot threads."""

_DEVICES: Final = Path("/sys/class/bdi")


def widen_page_cache(mountpoint: Path, devices: Path = _DEVICES) -> None:
    """Raise the limits of the mount at exactly this place; without root's rights they stay, and the log says so."""
    mounted = find_mount(mountpoint)
    if mounted is None or mounted.filesystem_type != FILESYSTEM_TYPE:
        return  # unmounted meanwhile
    limits = devices / mounted.device
    try:
        (limits / "max_ratio").write_text(f"{MAX_RATIO_PERCENT}\n", encoding="ascii")
        (limits / "read_ahead_kb").write_text(f"{READ_AHEAD_KIB}\n", encoding="ascii")
    except OSError as error:
        logger.info("%s: the kernel's limits for buffered reads and writes stay: %s", mountpoint, error)
