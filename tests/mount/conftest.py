"""A pool, its daemon and the real kernel.

Every mount ends the same way: unmounted (by force if need be), the daemon's log without a warning that the test did
not announce, the pool free, and ``incfs pool check --data`` clean.
"""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import Any

import pytest

from incfs.cli import main
from incfs.errors import IncfsError
from incfs.mount_table import MNT_DETACH, _libc, find_mount
from incfs.unmount import unmount

INCFS = [sys.executable, "-m", "incfs"]
START_TIMEOUT_S = 60
"""Of what takes a second or two: a busy machine may be very slow, and what does not happen never does."""
END_TIMEOUT_S = 60


def incfs(*args, check=True, **kwargs):
    """Run the command; returns the finished process with its output as text."""
    done = subprocess.run([*INCFS, *map(str, args)], capture_output=True, text=True, check=False, timeout=200, **kwargs)
    if check:
        assert done.returncode == 0, f"incfs {args} ended with {done.returncode}: {done.stderr}"
    return done


def incfs_here(*args):
    """Run an offline command that must work in this process, which has imported everything; returns its output."""
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
        main([*map(str, args)])
    assert ended.value.code == 0, f"incfs {args} ended with {ended.value.code}"
    return said.getvalue()


class MountedPool:
    """A pool in a temporary directory, or one that is there already, with a daemon in the foreground."""

    def __init__(self, directory, *pool_options, pool=None):
        directory.mkdir(exist_ok=True)
        self.pool = pool or directory / "pool"
        self.path = directory / "mnt"
        self.log_path = directory / "log"
        self.expected_log: list[str] = []
        self.process: Any = None
        self.path.mkdir()
        if pool is None:
            incfs_here("pool", "create", self.pool, *pool_options)

    def __truediv__(self, name):
        return self.path / name

    def command(self, *args, **kwargs):
        return incfs("-p", self.pool, *args, **kwargs)

    def start(self, options="", command=None):
        seen = len(self.log()) if self.log_path.exists() else 0
        command = command or [*INCFS, "mount", "--foreground"]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*map(str, command), str(self.pool), str(self.path), *(["-o", options] if options else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(lambda: ": mounted" in self.log()[seen:] or self.process.poll() is not None)
        assert self.process.poll() is None, f"the daemon did not start: {self.log()}"

    def log(self):
        return self.log_path.read_text()

    def remount(self, options=""):
        self.stop()
        self.log_path.write_text("")
        self.start(options)

    def stop(self):
        unmount(self.path)
        assert self.process.wait(END_TIMEOUT_S) == 0
        self.process = None

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(END_TIMEOUT_S)
        self.process = None

    def take_down(self):
        """End everything that is still there, whatever state the test left."""
        if self.process is not None and self.process.poll() is None and find_mount(self.path):
            with contextlib.suppress(IncfsError):
                unmount(self.path)
                self.process.wait(END_TIMEOUT_S)
        while find_mount(self.path) is not None:
            _libc.umount2(os.fsencode(self.path), MNT_DETACH)
        if self.process is not None and self.process.poll() is None:
            try:
                self.process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def check(self):
        unexpected = [
            line
            for line in self.log().splitlines()
            if re.search(r" (WARNING|ERROR|CRITICAL) |Traceback", line)
            and not any(re.search(pattern, line) for pattern in self.expected_log)
        ]
        assert not unexpected, unexpected
        assert "clean" in incfs_here("-p", self.pool, "pool", "check", "--data")


def wait_for(condition, timeout_s=START_TIMEOUT_S):
    """Wait for what another process is about to do."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def require_fuse():
    if not os.path.exists("/dev/fuse") or os.geteuid() != 0:
        # In CI a test of the mount that cannot run is a failure.
        (pytest.fail if os.environ.get("INCFS_REQUIRE_MOUNT") == "1" else pytest.skip)("needs /dev/fuse and root")


@contextmanager
def mounted_pool(directory, options="", *pool_options):
    require_fuse()
    mounted = MountedPool(directory, *pool_options)
    try:
        mounted.start(options)
        yield mounted
    finally:
        mounted.take_down()
    mounted.check()


@pytest.fixture
def mounted(tmp_path):
    """A mount of its own, for tests that change its life."""
    with mounted_pool(tmp_path) as pool:
        yield pool


@pytest.fixture(scope="module")
def mnt(tmp_path_factory):
    """A mount that the tests of a module share; each works on volumes of its own."""
    with mounted_pool(tmp_path_factory.mktemp("mount")) as pool:
        yield pool


@pytest.fixture
def volume(mnt, request):
    """The path of a volume named after the test; it does not exist yet."""
    name = re.sub(r"\W+", "-", request.node.name).strip("-")[:100]
    return mnt / name


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/mount" in str(item.path):
            item.add_marker(pytest.mark.mount)
