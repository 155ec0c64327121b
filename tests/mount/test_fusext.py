"""The C extension with the real kernel: what pyfuse3 lacks arrives, is answered once, and never ends the mount."""

import contextlib
import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.conftest import START_TIMEOUT_S
from tests.support.loop import filesystem

pytestmark = pytest.mark.mount

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 0x10
MIB = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Child:
    """A running ``tests.support.passthrough``."""

    def __init__(self, base: Path, mode: str) -> None:
        self.below, self.mountpoint = base / "below", base / "mnt"
        self.below.mkdir()
        self.mountpoint.mkdir()
        for name in ("vol", "target", "refuses", "raises", "hangs"):
            with open(self.below / name, "wb") as file:
                file.truncate(8 * MIB)
        # Data in [2 MiB, 3 MiB), holes around it.
        with open(self.below / "vol", "r+b") as file:
            file.seek(2 * MIB)
            file.write(b"x" * MIB)
        self.stderr = base / "stderr"
        command = [sys.executable, "-m", "tests.support.passthrough", str(self.below), str(self.mountpoint), mode]
        with open(self.stderr, "wb") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        self.said: list[list[Any]] = []

    def hear(self, *start: Any) -> list[Any]:
        """Return the next line that begins with ``start``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            what: list[Any] = json.loads(line)
            self.said.append(what)
            if what[: len(start)] == list(start):
                return what
        raise AssertionError(f"never said {start}: {self.said}\n{self.stderr.read_text()}")

    def open(self, name: str) -> int:
        return os.open(self.mountpoint / name, os.O_RDWR)

    def finish(self) -> str:
        """Unmount, wait for a clean end, and return what was logged."""
        subprocess.run(["umount", self.mountpoint], check=True)
        assert self.process.stdout is not None
        self.said += [json.loads(line) for line in self.process.stdout]
        assert self.process.wait(START_TIMEOUT_S) == 0, self.stderr.read_text()
        return self.stderr.read_text()

    def clean_up(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        if os.path.ismount(self.mountpoint) or self._is_dead():
            subprocess.run(["umount", "-l", self.mountpoint], check=True)

    def _is_dead(self) -> bool:
        try:
            os.stat(self.mountpoint)
        except OSError as error:
            return error.errno == errno.ENOTCONN
        return False


@pytest.fixture
def child(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Child]:
    started = Child(tmp_path, getattr(request, "param", "normal"))
    try:
        started.hear("ready")
        yield started
    finally:
        started.clean_up()


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if libc.fallocate(fd, mode, offset, length) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def errno_of(call: Any, *arguments: Any) -> int:
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or 0
    raise AssertionError(f"{call} did not fail")


def test_seek_finds_data_and_holes(child: Child) -> None:
    fd = child.open("vol")
    assert os.lseek(fd, 0, os.SEEK_DATA) == 2 * MIB
    assert child.hear("lseek") == ["lseek", 0, os.SEEK_DATA]
    assert os.lseek(fd, 2 * MIB + 5, os.SEEK_HOLE) == 3 * MIB
    assert child.hear("lseek") == ["lseek", 2 * MIB + 5, os.SEEK_HOLE]
    assert errno_of(os.lseek, fd, 3 * MIB, os.SEEK_DATA) == errno.ENXIO
    os.close(fd)
    assert child.finish() == ""


def test_fallocate_arrives_with_its_mode(child: Child) -> None:
    fd = child.open("vol")
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 2 * MIB, MIB // 2)
    assert child.hear("fallocate") == ["fallocate", PUNCH_HOLE | KEEP_SIZE, 2 * MIB, MIB // 2]
    assert os.pread(fd, 4, 2 * MIB + MIB // 2 - 2) == b"\0\0xx"
    fallocate(fd, ZERO_RANGE, 3 * MIB - 4096, 4096)
    assert child.hear("fallocate") == ["fallocate", ZERO_RANGE, 3 * MIB - 4096, 4096]
    os.posix_fallocate(fd, 8 * MIB, MIB)
    assert child.hear("fallocate") == ["fallocate", 0, 8 * MIB, MIB]
    assert os.fstat(fd).st_size == 9 * MIB
    os.close(fd)
    assert child.finish() == ""


def test_copy_file_range_arrives_with_both_files(child: Child) -> None:
    source, target = child.open("vol"), child.open("target")
    assert os.copy_file_range(source, target, 4096, 2 * MIB, 12288) == 4096
    assert child.hear("copy_file_range") == ["copy_file_range", 2 * MIB, 12288, 4096, 0]
    assert os.pread(target, 4097, 12288) == b"x" * 4096 + b"\0"
    os.close(source)
    os.close(target)
    assert child.finish() == ""


def test_an_errno_of_a_handler_reaches_the_caller(child: Child) -> None:
    fd = child.open("refuses")
    assert errno_of(os.lseek, fd, 0, os.SEEK_DATA) == errno.EPERM
    assert errno_of(fallocate, fd, PUNCH_HOLE | KEEP_SIZE, 0, 4096) == errno.EPERM
    os.close(fd)
    assert child.finish() == ""


def test_an_exception_in_a_handler_gives_eio_and_the_mount_lives(child: Child) -> None:
    fd = child.open("raises")
    assert errno_of(os.lseek, fd, 0, os.SEEK_DATA) == errno.EIO
    assert errno_of(fallocate, fd, PUNCH_HOLE | KEEP_SIZE, 0, 4096) == errno.EIO
    os.close(fd)
    fd = child.open("vol")
    assert os.lseek(fd, 0, os.SEEK_DATA) == 2 * MIB
    os.close(fd)
    lines = child.finish().splitlines()
    assert len(lines) == 2
    assert all("a bug in a handler" in line for line in lines)


@pytest.mark.parametrize(("child", "trace"), [("broken", "a bug in dispatch"), ("drop", "")], indirect=["child"])
def test_a_request_that_nobody_answers_gives_eio(child: Child, trace: str) -> None:
    fd = child.open("vol")
    for _ in range(3):
        assert errno_of(os.lseek, fd, 0, os.SEEK_DATA) == errno.EIO
    assert os.pread(fd, 1, 2 * MIB) == b"x"
    os.close(fd)
    assert trace in child.finish()
    for line in child.said:
        if line[0] == "lseek":
            assert line[1:] == [os.getuid(), os.getgid(), os.getpid()]


@pytest.mark.parametrize("child", ["idle"], indirect=True)
def test_without_handlers_the_kernel_helps_itself(child: Child) -> None:
    fd = child.open("vol")
    assert os.lseek(fd, 0, os.SEEK_DATA) == 0
    assert errno_of(fallocate, fd, PUNCH_HOLE | KEEP_SIZE, 0, 4096) == errno.EOPNOTSUPP
    os.close(fd)
    assert child.finish() == ""


@pytest.mark.parametrize("child", ["late"], indirect=True)
def test_a_mount_without_the_extension_works_and_says_so(child: Child) -> None:
    assert ["installed", False] in child.said
    fd = child.open("vol")
    assert os.lseek(fd, 0, os.SEEK_DATA) == 0
    assert os.pread(fd, 1, 2 * MIB) == b"x"
    os.close(fd)
    assert "pyfuse3 was imported before incfs" in child.finish()


@pytest.mark.parametrize(
    ("child", "name", "expected"),
    [
        ("normal", "hangs", {errno.EIO}),  # stop() answers while the mount is still there
        ("keep", "vol", {errno.ENOTCONN, errno.ECONNABORTED}),  # the unmount went first: by the kernel
    ],
    indirect=["child"],
)
def test_the_end_of_the_session_answers_what_is_pending(child: Child, name: str, expected: set[int]) -> None:
    fd = child.open(name)
    outcome: list[int] = []
    caller = threading.Thread(target=lambda: outcome.append(errno_of(os.lseek, fd, 0, os.SEEK_DATA)))
    caller.start()
    child.hear("kept" if name == "vol" else "lseek")
    child.process.send_signal(signal.SIGTERM)
    caller.join(START_TIMEOUT_S)
    assert not caller.is_alive()
    assert outcome[0] in expected
    with contextlib.suppress(OSError):  # the mount is gone, its flush fails
        os.close(fd)
    if name == "vol":
        assert child.hear("late reply")[1:] == [False, "this FUSE request has been answered already"]
    assert child.process.wait(START_TIMEOUT_S) == 0, child.stderr.read_text()


def test_the_limits_reach_the_kernel(child: Child, tmp_path: Path) -> None:
    device = os.stat(child.mountpoint).st_dev
    with filesystem(Path("fusectl"), tmp_path / "connections", "-t", "fusectl") as connections:
        connection = connections / str(os.minor(device))
        assert (connection / "max_background").read_text() == "77\n"
        assert (connection / "congestion_threshold").read_text() == "55\n"
    readahead = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert readahead.read_text() == "64\n"
    child.finish()
    agreed = child.said[-1][1]
    assert agreed["max_background"] == 77
    assert agreed["max_readahead"] == 65536
    assert agreed["want"] & 0b111 << 7 == 0  # FUSE_CAP_SPLICE_WRITE, _MOVE and _READ
