"""Fixtures and settings that every level of tests shares."""

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.support import hung_workers
from tests.support.figures import FIGURES

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell: tests of Ctrl-C need a child that minds it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # Started by nohup: the same.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile(
    "normal", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile(
    "long", max_examples=5000, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
# For who only wants to know whether a test fails (tests/teeth).
settings.register_profile("unshrunk", settings.get_profile("normal"), phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("INCFS_TEST_PROFILE", "normal"))

collect_ignore = ["vm"]
"""Virtual machines have targets of their own in the Makefile, which name the directory."""


def fast_directory() -> Path:
    """Where many tiny pools are made: in memory if the machine has that, for their thousands of syncs."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


@pytest.fixture
def pool_home() -> Iterator[Path]:
    """An empty directory for one test's pools, in memory if possible."""
    home = Path(tempfile.mkdtemp(prefix="incfs-test-", dir=fast_directory()))
    yield home
    shutil.rmtree(home)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Take away what a killed run left behind, and see to the workers, which leave each other's mounts alone."""
    directory = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    if hasattr(session.config, "workerinput"):
        hung_workers.announce(directory)
    else:
        subprocess.run([Path(__file__).parents[1] / "tools" / "sweep-mounts.sh"], check=True, timeout=60)
        stop = threading.Event()
        threading.Thread(target=hung_workers.watch, args=(directory, stop), daemon=True).start()
        session.config.add_cleanup(stop.set)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what a worker has tried to what is printed at the end."""
    FIGURES.update(getattr(node, "workeroutput", {}).get("figures", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the run of which this is a worker what was tried here."""
    if (workeroutput := getattr(session.config, "workeroutput", None)) is not None:
        workeroutput["figures"] = dict(FIGURES)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was tried."""
    if FIGURES:
        terminalreporter.section("figures of the crash tests")
        for name, count in FIGURES.items():
            terminalreporter.write_line(f"{count:>9,}  {name}")
