"""A pool, alone or served by a daemon."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.cli import Cli, environment


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
    Cli().ok("pool", "create", directory, "--capacity", "1G")
    return Cli(directory)


@pytest.fixture(params=["offline", "online"])
def cli(offline: Cli, request: pytest.FixtureRequest) -> Iterator[Cli]:
    """A pool reached both ways."""
    if request.param == "offline":
        yield offline
        return
    assert offline.pool is not None
    with serving(offline.pool):
        yield offline
