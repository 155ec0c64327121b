"""Names: create, mknod, lookup, unlink, rename, and what the tree does not have."""

import ctypes
import errno
import os
import stat

import pytest

AT_FDCWD = -100
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4


def renameat2(old, new, flags):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def errno_of(function, *args, **kwargs):
    with pytest.raises(OSError) as raised:  # noqa: PT011 - the errno is the caller's to compare
        function(*args, **kwargs)
    return raised.value.errno


def test_create_makes_an_empty_volume_with_the_callers_mode_and_owner(mnt, volume):
    os.close(os.open(volume, os.O_CREAT | os.O_WRONLY, 0o640))
    found = os.stat(volume)
    assert stat.S_ISREG(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert (found.st_size, found.st_blocks, found.st_uid, found.st_nlink) == (0, 0, os.getuid(), 1)
    assert volume.name in mnt.command("volume", "list").stdout


def test_create_exclusive_refuses_an_existing_name(volume):
    volume.touch()
    assert errno_of(os.open, volume, os.O_CREAT | os.O_EXCL | os.O_WRONLY) == errno.EEXIST


def test_mknod_makes_regular_files_only(volume):
    os.mknod(volume, stat.S_IFREG | 0o600)
    assert os.stat(volume).st_size == 0
    for kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR):
        assert errno_of(os.mknod, f"{volume}-x", kind | 0o600) == errno.EPERM


def test_directories_and_links_are_refused(volume):
    volume.touch()
    other = f"{volume}-other"
    assert errno_of(os.mkdir, other) == errno.EPERM
    assert errno_of(os.symlink, "target", other) == errno.EPERM
    assert errno_of(os.link, volume, other) == errno.EPERM
    assert errno_of(os.rmdir, volume.parent / ".snapshots") == errno.EPERM


@pytest.mark.parametrize("name", [b".hidden", b"-dash", b"a@b", b"a#b", b"tab\tin", b"\xff\xfe"])
def test_names_that_no_volume_may_have_are_refused(mnt, name):
    assert errno_of(os.open, os.fsencode(mnt.path) + b"/" + name, os.O_CREAT | os.O_WRONLY) == errno.EINVAL


def test_a_name_of_more_than_200_bytes_is_too_long(mnt):
    assert errno_of((mnt / ("x" * 201)).touch) == errno.ENAMETOOLONG
    assert errno_of(os.stat, mnt / ("ä" * 101)) == errno.ENAMETOOLONG
    longest = mnt / ("y" * 200)
    longest.touch()
    longest.unlink()


def test_unlink_removes_the_volume(mnt, volume):
    volume.write_bytes(b"x")
    volume.unlink()
    assert not volume.exists()
    assert errno_of(volume.unlink) == errno.ENOENT
    assert volume.name not in mnt.command("volume", "list").stdout


def test_an_unlinked_volume_is_usable_until_it_is_closed(volume):
    with open(volume, "w+b", buffering=0) as stream:
        stream.write(b"before")
        volume.unlink()
        volume.write_bytes(b"another of the same name")
        assert os.fstat(stream.fileno()).st_nlink == 0
        stream.write(b" and after")
        os.fsync(stream.fileno())
        os.ftruncate(stream.fileno(), 8192)
        os.fchmod(stream.fileno(), 0o400)
        assert os.pread(stream.fileno(), 16, 0) == b"before and after"
        assert os.fstat(stream.fileno()).st_size == 8192
    assert volume.read_bytes() == b"another of the same name"


def test_rename_moves_and_replaces(mnt, volume):
    target = mnt / f"{volume.name}-target"
    volume.write_bytes(b"moved")
    inode = os.stat(volume).st_ino
    target.write_bytes(b"replaced")
    with open(target, "rb") as replaced:
        os.rename(volume, target)
        assert replaced.read() == b"replaced"
    assert target.read_bytes() == b"moved"
    assert os.stat(target).st_ino == inode
    assert not volume.exists()


def test_rename_without_replacing(mnt, volume):
    target = mnt / f"{volume.name}-target"
    volume.write_bytes(b"a")
    target.write_bytes(b"b")
    assert errno_of(renameat2, volume, target, RENAME_NOREPLACE) == errno.EEXIST
    target.unlink()
    renameat2(volume, target, RENAME_NOREPLACE)
    assert target.read_bytes() == b"a"


def test_rename_exchanges(mnt, volume):
    other = mnt / f"{volume.name}-other"
    volume.write_bytes(b"first")
    other.write_bytes(b"second")
    renameat2(volume, other, RENAME_EXCHANGE)
    assert (volume.read_bytes(), other.read_bytes()) == (b"second", b"first")
    assert errno_of(renameat2, volume, mnt / "nowhere", RENAME_EXCHANGE) == errno.ENOENT
    assert errno_of(renameat2, volume, mnt / "nowhere", RENAME_WHITEOUT) == errno.EINVAL


def test_rename_refuses_bad_names_and_other_directories(mnt, volume):
    volume.write_bytes(b"x")
    assert errno_of(os.rename, volume, mnt / ".hidden") == errno.EINVAL
    assert errno_of(os.rename, volume, mnt / ".snapshots" / volume.name / "x") == errno.EPERM
    assert errno_of(os.rename, volume, mnt / ".incfs" / "x") == errno.EPERM
    assert volume.read_bytes() == b"x"


def test_dot_and_dot_dot_lead_where_they_should(mnt, volume):
    volume.touch()
    directory = mnt / ".snapshots" / volume.name
    assert os.stat(directory / "..").st_ino == os.stat(mnt / ".snapshots").st_ino
    assert os.stat(mnt / ".snapshots" / "..").st_ino == os.stat(mnt.path).st_ino == 1


def test_inode_numbers_survive_a_remount(mounted):
    (mounted / "db").touch()
    (mounted / ".snapshots/db/monday").touch()
    paths = [".", ".snapshots", ".incfs", ".incfs/metrics", "db", ".snapshots/db", ".snapshots/db/monday"]
    before = [os.stat(mounted / path).st_ino for path in paths]
    assert len(set(before)) == len(before)
    mounted.remount()
    assert [os.stat(mounted / path).st_ino for path in paths] == before


def test_status_files_cannot_be_removed(mnt):
    assert errno_of(os.unlink, mnt / ".incfs/metrics") == errno.EPERM
    assert errno_of(os.rename, mnt / ".incfs/metrics", mnt / ".incfs/other") == errno.EPERM
