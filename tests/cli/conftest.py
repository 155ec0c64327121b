"""A pool, alone or served by a daemon."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from incfs.recovery import create_pool
from tests.support.cli import Cli, InProcessCli, environment


@contextmanager
def serving(pool: Path) -> Iterator[subprocess.Popen[str]]:
    """Serve the pool's admin socket from another process."""
    daemon = subprocess.Popen(
        [sys.executable, "-m", "tests.support.daemon", str(pool)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert daemon.stdin is not None
    assert daemon.stdout is not None
    try:
        assert daemon.stdout.readline() == "serving\n"
        yield daemon
        daemon.stdin.close()
        assert daemon.wait(30) in (0, -signal.SIGKILL)
    finally:
        daemon.kill()
        daemon.wait()
        daemon.stdin.close()
        daemon.stdout.close()


@pytest.fixture
def offline(tmp_path: Path) -> Cli:
    """A pool that nobody has open."""
    directory = tmp_path / "pool"
    create_pool(directory, capacity_bytes=1 << 30)
    return Cli(directory)


@pytest.fixture(params=["offline", "online"])
def cli(offline: Cli, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """A pool reached both ways, by commands run in this process."""
    assert offline.pool is not None
    here = InProcessCli(offline.pool, capsys)
    if request.param == "offline":
        yield here
        return
    with serving(offline.pool):
        yield here
