"""Memory that a daemon cannot have: a control group with a limit, and a limit of its address space.

Whichever of cgroup 1 and 2 the machine has is used.
"""

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from incfs.fuse_ops import Operations

_ROOT = Path("/sys/fs/cgroup")
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3


class Group:
    """A control group."""

    def __init__(self, directory: Path, limit_name: str, usage_name: str) -> None:
        self._directory = directory
        self._limit, self._usage = directory / limit_name, directory / usage_name

    @property
    def processes(self) -> Path:
        """Where a process writes its id to join."""
        return self._directory / "cgroup.procs"

    @property
    def used_bytes(self) -> int:
        """What its processes use, files that they wrote in memory included."""
        return int(self._usage.read_text())

    def limit(self, limit_bytes: int) -> None:
        """Have the kernel kill a process of the group rather than give it more."""
        self._limit.write_text(str(limit_bytes))


@contextmanager
def control_group(name: str) -> Iterator[Group | None]:
    """Make a group; None where the machine does not let us."""
    first, second = _ROOT / "memory", _ROOT
    if (first / "memory.limit_in_bytes").exists():
        group = Group(first / name, "memory.limit_in_bytes", "memory.usage_in_bytes")
    else:
        group = Group(second / name, "memory.max", "memory.current")
    try:
        group.processes.parent.mkdir()
    except OSError:
        yield None
        return
    try:
        yield group if group.processes.exists() and os.access(group._limit, os.W_OK) else None
    finally:
        group.processes.parent.rmdir()


def join(processes: str) -> None:
    """Put this process into a group, and its children."""
    Path(processes).write_text(str(os.getpid()))


def take_address_space(pid: int, left_bytes: int) -> None:
    """Let a process have no more than this much address space beyond what it has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + left_bytes
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def give_address_space(pid: int) -> None:
    """Undo ``take_address_space``."""
    resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def sync_late(delay_s: float) -> None:
    """Have this daemon answer each fsync after a delay, and do no more for it, so that many are at hand at once."""

    async def late(self: Operations, *args: Any) -> None:
        await trio.sleep(delay_s)

    setattr(Operations, "fsync", late)  # noqa: B010 - mypy refuses the plain assignment


def keep_no_address_space() -> None:
    """Have malloc set none aside, for threads or of what was freed: a large piece needs new."""
    assert ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    assert ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 << 10)
