"""Handlers without a kernel: what the kernel would never, or not easily, ask."""

import errno
import json
import os
import stat
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest

from incfs import inodes
from incfs.fuse_files import CacheMode
from incfs.fuse_ops import Operations
from incfs.model import VolumeId, map_id
from tests.support.fake_service import FakeService
from tests.unit.test_boundary import errno_of

CONTEXT: Any = SimpleNamespace(uid=1000, gid=1001, pid=1, umask=0)


def new_operations(cache: CacheMode = "writeback") -> Operations:
    service: Any = FakeService()
    return Operations(service, cache)


@pytest.fixture
def operations():
    return new_operations()


async def test_an_inode_that_never_was(operations):
    for inode in (0, 6, 77, map_id(VolumeId(9)), inodes.snapshot_directory(VolumeId(9)), (9 << 32) + 1):
        assert await errno_of(operations.getattr(inode, CONTEXT)) == errno.ENOENT
    assert await errno_of(operations.open(map_id(VolumeId(9)), os.O_RDONLY, CONTEXT)) == errno.ENOENT
    assert not operations.service.failure


async def test_a_new_volume_belongs_to_the_caller(operations):
    opened, entry = await operations.create(inodes.ROOT, b"db", 0o4755, os.O_RDWR, CONTEXT)
    assert (entry.st_uid, entry.st_gid, stat.S_IMODE(entry.st_mode)) == (1000, 1001, 0o755)
    assert operations.service.handles.of_volume(VolumeId(1))
    await operations.release(opened.fh)
    assert not operations.service.handles.of_volume(VolumeId(1))


async def test_only_a_writers_handle_makes_seek_write_back(operations):
    asked = []

    class Kernel:
        async def write_back(self, name, inode):
            asked.append(name)
            return True

        async def size_of(self, name, inode):
            raise AssertionError("everything was written back")

        def is_ours(self, pid):
            return False

        def forget_attributes(self, inode):
            raise AssertionError("nothing was fsynced")

    operations.kernel = Kernel()
    opened, entry = await operations.create(inodes.ROOT, b"db", 0o600, os.O_RDWR, CONTEXT)
    await operations.write(opened.fh, 0, b"x")
    reader = await operations.open(entry.st_ino, os.O_RDONLY, CONTEXT)
    assert await operations.lseek(reader.fh, 0, os.SEEK_DATA) == 0
    assert asked == ["db"]
    await operations.release(opened.fh)
    assert await operations.lseek(reader.fh, 0, os.SEEK_HOLE) == 1
    assert asked == ["db"]


async def test_seek_in_a_nameless_volume_that_a_writer_has_open_misses_no_data(operations):
    opened, _ = await operations.create(inodes.ROOT, b"db", 0o600, os.O_RDWR, CONTEXT)
    await operations.service.resize_volume(VolumeId(1), 100_000)
    await operations.unlink(inodes.ROOT, b"db", CONTEXT)
    assert await operations.lseek(opened.fh, 5, os.SEEK_DATA) == 5
    assert await operations.lseek(opened.fh, 5, os.SEEK_HOLE) == 100_000
    assert await errno_of(operations.lseek(opened.fh, 100_000, os.SEEK_DATA)) == errno.ENXIO


async def test_seek_takes_all_for_data_up_to_the_kernels_end_if_its_pages_cannot_be_waited_for(operations):
    sizes = iter([None, 300_000, 300_000, 300_000])

    class Kernel:
        async def write_back(self, name, inode):
            return False

        async def size_of(self, name, inode):
            size_bytes = next(sizes)
            if size_bytes is None:  # renamed while it was looked for
                await operations.service.rename_volume(VolumeId(1), "other")
            return size_bytes

        def is_ours(self, pid):
            return False

        def forget_attributes(self, inode):
            raise AssertionError("nothing was fsynced")

    operations.kernel = Kernel()
    opened, _ = await operations.create(inodes.ROOT, b"db", 0o600, os.O_RDWR, CONTEXT)
    await operations.write(opened.fh, 0, b"x")
    assert await operations.lseek(opened.fh, 200_000, os.SEEK_DATA) == 200_000
    assert await operations.lseek(opened.fh, 5, os.SEEK_HOLE) == 300_000
    assert await errno_of(operations.lseek(opened.fh, 300_000, os.SEEK_DATA)) == errno.ENXIO


async def test_a_status_file_is_as_it_was_when_opened(operations):
    opened = await operations.open(inodes.FIRST_STATUS_FILE, os.O_RDONLY, CONTEXT)
    await operations.service.create_volume("later")
    content = await operations.read(opened.fh, 0, 1 << 20)
    assert json.loads(content)["volumes"] == []
    assert await operations.read(opened.fh, len(content), 10) == b""
    await operations.fsync(opened.fh, False)
    assert await errno_of(operations.write(opened.fh, 0, b"x")) == errno.EROFS
    assert await errno_of(operations.copy_file_range(opened.fh, 0, opened.fh, 0, 1, 0)) == errno.EOPNOTSUPP
    await operations.release(opened.fh)
    assert operations.service.commits == 0


async def test_cache_modes():
    expected: dict[CacheMode, bool] = {"writeback": False, "writethrough": False, "none": True}
    for cache, direct_io in expected.items():
        operations = new_operations(cache)
        assert operations.enable_writeback_cache is (cache == "writeback")
        opened, _ = await operations.create(inodes.ROOT, b"db", 0o600, os.O_RDWR, CONTEXT)
        assert (opened.direct_io, opened.keep_cache) == (direct_io, not direct_io)


async def test_a_snapshot_that_was_just_taken_is_not_cached_for_writing(operations):
    await operations.service.create_volume("db")
    directory = inodes.snapshot_directory(VolumeId(1))
    opened, entry = await operations.create(directory, b"s", 0o600, os.O_WRONLY, CONTEXT)
    assert opened.direct_io
    assert entry.st_ino == (1 << 32) + 1
    assert await errno_of(operations.write(opened.fh, 0, b"x")) == errno.EROFS


async def test_opening_a_directory_as_a_file(operations):
    assert await errno_of(operations.open(inodes.ROOT, os.O_RDONLY, CONTEXT)) == errno.EISDIR


async def test_a_listing_skips_what_has_gone_and_goes_on_at_its_cookie(operations, monkeypatch):
    replies: list[tuple[bytes, int]] = []

    def reply(token, name, entry, cookie):
        replies.append((name, cookie))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    for name in ("a", "b", "c"):
        await operations.service.create_volume(name)
    fh = await operations.opendir(inodes.ROOT, CONTEXT)
    await operations.readdir(fh, 0, None)
    names = [name for name, _ in replies]
    assert names == [b".", b"..", b".snapshots", b".incfs", b"a", b"b", b"c"]
    after_a = dict(replies)[b"a"]
    await operations.service.remove_volume(VolumeId(2))
    await operations.service.create_volume("d")
    replies.clear()
    await operations.readdir(fh, after_a, None)
    assert [name for name, _ in replies] == [b"c"]
    await operations.releasedir(fh)


async def test_opening_with_truncation_empties(operations):
    opened, entry = await operations.create(inodes.ROOT, b"db", 0o600, os.O_RDWR, CONTEXT)
    await operations.write(opened.fh, 0, b"data")
    again = await operations.open(entry.st_ino, os.O_WRONLY | os.O_TRUNC, CONTEXT)
    assert (await operations.getattr(entry.st_ino, CONTEXT)).st_size == 0
    assert await operations.read(again.fh, 0, 4) == b""


async def test_truncating_sets_the_size(operations):
    opened, entry = await operations.create(inodes.ROOT, b"db", 0o600, os.O_RDWR, CONTEXT)
    await operations.write(opened.fh, 0, b"data")
    names = ("size", "mode", "uid", "gid", "atime", "mtime", "ctime")
    fields: Any = SimpleNamespace(**{f"update_{name}": name == "size" for name in names})
    for size, expected in ((6, b"data\0\0"), (2, b"da"), (0, b"")):
        wanted: Any = SimpleNamespace(st_size=size)
        assert (await operations.setattr(entry.st_ino, wanted, fields, opened.fh, CONTEXT)).st_size == size
        assert await operations.read(opened.fh, 0, 10) == expected
