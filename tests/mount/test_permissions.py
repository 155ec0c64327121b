"""Other users: shut out without allow_other, bound by the modes with it."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from tests.mount.conftest import mounted_pool
from tests.support.users import NOBODY, as_nobody


def let_in(directory):
    """Let everybody reach a test's own directory."""
    for place in (directory, *directory.parents):
        if Path(tempfile.gettempdir()) in place.parents:
            os.chmod(place, 0o755)


@pytest.fixture
def shared(tmp_path):
    let_in(tmp_path)
    with mounted_pool(tmp_path, "allow_other") as pool:
        yield pool


def test_nobody_else_gets_in_by_default(mounted):
    let_in(mounted.path.parent)
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


def test_status_files_and_their_directory_are_for_reading_only(shared):
    (shared / "db").write_bytes(b"x")
    for name in ("stats.json", "metrics"):
        status = shared / ".incfs" / name
        assert as_nobody(os.open, status, os.O_RDONLY) == 0
        assert as_nobody(os.open, status, os.O_WRONLY) == errno.EACCES
        assert as_nobody(os.unlink, status) in (errno.EACCES, errno.EPERM)
        assert as_nobody(os.chmod, status, 0o777) == errno.EPERM
        with pytest.raises(OSError, match="Permission denied"):
            os.open(status, os.O_WRONLY)
    assert as_nobody(os.open, shared / ".incfs/new", os.O_CREAT | os.O_WRONLY) == errno.EACCES
    assert as_nobody(os.open, shared / ".snapshots/new", os.O_CREAT | os.O_WRONLY) == errno.EACCES


def test_a_group_gets_what_its_bits_say(shared):
    (shared / "db").write_bytes(b"x")
    os.chown(shared / "db", 0, NOBODY)
    for mode, may_read, may_write in ((0o600, False, False), (0o640, True, False), (0o660, True, True)):
        os.chmod(shared / "db", mode)
        assert (as_nobody(os.open, shared / "db", os.O_RDONLY) == 0) is may_read
        assert (as_nobody(os.open, shared / "db", os.O_RDWR) == 0) is may_write
        assert (as_nobody(os.truncate, shared / "db", 0) == 0) is may_write
        assert (as_nobody(os.setxattr, shared / "db", "user.a", b"1") == 0) is may_write
        taking = as_nobody(os.open, shared / f".snapshots/db/s{mode:o}", os.O_CREAT | os.O_RDONLY)
        assert (taking == 0) is may_write
