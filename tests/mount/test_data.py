"""Reading and writing: every way in which bytes reach a volume and come back."""

import contextlib
import errno
import mmap
import os
import re
import threading
import time

import pytest

from tests.mount.conftest import END_TIMEOUT_S, incfs, mounted_pool
from tests.mount.test_fusext import KEEP_SIZE, PUNCH_HOLE, fallocate
from tests.mount.test_names import errno_of

MIB = 1 << 20


def test_what_was_written_is_read(volume):
    data = os.urandom(5 * MIB + 123)
    volume.write_bytes(data)
    assert volume.read_bytes() == data


def test_writes_survive_a_remount_without_an_fsync(mounted):
    data = os.urandom(3 * MIB + 1)
    (mounted / "db").write_bytes(data)
    mounted.remount()
    assert (mounted / "db").read_bytes() == data


def test_partial_blocks_keep_their_neighbours(volume):
    volume.write_bytes(b"a" * 10000)
    with open(volume, "r+b", buffering=0) as stream:
        for offset, length in ((4090, 12), (1, 1), (8191, 2), (9999, 1)):
            os.pwrite(stream.fileno(), b"b" * length, offset)
    expected = bytearray(b"a" * 10000)
    for offset, length in ((4090, 12), (1, 1), (8191, 2), (9999, 1)):
        expected[offset : offset + length] = b"b" * length
    assert volume.read_bytes() == expected


def test_writing_behind_the_end_leaves_zeros_between(volume):
    with open(volume, "wb", buffering=0) as stream:
        os.pwrite(stream.fileno(), b"end", 10 * MIB)
    assert os.stat(volume).st_size == 10 * MIB + 3
    with open(volume, "rb") as stream:
        assert stream.read(10 * MIB) == bytes(10 * MIB)
        assert stream.read() == b"end"


def test_reading_at_and_behind_the_end_gives_nothing(volume):
    volume.write_bytes(b"12345")
    fd = os.open(volume, os.O_RDONLY)
    assert os.pread(fd, 100, 3) == b"45"
    assert os.pread(fd, 100, 5) == os.pread(fd, 100, 1 << 40) == b""
    os.close(fd)


def test_append_goes_to_the_end(volume):
    for part in (b"one", b"two", b"three"):
        with open(volume, "ab") as stream:
            stream.write(part)
    assert volume.read_bytes() == b"onetwothree"


def test_opening_with_truncation_empties(volume):
    volume.write_bytes(b"x" * 100000)
    os.close(os.open(volume, os.O_WRONLY | os.O_TRUNC))
    assert os.stat(volume).st_size == os.stat(volume).st_blocks == 0
    assert volume.read_bytes() == b""


def test_opened_for_writing_only_and_written_in_part_of_a_page(volume):
    volume.write_bytes(b"a" * 4096)
    fd = os.open(volume, os.O_WRONLY)
    os.pwrite(fd, b"b", 100)
    os.fsync(fd)
    os.close(fd)
    assert volume.read_bytes() == b"a" * 100 + b"b" + b"a" * 3995


@pytest.mark.parametrize("flag", ["O_SYNC", "O_DSYNC"])
def test_synchronous_writes(volume, flag):
    fd = os.open(volume, os.O_CREAT | os.O_RDWR | getattr(os, flag))
    assert os.write(fd, b"safe") == 4
    assert os.pread(fd, 4, 0) == b"safe"
    os.close(fd)


def test_direct_io(volume):
    buffer = mmap.mmap(-1, MIB)
    buffer.write(os.urandom(MIB))
    fd = os.open(volume, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    assert os.pwritev(fd, [buffer], 0) == MIB
    back = mmap.mmap(-1, MIB)
    assert os.preadv(fd, [back], 0) == MIB
    assert back[:] == buffer[:]
    assert os.pwritev(fd, [memoryview(buffer)[:512]], MIB + 512) == 512
    os.close(fd)
    assert volume.read_bytes() == buffer[:] + bytes(512) + buffer[:512]


def test_memory_mapping_is_written_back(volume):
    volume.write_bytes(bytes(3 * 4096))
    with open(volume, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        mapped[4095:4099] = b"abcd"
        mapped.flush()
        assert os.pread(stream.fileno(), 4, 4095) == b"abcd"
        mapped[0:1] = b"z"
    data = volume.read_bytes()
    assert (data[0:1], data[4095:4099]) == (b"z", b"abcd")


@pytest.mark.parametrize("cache", ["writethrough", "none"])
def test_an_fsync_covers_other_volumes_where_the_kernel_holds_nothing_back(tmp_path, cache):
    with mounted_pool(tmp_path, f"cache={cache},commit=600") as mnt:
        mnt.expected_log.append("detaching the dead mount")
        one, other = os.open(mnt / "one", os.O_RDWR | os.O_CREAT), os.open(mnt / "other", os.O_RDWR | os.O_CREAT)
        os.pwrite(other, b"b" * MIB, 0)
        os.pwrite(one, b"a", 0)
        os.fsync(one)
        mnt.kill()
        for fd in (one, other):
            with pytest.raises(OSError, match="not connected"):
                os.close(fd)
        mnt.start(f"cache={cache}")
        assert (mnt / "other").read_bytes() == b"b" * MIB


def linux_version():
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


def test_memory_mapping_without_a_cache(tmp_path):
    """Since Linux 6.6 shared mappings work, and agree with read and write; before, they are refused."""
    with mounted_pool(tmp_path, "cache=none") as mnt:
        volume = mnt / "vol"
        volume.write_bytes(bytes(3 * 4096))
        with open(volume, "r+b") as stream:
            if linux_version() < (6, 6):
                with pytest.raises(OSError, match="No such device"):
                    mmap.mmap(stream.fileno(), 0)
                return
            with mmap.mmap(stream.fileno(), 0) as mapped:
                mapped[4095:4099] = b"abcd"
                mapped.flush()
                assert os.pread(stream.fileno(), 4, 4095) == b"abcd"
                os.pwrite(stream.fileno(), b"ef", 4096)
                assert mapped[4095:4099] == b"aefd"
                mapped[0:1] = b"z"
                mnt.command("snapshot", "create", "vol@s")
        frozen = (mnt / ".snapshots/vol/s").read_bytes()
        assert (frozen[0:1], frozen[4095:4099]) == (b"z", b"aefd")
        mnt.remount("cache=none")
        assert volume.read_bytes() == frozen


def test_fsync_works_on_files_and_directories(mnt, volume):
    with open(volume, "wb") as stream:
        stream.write(b"x")
        stream.flush()
        os.fsync(stream.fileno())
        os.fdatasync(stream.fileno())
    fd = os.open(mnt.path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def test_many_writers_at_once(volume):
    volume.write_bytes(bytes(16 * MIB))

    def write(number):
        with open(volume, "r+b", buffering=0) as stream:
            for block in range(number, 4096, 16):
                os.pwrite(stream.fileno(), bytes([number + 1]) * 4096, block * 4096)
            os.fsync(stream.fileno())

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = volume.read_bytes()
    assert all(data[b * 4096 : b * 4096 + 4096] == bytes([b % 16 + 1]) * 4096 for b in range(4096))


def test_a_pool_without_room_says_so_and_goes_on(tmp_path):
    with mounted_pool(tmp_path, "", "--capacity", "16M") as pool:
        with open(pool / "db", "wb", buffering=0) as stream:
            assert errno_of(_fill, stream.fileno(), 64 * MIB) == errno.ENOSPC
        (pool / "db").unlink()
        (pool / "other").write_bytes(b"x" * MIB)
        assert (pool / "other").read_bytes() == b"x" * MIB
        pool.stop()  # by umount, which does not tell again what was told and is over, though the kernel does


def test_umount_tells_of_a_failure_that_nobody_was_told_of(tmp_path):
    with mounted_pool(tmp_path, "", "--capacity", "4M") as pool:
        fd = os.open(pool / "db", os.O_RDWR | os.O_CREAT)
        with contextlib.suppress(OSError):
            for offset in range(0, 6 * MIB, MIB):
                os.pwrite(fd, os.urandom(MIB), offset)
        with contextlib.suppress(OSError):
            os.close(fd)
        done = incfs("umount", pool.path, check=False)
        assert (done.returncode, "not everything could be written" in done.stderr) == (1, True)
        assert pool.process.wait(END_TIMEOUT_S) == 0
        pool.process = None


@pytest.mark.parametrize("plane", ["native", "python"])
def test_a_writer_that_the_kernel_caches_for_hears_that_the_pool_is_full(tmp_path, plane):
    """Nobody told the kernel: ``dd`` wrote 74 GB into 251 MiB, and heard of it when it closed the file."""
    with mounted_pool(tmp_path, f"data_plane={plane}", "--capacity", "16M") as pool:
        data, deadline, written = os.urandom(MIB), time.monotonic() + 60, 0
        fd, other = os.open(pool / "db", os.O_WRONLY | os.O_CREAT), os.open(pool / "db", os.O_RDWR)
        while time.monotonic() < deadline and not (error := _refusal(os.write, fd, data)):
            written += MIB
            if written % (8 * MIB) == 0:
                _refusal(os.fsync, other)  # else the kernel keeps what it likes
        assert error == errno.ENOSPC
        assert written <= 256 * MIB
        time.sleep(1.1)  # now the kernel asks for the size
        assert os.lseek(other, 0, os.SEEK_END) == written
        assert os.read(other, 10) == b""
        while _refusal(fallocate, fd, PUNCH_HOLE | KEEP_SIZE, 0, 8 * MIB) == errno.ENOSPC:
            assert time.monotonic() < deadline, "what became of pages is told once"
        pool.command("pool", "check")  # begins with a checkpoint: what was punched is free
        while _refusal(os.pwrite, fd, data, 0) or _refusal(os.fsync, fd):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for opened in (fd, other):
            _refusal(os.close, opened)
        assert (pool / "db").read_bytes()[:MIB] == data


def _refusal(function, *args):
    """Call it; give the errno, 0 for none."""
    try:
        function(*args)
    except OSError as error:
        return error.errno
    return 0


def _fill(fd, length):
    for offset in range(0, length, MIB):
        os.pwrite(fd, os.urandom(MIB), offset)
        os.fsync(fd)
