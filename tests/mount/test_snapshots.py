"""Snapshots as files: touch takes one, rm removes it, mv renames it, and nobody writes to it."""

import errno
import os
import subprocess

import pytest

from tests.mount.test_names import RENAME_EXCHANGE, errno_of, renameat2

MIB = 1 << 20


@pytest.fixture
def snapshots(mnt, volume):
    """The snapshot directory of a volume with 1 MiB of data."""
    volume.write_bytes(b"a" * MIB)
    return mnt / ".snapshots" / volume.name


def test_touch_takes_a_snapshot_that_keeps_its_bytes(volume, snapshots):
    subprocess.run(["touch", snapshots / "monday"], check=True)
    volume.write_bytes(b"b" * 2 * MIB)
    (snapshots / "tuesday").touch()
    volume.write_bytes(b"")
    assert (snapshots / "monday").read_bytes() == b"a" * MIB
    assert (snapshots / "tuesday").read_bytes() == b"b" * 2 * MIB
    assert sorted(os.listdir(snapshots)) == ["monday", "tuesday"]
    assert os.stat(snapshots / "monday").st_blocks * 512 == MIB


def test_touch_of_an_existing_snapshot_changes_nothing(volume, snapshots):
    (snapshots / "s").touch()
    before = os.stat(snapshots / "s")
    volume.write_bytes(b"b")
    subprocess.run(["touch", "-c", snapshots / "s"], check=True)
    after = os.stat(snapshots / "s")
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)
    assert (snapshots / "s").read_bytes() == b"a" * MIB


def test_a_snapshot_holds_what_the_kernel_has_not_written_yet(volume, snapshots):
    with open(volume, "r+b", buffering=0) as stream:
        os.pwrite(stream.fileno(), b"new", 0)
        (snapshots / "s").touch()
        os.pwrite(stream.fileno(), b"later", 0)
    assert (snapshots / "s").read_bytes()[:5] == b"newaa"


def test_a_snapshot_by_command_holds_what_the_kernel_has_not_written_yet(mnt, volume, snapshots):
    with open(volume, "r+b", buffering=0) as stream:
        os.pwrite(stream.fileno(), b"new", 0)
        mnt.command("snapshot", "create", f"{volume.name}@s")
        os.pwrite(stream.fileno(), b"later", 0)
    assert (snapshots / "s").read_bytes()[:5] == b"newaa"


def test_snapshots_refuse_changes(snapshots):
    path = snapshots / "s"
    path.touch()
    assert errno_of(os.open, path, os.O_WRONLY) == errno.EROFS
    assert errno_of(os.open, path, os.O_RDWR) == errno.EROFS
    assert errno_of(os.open, path, os.O_RDONLY | os.O_TRUNC) == errno.EROFS
    assert errno_of(os.truncate, path, 0) == errno.EROFS
    assert errno_of(os.chmod, path, 0o777) == errno.EROFS
    assert errno_of(os.setxattr, path, "user.a", b"b") == errno.EROFS
    with open(snapshots / "fresh", "wb", buffering=0) as stream:
        assert errno_of(stream.write, b"x") == errno.EROFS
    assert (snapshots / "fresh").read_bytes() == b"a" * MIB


def test_rm_removes_and_mv_renames(snapshots):
    for name in ("one", "two"):
        (snapshots / name).touch()
    os.rename(snapshots / "one", snapshots / "three")
    assert sorted(os.listdir(snapshots)) == ["three", "two"]
    assert errno_of(os.rename, snapshots / "two", snapshots / "three") == errno.EEXIST
    assert errno_of(renameat2, snapshots / "two", snapshots / "three", RENAME_EXCHANGE) == errno.EINVAL
    assert errno_of(os.rename, snapshots / "two", snapshots / "a@b") == errno.EINVAL
    assert errno_of(os.rename, snapshots / "two", snapshots.parent.parent / "two") == errno.EPERM
    os.unlink(snapshots / "two")
    assert os.listdir(snapshots) == ["three"]
    assert errno_of(os.unlink, snapshots / "two") == errno.ENOENT


def test_an_open_snapshot_is_busy(snapshots):
    (snapshots / "s").touch()
    with open(snapshots / "s", "rb") as stream:
        assert errno_of(os.unlink, snapshots / "s") == errno.EBUSY
        assert stream.read(3) == b"aaa"
    os.unlink(snapshots / "s")


def test_a_volume_with_snapshots_cannot_be_removed(volume, snapshots):
    (snapshots / "s").touch()
    assert errno_of(os.unlink, volume) == errno.EBUSY
    other = volume.with_name(volume.name + "-other")
    other.touch()
    assert errno_of(os.rename, other, volume) == errno.EBUSY
    os.unlink(snapshots / "s")
    os.unlink(volume)
    assert not snapshots.exists()


def test_snapshot_directories_are_the_volumes(mnt, volume, snapshots):
    assert volume.name in os.listdir(mnt / ".snapshots")
    assert errno_of(os.mkdir, mnt / ".snapshots" / "new") == errno.EPERM
    assert errno_of(os.rmdir, snapshots) == errno.EPERM
    assert errno_of((mnt / ".snapshots" / "file").touch) == errno.EPERM
    assert errno_of((mnt / ".incfs" / "file").touch) == errno.EPERM
    renamed = volume.with_name(volume.name + "-renamed")
    (snapshots / "s").touch()
    os.rename(volume, renamed)
    assert not snapshots.exists()
    assert os.listdir(mnt / ".snapshots" / renamed.name) == ["s"]


def test_two_hundred_volumes_snapshot_at_once(mounted):
    """Each touch holds a request of the mount while it waits for others of its own."""
    for number in range(200):
        (mounted / f"v{number}").write_bytes(b"x")
    script = f'for v in {mounted.path}/v*; do touch "{mounted.path}/.snapshots/$(basename $v)/s" & done; wait'
    subprocess.run(["sh", "-ec", script], check=True, timeout=60)
    assert all((mounted / f".snapshots/v{number}/s").exists() for number in range(200))
