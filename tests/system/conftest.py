"""What the system tests need of the machine: FUSE, loop devices, root, and programs of others."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.spawner import Spawner

SWEEP = Path(__file__).resolve().parents[2] / "tools" / "sweep-mounts.sh"


def _lacks() -> str:
    if os.geteuid() != 0:
        return "root"
    return next((path for path in ("/dev/fuse", "/dev/loop-control") if not Path(path).exists()), "")


@pytest.fixture(autouse=True, scope="session")
def machine() -> None:
    """Skip what this machine cannot run; fail where it must (INCFS_REQUIRE_MOUNT=1)."""
    lacking = _lacks()
    if lacking:
        (pytest.fail if os.environ.get("INCFS_REQUIRE_MOUNT") == "1" else pytest.skip)(f"needs {lacking}")
    # What a run that was killed left behind must not be in the way of this one.
    subprocess.run([SWEEP], check=True, timeout=60)


@pytest.fixture(scope="session")
def spawner() -> Iterator[Spawner]:
    """Starts daemons."""
    spawner = Spawner()
    yield spawner
    spawner.close()
