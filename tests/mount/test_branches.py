"""Clones made by command, seen through the kernel."""

import json
import os

import pytest

from tests.support.loop import filesystem, loop_device, run

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


def test_a_rollback_changes_what_is_read_also_what_the_kernel_had_cached(mnt, volume):
    volume.write_bytes(b"a" * MIB)
    mnt.command("snapshot", "create", f"{volume.name}@s")
    volume.write_bytes(b"b" * 3 * MIB)
    mnt.command("snapshot", "create", f"{volume.name}@t")
    assert volume.read_bytes() == b"b" * 3 * MIB
    with open(volume, "rb") as held:
        held.read(1)
        refused = mnt.command("volume", "rollback", "--force", f"{volume.name}@t", check=False)
        assert refused.returncode == 0
        refused = mnt.command("volume", "rollback", f"{volume.name}@t", check=False)
        assert (refused.returncode, "open by pid" in refused.stderr) == (11, True)
    mnt.command("volume", "rollback", "--force", f"{volume.name}@s")
    assert os.stat(volume).st_size == MIB
    assert volume.read_bytes() == b"a" * MIB
    assert os.listdir(mnt / ".snapshots" / volume.name) == ["s"]
    with open(volume, "ab") as stream:
        stream.write(b"c" * 10)
    assert volume.read_bytes() == b"a" * MIB + b"c" * 10


def test_a_forced_rollback_under_an_open_file_shows_its_reader_the_old_contents(mnt, volume):
    volume.write_bytes(b"a" * MIB)
    mnt.command("snapshot", "create", f"{volume.name}@s")
    with open(volume, "r+b", buffering=0) as stream:
        stream.write(b"b" * 2 * MIB)
        assert os.pread(stream.fileno(), 10, 0) == b"b" * 10
        mnt.command("volume", "rollback", "--force", f"{volume.name}@s")
        assert os.pread(stream.fileno(), 10, 0) == b"a" * 10
        assert os.fstat(stream.fileno()).st_size == MIB
        os.pwrite(stream.fileno(), b"c", 0)
    assert volume.read_bytes() == b"c" + b"a" * (MIB - 1)


def test_a_diff_is_listed_in_parts(mnt, volume):
    volume.write_bytes(b"a" * MIB)
    mnt.command("snapshot", "create", f"{volume.name}@s")
    with open(volume, "r+b") as stream:
        for block in (0, 3, 4, 9, 600 % 256):
            stream.seek(block * 4096)
            stream.write(b"b" * 4096)
    mnt.command("snapshot", "create", f"{volume.name}@t")
    changed = ["snapshot", "diff", "--json", "--from", "s", f"{volume.name}@t"]
    whole = json.loads(mnt.command(*changed).stdout)
    assert [(m["byte_offset"], m["size_bytes"]) for m in whole["block_metadata"]] == [
        (0, 4096), (3 * 4096, 8192), (9 * 4096, 4096), (88 * 4096, 4096),
    ]  # fmt: skip
    first = json.loads(mnt.command(*changed, "--max-results", 2).stdout)
    rest = json.loads(mnt.command(*changed, "--start", first["next_offset"]).stdout)
    assert first["block_metadata"] + rest["block_metadata"] == whole["block_metadata"]
    inside = json.loads(mnt.command(*changed, "--start", 4 * 4096 + 5, "--max-results", 1).stdout)
    assert inside["block_metadata"] == [{"byte_offset": 4 * 4096, "size_bytes": 4096}]
    freed = json.loads(mnt.command("snapshot", "remove", "--json", "-n", f"{volume.name}@s").stdout)["removal"]
    assert freed["freed_bytes"] == 5 * 4096


@pytest.mark.loop
def test_import_from_and_export_to_devices_while_mounted(mnt, tmp_path):
    image, other = tmp_path / "image", tmp_path / "other"
    image.write_bytes(b"i" * MIB + bytes(MIB))
    other.write_bytes(b"o" * 3 * MIB)
    with loop_device(image) as device:
        mnt.command("import", "db", device, "--snapshot", "a")
        assert (mnt / "db").read_bytes() == b"i" * MIB + bytes(MIB)
        device.write_bytes(b"j" * 4096)
        mnt.command("import", "db", device, "--incremental", "--snapshot", "b")
    expected = b"j" * 4096 + b"i" * (MIB - 4096) + bytes(MIB)
    assert (mnt / "db").read_bytes() == expected
    with loop_device(other) as device:
        mnt.command("export", "db@b", device)
    assert other.read_bytes() == expected + b"o" * MIB
    with loop_device(other) as device:
        run("mkfs.ext4", "-q", device)
        with filesystem(device, tmp_path / "fs"):
            refused = mnt.command("export", "db@b", device, check=False)
            assert (refused.returncode, "mounted or in use" in refused.stderr) == (11, True)
    refused = mnt.command("export", "db@b", mnt / "other", check=False)
    assert (refused.returncode, "own mount" in refused.stderr) == (2, True)
