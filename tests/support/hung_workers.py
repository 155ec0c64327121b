"""A worker whose test waits in the kernel for ever: its mounts are given up, so that it ends and the run goes on.

pytest-timeout ends the worker, but a thread that waits for a daemon's answer cannot be killed: the process stays as a
zombie with its descriptors open, and the run would wait for it without an end.
"""

import ctypes
import os
import signal
import threading
from pathlib import Path
from typing import Final

from incfs.mount_table import read_mounts

INTERVAL_S: Final = 5
_PID: Final = "worker.pid"
_MNT_FORCE: Final = 1
_KILLED: Final = 1 << (signal.SIGKILL - 1)
_libc: Final = ctypes.CDLL(None)


def announce(directory: Path) -> None:
    """Tell the run that this process mounts below ``directory``, which is in the run's own."""
    (directory / _PID).write_text(str(os.getpid()))


def watch(directory: Path, stop: threading.Event) -> None:
    """Until ``stop`` is set, see to the workers of the run in ``directory``."""
    while not stop.wait(INTERVAL_S):
        for announced in directory.glob(f"*/{_PID}"):
            pid = announced.read_text()
            if pid and _has_ended(int(pid)):
                _give_up_mounts(announced.parent)


def _has_ended(pid: int) -> bool:
    """Whether the process ended, or would if none of its threads waited in the kernel."""
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status["State"].startswith("Z") or bool(int(status["SigPnd"], 16) & _KILLED)


def _give_up_mounts(directory: Path) -> None:
    """Answer whoever waits for a mount below it with an error, as ``umount --force`` does."""
    for mounted in read_mounts():
        if mounted.filesystem_type.startswith("fuse") and directory in mounted.mountpoint.parents:
            _libc.umount2(os.fsencode(mounted.mountpoint), _MNT_FORCE)  # EBUSY: it is aborted, and goes with its user
