"""The journal's fast lane: what fsync commits past Python is what Python would have committed."""

import ctypes
import errno
import os

import pytest

pytest.importorskip("incfs._dataplane")

from contextlib import contextmanager
from dataclasses import replace

from incfs import copymaker, ranges, rollback, snapshot, volume
from incfs.backing import Backing
from incfs.changes import decode_body, map_runs
from incfs.dataplane import LeaseExhausted
from incfs.errors import BackingError, MetadataFull, PoolReadOnly
from incfs.roster import read_roster
from tests.support import pools
from tests.support.served import Served

BLOCK = pools.BLOCK
LEASE_BLOCKS = 2000
OPTIONS = replace(pools.tiny_options(small_commit_bytes=8192), data_plane="native")


@pytest.fixture
def pool(tmp_path):
    return pools.make_pool(tmp_path)


def opened(pool, plane="native"):
    store = pools.open_tiny(pool, replace(OPTIONS, data_plane=plane))
    store.watch()
    return store


def new_volumes(store, *names, size_bytes=1000 * BLOCK):
    """Volumes that the data plane may serve, with leases, and nothing left to commit."""
    tables = [pools.new_volume(store, name, size_bytes).map_id for name in names]
    for table in tables:
        fill(store, table, 0, bytes(BLOCK))
        lease(store, table)
    store.commit()
    for table in tables:
        store.serve(table)
    store.lend_journal()
    return tables


def lease(store, table):
    def need(_wait):
        if store.plane.leased_blocks(table) < LEASE_BLOCKS:
            raise LeaseExhausted(table, LEASE_BLOCKS)

    ranges.drive(store, need)


def fill(store, table, first_block, data):
    """Write as a hot thread does: no record is touched."""
    ranges.drive(store, lambda wait: store.plane.write(table, first_block * BLOCK, data, wait=wait))


def crash(store, plane="native"):
    store.abandon()
    return opened(store.directory, plane)


@pytest.mark.parametrize("plane", ["native", "python"])
def test_what_was_synced_survives(pool, plane):
    store = opened(pool)
    first, second = new_volumes(store, "first", "second")
    data = os.urandom(3 * BLOCK)
    fill(store, first, 510, data)  # two pages
    fill(store, second, 7, data[:BLOCK])
    fill(store, second, 9, data[BLOCK:])
    store.plane.discard(first, 511, 1)
    assert store.plane._sync(second)
    store = crash(store, plane)
    expected = data[:BLOCK] + bytes(BLOCK) + data[2 * BLOCK :]
    assert pools.read(store, first, 510 * BLOCK, 3 * BLOCK) == expected
    assert pools.read(store, second, 7 * BLOCK, 4 * BLOCK) == data[:BLOCK] + bytes(BLOCK) + data[BLOCK:]
    pools.check_clean(store)
    store.abandon()


def test_its_records_say_what_pythons_say(pool):
    store = opened(pool)
    (table,) = new_volumes(store, "v")
    bodies = []
    for commit in (lambda: store.plane._sync(table), store.commit):
        fill(store, table, 5, b"x" * BLOCK * 4)
        fill(store, table, 600, b"y" * BLOCK)
        commit()
        bodies.append(decode_body(list(store.journal.records())[-1].body))
    for body in bodies:
        (change,) = [change for change in body.changes if change[0] == "map"]
        runs = [(run.first_block, run.block_count) for run in map_runs(change[2])]
        assert change[1] == table >> 32
        assert runs == [(5, 4), (600, 1)]
        assert body.data == b"x" * BLOCK * 4 + b"y" * BLOCK
    assert bodies[0].folded_sequence == bodies[1].folded_sequence
    store.abandon()


def test_commits_of_both_kinds_follow_one_another(pool):
    store = opened(pool)
    (table,) = new_volumes(store, "v")
    for number in range(40):
        fill(store, table, number, bytes([number + 1]) * BLOCK)
        if number % 3:
            store.lend_journal()
            assert store.plane._sync(table)
        elif number % 9:
            store.commit()
        else:
            store.checkpoint()
    assert [record.sequence for record in store.journal.records()] == [39, 40, 41]  # since the last checkpoint
    store = crash(store)
    expected = b"".join(bytes([number + 1]) * BLOCK for number in range(40))
    assert pools.read(store, table, 0, 40 * BLOCK) == expected
    pools.check_clean(store)
    store.abandon()


def test_nothing_overtakes_a_change_that_waits(pool):
    store = opened(pool)
    (table,) = new_volumes(store, "v")
    fill(store, table, 0, b"1" * BLOCK)
    snapshot.create(store, [(store.catalog.volume_named("v").id, "s")])
    store.lend_journal()
    fill(store, table, 0, b"2" * BLOCK)
    assert not store.plane._sync(table), "the snapshot is not committed yet"
    store.commit()
    store.lend_journal()
    fill(store, table, 0, b"3" * BLOCK)
    assert store.plane._sync(table)
    store = crash(store)
    (taken,) = store.catalog.snapshots(store.catalog.volume_named("v").id)
    assert pools.read(store, taken.map_id, 0, BLOCK) == b"1" * BLOCK
    assert pools.read(store, table, 0, BLOCK) == b"3" * BLOCK
    pools.check_clean(store)
    store.abandon()


def test_nothing_overtakes_a_page_that_a_rollback_unrolls(pool):
    """The page is loaded, without any change of records: what is written to it would be unrolled after a crash."""
    store = opened(pool)
    (table,) = new_volumes(store, "v")
    volume_id = store.catalog.volume_named("v").id
    fill(store, table, 0, b"1" * BLOCK)
    snapshot.create(store, [(volume_id, "s")])
    fill(store, table, 0, b"2" * BLOCK)
    store.commit()
    rollback.roll_back(store, volume_id, "s")
    lease(store, table)
    store.commit()
    store.lend_journal()
    fill(store, table, 0, b"3" * BLOCK)
    if not store.plane._sync(table):
        store.commit()
    store = crash(store)
    assert pools.read(store, table, 0, BLOCK) == b"3" * BLOCK
    pools.check_clean(store)
    store.abandon()


def test_a_page_evicted_after_its_sync_is_loaded_as_it_was(pool):
    """The log had not heard of the commit yet, so the page came back with the mappings before it."""
    store = opened(pool)
    (table,) = new_volumes(store, "v")
    fill(store, table, 0, b"1" * BLOCK)
    assert store.plane._sync(table)
    store.plane.shrink(0)  # the first time round it only looks whether a page was used
    assert store.plane.shrink(0)
    assert pools.read(store, table, 0, BLOCK) == b"1" * BLOCK
    store.abandon()


def test_a_touched_volume_is_left_to_python(pool):
    store = opened(pool)
    (table,) = new_volumes(store, "v")
    volume.set_attributes(store, store.catalog.volume_named("v").id, mode=0o640)
    assert not store.plane._sync(table)
    store.commit()
    store.lend_journal()
    assert store.plane._sync(table)
    store.abandon()


def test_large_commits_are_left_to_python(pool):
    store = opened(pool)
    (table,) = new_volumes(store, "v")
    most = OPTIONS.small_commit_bytes // BLOCK
    fill(store, table, 0, os.urandom((most + 1) * BLOCK))
    assert not store.plane._sync(table)
    assert store.plane.fresh_count == most + 1, "it was sealed in passing"
    store.commit()
    store.lend_journal()
    fill(store, table, 0, os.urandom(BLOCK))
    assert store.plane._sync(table)
    store.abandon()


def test_a_full_segment_is_left_to_python(pool):
    store = opened(pool)
    (table,) = new_volumes(store, "v")
    synced = 0
    while True:
        fill(store, table, synced % 500, os.urandom(BLOCK))
        if not store.plane._sync(table):
            break
        synced += 1
    assert store.journal.used_bytes * 2 >= store.superblock.journal_bytes
    store.commit()
    assert store.wants_checkpoint
    store.checkpoint()
    store.lend_journal()
    fill(store, table, 0, b"a" * BLOCK)
    assert store.plane._sync(table)
    store = crash(store)
    assert pools.read(store, table, 0, BLOCK) == b"a" * BLOCK
    store.abandon()


def test_records_made_while_a_checkpoint_ends_say_what_the_tables_contain(pool):
    """Without that, tables from before the checkpoint would be taken for those that go with the record."""
    store = opened(pool)
    (table,) = new_volumes(store, "v")
    checkpoint = store.begin_checkpoint(7)
    checkpoint.run_commit()
    store.end_checkpoint_commit(checkpoint)
    store.lend_journal()
    folded = []
    for number in range(2):
        fill(store, table, number, b"x" * BLOCK)
        assert store.plane._sync(table)
        folded.append(decode_body(list(store.journal.records())[-1].body).folded_sequence)
        if not number:
            checkpoint.run_fold()
            store.end_checkpoint(checkpoint)
    assert folded[0] < folded[1] == checkpoint.sequence
    store.abandon()


def test_a_failed_flush_is_told_and_the_pool_becomes_read_only(pool):
    """I10: nobody hears "durable", nothing is tried again.  The device takes the record, and refuses to flush it."""
    store = opened(pool)
    (table,) = new_volumes(store, "v")
    fill(store, table, 0, b"1" * BLOCK)
    assert store.plane._sync(table)
    full = os.open("/dev/null", os.O_RDWR)
    lent = store.journal._file(store.journal.segment.number)
    saved = os.dup(lent.fileno())
    os.dup2(full, lent.fileno())
    try:
        fill(store, table, 0, b"2" * BLOCK)
        with pytest.raises(BackingError, match="journal"):
            store.plane._sync(table)
        assert not store.plane._sync(table), "the next one is the control plane's to refuse"
        assert not Served(store.plane).write(table, 0, b"3" * BLOCK), "hot threads write no more"
        with pytest.raises(BackingError, match="journal"):
            store.commit()  # of an fsync through Python, before anybody has told of the failure
        assert store.failure is not None
        assert store.durable_sequence == store.sequence - 1
        with pytest.raises(PoolReadOnly):
            store.commit()
    finally:
        os.dup2(saved, lent.fileno())
        os.close(saved)
        os.close(full)
    store = crash(store)
    assert pools.read(store, table, 0, BLOCK) == b"1" * BLOCK
    store.abandon()


@contextmanager
def full_disks(fds):
    """Let files be on a full disk; all of them must have been empty of what is written meanwhile."""
    saved = [os.dup(fd) for fd in fds]
    full = os.open("/dev/full", os.O_RDWR)
    for fd in fds:
        os.dup2(full, fd)
    try:
        yield
    finally:
        for fd, before in zip(fds, saved, strict=True):
            os.dup2(before, fd)
            os.close(before)
        os.close(full)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_record_without_room_is_kept_and_written_before_any_other(pool, copies):
    """It made the pool read-only until it was mounted again."""
    store = opened_with_two_copies(pool) if copies == 2 else opened(pool)
    (table,) = new_volumes(store, "v")
    with full_disks(list(store.journal._file(store.journal.segment.number).filenos().values())):
        fill(store, table, 0, b"2" * BLOCK)
        assert not store.plane._sync(table), "nobody hears durable"
        store.plane.reopen()
        fill(store, table, 3, b"6" * BLOCK)
        assert not store.plane._sync(table), "nothing is begun behind it"
        for _ in range(2):
            with pytest.raises(MetadataFull, match="journal"):
                store.commit()  # of the same fsync, through Python
        assert store.failure is None
        store.catch_up()
        assert store.durable_sequence == store.sequence - 2, "the lane's, and the next"
        with pytest.raises(MetadataFull):
            pools.write(store, table, 0, b"3" * BLOCK)
        assert pools.read(store, table, 0, BLOCK) == b"2" * BLOCK
        store.lend_journal()
        fill(store, table, 1, b"4" * BLOCK)  # of a write that was on its way
        assert not store.plane._sync(table), "no record overtakes it"
    store.commit()
    assert store.durable_sequence == store.sequence
    assert store.copies.current == list(range(1, copies + 1))
    store.lend_journal()
    fill(store, table, 2, b"5" * BLOCK)
    assert store.plane._sync(table), "it goes on"
    store = crash(store)
    assert pools.read(store, table, 0, 4 * BLOCK) == b"".join(byte * BLOCK for byte in (b"2", b"4", b"5", b"6"))
    pools.check_clean(store)
    store.abandon()


def test_a_record_without_room_is_lost_with_the_power_and_nothing_else(pool):
    store = opened(pool)
    (table,) = new_volumes(store, "v")
    fill(store, table, 0, b"1" * BLOCK)
    assert store.plane._sync(table)
    with full_disks([store.journal._file(store.journal.segment.number).fileno()]):
        fill(store, table, 0, b"2" * BLOCK)
        assert not store.plane._sync(table)
    store = crash(store)
    assert pools.read(store, table, 0, BLOCK) == b"1" * BLOCK
    pools.check_clean(store)
    store.abandon()


def test_tests_may_stand_between_a_record_and_its_disk(pool):
    """What the gremlin hangs on: each write and flush of a commit goes through what was put in their place."""
    store = opened(pool)
    (table,) = new_volumes(store, "v")
    seen = []

    def write(fd, data, length, offset):
        seen.append(ctypes.string_at(data, 4))
        return 0 if os.pwrite(fd, ctypes.string_at(data, length), offset) == length else errno.EIO

    def flush(fd):
        os.fdatasync(fd)
        seen.append(b"flush")
        return errno.EIO if len(seen) > 3 else 0

    write = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64)(write)
    flush = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(flush)
    store.plane._divert(*(ctypes.cast(call, ctypes.c_void_p).value for call in (write, flush)))
    fill(store, table, 0, b"1" * BLOCK)
    assert store.plane._sync(table)
    assert seen == [b"JREC", b"flush", b"JACK"]
    fill(store, table, 0, b"2" * BLOCK)
    with pytest.raises(BackingError, match="journal"):
        store.plane._sync(table)
    store.abandon()


def opened_with_two_copies(pool):
    with pools.open_tiny(pool) as store:
        copymaker.bring_back(store, copymaker.announce(store, pool.with_name("other"), force=True))
    return opened(pool)


def test_a_record_goes_to_every_copy_of_the_journal(pool):
    store = opened_with_two_copies(pool)
    (table,) = new_volumes(store, "v")
    fill(store, table, 3, b"1" * BLOCK)
    assert store.plane._sync(table)
    name = store.journal._file(store.journal.segment.number).path.name
    assert (pool / name).read_bytes() == (pool.with_name("other") / name).read_bytes()
    store.abandon()
    for directory in (pool, pool.with_name("other")):
        store = opened(directory)
        assert pools.read(store, table, 3 * BLOCK, BLOCK) == b"1" * BLOCK
        store.abandon()


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("device", ["/dev/full", "/dev/null"])
def test_a_copy_that_fails_is_left_behind_before_fsync_is_answered(pool, device, failing):
    """The lane answers nobody: whoever waits is the control plane's to answer, once the others know who lacks what."""
    store = opened_with_two_copies(pool)
    (table,) = new_volumes(store, "v")
    lent = store.journal._file(store.journal.segment.number).filenos()[failing]
    saved, full = os.dup(lent), os.open(device, os.O_RDWR)
    os.dup2(full, lent)
    try:
        fill(store, table, 0, b"2" * BLOCK)
        assert not store.plane._sync(table), "answered before it was known who was left behind"
        store.catch_up()
        assert store.durable_sequence < store.sequence, "an fsync that finds nothing pending would be answered"
        assert store.copies.current == [1, 2]
        os.dup2(saved, lent)  # it would take the next record, without having this one
        store.plane.reopen()
        fill(store, table, 2, b"4" * BLOCK)
        assert not store.plane._sync(table), "nothing is begun meanwhile"
        store.commit()
        assert store.failure is None
        assert store.copies.current == [3 - failing]
        assert store.copies.is_settled
        store.lend_journal()
        fill(store, table, 1, b"3" * BLOCK)
        assert store.plane._sync(table), "it goes on with the other"
    finally:
        os.dup2(saved, lent)
        os.close(saved)
        os.close(full)
    store.abandon()
    own = read_roster(Backing(), store.copies.directories[3 - failing])
    assert own is not None
    assert own[0].current == [3 - failing]
    store = opened(pool)
    assert pools.read(store, table, 0, 2 * BLOCK) == b"2" * BLOCK + b"3" * BLOCK
    pools.check_clean(store)
    store.abandon()


def test_when_every_copy_fails_the_pool_is_read_only(pool):
    store = opened_with_two_copies(pool)
    (table,) = new_volumes(store, "v")
    lent = store.journal._file(store.journal.segment.number).filenos()
    full = os.open("/dev/null", os.O_RDWR)
    for fd in lent.values():
        os.dup2(full, fd)
    fill(store, table, 0, b"2" * BLOCK)
    with pytest.raises(BackingError, match="journal"):
        store.plane._sync(table)
    store.attend()
    assert store.failure is not None
    os.close(full)
    store.abandon()


def test_each_copy_is_written_and_flushed(pool):
    store = opened_with_two_copies(pool)
    (table,) = new_volumes(store, "v")
    seen = []

    def write(fd, data, length, offset):
        seen.append((fd, ctypes.string_at(data, 4)))
        return 0 if os.pwrite(fd, ctypes.string_at(data, length), offset) == length else errno.EIO

    def flush(fd):
        seen.append((fd, b"flush"))
        return 0

    write = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64)(write)
    flush = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(flush)
    store.plane._divert(*(ctypes.cast(call, ctypes.c_void_p).value for call in (write, flush)))
    lent = store.journal._file(store.journal.segment.number).filenos()
    fill(store, table, 0, b"1" * BLOCK)
    assert store.plane._sync(table)
    for fd in lent.values():
        assert [what for where, what in seen if where == fd] == [b"JREC", b"flush", b"JACK"]
    store.abandon()
