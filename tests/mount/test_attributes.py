"""Attributes: sizes, blocks, modes, owners, times, and what df shows."""

import errno
import mmap
import os
import re
import stat
import subprocess
import time

import pytest

from tests.mount.conftest import mounted_pool
from tests.mount.test_names import errno_of

MIB = 1 << 20


def test_truncate_grows_thinly_and_shrinks(volume):
    volume.write_bytes(b"x" * 10000)
    os.truncate(volume, 1 << 40)
    found = os.stat(volume)
    assert (found.st_size, found.st_blocks) == (1 << 40, 24)
    os.truncate(volume, 5000)
    assert volume.read_bytes() == b"x" * 5000
    os.truncate(volume, 10000)
    assert volume.read_bytes() == b"x" * 5000 + bytes(5000)


def test_the_largest_size_is_8_eib_less_one_block(volume):
    volume.touch()
    os.truncate(volume, (1 << 63) - 65536)
    assert os.stat(volume).st_size == (1 << 63) - 65536
    assert errno_of(os.truncate, volume, (1 << 63) - 1) == errno.EFBIG


def test_blocks_tell_what_is_stored(volume):
    with open(volume, "wb", buffering=0) as stream:
        os.ftruncate(stream.fileno(), 100 * MIB)
        os.pwrite(stream.fileno(), b"a" * MIB, 50 * MIB)
        os.fsync(stream.fileno())
        assert os.fstat(stream.fileno()).st_blocks * 512 == MIB
        os.pwrite(stream.fileno(), bytes(MIB), 50 * MIB)
        os.fsync(stream.fileno())
        assert os.fstat(stream.fileno()).st_blocks == 0
    assert subprocess.check_output(["du", "-B1", volume]).split()[0] == b"0"


def test_mode_owner_and_times_are_kept_across_a_remount(mounted):
    volume = mounted / "db"
    volume.write_bytes(b"x")
    os.chmod(volume, 0o604)
    os.chown(volume, 1234, 2345)
    os.utime(volume, ns=(1_000_000_007, 2_000_000_011))
    mounted.remount()
    found = os.stat(volume)
    assert stat.S_IMODE(found.st_mode) == 0o604
    assert (found.st_uid, found.st_gid) == (1234, 2345)
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_007, 2_000_000_011)


def test_a_write_moves_the_modification_time_for_good(mounted):
    volume = mounted / "db"
    volume.write_bytes(b"x")
    os.utime(volume, ns=(0, 0))
    before = time.time_ns()
    with open(volume, "r+b") as stream:
        stream.write(b"y")
    written = os.stat(volume).st_mtime_ns
    assert written >= before - 20_000_000  # the kernel's clock for files ticks coarsely
    mounted.remount()
    assert os.stat(volume).st_mtime_ns == written


@pytest.mark.parametrize("path", [".", ".snapshots", ".incfs", ".incfs/metrics", ".snapshots/db"])
def test_what_is_no_volume_keeps_its_attributes(mnt, path):
    (mnt / "db").touch()
    for change in (lambda p: os.chmod(p, 0o777), lambda p: os.chown(p, 1, 1), lambda p: os.utime(p, (1, 1))):
        assert errno_of(change, mnt / path) == errno.EPERM


def test_df_shows_the_pool(mounted):
    total = os.statvfs(mounted.path)
    assert total.f_bsize == total.f_frsize == 4096
    assert total.f_namemax == 200
    assert total.f_bavail == total.f_bfree <= total.f_blocks
    with open(mounted / "db", "wb") as stream:
        stream.write(os.urandom(8 * MIB))
        stream.flush()
        os.fsync(stream.fileno())
    used = os.statvfs(mounted.path)
    assert (used.f_blocks - used.f_bfree) - (total.f_blocks - total.f_bfree) == 2048


def test_status_files_tell_of_pool_and_volumes(mnt, volume):
    import json

    volume.write_bytes(b"x" * 4096)
    document = json.loads((mnt / ".incfs/stats.json").read_text())
    assert document["output_version"] == 1
    found = next(v for v in document["volumes"] if v["name"] == volume.name)
    assert (found["size_bytes"], found["mapped_bytes"]) == (4096, 4096)
    metrics = (mnt / ".incfs/metrics").read_text()
    assert f'incfs_volume_mapped_bytes{{volume="{volume.name}"}} 4096' in metrics
    assert 'incfs_fuse_op_duration_seconds_count{op="write"}' in metrics
    with pytest.raises(PermissionError):
        os.open(mnt / ".incfs/metrics", os.O_WRONLY)


@pytest.mark.parametrize("plane", ["python", "native"])
def test_the_kernel_does_not_ask_for_capabilities_before_each_write(tmp_path, plane):
    """It did, so that every write of the Python data plane was two requests."""
    with mounted_pool(tmp_path, f"data_plane={plane}") as pool, mmap.mmap(-1, 4096) as block:
        fd = os.open(pool / "db", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.ftruncate(fd, 100 * 4096)
        for i in range(100):
            os.pwrite(fd, block, i * 4096)
        os.close(fd)
        text = (pool / ".incfs/metrics").read_text()
    counts = dict(re.findall(r'op_duration_seconds_count\{op="(\w+)"\} (\d+)', text))
    assert int(counts["write"]) == 100
    assert int(counts.get("getxattr", 0)) < 10
