"""Clones made by command, seen through the kernel."""

import os

MIB = 1 << 20


def test_a_clone_appears_as_a_file_and_is_written_like_one(mnt, volume):
    volume.write_bytes(b"a" * MIB)
    mnt.command("snapshot", "create", f"{volume.name}@s")
    mnt.command("volume", "clone", f"{volume.name}@s", "branch")
    branch = mnt / "branch"
    assert branch.read_bytes() == b"a" * MIB
    assert os.stat(branch).st_blocks == 0
    assert os.getxattr(branch, "user.incfs.origin").decode() == f"{volume.name}@s"
    with open(branch, "r+b") as stream:
        stream.write(b"b" * 5000)
        stream.flush()
        os.fsync(stream.fileno())
    volume.write_bytes(b"c" * MIB)
    assert branch.read_bytes() == b"b" * 5000 + b"a" * (MIB - 5000)
    assert os.stat(branch).st_blocks * 512 == 8192
