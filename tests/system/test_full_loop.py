"""A filesystem on a volume of a pool that gets full: what its programs see, and when nothing at all."""

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from incfs.recovery import create_pool
from tests.support.ballast import MIB, Ballast
from tests.support.fire import START_TIMEOUT_S, Setting, Target
from tests.support.loop import filesystem, loop_device, run, small_disk
from tests.support.spawner import Spawner

VOLUME_BYTES = 128 * MIB
DISK_BYTES = 48 * MIB
FILE_BYTES = 4 * MIB
WAITS_S = 2
WAYS = ["a storage volume", "what another program gives back"]

pytestmark = [pytest.mark.mount, pytest.mark.loop, pytest.mark.slow, pytest.mark.timeout(300)]


@contextmanager
def mounted(disk: Path, home: Path, tmp_path: Path, spawner: Spawner, when_full: str) -> Iterator[Target]:
    create_pool(home / "pool", directories=[disk / "images"], journal_bytes=MIB)
    target = Target(home, tmp_path / "mnt", Setting(4096, "writeback", options="dump=off"), spawner)
    try:
        target.mount()
        target.call("policy.set", text=f'[pool]\nextend_by = "4M"\nreserve = "4M"\nwhen_full = "{when_full}"\n')
        target.call("volume.create", name="db", size_bytes=VOLUME_BYTES)
        yield target
    except BaseException as error:
        error.add_note(target.log.read_text()[-3000:])
        raise
    finally:
        target.take_down()


def content(number: int) -> bytes:
    return random.Random(number).randbytes(FILE_BYTES)


@pytest.mark.parametrize("extended_by", WAYS if "INCFS_FULL_ROUNDS" in os.environ else WAYS[:1])
def test_ext4_sees_nothing_of_a_pool_that_is_extended_in_time(
    extended_by: str, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    """With ``when_full = "queue:60s"``, whoever makes room has a minute for it."""
    with small_disk("tmpfs", 2 * DISK_BYTES, pool_home / "unused", tmp_path / "disk") as disk:
        ballast = Ballast(disk, random.Random(1))
        ballast.leave(DISK_BYTES)
        with mounted(disk, pool_home, tmp_path, spawner, "queue:60s") as target:
            with loop_device(target.mountpoint / "db") as device:
                run("mkfs.ext4", "-q", device)
                with filesystem(device, tmp_path / "files") as files:
                    number = fill(target, files, lambda: extend(target, ballast, pool_home, extended_by))
                    errors = Path("/sys/fs/ext4", device.name, "errors_count").read_text()
                    assert int(errors) == 0
                with filesystem(device, tmp_path / "files") as files:
                    for i in range(number):
                        assert (files / str(i)).read_bytes() == content(i)
                run("e2fsck", "-fn", device)
            said = target.log.read_text()
            assert "writes wait up to 60 s" in said
            assert "ENOSPC" not in said
            target.check_pool()


def extend(target: Target, ballast: Ballast, home: Path, by: str) -> None:
    if by == "a storage volume":
        target.call("storage.add", path=str(home / "more.img"))
    else:
        ballast.leave(2 * DISK_BYTES)


def fill(target: Target, files: Path, extend: Callable[[], None]) -> int:
    """Write files, each made durable, beyond what the pool holds; have it extended some seconds after it is full."""

    def wait_and_extend() -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "queue: pool" not in target.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(WAITS_S)
        extend()

    helper = threading.Thread(target=wait_and_extend)
    helper.start()
    number = 0
    try:
        while number < (DISK_BYTES + 16 * MIB) // FILE_BYTES:
            with open(files / str(number), "xb", buffering=0) as file:
                assert file.write(content(number)) == FILE_BYTES
                os.fsync(file)
            number += 1
    finally:
        helper.join()
    return number


@pytest.mark.skipif("INCFS_FULL_ROUNDS" not in os.environ, reason="make full-long")
def test_ext4_of_a_pool_that_is_full_loses_nothing_that_was_synced(
    spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    """With ``when_full = "error"`` the filesystem takes it for a failed disk, and is right again after e2fsck."""
    with (
        small_disk("tmpfs", DISK_BYTES, pool_home / "unused", tmp_path / "disk") as disk,
        mounted(disk, pool_home, tmp_path, spawner, "error") as target,
    ):
        with loop_device(target.mountpoint / "db") as device:
            run("mkfs.ext4", "-q", device)
            with filesystem(device, tmp_path / "files") as files:
                number = write_until_refused(files)
            target.call("storage.add", path=str(pool_home / "more.img"))
            assert run("e2fsck", "-fy", device, check=False).returncode in (0, 1)
            with filesystem(device, tmp_path / "files") as files:
                for i in range(number):
                    assert (files / str(i)).read_bytes() == content(i)
                (files / "more").write_bytes(content(0))
                run("sync", "-f", files)
        target.check_pool()


def write_until_refused(files: Path) -> int:
    """Write files, each made durable; give how many are."""
    for number in range(VOLUME_BYTES // FILE_BYTES):
        try:
            with open(files / str(number), "xb", buffering=0) as file:
                file.write(content(number))
                os.fsync(file)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENOSPC, errno.EROFS):
                raise
            return number
    raise AssertionError("the pool is never full")
