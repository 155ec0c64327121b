"""The same random operations on a volume and on a plain file give the same results, errors included."""

import errno
import os
import random

import pytest

from tests.mount.conftest import mounted_pool
from tests.mount.test_sparse import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate

SIZE = 1 << 20
STEPS = 500


class Twin:
    """Runs an operation on both files and compares."""

    def __init__(self, volume, plain, seed):
        self.random = random.Random(seed)
        self.paths = (volume, plain)
        self.fds = [os.open(path, os.O_CREAT | os.O_RDWR) for path in self.paths]
        self.history = []

    def both(self, name, function, *args):
        self.history.append((name, *args))
        results = [self.outcome(function, fd, *args) for fd in self.fds]
        assert results[0] == results[1], f"after {self.history[-20:]}"

    @staticmethod
    def outcome(function, fd, *args):
        try:
            return function(fd, *args)
        except OSError as error:
            return error.errno

    def step(self):
        offset = self.random.choice([self.random.randrange(SIZE), self.random.randrange(SIZE // 4096) * 4096])
        length = self.random.choice([1, 511, 4096, 8192, self.random.randrange(1, 100_000)])
        match self.random.randrange(13):
            case 0 | 1 | 2:
                data = self.random.randbytes(length) if self.random.random() < 0.8 else bytes(length)
                self.both("write", lambda fd: os.pwrite(fd, data, offset))
                self.history[-1] = ("write", offset, length)
            case 3 | 4:
                self.both("read", os.pread, length, offset)
            case 5:
                self.both("truncate", os.ftruncate, offset)
            case 6:
                self.both("punch", fallocate, PUNCH_HOLE | KEEP_SIZE, offset, length)
            case 7:
                self.both("zero", fallocate, ZERO_RANGE | self.random.choice([0, KEEP_SIZE]), offset, length)
            case 8:
                self.both("allocate", fallocate, self.random.choice([0, KEEP_SIZE]), offset, length)
            case 9:
                self.both("copy", copy_range, offset, self.random.randrange(SIZE), length)
            case 10:
                self.both("size", lambda fd: os.fstat(fd).st_size)
            case 11:
                self.both("fsync", os.fsync)
            case 12:
                self.check_holes()

    def check_holes(self):
        """A hole that is announced holds zeros; holes need not be the same as those of the plain file."""
        fd, end, holes = self.fds[0], 0, []
        size = os.fstat(fd).st_size
        while end < size:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                start = size
            holes.append((end, start))
            end = os.lseek(fd, start, os.SEEK_HOLE) if start < size else size
        for start, end in holes:
            assert not os.pread(self.fds[1], end - start, start).strip(b"\0"), f"after {self.history[-20:]}"

    def close(self):
        for fd in self.fds:
            os.close(fd)


def copy_range(fd, source, target, length):
    """copy_file_range inside one file, where a short copy is as good as a long one."""
    copied = 0
    while copied < length:
        count = os.copy_file_range(fd, fd, length - copied, source + copied, target + copied)
        if count == 0:
            break
        copied += count
    return copied


@pytest.fixture(scope="module", params=["writeback", "writethrough", "none"])
def mnt(request, tmp_path_factory):
    with mounted_pool(tmp_path_factory.mktemp("mount"), f"cache={request.param}") as pool:
        yield pool


@pytest.mark.parametrize("seed", range(6))
def test_random_operations(mnt, volume, tmp_path, seed):
    twin = Twin(volume, tmp_path / "plain", seed)
    try:
        for _ in range(STEPS):
            twin.step()
        twin.check_holes()
    finally:
        twin.close()
    assert volume.read_bytes() == (tmp_path / "plain").read_bytes()
