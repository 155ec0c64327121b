"""Streams into a mounted pool: the file meanwhile, a replica's file, and what the kernel had of them."""

import errno
import os
import subprocess

import pytest

from tests.mount.conftest import INCFS


def stream(mounted, *arguments):
    command = [*map(str, INCFS), "-p", str(mounted.pool), "send", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def receive(mounted, data, *arguments):
    command = [*map(str, INCFS), "-p", str(mounted.pool), "receive", *arguments]
    return subprocess.run(command, input=data, stderr=subprocess.PIPE, check=False)


@pytest.fixture
def pair(mounted):
    """A volume with two snapshots, and its copy at the first."""
    source = mounted / "db"
    for number in range(2):
        with open(source, "r+b" if number else "wb") as file:
            file.write(f"version {number} ".encode() * 50_000)
            os.fsync(file.fileno())
        mounted.command("snapshot", "create", f"db@s{number}")
    assert receive(mounted, stream(mounted, "db@s0"), "copy").returncode == 0
    return mounted


def test_a_volume_that_receives_cannot_be_opened_and_shows_its_new_contents_afterwards(pair):
    copy = pair / "copy"
    assert copy.read_bytes() == (pair / ".snapshots" / "db" / "s0").read_bytes()
    step = stream(pair, "-i", "s0", "db@s1", "--level", "0")
    with open(copy, "rb"):
        refused = receive(pair, step, "copy")
        assert (refused.returncode, b"is open by" in refused.stderr) == (12, True)
    assert receive(pair, step[:-200], "copy").returncode == 14
    for flags in (os.O_RDONLY, os.O_RDWR):
        with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
            os.open(copy, flags)
    assert (pair / ".snapshots" / "copy" / "s0").read_bytes() == (pair / ".snapshots" / "db" / "s0").read_bytes()
    assert receive(pair, step, "copy").returncode == 0
    assert copy.read_bytes() == (pair / "db").read_bytes()
    with open(copy, "r+b") as file:
        file.write(b"mine")
    assert copy.read_bytes()[:4] == b"mine"


def test_a_replica_is_read_only_until_it_is_promoted(pair):
    step = stream(pair, "-i", "s0", "db@s1")
    copy = pair / "copy"
    assert receive(pair, step, "copy", "--replica").returncode == 12
    pair.command("replica", "demote", "copy")
    assert receive(pair, step, "copy", "--replica").returncode == 0
    assert copy.read_bytes() == (pair / "db").read_bytes()
    for action in (lambda: os.open(copy, os.O_RDWR), lambda: os.truncate(copy, 5), lambda: copy.write_bytes(b"")):
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            action()
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        (pair / ".snapshots" / "copy" / "mine").touch()
    pair.command("replica", "promote", "copy")
    copy.write_bytes(b"ours")


def test_an_aborted_receive_leaves_the_file_as_it_was(pair):
    copy = pair / "copy"
    before = copy.read_bytes()
    step = stream(pair, "-i", "s0", "db@s1", "--level", "0")
    assert receive(pair, step[:-200], "copy").returncode == 14
    pair.command("receive", "--abort", "copy")
    assert copy.read_bytes() == before
