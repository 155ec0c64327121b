"""The disk of the pool's metadata is full to the last byte: the pool opens, is read and written, and loses nothing.

What it writes is there already (the journal, LMDB's list of readers, the lock) or was set aside for it (what tables
grow by), on each of the filesystems that people use.
"""

import errno
import os
import signal
from pathlib import Path

import pytest

from incfs.recovery import create_pool
from tests.support.cli import Cli
from tests.support.fire import Setting, Target
from tests.support.loop import small_disk
from tests.support.spawner import Spawner

MIB = 1 << 20
SIZES = {"tmpfs": 32 * MIB, "ext4": 56 * MIB, "xfs": 310 * MIB, "btrfs": 150 * MIB}
CONTENT = os.urandom(MIB)
SECOND = os.urandom(4096)
JOURNAL_BYTES = 256 << 10


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
    with small_disk(kind, SIZES[kind], tmp_path / "disk.img", tmp_path / "small") as disk:
        directories = [pool_home / "images"] if images == "elsewhere" else []
        create_pool(disk / "pool", directories=directories, journal_bytes=MIB, capacity_bytes=4 * MIB)
        target = Target(pool_home, tmp_path / "mnt", Setting(4096, "none"), spawner, pool=disk / "pool")
        try:
            target.mount()
            kill_with_work(target)
            ballast = fill(disk)
            written = work_on_a_full_disk(target, may_be_full=images == "on-it")
            assert "without folding its journal" not in target.log.read_text()
            ballast.unlink()
            target.mount()
            assert (target.mountpoint / "v").read_bytes() == expected(written)
            target.check_pool()
            target.signal(signal.SIGTERM)
            target.wait_for_end()
        except BaseException as error:
            error.add_note(target.log.read_text())
            raise
        finally:
            target.take_down()


def work_on_a_full_disk(target: Target, *, may_be_full: bool) -> int:
    """Open the pool in each way; read, write, end it cleanly and by a kill; give how many blocks are written then."""
    cli = Cli(target.pool)
    number = 8
    for end in (signal.SIGTERM, signal.SIGKILL):
        listed = cli.run("volume", "list", "-H")
        assert (listed.returncode, listed.stdout.split()[0]) == (0, "v"), listed.stderr
        target.mount()
        assert (target.mountpoint / "v").read_bytes() == expected(number)
        with open(target.mountpoint / "v", "r+b", buffering=0) as file:
            try:
                os.pwrite(file.fileno(), SECOND, 65536 * number)
                os.fsync(file)
                number += 1
            except OSError as error:
                if error.errno != errno.ENOSPC or not may_be_full:  # what became free went back to the disk
                    raise
        assert not target.call("pool.show")["pool"]["read_only"]
        target.signal(end)
        target.wait_for_end()
    return number


@pytest.mark.mount
@pytest.mark.loop
@pytest.mark.parametrize("kind", SIZES)
def test_a_journal_that_is_full_again_and_again_is_folded_on_a_full_disk(
    kind: str, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    """The first fold that found no room made the pool read-only until it was mounted again."""
    with small_disk(kind, SIZES[kind], tmp_path / "disk.img", tmp_path / "small") as disk:
        create_pool(disk / "pool", directories=[pool_home / "images"], journal_bytes=JOURNAL_BYTES)
        target = Target(pool_home, tmp_path / "mnt", Setting(4096, "none"), spawner, pool=disk / "pool")
        try:
            target.mount()
            (target.mountpoint / "v").write_bytes(CONTENT)
            (target.mountpoint / ".snapshots/v/s").touch()
            ballast = fill(disk)
            written = fill_journal(target, rounds=4)
            (target.mountpoint / ".snapshots/v/s").unlink()
            (target.mountpoint / ".snapshots/v/t").touch()
            target.call("debug.dump")  # of a checkpoint
            written = fill_journal(target, rounds=2)
            target.kill()
            target.mount()
            assert (target.mountpoint / "v").read_bytes() == written
            assert not target.call("pool.show")["pool"]["read_only"]
            target.signal(signal.SIGTERM)
            target.wait_for_end()
            ballast.unlink()
            target.mount()
            assert (target.mountpoint / "v").read_bytes() == written
            target.check_pool()
            target.signal(signal.SIGTERM)
            target.wait_for_end()
        except BaseException as error:
            error.add_note(target.log.read_text())
            raise
        finally:
            target.take_down()


def fill_journal(target: Target, *, rounds: int) -> bytes:
    """Fsync so many blocks that each of the two segments is used several times; give what is there then."""
    with open(target.mountpoint / "v", "r+b", buffering=0) as file:
        for number in range(rounds * JOURNAL_BYTES // 4096):
            os.pwrite(file.fileno(), number.to_bytes(4) * 1024, number % 256 * 4096)
            os.fsync(file)
        return os.pread(file.fileno(), MIB, 0)
