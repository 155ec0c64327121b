"""The host's files: short counts go on, and each errno becomes the error that it means."""

import errno
import os
from pathlib import Path

import pytest

from incfs.backing import Backing, translate
from incfs.errors import AlreadyExists, BackingError, NoSpace


def test_a_short_write_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, bytes(data)[:7], offset))
    file = Backing().create(tmp_path / "file")
    file.pwrite(3, b"a write of more than seven bytes")
    file.close()
    assert (tmp_path / "file").read_bytes() == b"\0\0\0a write of more than seven bytes"


def test_a_sync_reaches_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files and of directories; the power cuts of tests/crash take that for granted."""
    asked = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: asked.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(os, "fsync", lambda fd: asked.append(os.readlink(f"/proc/self/fd/{fd}")))
    file = Backing().create(tmp_path / "file")
    file.sync()
    file.close()
    Backing().sync_directory(tmp_path)
    assert asked == [str(tmp_path / "file"), str(tmp_path)]


def test_a_failed_sync_is_told_to_whoever_asks_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of lost pages once: a fold beside the commit that was told stored tables which name them."""
    told: list[int] = []

    def sync(fd: int) -> None:
        told.append(fd)
        if len(told) == 1:
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fdatasync", sync)
    file = Backing().create(tmp_path / "file")
    for _ in range(2):
        with pytest.raises(BackingError, match="cannot sync"):
            file.sync()
    assert len(told) == 1
    file.begin_anew()
    file.sync()
    file.close()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EFBIG, NoSpace),
        (errno.EEXIST, AlreadyExists),
        (errno.EIO, BackingError),
        (errno.EROFS, BackingError),
    ],
)
def test_what_an_errno_of_the_host_means(code: int, expected: type[Exception]) -> None:
    assert type(translate(OSError(code, ""), Path("/disk/image"), "write")) is expected


def test_a_symlink_is_not_followed(tmp_path: Path) -> None:
    """Somebody who may write to an image directory must not choose what the daemon opens."""
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "image").symlink_to(tmp_path / "secret")
    with pytest.raises(BackingError):
        Backing().open(tmp_path / "image")


def test_data_is_told_from_what_is_only_reserved_and_from_what_was_punched(tmp_path: Path) -> None:
    file = Backing().create(tmp_path / "image")
    file.allocate(0, 16 * 65536)
    assert file.data_ranges(0, 16 * 65536) == []
    file.pwrite(2 * 65536, b"x" * 3 * 65536)
    file.pwrite(15 * 65536, b"x" * 65536)
    file.punch(3 * 65536, 65536)
    assert file.data_ranges(0, 16 * 65536) == [(2 * 65536, 65536), (4 * 65536, 65536), (15 * 65536, 65536)]
    assert file.data_ranges(4 * 65536 + 4096, 4096) == [(4 * 65536 + 4096, 4096)]
    assert file.data_ranges(5 * 65536, 65536) == []
    file.close()
