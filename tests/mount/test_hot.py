"""Requests that native threads answer past Python: counted, verified under load, and never lost at the end."""

import contextlib
import mmap
import os
import random
import re
import threading
import time

import pytest

from incfs.planes import HAS_NATIVE
from tests.mount.conftest import END_TIMEOUT_S, mounted_pool, wait_for

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the C data plane was not built")

BLOCK = 4096
BLOCKS = 2048
WORKERS = 4


@pytest.fixture
def hot(tmp_path):
    with mounted_pool(tmp_path, "data_plane=native,threads=3") as pool:
        yield pool


def counts(pool):
    text = (pool / ".incfs/metrics").read_text()
    return {kind: int(value) for kind, value in re.findall(r'incfs_data_plane_total\{kind="(\w+)"\} (\d+)', text)}


def timed(pool, operation) -> int:
    """Count the requests of a kind, whoever answered them."""
    text = (pool / ".incfs/metrics").read_text()
    return sum(map(int, re.findall(rf'op_duration_seconds_count{{op="{operation}"}} (\d+)', text)))


def aligned(content: bytes) -> mmap.mmap:
    """A buffer that O_DIRECT takes."""
    buffer = mmap.mmap(-1, len(content))
    buffer[:] = content
    return buffer


def block_of(index: int, number: int) -> bytes:
    return (b"%08d-%012d|" % (index, number)).ljust(32, b".") * (BLOCK // 32)


class Load:
    """Threads that each rewrite blocks of their own, directly, and remember what was acknowledged."""

    def __init__(self, path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.acknowledged = [0] * BLOCKS
        self.begun = [0] * BLOCKS
        self.errors: list[Exception] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(WORKERS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(OSError):  # the daemon may have been killed
            os.close(self.fd)

    def _run(self, worker: int) -> None:
        chance = random.Random(worker)
        try:
            while not self._stopping.is_set():
                index = chance.randrange(BLOCKS // WORKERS) * WORKERS + worker
                if chance.random() < 0.3:
                    self.check(index)
                    continue
                self.begun[index] += 1
                os.pwritev(self.fd, [aligned(block_of(index, self.begun[index]))], index * BLOCK)
                self.acknowledged[index] = self.begun[index]
        except (OSError, AssertionError) as error:
            self.errors.append(error)

    def check(self, index: int) -> None:
        expected = block_of(index, self.acknowledged[index]) if self.acknowledged[index] else bytes(BLOCK)
        buffer = mmap.mmap(-1, BLOCK)
        assert os.preadv(self.fd, [buffer], index * BLOCK) == BLOCK
        assert buffer[:] == expected, f"block {index}"


def make_volume(pool):
    with open(pool / "vol", "wb") as file:
        file.truncate(BLOCKS * BLOCK)
    return pool / "vol"


def test_hot_requests_are_right_and_do_not_go_through_python(hot):
    with Load(make_volume(hot)) as load:
        wait_for(lambda: sum(load.acknowledged) > 4 * BLOCKS)  # the counts are not asked for: Python answers that
    assert load.errors == []
    found = counts(hot)
    # All but the first writes to each page and lease.
    assert found["writes"] > 10 * found["handed_writes"], found
    assert found["reads"] > 10 * found["handed_reads"], found
    for operation in ("read", "write"):  # both those that were served past Python and those that were handed over
        assert timed(hot, operation) >= found[f"{operation}s"] + found[f"handed_{operation}s"]


def test_hot_writes_are_seen_everywhere(hot):
    """By a snapshot, by du, by the modification time, by a second mount."""
    path = make_volume(hot)
    before = path.stat()
    with Load(path) as load:
        wait_for(lambda: counts(hot)["writes"] > 500)
    assert load.errors == []
    hot.command("snapshot", "create", "vol@one")
    frozen = list(load.acknowledged)
    after = path.stat()
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_blocks * 512 == sum(number > 0 for number in frozen) * BLOCK
    more = Load(path)
    more.acknowledged[:] = more.begun[:] = frozen
    with more:
        time.sleep(0.5)
    assert more.errors == []
    hot.remount("data_plane=python")
    snapshot = (hot / ".snapshots/vol/one").read_bytes()
    live = (hot / "vol").read_bytes()
    for index in range(BLOCKS):
        span = slice(index * BLOCK, (index + 1) * BLOCK)
        assert snapshot[span] == (block_of(index, frozen[index]) if frozen[index] else bytes(BLOCK))
        number = more.acknowledged[index]
        assert live[span] == (block_of(index, number) if number else bytes(BLOCK))


def test_a_killed_daemon_has_what_fsync_acknowledged(hot):
    with Load(make_volume(hot)) as load:
        wait_for(lambda: counts(hot)["writes"] > 500)
        synced = list(load.acknowledged)
        os.fsync(load.fd)
        time.sleep(0.2)
        hot.kill()
    hot.take_down()
    hot.start("data_plane=native")
    live = (hot / "vol").read_bytes()
    for index in range(BLOCKS):
        found = live[index * BLOCK : (index + 1) * BLOCK]
        possible = [block_of(index, number) for number in range(synced[index], load.begun[index] + 1)]
        assert found in possible or (not synced[index] and found == bytes(BLOCK)), f"block {index}"


def test_synced_writes_go_past_python_and_survive_a_kill(hot):
    """Of several writers at once; and the kernel asks nothing else around a write."""
    path = make_volume(hot)
    fds = [os.open(path, os.O_RDWR | os.O_DIRECT) for _ in range(WORKERS)]
    acknowledged = [0] * WORKERS
    stopping = threading.Event()

    def run(worker: int) -> None:
        with contextlib.suppress(OSError):
            while not stopping.is_set():
                number = acknowledged[worker] + 1
                os.pwritev(fds[worker], [aligned(block_of(worker, number))], worker * BLOCK)
                os.fdatasync(fds[worker])
                acknowledged[worker] = number

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(WORKERS)]
    for thread in threads:
        thread.start()
    wait_for(lambda: sum(acknowledged) > 400)
    found = counts(hot)
    asked = sum(timed(hot, operation) for operation in ("getattr", "getxattr"))
    synced = list(acknowledged)
    hot.kill()
    stopping.set()
    for thread in threads:
        thread.join()
    for fd in fds:
        with contextlib.suppress(OSError):  # there is nobody left to answer
            os.close(fd)
    assert found["syncs"] > 300, found
    # Of a file's times the kernel tells at each tick of its clock in which there was a write.
    assert asked < 100, (asked, found)
    hot.take_down()
    hot.start("data_plane=native")
    live = (hot / "vol").read_bytes()
    for worker in range(WORKERS):
        number = int(live[worker * BLOCK + 9 : worker * BLOCK + 21])
        assert synced[worker] <= acknowledged[worker] <= number <= acknowledged[worker] + 1


def test_times_and_sizes_are_what_fsync_promised(hot):
    """Attributes that native threads answered are in the pool, too."""
    path = make_volume(hot)
    with path.open("r+b") as file:
        for number in range(50):
            file.seek(number * 5 * BLOCK)
            file.write(block_of(number, 1))
            file.flush()
            os.fsync(file.fileno())
    before = path.stat()
    assert before.st_blocks * 512 == 50 * BLOCK
    hot.kill()
    hot.take_down()
    hot.start("data_plane=native")
    after = path.stat()
    assert (after.st_size, after.st_blocks, after.st_mtime_ns) == (before.st_size, before.st_blocks, before.st_mtime_ns)


def test_a_signal_under_load_refuses_no_request(hot):
    """The daemon serves until nobody uses the mount any more, and ends then with everything on disk."""
    hot.expected_log = ["in use", "busy"]
    with Load(make_volume(hot)) as load:
        wait_for(lambda: counts(hot)["writes"] > 500)
        hot.process.terminate()
        before = counts(hot)["writes"]
        wait_for(lambda: counts(hot)["writes"] > before + 500)
    assert load.errors == []
    hot.process.wait(END_TIMEOUT_S)
    hot.process = None
    hot.take_down()
    hot.start("data_plane=native")
    live = (hot / "vol").read_bytes()
    for index in range(BLOCKS):
        found = live[index * BLOCK : (index + 1) * BLOCK]
        possible = [block_of(index, number) for number in range(load.acknowledged[index], load.begun[index] + 1)]
        assert found in possible or (not load.acknowledged[index] and found == bytes(BLOCK)), f"block {index}"


def test_truncation_under_load(hot):
    """What lay behind a shrunk end is gone, whoever wrote there."""
    path = make_volume(hot)
    half = BLOCKS // 2 * BLOCK
    with Load(path) as load:
        wait_for(lambda: counts(hot)["writes"] > 300)
    assert load.errors == []
    os.truncate(path, half)
    os.truncate(path, 2 * half)
    assert path.read_bytes()[half:] == bytes(half)


@pytest.mark.parametrize(("threads", "parts"), [(2, 2), (1, 1)])
def test_a_large_request_is_shared_between_the_hot_threads(tmp_path, threads, parts):
    with mounted_pool(tmp_path, f"data_plane=native,threads={threads}") as pool:
        content = aligned(os.urandom(1 << 20))
        fd = os.open(pool / "v", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        try:
            os.write(fd, content)  # loads the pages
            before = counts(pool)
            os.pwrite(fd, content, 0)
            found = aligned(bytes(1 << 20))
            os.preadv(fd, [found], 0)
            after = counts(pool)
        finally:
            os.close(fd)
        assert bytes(found) == bytes(content)
        assert sum(after[kind] - before[kind] for kind in ("writes", "handed_writes")) == parts


def test_no_threads_at_all(tmp_path):
    with mounted_pool(tmp_path, "data_plane=native,threads=0") as pool:
        (pool / "vol").write_bytes(b"x" * 10000)
        assert (pool / "vol").read_bytes() == b"x" * 10000
        assert counts(pool) == {}


def test_hot_reads_may_begin_anywhere(tmp_path):
    """Without the kernel's cache a request is what the caller asks for."""
    data = os.urandom(64 * BLOCK)
    with mounted_pool(tmp_path, "data_plane=native,threads=3,cache=none") as pool:
        fd = os.open(pool / "vol", os.O_RDWR | os.O_CREAT)
        os.truncate(fd, len(data))
        for start in range(0, len(data), BLOCK):
            assert os.pwrite(fd, data[start : start + BLOCK], start) == BLOCK
        before = counts(pool)
        for start, length in ((0, 1), (1, 10), (BLOCK - 1, 2), (5 * BLOCK + 7, 3 * BLOCK), (len(data) - 3, 10)):
            assert os.pread(fd, length, start) == data[start : start + length]
        after = counts(pool)
        os.close(fd)
    assert before["writes"] > before["handed_writes"], before
    assert after["reads"] - before["reads"] == 5, after
