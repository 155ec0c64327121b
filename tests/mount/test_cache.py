"""The kernel's cache: never stale after a command, in each of the three modes."""

import errno
import mmap
import os

import pytest

from tests.mount.conftest import mounted_pool
from tests.mount.test_names import errno_of


@pytest.fixture(scope="module", params=["writeback", "writethrough", "none"])
def mnt(request, tmp_path_factory):
    with mounted_pool(tmp_path_factory.mktemp("mount"), f"cache={request.param}") as pool:
        yield pool


def test_growing_by_command_is_seen_at_once(mnt, volume):
    volume.write_bytes(b"x" * 5000)
    with open(volume, "rb") as stream:
        assert stream.read() == b"x" * 5000
        mnt.command("volume", "resize", volume.name, "10000")
        assert os.fstat(stream.fileno()).st_size == 10000
        assert stream.read() == bytes(5000)


def test_shrinking_by_command_is_refused_while_it_is_open_and_seen_at_once(mnt, volume):
    volume.write_bytes(b"x" * 20000)
    with open(volume, "r+b") as stream:
        assert len(stream.read()) == 20000
        refused = mnt.command("volume", "resize", "--shrink", volume.name, "6000", check=False)
        assert (refused.returncode, f"open by pid {os.getpid()}" in refused.stderr) == (11, True), refused.stderr
        assert os.fstat(stream.fileno()).st_size == 20000
    mnt.command("volume", "resize", "--shrink", volume.name, "--", "-14000")
    assert os.stat(volume).st_size == 6000
    with open(volume, "r+b") as stream:
        assert stream.read() == b"x" * 6000
        os.ftruncate(stream.fileno(), 20000)
        stream.seek(0)
        assert stream.read() == b"x" * 6000 + bytes(14000)


def test_shrinking_without_saying_so_is_refused(mnt, volume):
    volume.write_bytes(b"x" * 20000)
    assert mnt.command("volume", "resize", volume.name, "6000", check=False).returncode == 2
    assert os.stat(volume).st_size == 20000


def test_renaming_and_removing_by_command_is_seen_at_once(mnt, volume):
    volume.write_bytes(b"x")
    new = volume.with_name(f"{volume.name}-new")
    mnt.command("volume", "rename", volume.name, new.name)
    assert not volume.exists()
    assert new.read_bytes() == b"x"
    mnt.command("volume", "remove", new.name)
    assert not new.exists()
    assert errno_of(os.stat, mnt / ".snapshots" / new.name) == errno.ENOENT


def test_a_volume_made_by_command_is_there_at_once(mnt, volume):
    assert not volume.exists()
    mnt.command("volume", "create", volume.name, "1M")
    assert os.stat(volume).st_size == 1 << 20
    assert volume.name in os.listdir(mnt.path)


def test_snapshots_by_command_are_seen_at_once(mnt, volume):
    volume.write_bytes(b"x" * 4096)
    directory = mnt / ".snapshots" / volume.name
    mnt.command("snapshot", "create", f"{volume.name}@one")
    assert (directory / "one").read_bytes() == b"x" * 4096
    mnt.command("snapshot", "rename", f"{volume.name}@one", "two")
    assert os.listdir(directory) == ["two"]
    assert not (directory / "one").exists()
    mnt.command("snapshot", "remove", f"{volume.name}@two")
    assert os.listdir(directory) == []


def test_another_volume_of_the_same_name_is_another_file(mnt, volume):
    volume.write_bytes(b"old")
    with open(volume, "rb") as old:
        assert mnt.command("volume", "remove", volume.name, check=False).returncode == 11
        volume.unlink()
        mnt.command("volume", "create", volume.name, "3")
        assert volume.read_bytes() == bytes(3)
        assert old.read() == b"old"


def test_bytes_written_and_read_through_every_door(mnt, volume):
    volume.write_bytes(bytes(8192))
    with open(volume, "r+b", buffering=0) as stream:
        os.pwrite(stream.fileno(), b"one", 100)
        assert os.pread(stream.fileno(), 3, 100) == b"one"
        with mmap.mmap(stream.fileno(), 8192, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
            assert mapped[100:103] == b"one"
    assert volume.read_bytes()[100:103] == b"one"
