"""Extended attributes: stored ones and facts."""

import errno
import os
import subprocess

import pytest

from tests.mount.test_names import errno_of


def test_attributes_are_set_listed_and_removed(volume):
    volume.touch()
    os.setxattr(volume, "user.colour", b"blue\x00\xff")
    os.setxattr(volume, "user.empty", b"")
    assert os.getxattr(volume, "user.colour") == b"blue\x00\xff"
    assert {"user.colour", "user.empty"} <= set(os.listxattr(volume))
    os.removexattr(volume, "user.empty")
    assert "user.empty" not in os.listxattr(volume)
    assert errno_of(os.getxattr, volume, "user.empty") == errno.ENODATA
    assert errno_of(os.removexattr, volume, "user.empty") == errno.ENODATA


def test_create_and_replace_are_honoured(volume):
    volume.touch()
    assert errno_of(os.setxattr, volume, "user.a", b"1", os.XATTR_REPLACE) == errno.ENODATA
    os.setxattr(volume, "user.a", b"1", os.XATTR_CREATE)
    assert errno_of(os.setxattr, volume, "user.a", b"2", os.XATTR_CREATE) == errno.EEXIST
    os.setxattr(volume, "user.a", b"3", os.XATTR_REPLACE)
    assert os.getxattr(volume, "user.a") == b"3"


def test_attributes_survive_a_remount(mounted):
    (mounted / "db").touch()
    os.setxattr(mounted / "db", "user.a", b"b")
    mounted.remount()
    assert os.getxattr(mounted / "db", "user.a") == b"b"


def test_too_much_is_refused(volume):
    volume.touch()
    os.setxattr(volume, "user.a", b"x" * 60000)
    assert errno_of(os.setxattr, volume, "user.b", b"x" * 10000) == errno.ENOSPC
    assert os.getxattr(volume, "user.a") == b"x" * 60000


def test_other_namespaces_are_not_stored(volume):
    volume.touch()
    assert errno_of(os.setxattr, volume, "trusted.a", b"b") == errno.EOPNOTSUPP
    assert errno_of(os.setxattr, volume, "security.capability", b"b" * 20) in (errno.EOPNOTSUPP, errno.EINVAL)
    assert errno_of(os.getxattr, volume, "security.selinux") in (errno.ENODATA, errno.EOPNOTSUPP)


def test_facts_of_volume_snapshot_and_pool(mnt, volume):
    volume.write_bytes(b"x" * 8192)
    snapshot = mnt / ".snapshots" / volume.name / "s"
    snapshot.touch()
    os.truncate(volume, 4096)
    facts = {name: os.getxattr(volume, name) for name in os.listxattr(volume)}
    assert facts["user.incfs.size_bytes"] == facts["user.incfs.mapped_bytes"] == b"4096"
    assert facts["user.incfs.snapshots"] == b"1"
    facts = {name: os.getxattr(snapshot, name) for name in os.listxattr(snapshot)}
    assert facts["user.incfs.size_bytes"] == facts["user.incfs.mapped_bytes"] == b"8192"
    assert (facts["user.incfs.origin"], facts["user.incfs.generation"]) == (volume.name.encode(), b"1")
    assert os.getxattr(mnt.path, "user.incfs.pool") == os.fsencode(mnt.pool)


def test_facts_stay_what_they_are(mnt, volume):
    """They come along when files are copied; EPERM had rsync -X, cp --preserve=xattr, tar and mv fail."""
    volume.touch()
    for path in (volume, mnt.path):
        before = os.getxattr(path, "user.incfs.uuid")
        os.setxattr(path, "user.incfs.uuid", b"x")
        os.setxattr(path, "user.incfs.origin", b"x")
        os.removexattr(path, "user.incfs.uuid")
        assert os.getxattr(path, "user.incfs.uuid") == before
        assert "user.incfs.origin" not in os.listxattr(path)
        assert errno_of(os.removexattr, path, "user.incfs.origin") == errno.ENODATA
    assert errno_of(os.setxattr, mnt.path, "user.a", b"x") == errno.EPERM


@pytest.mark.parametrize(
    "copy", [["rsync", "-aX", "--inplace"], ["cp", "--preserve=all"], ["mv"]], ids=lambda command: command[0]
)
def test_attributes_travel_out_and_in(mnt, volume, tmp_path, copy):
    volume.write_bytes(b"x" * 8192)
    os.setxattr(volume, "user.mine", b"1")
    subprocess.run(["rsync", "-aX", volume, tmp_path / "out"], check=True)
    back = volume.with_name(f"{volume.name}-back")
    done = subprocess.run([*copy, tmp_path / "out", back], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (back.read_bytes(), os.getxattr(back, "user.mine")) == (b"x" * 8192, b"1")
    assert os.getxattr(back, "user.incfs.uuid") != os.getxattr(volume, "user.incfs.uuid")
