"""The command mounts again after ``kill -9``, by itself, whatever the dead daemon left behind."""

import os
import resource
import select
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from incfs.mount_table import detach, find_mount
from incfs.recovery import create_pool
from tests.support.cli import environment
from tests.support.fire import START_TIMEOUT_S
from tests.support.stamps import stamps

ROUNDS = max(3, int(os.environ.get("INCFS_KILL_ROUNDS", "60")) // 20)
CONTENT = stamps(0, 0, 2000, 1)


def _kill(pid: int) -> None:
    """Kill the daemon; the dead mount, its socket and its lock file stay."""
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    ended, _, _ = select.select([pidfd], [], [], START_TIMEOUT_S)
    os.close(pidfd)
    assert ended, "the daemon does not end"


def _children_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def _spent_s(pid: int) -> float:
    """Tell how much processor time a daemon has had, and the commands before it that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return _children_s() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600 + 5 * ROUNDS)
def test_restart_after_a_kill_needs_nobody(pool_home: Path, tmp_path: Path) -> None:
    pool, mountpoint = pool_home / "pool", tmp_path / "mnt"
    mountpoint.mkdir()
    create_pool(pool)
    command = [sys.executable, "-m", "incfs", "mount", str(pool), str(mountpoint)]
    took_s, spent_s = [], []
    try:
        for number in range(ROUNDS + 1):
            began, before_s = time.monotonic(), _children_s()
            subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=START_TIMEOUT_S)
            os.stat(mountpoint)
            took_s.append(time.monotonic() - began)
            pid = int(os.getxattr(mountpoint, "user.incfs.pid"))
            spent_s.append(_spent_s(pid) - before_s)
            if number:
                assert (mountpoint / "v").read_bytes() == CONTENT
            with open(mountpoint / "v", "wb", buffering=0) as file:
                file.write(CONTENT)
                os.fsync(file)
            _kill(pid)
    finally:
        while find_mount(mountpoint):
            detach(mountpoint, lazy=True)
    median_s, spent = statistics.median(took_s[1:]), statistics.median(spent_s[1:])
    print(f"\n{ROUNDS} kills: mounted again in {median_s:.2f} s in the median, {spent:.2f} s of a processor")
