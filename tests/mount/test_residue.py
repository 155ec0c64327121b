"""Through the mount: what a removed volume held never shows in another one, by either data plane."""

import os
from contextlib import suppress

import pytest

from incfs.planes import HAS_NATIVE
from tests.mount.conftest import mounted_pool
from tests.mount.test_fusext import KEEP_SIZE, PUNCH_HOLE, libc

BLOCK = 4096
BLOCKS = 512
SIZE = BLOCK * BLOCKS
MARK = b"SECRET->"
MODES = [("python", "none"), ("native", "none"), ("native", "writeback")]


@pytest.fixture(params=[m for m in MODES if HAS_NATIVE or m[0] == "python"], ids="-".join)
def full(request, tmp_path):
    """A pool whose every block holds the secret but for one in two, whose owner stays."""
    plane, cache = request.param
    with mounted_pool(tmp_path, f"data_plane={plane},cache={cache}", "--capacity", str(SIZE + 64 * BLOCK)) as pool:
        with open(pool / "secret", "wb", buffering=0) as secret, open(pool / "kept", "wb", buffering=0) as kept:
            for index in range(BLOCKS):
                os.pwrite((secret if index % 2 else kept).fileno(), MARK * (BLOCK // 8), index * BLOCK)
                if index % 16 == 15:
                    os.fsync(secret.fileno())
                    os.fsync(kept.fileno())
        yield pool


def show(path) -> bytes:
    """Everything in a volume, as the daemon has it: the kernel's own pages are dropped first."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return b"".join(iter(lambda: os.read(fd, 1 << 20), b""))
    finally:
        os.close(fd)


def test_a_removed_secret_is_nowhere_in_a_new_volume(full):
    os.unlink(full / "secret")
    probe = full / "probe"
    expected = bytearray(SIZE)
    with open(probe, "w+b", buffering=0) as file:
        for index in range(BLOCKS // 2):  # one short write into each block: its rest must be zeros
            at = index * 2 * BLOCK + index * 13 % (BLOCK - 5)
            assert os.pwrite(file.fileno(), b"short", at) == 5
            expected[at : at + 5] = b"short"
        os.fsync(file.fileno())
        end = os.fstat(file.fileno()).st_size
        assert show(probe) == expected[:end]
        os.ftruncate(file.fileno(), SIZE)  # the tail of the last block, and what is behind it
        assert show(probe) == expected
        os.ftruncate(file.fileno(), 777_777)
        os.ftruncate(file.fileno(), SIZE)
        expected[777_777:] = bytes(SIZE - 777_777)
        assert show(probe) == expected
        assert libc.fallocate(file.fileno(), PUNCH_HOLE | KEEP_SIZE, 5000, 300_000) == 0
        expected[5000:305_000] = bytes(300_000)
        assert show(probe) == expected
        (full / ".snapshots/probe/s").touch()
        os.pwrite(file.fileno(), b"x" * 100, 3)
        os.fsync(file.fileno())
    assert show(full / ".snapshots/probe/s") == expected
    assert MARK not in show(probe)


@pytest.mark.parametrize("full", [MODES[0], MODES[-1]], ids="-".join, indirect=True)
def test_a_short_write_into_a_full_pool_shows_nothing(full):
    os.unlink(full / "secret")
    written = 0
    with open(full / "probe", "wb", buffering=0) as file:
        with suppress(OSError):  # ENOSPC, of a write or of the sync
            while written < 2 * SIZE:
                written += os.pwrite(file.fileno(), b"p" * 10_001, written)
            os.fsync(file.fileno())
        os.ftruncate(file.fileno(), 2 * SIZE + 1)
    content = show(full / "probe")
    assert set(content) <= {0, ord("p")}
    assert len(content) == 2 * SIZE + 1
    full.expected_log += ["is at its capacity limit", "pool is full", "No space left"]
