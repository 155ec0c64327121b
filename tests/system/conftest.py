"""What the system tests need of the machine: FUSE, loop devices, root, and programs of others."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.spawner import Spawner


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


@pytest.fixture(scope="session")
def spawner() -> Iterator[Spawner]:
    """Starts daemons."""
    spawner = Spawner()
    yield spawner
    spawner.close()
