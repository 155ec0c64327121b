"""A disk that does not answer keeps those waiting who need it, and nobody else.

One image lies on a filesystem that stops answering until the test lets it go on; what is done meanwhile with volumes on
the other image ends, or the test does.
"""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.conftest import END_TIMEOUT_S, mounted_pool, wait_for
from tests.support.stalling_fs import EVERYTHING, NOTHING, WRITES, stalling

BLOCK = 4096
SLOW_VOLUMES = 6
PLACES = range(1, 64, 16)
"""Blocks that are written in each at once: all hang, on all threads that take requests."""
POLICY = """
[volume."slow*"]
place = ["class=slow"]
[volume."fast*"]
place = ["class=fast"]
"""


def put(path, offset, data):
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def put_scattered(path):
    """Write what the kernel sends in as many requests as there are places."""
    fd = os.open(path, os.O_RDWR)
    try:
        for block in PLACES:
            os.pwrite(fd, b"t" * BLOCK, block * BLOCK)
        os.fsync(fd)
    finally:
        os.close(fd)


def get(path, offset, length):
    """Read what the kernel does not have."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


@pytest.fixture
def slow_disk(tmp_path):
    (tmp_path / "below").mkdir()
    with stalling(tmp_path / "below", tmp_path / "slow", tmp_path / "switch") as switch:
        yield tmp_path / "slow", switch


@pytest.fixture
def two_disks(slow_disk, tmp_path):
    place, switch = slow_disk
    (tmp_path / "policy.toml").write_text(POLICY)
    with mounted_pool(tmp_path) as pool:
        pool.command("storage", "add", place / "slow.img", "--class", "slow")
        pool.command("storage", "add", tmp_path / "fast.img", "--class", "fast")
        pool.command("policy", "set", tmp_path / "policy.toml")
        for number in range(SLOW_VOLUMES):
            put(pool / f"slow{number}", 0, b"s" * 64 * BLOCK)
        put(pool / "fast", 0, b"f" * 1024 * BLOCK)
        try:
            yield pool, switch, tmp_path / "fast.img"
        finally:
            switch.stalls = NOTHING


def writing_threads(pool):
    """Count the daemon's threads that are in pwrite()."""
    number = {"x86_64": "18", "aarch64": "68"}[os.uname().machine]
    calls = list(Path(f"/proc/{pool.process.pid}/task").glob("*/syscall"))
    return sum(path.read_text().split()[0] == number for path in calls)


@contextmanager
def going_on(pool, image):
    """Prove that what does not need the slow disk is done; then let the body do more."""
    user = ThreadPoolExecutor(1)

    def do(work, *arguments):
        return user.submit(work, *arguments).result(END_TIMEOUT_S)

    try:
        for turn in range(3):
            assert do(get, pool / "fast", turn * BLOCK, 4 * BLOCK) == b"f" * 4 * BLOCK
            with open(image, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert do(get, pool / "fast", (100 + turn) * BLOCK, 64 * BLOCK) == b"f" * 64 * BLOCK
            do(put, pool / "fast", (900 + turn) * BLOCK, b"g" * BLOCK)
            assert do(get, pool / "fast", (900 + turn) * BLOCK, BLOCK) == b"g" * BLOCK
            do(put, pool / f"fast-{turn}", 0, b"n" * 10 * BLOCK)
            assert do(os.statvfs, pool.path).f_blocks > 0
            assert "slow0" in do(os.listdir, pool.path)
            assert do(os.stat, pool / "slow0").st_size == 64 * BLOCK
        yield do
    finally:
        user.shutdown(wait=False)  # what hangs ends when the disk goes on


def test_writes_that_hang_keep_nobody_else_waiting(two_disks):
    pool, switch, image = two_disks
    switch.stalls = WRITES
    hanging = [
        threading.Thread(target=put_scattered, args=(pool / f"slow{number}",), daemon=True)
        for number in range(SLOW_VOLUMES)
    ]
    for thread in hanging:
        thread.start()
    hanging_writes = SLOW_VOLUMES * len(PLACES)
    wait_for(lambda: writing_threads(pool) == hanging_writes)
    with going_on(pool, image):
        assert writing_threads(pool) == hanging_writes
    switch.stalls = NOTHING
    for thread in hanging:
        thread.join(END_TIMEOUT_S)
        assert not thread.is_alive()
    for number in range(SLOW_VOLUMES):
        expected = b"".join((b"t" if block in PLACES else b"s") * BLOCK for block in range(64))
        assert get(pool / f"slow{number}", 0, 64 * BLOCK) == expected


def test_a_host_that_does_not_answer_stops_nobody_and_is_told(two_disks):
    pool, switch, image = two_disks
    switch.stalls = EVERYTHING
    with going_on(pool, image) as do:
        show = json.loads(do(lambda: pool.command("pool", "show", "--json").stdout))
        assert show["pool"]["capacity_bytes"] > 0
        wait_for(lambda: states(do(lambda: pool.command("storage", "list", "--json").stdout))["slow"] == "silent")
        assert "host-silent" in do(lambda: pool.command("events").stdout)
    with going_on(pool, image):
        switch.stalls = NOTHING
    wait_for(lambda: states(pool.command("storage", "list", "--json").stdout)["slow"] == "online")
    assert "host-answers" in pool.command("events").stdout
    assert get(pool / "slow0", 0, BLOCK) == b"s" * BLOCK


def states(text):
    return {storage["class"]: storage["state"] for storage in json.loads(text)["storages"]}
