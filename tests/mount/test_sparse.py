"""Holes: fallocate, SEEK_DATA and SEEK_HOLE, copy_file_range."""

import ctypes
import errno
import os
import subprocess

import pytest

from tests.mount.conftest import START_TIMEOUT_S
from tests.mount.test_names import errno_of

MIB = 1 << 20
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE_RANGE = 1, 2, 8, 16, 32, 64


def fallocate(fd, mode, offset, length):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def data_ranges(fd):
    """List the [start, end) ranges that hold data."""
    found: list[tuple[int, int]] = []
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return found
        end = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, end))


@pytest.fixture
def fd(volume):
    fd = os.open(volume, os.O_CREAT | os.O_RDWR)
    yield fd
    os.close(fd)


def blocks(fd):
    os.fsync(fd)
    return os.fstat(fd).st_blocks * 512


def test_plain_fallocate_extends_and_reserves_nothing(fd):
    fallocate(fd, 0, 0, 10 * MIB)
    assert (os.fstat(fd).st_size, blocks(fd)) == (10 * MIB, 0)
    fallocate(fd, 0, 0, MIB)
    fallocate(fd, KEEP_SIZE, 0, 20 * MIB)
    assert os.fstat(fd).st_size == 10 * MIB


def test_punching_a_hole_gives_space_back(fd):
    data = os.urandom(4 * MIB)
    os.pwrite(fd, data, 0)
    assert blocks(fd) == 4 * MIB
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, MIB, MIB)
    assert blocks(fd) == 3 * MIB
    assert os.pread(fd, 4 * MIB, 0) == data[:MIB] + bytes(MIB) + data[2 * MIB :]


def test_punching_parts_of_blocks_zeroes_them(fd):
    os.pwrite(fd, b"a" * 16384, 0)
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 100, 10000)
    assert os.pread(fd, 20000, 0) == b"a" * 100 + bytes(10000) + b"a" * 6284
    assert blocks(fd) == 3 * 4096


def test_punching_behind_the_end_changes_nothing(fd):
    os.pwrite(fd, b"a" * 5000, 0)
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 4096, MIB)
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 10 * MIB, MIB)
    assert os.pread(fd, 10000, 0) == b"a" * 4096 + bytes(904)


def test_zero_range_with_and_without_keeping_the_size(fd):
    os.pwrite(fd, b"a" * 8192, 0)
    fallocate(fd, ZERO_RANGE | KEEP_SIZE, 4096, 8192)
    assert os.pread(fd, 20000, 0) == b"a" * 4096 + bytes(4096)
    fallocate(fd, ZERO_RANGE, 2048, 8192)
    assert os.pread(fd, 20000, 0) == b"a" * 2048 + bytes(8192)
    assert os.fstat(fd).st_size == 10240


@pytest.mark.parametrize("mode", [COLLAPSE_RANGE, INSERT_RANGE, UNSHARE_RANGE])
def test_other_modes_are_not_supported(fd, mode):
    os.pwrite(fd, b"a" * 8192, 0)
    assert errno_of(fallocate, fd, mode, 0, 4096) == errno.EOPNOTSUPP


def test_seek_finds_data_and_holes(fd):
    os.ftruncate(fd, 100 * MIB)
    assert data_ranges(fd) == []
    assert os.lseek(fd, 5, os.SEEK_HOLE) == 5
    os.pwrite(fd, b"x" * 4096, 10 * MIB)
    os.pwrite(fd, b"x" * 8192, 50 * MIB)
    os.fsync(fd)
    assert data_ranges(fd) == [(10 * MIB, 10 * MIB + 4096), (50 * MIB, 50 * MIB + 8192)]
    assert os.lseek(fd, 10 * MIB + 7, os.SEEK_DATA) == 10 * MIB + 7
    assert os.lseek(fd, 50 * MIB + 8192, os.SEEK_HOLE) == 50 * MIB + 8192
    assert errno_of(os.lseek, fd, 100 * MIB, os.SEEK_HOLE) == errno.ENXIO
    assert errno_of(os.lseek, fd, 60 * MIB, os.SEEK_DATA) == errno.ENXIO


def test_seek_sees_what_the_kernel_has_not_written_yet(fd):
    """Without care the kernel's changed pages look like holes, and cp loses them."""
    os.ftruncate(fd, 10 * MIB)
    os.pwrite(fd, b"x" * 4096, 5 * MIB)
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        assert data_ranges(other) == [(5 * MIB, 5 * MIB + 4096)]
    finally:
        os.close(other)


def test_cp_of_a_sparse_volume_is_sparse_and_equal(volume, tmp_path):
    with open(volume, "wb", buffering=0) as stream:
        os.ftruncate(stream.fileno(), 20 << 30)
        for place in (0, 7 << 30, (20 << 30) - 4096):
            os.pwrite(stream.fileno(), os.urandom(4096), place)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "--sparse=auto", volume, copy], check=True, timeout=START_TIMEOUT_S)
    assert os.stat(copy).st_size == 20 << 30
    assert os.stat(copy).st_blocks * 512 <= 1 * MIB
    with open(volume, "rb") as left, open(copy, "rb") as right:
        for place in (0, 7 << 30, (20 << 30) - 4096):
            assert os.pread(left.fileno(), 4096, place) == os.pread(right.fileno(), 4096, place)


def test_copy_file_range_copies_and_keeps_holes(fd, mnt, volume):
    source = os.open(mnt / f"{volume.name}-source", os.O_CREAT | os.O_RDWR)
    data = os.urandom(2 * MIB)
    os.pwrite(source, data, 4 * MIB)
    os.ftruncate(source, 10 * MIB)
    os.pwrite(fd, b"old" * MIB, 0)
    offset = 0
    while copied := os.copy_file_range(source, fd, 20 * MIB, offset, offset + 100):
        offset += copied
    assert offset == 10 * MIB
    assert os.pread(fd, 20 * MIB, 100) == bytes(4 * MIB) + data + bytes(4 * MIB)
    assert os.pread(fd, 100, 0) == (b"old" * 40)[:100]
    assert blocks(fd) <= 2 * MIB + 2 * 4096
    os.close(source)


def test_copy_file_range_from_a_snapshot_and_inside_one_file(fd, mnt, volume):
    data = os.urandom(MIB)
    os.pwrite(fd, data, 0)
    (mnt / ".snapshots" / volume.name / "s").touch()
    os.pwrite(fd, bytes(MIB), 0)
    with open(mnt / ".snapshots" / volume.name / "s", "rb") as snapshot:
        assert os.copy_file_range(snapshot.fileno(), fd, MIB, 0, 0) == MIB
    assert os.copy_file_range(fd, fd, MIB, 0, 3 * MIB) == MIB
    assert os.pread(fd, 5 * MIB, 0) == data + bytes(2 * MIB) + data
    assert errno_of(os.copy_file_range, fd, fd, MIB, 0, 100) == errno.EINVAL


def test_copy_file_range_to_another_filesystem_falls_back(fd, tmp_path):
    os.pwrite(fd, b"x" * 10000, 0)
    with open(tmp_path / "copy", "wb") as target:
        assert errno_of(os.copy_file_range, fd, target.fileno(), 10000, 0, 0) == errno.EXDEV
