"""What the native data plane does for its own threads, without a mount: only what the control plane allows."""

import os
import resource
import threading
from typing import Any

import pytest

from incfs.dataplane import LeaseExhausted
from incfs.errors import IncfsError
from incfs.model import Facts, StorageId

nativeplane = pytest.importorskip("incfs.nativeplane", reason="the C data plane was not built")
from tests.support.served import Served  # noqa: E402
from tests.unit.test_planes import BLOCK, TABLES, make_images  # noqa: E402

FACTS = Facts(0o600, 0, 0, 1, 0, 0, 0, 0)


@pytest.fixture
def native(pool_home):
    """A native plane with a page and a lease of the first table, which is served."""
    images = make_images(pool_home)
    plane = nativeplane.NativePlane(BLOCK, images)
    plane.load(TABLES[0], 0, {})
    plane.grant(TABLES[0], (1 << 48) + 1, 10)
    plane.serve(TABLES[0], 4 * BLOCK, FACTS, is_writable=True)
    plane.images = images
    yield plane
    for image in images.values():
        image.file.close()


def redirect(plane: Any, path: str) -> None:
    target = os.open(path, os.O_RDWR)
    os.dup2(target, plane.images[StorageId(1)].file.fileno())
    os.close(target)


def test_only_what_is_allowed_is_served(native):
    served = Served(native)
    assert served.write(TABLES[0], BLOCK, b"a" * BLOCK)
    assert served.read(TABLES[0], BLOCK + 3, 10) == b"a" * 10
    # Behind the end it may not be written, and nothing is read.
    assert not served.write(TABLES[0], 3 * BLOCK, b"a" * 2 * BLOCK)
    assert served.read(TABLES[0], 4 * BLOCK, BLOCK) == b""
    assert served.read(TABLES[0], 3 * BLOCK, 2 * BLOCK) == bytes(BLOCK)
    assert served.read(TABLES[1], 0, BLOCK) is None
    native.serve(TABLES[0], 4 * BLOCK, FACTS, is_writable=False)
    assert not served.write(TABLES[0], 0, b"b" * BLOCK)
    native.serve(TABLES[0], 4 * BLOCK, FACTS, is_writable=True)
    native.unserve(TABLES[0])
    assert not served.write(TABLES[0], 0, b"b" * BLOCK)
    assert served.read(TABLES[0], BLOCK, BLOCK) is None
    native.serve(TABLES[0], 4 * BLOCK, FACTS, is_writable=True)
    native.freeze()
    assert not served.write(TABLES[0], 0, b"b" * BLOCK)
    assert served.read(TABLES[0], 0, 2 * BLOCK) == bytes(BLOCK) + b"a" * BLOCK


def test_a_served_write_that_fails_is_told_and_not_tried_again(native, tmp_path):
    """The caller asks Python next; that must not hide the failure by a write that works (I10)."""
    served = Served(native)
    path = native.images[StorageId(1)].file.path
    read_only = os.open(path, os.O_RDONLY)
    os.dup2(read_only, native.images[StorageId(1)].file.fileno())
    os.close(read_only)
    assert not served.write(TABLES[0], 0, b"a" * BLOCK)
    redirect(native, path)
    assert not served.write(TABLES[0], 0, b"a" * BLOCK)
    with pytest.raises(IncfsError):
        native.write(TABLES[0], 0, b"a" * BLOCK)


def test_a_served_write_without_room_harms_nothing(native):
    served = Served(native)
    path = native.images[StorageId(1)].file.path
    redirect(native, "/dev/full")
    assert not served.write(TABLES[0], 0, b"a" * BLOCK)
    redirect(native, path)
    assert served.write(TABLES[0], 0, b"a" * BLOCK)
    assert served.read(TABLES[0], 0, BLOCK) == b"a" * BLOCK


def test_a_served_write_to_a_file_that_may_be_no_longer_harms_nothing(native):
    served = Served(native)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK, before[1]))
    try:
        assert not served.write(TABLES[0], 0, b"a" * BLOCK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert served.write(TABLES[0], 0, b"a" * BLOCK)


def test_served_writes_keep_zeros_where_the_rules_say_so(native):
    served = Served(native)
    assert served.write(TABLES[0], 0, bytes(2 * BLOCK))
    assert native.mapped_delta(TABLES[0]) == 0
    native.serve(TABLES[0], 4 * BLOCK, FACTS, is_writable=True, keep_zeros=True)
    assert served.write(TABLES[0], 0, bytes(2 * BLOCK))
    assert served.write(TABLES[0], 2 * BLOCK + 1, bytes(BLOCK))
    assert native.mapped_delta(TABLES[0]) == 4
    assert served.read(TABLES[0], 0, 4 * BLOCK) == bytes(4 * BLOCK)


def test_served_reads_compare_unless_the_rules_say_otherwise(native):
    served = Served(native)
    assert served.write(TABLES[0], 0, b"a" * BLOCK)
    native.images[StorageId(1)].write_blocks(1, b"b" * BLOCK)
    assert served.read(TABLES[0], 0, BLOCK) is None
    native.serve(TABLES[0], 4 * BLOCK, FACTS, is_writable=True, verify=False)
    assert served.read(TABLES[0], 0, BLOCK) == b"b" * BLOCK
    native.serve(TABLES[0], 4 * BLOCK, FACTS, is_writable=True)
    assert served.read(TABLES[0], 0, BLOCK) is None


def test_a_read_that_does_not_verify_never_sees_who_got_the_block_next(native):
    """The checksum also showed that a block was not reused while it was read; without it a seal does."""
    served, seen, last = Served(native), set(), 511
    native.serve(TABLES[0], 512 * BLOCK, FACTS, is_writable=True, verify=False)
    for block in range(1, 1024, 2):  # apart, so that a read of all takes long between its look at the map and the last
        native.grant(TABLES[0], (1 << 48) + 100 + block, 1)
    native.write(TABLES[0], 0, b"a" * 512 * BLOCK)
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            seen.add((served.read(TABLES[0], 0, 512 * BLOCK) or b"refused")[last * BLOCK :])

    reader = threading.Thread(target=read)
    reader.start()
    spare, used = 2000, 2002
    for number in range(20_000):
        native.seal()
        native.revoke()
        native.grant(TABLES[0], (1 << 48) + spare, 1)
        native.write(TABLES[0], last * BLOCK, (b"a", b"b")[number % 2] * BLOCK)
        native.seal()  # what was replaced may be somebody else's from now on, and is at once
        spare, used = used, spare
        native.images[StorageId(1)].write_blocks(spare, b"?" * BLOCK)
    ended.set()
    reader.join()
    assert seen <= {b"a" * BLOCK, b"b" * BLOCK}


def test_writers_of_parts_of_one_block_lose_nothing(native):
    """Each writes its own bytes of the same two blocks, and finds them as it left them, whatever the others write."""
    writers, turns, part = 4, 20_000, 2 * BLOCK // 4
    native.grant(TABLES[0], (1 << 48) + 100, 500)
    lost: list[tuple[int, int]] = []
    begin = threading.Barrier(writers)

    def write(number: int) -> None:
        begin.wait()
        for turn in range(turns):
            data = bytes([turn % 250 + 1]) * part
            while not native.write_served(TABLES[0], number * part, data):
                pass
            found = native.read(TABLES[0], 0, 2, wait=True)[number * part : (number + 1) * part]
            if found != data:
                lost.append((number, turn))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not lost
    assert native.fresh_count == 2
    assert native.leased_blocks(TABLES[0]) == 508, "blocks that were given up are there again"


def test_a_write_of_a_lease_that_was_taken_back_is_done_anew(native):
    """Beside writers, leases are taken back and given: whatever a write took is mapped, leased or dropped, once."""
    served = {block for run in [((1 << 48) + 1, 10)] for block in range(run[0], run[0] + run[1])}
    is_over = threading.Event()

    def write() -> None:
        while not is_over.is_set():
            try:
                native.write_served(TABLES[0], BLOCK // 2, b"w" * 2 * BLOCK)
            except LeaseExhausted:
                continue

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    free: list[int] = []
    for _ in range(300):
        free += native.revoke(TABLES[0])
        free += native.seal().dropped
        while free:
            native.grant(TABLES[0], free.pop(), 1)
    is_over.set()
    for thread in threads:
        thread.join()
    free += native.revoke(TABLES[0])
    batch = native.seal()
    state = native.inspect()
    mapped = [address for address, _ in state.pages[TABLES[0], 0][0].values() if address > 1]
    assert len(set(free + batch.dropped)) == len(free + batch.dropped)
    assert not set(mapped) & set(free + batch.dropped)
    assert {*free, *batch.dropped, *mapped} <= served
