"""Seeks for data while the kernel is still sending it, on the running kernel and as on one that cannot wait for it.

Kernels before 6.16 say that a page is written when its copy is queued; data that had been written a moment before was
a hole to SEEK_DATA then, and whoever copied the volume by its holes left it out.
"""

import errno
import os
import subprocess
import sys

import pytest

from incfs.kernels import waits_for_pages
from tests.mount.conftest import START_TIMEOUT_S, mounted_pool
from tests.mount.test_names import errno_of
from tests.mount.test_sparse import data_ranges

MIB = 1 << 20
SIZE_BYTES = 256 * MIB
PLACES = [(4 + 8 * number) * MIB for number in range(24)]
ROUNDS = 4
UNWAITING = [sys.executable, "-m", "tests.support.unwaiting"]


@pytest.fixture(scope="module", params=["running", "unwaiting"])
def mnt(request, tmp_path_factory):
    """A mount on the running kernel, and one whose daemon takes it for a kernel that does not wait."""
    with mounted_pool(tmp_path_factory.mktemp("mount")) as pool:
        if request.param == "unwaiting":
            pool.stop()
            pool.start(command=UNWAITING)
        pool.is_exact = request.param == "running" and waits_for_pages()
        yield pool


@pytest.fixture
def fd(volume):
    fd = os.open(volume, os.O_CREAT | os.O_RDWR)
    yield fd
    os.close(fd)


def write_afresh(fd, data):
    os.ftruncate(fd, 0)
    os.ftruncate(fd, SIZE_BYTES)
    for place in PLACES:
        os.pwrite(fd, data, place)


def test_seek_misses_no_data_that_was_just_written(fd, mnt):
    data = os.urandom(MIB)
    for _ in range(ROUNDS):
        write_afresh(fd, data)
        found = data_ranges(fd)
        assert [place for place in PLACES if not any(start <= place < end for start, end in found)] == []
        if mnt.is_exact:
            assert found == [(place, place + MIB) for place in PLACES]


def test_the_first_seek_finds_the_only_data(fd, mnt):
    os.ftruncate(fd, 1 << 30)
    os.pwrite(fd, os.urandom(64 << 10), MIB)
    assert os.lseek(fd, 0, os.SEEK_DATA) == (MIB if mnt.is_exact else 0)


def test_seek_finds_what_was_just_appended(fd):
    """The daemon knows neither the data nor the new end yet."""
    os.pwrite(fd, b"x" * 4096, 0)
    os.fsync(fd)
    os.pwrite(fd, b"x" * 4096, 1 * MIB)
    assert os.lseek(fd, MIB, os.SEEK_DATA) == MIB
    assert os.lseek(fd, MIB, os.SEEK_HOLE) == MIB + 4096
    assert errno_of(os.lseek, fd, MIB + 4096, os.SEEK_DATA) == errno.ENXIO


def test_a_sparse_copy_of_a_volume_that_was_just_written_is_whole(fd, volume, tmp_path):
    data = os.urandom(MIB)
    copy = tmp_path / "copy"
    for _ in range(2):
        write_afresh(fd, data)
        subprocess.run(["cp", "--sparse=auto", volume, copy], check=True, timeout=START_TIMEOUT_S)
        with open(copy, "rb") as copied:
            assert [place for place in PLACES if os.pread(copied.fileno(), MIB, place) != data] == []


def test_holes_are_exact_once_no_writer_has_the_volume_open(volume):
    fd = os.open(volume, os.O_CREAT | os.O_RDWR)
    write_afresh(fd, os.urandom(MIB))
    reader = os.open(volume, os.O_RDONLY)
    os.close(fd)
    try:
        assert data_ranges(reader) == [(place, place + MIB) for place in PLACES]
    finally:
        os.close(reader)
