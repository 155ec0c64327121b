"""Other users: shut out without allow_other, bound by the modes with it."""

import errno
import os

import pytest

from tests.mount.conftest import mounted_pool

NOBODY = 65534


@pytest.fixture
def shared(tmp_path):
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents[:2]:
        os.chmod(parent, 0o755)
    with mounted_pool(tmp_path, "allow_other") as pool:
        yield pool


def as_nobody(function, *args):
    """Call a function as another user in a child; returns the errno it failed with, 0 when it did not."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            function(*args)
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_nobody_else_gets_in_by_default(mounted):
    for parent in (mounted.path.parent, *mounted.path.parents[1:3]):
        os.chmod(parent, 0o755)
    (mounted / "db").touch()
    os.chmod(mounted / "db", 0o666)
    assert as_nobody(os.stat, mounted / "db") == errno.EACCES


def test_the_mode_of_a_volume_decides(shared):
    (shared / "db").write_bytes(b"x")
    for mode, may_read, may_write in ((0o600, False, False), (0o604, True, False), (0o606, True, True)):
        os.chmod(shared / "db", mode)
        assert (as_nobody(os.open, shared / "db", os.O_RDONLY) == 0) is may_read
        assert (as_nobody(os.open, shared / "db", os.O_RDWR) == 0) is may_write


def test_snapshots_follow_the_mode_of_their_volume_at_once(shared):
    (shared / "db").write_bytes(b"x")
    os.chmod(shared / "db", 0o644)
    snapshot = shared / ".snapshots/db/s"
    snapshot.touch()
    assert as_nobody(os.open, snapshot, os.O_RDONLY) == 0
    assert as_nobody(os.unlink, snapshot) == errno.EACCES
    assert as_nobody(os.open, snapshot.with_name("t"), os.O_CREAT | os.O_WRONLY) == errno.EACCES
    os.chmod(shared / "db", 0o600)
    assert as_nobody(os.open, snapshot, os.O_RDONLY) == errno.EACCES
    assert as_nobody(os.listdir, snapshot.parent) == errno.EACCES


def test_others_may_not_create_remove_or_take_over(shared):
    (shared / "db").write_bytes(b"x")
    os.chmod(shared / "db", 0o666)
    assert as_nobody(os.open, shared / "new", os.O_CREAT | os.O_WRONLY) == errno.EACCES
    assert as_nobody(os.unlink, shared / "db") == errno.EACCES
    assert as_nobody(os.chmod, shared / "db", 0o777) == errno.EPERM
    assert as_nobody(os.chown, shared / "db", 65534, -1) == errno.EPERM


def test_an_owner_by_chown_owns(shared):
    (shared / "db").write_bytes(b"x")
    os.chown(shared / "db", NOBODY, NOBODY)
    os.chmod(shared / "db", 0o600)
    assert as_nobody(os.open, shared / "db", os.O_RDWR) == 0
    assert as_nobody(os.open, shared / ".snapshots/db/s", os.O_CREAT | os.O_WRONLY) == 0
    assert as_nobody(os.chmod, shared / "db", 0o400) == 0
    assert (shared / ".snapshots/db/s").exists()


def test_no_file_is_ever_setuid(shared):
    """The kernel was told that writing need not take such bits away."""
    volume = shared / "db"
    os.close(os.open(volume, os.O_CREAT | os.O_RDWR, 0o6777))
    assert volume.stat().st_mode & 0o7000 == 0
    os.chmod(volume, 0o6755)
    assert volume.stat().st_mode & 0o7777 == 0o755
    os.chmod(volume, 0o666)
    os.truncate(volume, 8192)

    def write() -> None:
        with volume.open("r+b", buffering=0) as file:
            assert file.write(b"theirs") == 6

    assert as_nobody(write) == 0
    assert volume.read_bytes()[:6] == b"theirs"
    assert errno_of_capability(volume) == errno.EOPNOTSUPP


def errno_of_capability(path):
    try:
        os.setxattr(path, "security.capability", b"\x01\0\0\2" + bytes(16))
    except OSError as error:
        return error.errno
    return 0
