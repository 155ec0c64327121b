"""Many at once through the mount: 200 open files and 64 writers, many volumes, 1 PiB; the daemon gives all back."""

import os
import threading
from pathlib import Path
from random import Random

import pytest

from incfs.planes import HAS_NATIVE
from tests.mount.conftest import START_TIMEOUT_S, mounted_pool, wait_for

PLANES = ["python", "native"] if HAS_NATIVE else ["python"]
OPEN_FILES = 200
WRITERS = 64
SPAN = 256 << 10
NAMES = 10_000 if os.environ.get("INCFS_TEST_PROFILE") == "long" else 200


@pytest.fixture(scope="module", params=PLANES)
def mnt(request, tmp_path_factory):
    with mounted_pool(tmp_path_factory.mktemp("many"), f"data_plane={request.param}") as pool:
        yield pool


def descriptors(pool) -> int:
    return len(os.listdir(f"/proc/{pool.process.pid}/fd"))


def threads(pool) -> int:
    return len(os.listdir(f"/proc/{pool.process.pid}/task"))


def resident_mib(pool) -> int:
    return int(Path(f"/proc/{pool.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def test_200_open_files_and_64_writers(mnt):
    before = descriptors(mnt)
    fds = [os.open(mnt / f"f{number}", os.O_RDWR | os.O_CREAT) for number in range(OPEN_FILES)]
    contents = [bytearray(SPAN) for _ in fds]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        chance = Random(number)
        try:
            for turn in range(12):
                start = chance.randrange(SPAN - 20_000)
                data = bytes([1 + (number + turn) % 255]) * chance.randrange(1, 20_000)
                contents[number][start : start + len(data)] = data
                assert os.pwrite(fds[number], data, start) == len(data)
                if turn % 4 == 0:
                    os.fsync(fds[number])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(WRITERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(START_TIMEOUT_S)
        assert not worker.is_alive(), "a writer is stuck"
    assert errors == []
    # Each open file is a number in the daemon, not a descriptor.  What works in the background opens some at times.
    wait_for(lambda: descriptors(mnt) <= before + 2)
    for number in range(WRITERS):
        size = os.fstat(fds[number]).st_size
        assert os.pread(fds[number], SPAN, 0) == contents[number][:size]
        assert not any(contents[number][size:])
    for number, fd in enumerate(fds):
        if number % 2:
            os.unlink(mnt / f"f{number}")  # open files outlive their names
            os.pwrite(fd, b"still here", 0)
            assert os.pread(fd, 10, 0) == b"still here"
        os.close(fd)
    for number in range(0, OPEN_FILES, 2):
        os.unlink(mnt / f"f{number}")
    wait_for(lambda: not [name for name in os.listdir(mnt.path) if name.startswith("f")])
    wait_for(lambda: descriptors(mnt) <= before + 2)
    wait_for(lambda: threads(mnt) < 40)  # worker threads are given back when they had nothing to do for ten seconds


def test_thousands_of_names(mnt):
    for number in range(NAMES):
        os.close(os.open(mnt / f"n{number}", os.O_WRONLY | os.O_CREAT))
    assert sorted(name for name in os.listdir(mnt.path) if name[0] == "n") == sorted(f"n{i}" for i in range(NAMES))
    assert all(entry.stat().st_size == 0 for entry in os.scandir(mnt.path) if entry.name[0] == "n")
    for number in range(NAMES):
        os.unlink(mnt / f"n{number}")
    assert not [name for name in os.listdir(mnt.path) if name[0] == "n"]
    assert resident_mib(mnt) < 150


def test_a_pebibyte(mnt):
    path = mnt / "huge"
    with open(path, "w+b", buffering=0) as file:
        file.truncate(1 << 50)
        for place in (0, 1 << 40, (1 << 50) - 4096):
            os.pwrite(file.fileno(), b"x" * 4096, place)
        os.fsync(file.fileno())
        assert os.lseek(file.fileno(), 4096, os.SEEK_DATA) == 1 << 40
        assert os.lseek(file.fileno(), (1 << 40) + 4096, os.SEEK_DATA) == (1 << 50) - 4096
        (mnt / ".snapshots/huge/s").touch()
        file.truncate(10)
        assert path.stat().st_blocks * 512 == 4096
        assert (mnt / ".snapshots/huge/s").stat().st_size == 1 << 50
    (mnt / ".snapshots/huge/s").unlink()
    path.unlink()
