"""A block device on a volume: the main job."""

import os
import subprocess
from contextlib import contextmanager

import pytest

MIB = 1 << 20
pytestmark = pytest.mark.loop


def run(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, timeout=60).stdout


@contextmanager
def loop_device(path, *options):
    device = run("losetup", "--find", "--show", *options, path).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def filesystem(device, directory, *options):
    directory.mkdir(exist_ok=True)
    run("mount", *options, device, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


@pytest.mark.parametrize("direct", ["on", "off"])
def test_a_loop_device_offers_discard(mounted, direct):
    with open(mounted / "db", "wb") as stream:
        stream.truncate(64 * MIB)
    with loop_device(mounted / "db", f"--direct-io={direct}") as device:
        name = os.path.basename(device)
        with open(f"/sys/block/{name}/queue/discard_max_bytes", encoding="ascii") as stream:
            assert int(stream.read()) > 0
        data = os.urandom(4 * MIB)
        with open(device, "r+b", buffering=0) as stream:
            stream.write(data)
            os.fsync(stream.fileno())
        assert os.stat(mounted / "db").st_blocks * 512 == 4 * MIB
        run("blkdiscard", "--offset", MIB, "--length", MIB, device)
        with open(device, "rb") as stream:
            assert stream.read(4 * MIB) == data[:MIB] + bytes(MIB) + data[2 * MIB :]
    assert (mounted / "db").stat().st_blocks * 512 == 3 * MIB


@pytest.mark.parametrize(
    ("make", "repair"),
    [(("mkfs.ext4", "-q"), ("fsck.ext4", "-fn")), (("mkfs.xfs", "-q"), ("xfs_repair", "-n"))],
    ids=["ext4", "xfs"],
)
def test_a_filesystem_lives_in_a_volume(mounted, tmp_path, make, repair):
    files = {f"f{number}": os.urandom(number * 1000) for number in range(200)}
    with open(mounted / "db", "wb") as stream:
        stream.truncate(400 * MIB)
    with loop_device(mounted / "db", "--direct-io=on") as device:
        run(*make, device)
        with filesystem(device, tmp_path / "fs") as root:
            for name, data in files.items():
                (root / name).write_bytes(data)
            run("sync", "-f", root)
            before = os.stat(mounted / "db").st_blocks
            for number in range(100, 200):
                (root / f"f{number}").unlink()
        # XFS frees what was unlinked some time after; once it was unmounted it has.
        with filesystem(device, tmp_path / "fs") as root:
            run("fstrim", root)
            assert os.stat(mounted / "db").st_blocks * 512 < before * 512 - 10 * MIB
            (mounted / ".snapshots/db/s").touch()
        run(*repair, device)
    mounted.remount()
    with loop_device(mounted / "db") as device, filesystem(device, tmp_path / "fs") as root:
        assert all((root / f"f{number}").read_bytes() == files[f"f{number}"] for number in range(100))


def test_a_snapshot_taken_while_mounted_can_be_mounted(mounted, tmp_path):
    with open(mounted / "db", "wb") as stream:
        stream.truncate(64 * MIB)
    with loop_device(mounted / "db", "--direct-io=on") as device:
        run("mkfs.ext4", "-q", device)
        with filesystem(device, tmp_path / "fs") as root:
            (root / "kept").write_bytes(b"x" * 100_000)
            run("sync", "-f", root)
            (mounted / ".snapshots/db/s").touch()
            (root / "kept").write_bytes(b"y" * 100_000)
    with loop_device(mounted / ".snapshots/db/s", "--read-only") as device:  # noqa: SIM117
        with filesystem(device, tmp_path / "fs", "-o", "ro,noload") as root:
            assert (root / "kept").read_bytes() == b"x" * 100_000
