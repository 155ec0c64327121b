"""The disk of the pool's metadata is full to the last byte: the pool opens, is read and written, and loses nothing.

What opening writes is there already (the journal, LMDB's list of readers, the lock) or waits for room (the checkpoint).
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from incfs.recovery import create_pool
from tests.support.cli import Cli
from tests.support.fire import Setting, Target
from tests.support.loop import filesystem, loop_device, run
from tests.support.spawner import Spawner

MIB = 1 << 20
CONTENT = os.urandom(MIB)
SECOND = os.urandom(4096)


@contextmanager
def small_disk(kind: str, home: Path, where: Path) -> Iterator[Path]:
    """Give a directory on a filesystem of its own."""
    if kind == "tmpfs":
        where.mkdir()
        run("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", where)
        try:
            yield where
        finally:
            subprocess.run(["umount", where], check=True)
    else:
        disk = home / "disk.img"
        with open(disk, "wb") as stream:
            stream.truncate(48 * MIB)
        with loop_device(disk) as device:
            run("mkfs.ext4", "-q", "-m", "0", device)
            with filesystem(device, where) as directory:
                yield directory


def fill(directory: Path) -> Path:
    """Leave not a byte."""
    ballast = directory / "ballast"
    with open(ballast, "wb", buffering=0) as stream:
        for length in (MIB, 4096, 1):
            try:
                while stream.write(bytes(length)):
                    pass
            except OSError:
                continue
    os.sync()
    return ballast


def kill_with_work(target: Target) -> None:
    """Leave a journal that recovery must fold."""
    (target.mountpoint / "v").write_bytes(CONTENT)
    with open(target.mountpoint / "v", "r+b", buffering=0) as file:
        os.fsync(file)
        for number in range(8):
            os.pwrite(file.fileno(), SECOND, 65536 * number)
            os.fsync(file)
    target.kill()


def expected(count: int) -> bytes:
    data = bytearray(CONTENT)
    for number in range(count):
        data[65536 * number : 65536 * number + len(SECOND)] = SECOND
    return bytes(data)


@pytest.mark.mount
@pytest.mark.loop
@pytest.mark.parametrize("images", ["on-it", "elsewhere"])
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_pool_opens_whose_metadata_disk_is_full(
    kind: str, images: str, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    with small_disk(kind, tmp_path, tmp_path / "small") as disk:
        directories = [pool_home / "images"] if images == "elsewhere" else []
        create_pool(disk / "pool", directories=directories, journal_bytes=MIB, capacity_bytes=4 * MIB)
        target = Target(pool_home, tmp_path / "mnt", Setting(4096, "none"), spawner, pool=disk / "pool")
        try:
            target.mount()
            kill_with_work(target)
            ballast = fill(disk)
            work_on_a_full_disk(target)
            assert "opened without folding its journal" in target.log.read_text()
            ballast.unlink()
            target.mount()
            assert (target.mountpoint / "v").read_bytes() == expected(10)
            target.check_pool()
            target.signal(signal.SIGTERM)
            target.wait_for_end()
        finally:
            target.take_down()


def work_on_a_full_disk(target: Target) -> None:
    """Open the pool in each way; read, write, end it cleanly and by a kill."""
    cli = Cli(target.pool)
    for number, end in enumerate((signal.SIGTERM, signal.SIGKILL), 8):
        listed = cli.run("volume", "list", "-H")
        assert (listed.returncode, listed.stdout.split()[0]) == (0, "v"), listed.stderr
        target.mount()
        assert (target.mountpoint / "v").read_bytes() == expected(number)
        with open(target.mountpoint / "v", "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), SECOND, 65536 * number)
            os.fsync(file)
        assert not target.call("pool.show")["pool"]["read_only"]
        target.signal(end)
        target.wait_for_end()
