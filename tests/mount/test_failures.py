"""Bugs and broken disks behind the mount: an errno for the caller, one line in the log, and the mount lives on."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.conftest import END_TIMEOUT_S, incfs
from tests.mount.test_names import errno_of

UNSERVED_DAEMON = Path(__file__).parents[1] / "support" / "unserved_daemon.py"
BROKEN_DAEMON = Path(__file__).parents[1] / "support" / "broken_daemon.py"


@pytest.fixture
def broken(mounted):
    """A mount whose daemon has a bug, with a volume of 200 blocks."""
    (mounted / "db").write_bytes(b"x" * 200 * 4096)
    mounted.stop()
    # Native threads would read past the bug.
    mounted.start("cache=none,threads=0", command=[sys.executable, BROKEN_DAEMON])
    mounted.expected_log = ["unexpected ZeroDivisionError", "read-only", "failsafe"]
    return mounted


def test_a_bug_gives_eio_one_line_and_a_read_only_pool(broken):
    fd = os.open(broken / "db", os.O_RDWR)
    assert os.pread(fd, 4096, 99 * 4096) == b"x" * 4096
    assert errno_of(os.pwrite, fd, b"y" * 4096, 100 * 4096) == errno.EIO
    inode = os.fstat(fd).st_ino
    unexpected = [line for line in broken.log().splitlines() if "incfs.boundary" in line]
    assert len(unexpected) == 1
    for part in ("write", f"inode {inode}", f"offset {100 * 4096}", "broken_daemon.py"):
        assert part in unexpected[0]
    assert "Traceback" not in broken.log()
    # The mount lives on, read-only.
    assert os.pread(fd, 4096, 101 * 4096) == b"x" * 4096
    assert errno_of(os.pwrite, fd, b"y", 0) == errno.EROFS
    assert errno_of(os.fsync, fd) == errno.EROFS
    assert errno_of((broken / "new").touch) == errno.EROFS
    os.close(fd)
    assert os.listdir(broken.path)


def test_a_bug_in_a_look_stops_no_writer(broken):
    """Whoever looks, and whatever at: only a change that may be half done makes the pool read-only."""
    fd = os.open(broken / "db", os.O_RDWR)
    assert errno_of(os.pread, fd, 4096, 100 * 4096) == errno.EIO
    unexpected = [line for line in broken.log().splitlines() if "incfs.boundary" in line]
    assert len(unexpected) == 1
    for part in ("read", f"inode {os.fstat(fd).st_ino}", f"offset {100 * 4096}", "broken_daemon.py"):
        assert part in unexpected[0]
    assert os.pwrite(fd, b"y" * 4096, 0) == 4096
    os.fsync(fd)
    (broken / "new").touch()
    os.close(fd)


def test_umount_in_the_failsafe_says_that_not_everything_was_written(broken):
    fd = os.open(broken / "db", os.O_RDWR)
    assert errno_of(os.pwrite, fd, b"y" * 4096, 100 * 4096) == errno.EIO
    os.close(fd)
    done = incfs("umount", broken.path, check=False)
    assert done.returncode == 1
    assert "not everything could be written" in done.stderr
    broken.process.wait(END_TIMEOUT_S)
    broken.log_path.write_text("")
    broken.start()
    assert (broken / "db").read_bytes() == b"x" * 200 * 4096


def test_a_damaged_block_gives_eio_for_its_range_only(mounted):
    data = os.urandom(64 * 4096)
    (mounted / "db").write_bytes(data)
    mounted.stop()
    block = data[10 * 4096 : 11 * 4096]
    image = next(path for path in mounted.pool.rglob("*.img"))  # a commit may have brought it into the journal, too
    raw = image.read_bytes()
    place = raw.index(block)
    with open(image, "r+b") as stream:
        stream.seek(place + 5)
        stream.write(b"\x00" if raw[place + 5] else b"\x01")
    mounted.start("cache=none")
    mounted.expected_log = ["."]
    fd = os.open(mounted / "db", os.O_RDONLY)
    assert errno_of(os.pread, fd, 4096, 10 * 4096) == errno.EIO
    assert os.pread(fd, 4096, 9 * 4096) == data[9 * 4096 : 10 * 4096]
    assert os.pread(fd, 4096, 11 * 4096) == data[11 * 4096 : 12 * 4096]
    os.close(fd)
    with open(image, "r+b") as stream:
        stream.seek(place)
        stream.write(block)
    (mounted / "other").write_bytes(b"a checksum error is no failure of the pool")


@pytest.mark.parametrize("plane", ["python", "native"])
@pytest.mark.parametrize("who", ["reader", "work"])
def test_a_daemon_that_an_error_ends_waits_for_no_answer_of_its_own_mount(mounted, who, plane):
    """It waited for ever when a snapshot was being taken: that wait is shielded, and nobody answered any more."""
    (mounted / "db").write_bytes(b"x" * 4096)
    mounted.stop()
    mounted.start(f"data_plane={plane}", command=[sys.executable, UNSERVED_DAEMON, who])
    mounted.expected_log = ["Traceback"]  # of the error
    writer = os.open(mounted / "db", os.O_RDWR)
    taking = subprocess.Popen(["touch", mounted / ".snapshots" / "db" / "s"], stderr=subprocess.DEVNULL)
    try:
        mounted.process.wait(END_TIMEOUT_S)
    finally:
        mounted.kill()
        assert taking.wait(END_TIMEOUT_S) != 0
        with contextlib.suppress(OSError):
            os.close(writer)
