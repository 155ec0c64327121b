"""A mirrored pool over two filesystems, of which one vanishes under load: nothing that was acknowledged is lost."""

import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.mount.conftest import MountedPool, incfs
from tests.support.loop import filesystem, loop_device, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DISK_BYTES = 200 << 20
SLOT = 4096
SLOTS = 512
SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN, with 2: nothing more reaches the disk, whatever is in the journal."""


@contextmanager
def disk(home: Path, name: str) -> Iterator[Path]:
    image = home / f"{name}.disk"
    with open(image, "wb") as file:
        file.truncate(DISK_BYTES)
    run("mkfs.ext4", "-q", image)
    with loop_device(image) as device, filesystem(device, home / name) as mounted:
        yield mounted


def vanish(directory: Path) -> None:
    """Whatever is asked of this filesystem from now on fails."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", 2))
    finally:
        os.close(fd)


class Writer(threading.Thread):
    """Writes numbered slots and has each flushed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.acknowledged: dict[int, int] = {}
        self.stopping = threading.Event()
        self.error: OSError | None = None

    def run(self) -> None:
        fd = os.open(self._path, os.O_RDWR)
        number = 0
        try:
            while not self.stopping.is_set():
                number += 1
                os.pwrite(fd, number.to_bytes(8, "little") * (SLOT // 8), number % SLOTS * SLOT)
                os.fsync(fd)
                self.acknowledged[number % SLOTS] = number
        except OSError as error:
            self.error = error
        finally:
            os.close(fd)

    def wait_for(self, more: int) -> None:
        """Wait until so many more were acknowledged."""
        wanted = max(self.acknowledged.values(), default=0) + more
        while self.error is None and max(self.acknowledged.values(), default=0) < wanted:
            self.stopping.wait(0.01)

    def end(self) -> None:
        self.stopping.set()
        self.join()
        if self.error is not None:
            raise self.error


def require(path: Path, acknowledged: dict[int, int]) -> None:
    with path.open("rb") as file:
        for slot, number in acknowledged.items():
            file.seek(slot * SLOT)
            found = file.read(SLOT)
            assert int.from_bytes(found[:8], "little") >= number
            assert found == found[:8] * (SLOT // 8)


@pytest.mark.parametrize("lost", ["a", "b"])
def test_a_mirror_survives_the_loss_of_any_one_disk(tmp_path: Path, lost: str) -> None:
    kept = {"a": "b", "b": "a"}[lost]
    with ExitStack() as stack:
        disks = {name: stack.enter_context(disk(tmp_path, name)) for name in "ab"}
        pools = {name: path / "pool" for name, path in disks.items()}
        incfs("pool", "create", "--mirror", pools["a"], pools["b"])
        mounted = MountedPool(tmp_path / "first", pool=pools["a"])
        stack.callback(mounted.take_down)
        mounted.start()
        mounted.command("volume", "create", "v", "8M")
        writer = Writer(mounted / "v")
        writer.start()
        try:
            writer.wait_for(100)
            vanish(disks[lost])
            writer.wait_for(300)
        finally:
            writer.end()
        shown = incfs("-p", pools[kept], "pool", "metadata", "list", "-H").stdout.splitlines()
        assert [line.split("\t")[2] for line in shown] == ["stale" if name == lost else "online" for name in "ab"]
        mounted.kill()  # and what it had acknowledged is on the disk that is left
        run("umount", "--lazy", disks[lost])
        again = MountedPool(tmp_path / "again", pool=pools[kept])
        stack.callback(again.take_down)
        again.start()
        require(again / "v", writer.acknowledged)
        again.stop()
        assert incfs("-p", pools[kept], "pool", "check", "--data").stdout.startswith("clean")
        run("mount", tmp_path / f"{lost}.disk", disks[lost])  # for the context to unmount; empty of what came later
