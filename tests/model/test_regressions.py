"""Bugs that the state machine, the power cuts or a reading found, each as its shortest story."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from incfs import extents, ranges, stripes
from incfs import volume as volumes
from incfs.backing import Backing, File
from incfs.errors import BackingError, IncfsError, NoSpace, PoolReadOnly
from incfs.model import HOLE
from incfs.store import Store
from incfs.tables import Tables
from tests.support import pools
from tests.support.faults import Fault, FaultyBacking
from tests.support.media import MemoryBacking
from tests.support.recorder import make_media

BLOCK = pools.BLOCK


class FailingBacking(Backing):
    """Fails writes to images once ``error`` is set, after ``good_writes`` more of them."""

    def __init__(self) -> None:
        self.error: IncfsError | None = None
        self.good_writes = 0

    def _open(self, path: Path, flags: int) -> File:
        backing = self

        class FailingFile(File):
            def pwrite(self, offset_bytes: int, data: bytes | memoryview) -> None:
                if backing.error is not None and self.path.suffix == ".img":
                    if not backing.good_writes:
                        raise backing.error
                    backing.good_writes -= 1
                super().pwrite(offset_bytes, data)

        plain = super()._open(path, flags)
        return FailingFile(path, plain.fileno())


def test_growth_in_steps_smaller_than_a_write_ends(pool_home: Path) -> None:
    """Each ask for a lease forgot what the table had been given before: the image grew for ever."""
    with pools.open_tiny(pools.make_pool(pool_home), pools.tiny_options(extend_bytes=320)) as store:
        volume = pools.new_volume(store, "a")
        pools.write(store, volume.map_id, 0, b"x" * 1500)
        assert store.pool.used_blocks() == 0
        assert sum(s.grown_blocks for s in store.pool.volumes.values()) <= 30


def test_free_blocks_in_two_lots_are_enough(pool_home: Path) -> None:
    """5 blocks free at once and 4 freed by a checkpoint did not serve a write of 8: ENOSPC."""
    with pools.open_tiny(pools.make_pool(pool_home, capacity_bytes=20 * 64)) as store:
        volume = pools.new_volume(store, "a")
        pools.write(store, volume.map_id, 0, b"x" * 15 * 64)
        store.commit()
        pools.discard(store, volume.map_id, 0, 4 * 64)
        store.commit()
        pools.write(store, volume.map_id, 20 * 64, b"y" * 8 * 64)
        pools.check_clean(store)


def test_blocks_replaced_since_the_last_seal_count_as_space(pool_home: Path) -> None:
    """Making space did not look at writes that were not sealed: ENOSPC in a pool with room."""
    with pools.open_tiny(pools.make_pool(pool_home, capacity_bytes=20 * 64)) as store:
        volume = pools.new_volume(store, "a")
        for fill in (b"x", b"y", b"z"):
            pools.write(store, volume.map_id, 0, fill * 10 * 64)
            if fill == b"x":
                store.absorb()
        pools.write(store, volume.map_id, 20 * 64, b"w" * 10 * 64)
        assert pools.read(store, volume.map_id, 0, 640) == b"z" * 640
        pools.check_clean(store)


def test_a_snapshot_taken_before_a_shrink_was_trimmed_has_no_extent_behind_its_end(pool_home: Path) -> None:
    """Mappings behind the size gave extents beyond it and of negative length."""
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume = pools.new_volume(store, "a")
        pools.write(store, volume.map_id, 640, b"x" * 640)
        volumes.resize(store, volume.id, 100, shrink=True)
        (taken,) = pools.take_snapshots(store, [(volume.id, "s")])
        ranges.finish_trim(store, volume.id)
        for table in (volume.map_id, taken.map_id):
            assert [(e.offset_bytes, e.length_bytes) for e in extents.extents(store, table)] == [(0, 100)]


def test_the_id_of_a_removed_volume_is_not_given_out_again(pool_home: Path) -> None:
    """The highest id was taken from the records, which forget a removed volume."""
    pool = pools.make_pool(pool_home)
    with pools.open_tiny(pool) as store:
        first = pools.new_volume(store, "a").id
        volumes.remove(store, first, snapshots=False)
        pools.reclaim(store)
    with pools.open_tiny(pool) as store:
        assert pools.new_volume(store, "b").id > first


def test_a_volume_that_is_half_reclaimed_checks_clean(pool_home: Path) -> None:
    """Its counter of mapped blocks was compared with what reclaiming had left."""
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume = pools.new_volume(store, "a")
        for page in range(3):
            pools.write(store, volume.map_id, page * 32_768, b"x" * 64)
        store.commit()
        volumes.remove(store, volume.id, snapshots=False)
        assert not volumes.reclaim(store, volume.id, 1)
        pools.check_clean(store)


def test_a_failed_write_of_a_partial_discard_makes_the_pool_read_only(pool_home: Path) -> None:
    """Only failures of plain writes did (I10)."""
    backing = FailingBacking()
    store = pools.open_tiny(pools.make_pool(pool_home), backing=backing)
    volume = pools.new_volume(store, "a")
    pools.write(store, volume.map_id, 0, b"x" * 64)
    backing.error = BackingError("the disk is gone")
    with pytest.raises(BackingError):
        pools.discard(store, volume.map_id, 0, 10)
    with pytest.raises(PoolReadOnly):
        pools.write(store, volume.map_id, 0, b"y")
    store.abandon()


def test_what_a_failed_write_left_behind_the_end_does_not_come_to_light(pool_home: Path) -> None:
    """A write cut short by a full host had mapped blocks behind the size; growing showed them."""
    backing = FailingBacking()
    with pools.open_tiny(pools.make_pool(pool_home, storages=2, capacity_bytes=16 * 64), backing=backing) as store:
        volume = pools.new_volume(store, "a")
        backing.error, backing.good_writes = NoSpace("the host is full"), 1
        with pytest.raises(NoSpace):
            pools.write(store, volume.map_id, 0, b"x" * 10 * 64)
        backing.error = None
        stored = [e for e in extents.extents(store, volume.map_id) if e.address > HOLE]
        last = max((e.offset_bytes + e.length_bytes for e in stored), default=0)
        assert 0 < last <= store.catalog.volume(volume.id).size_bytes
        pools.write(store, volume.map_id, 0, b"y" * 4 * 64)
        pools.check_clean(store)


def test_a_checkpoint_without_host_space_may_be_tried_again(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second try, and closing, ended in an assertion: one checkpoint at a time."""
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume = pools.new_volume(store, "a")
        pools.write(store, volume.map_id, 0, b"x" * 640)
        with monkeypatch.context() as patched:
            patched.setattr(Tables, "reserve", _no_space)  # what was set aside is not enough
            with pytest.raises(NoSpace):
                store.checkpoint()
            assert store.failure is None
        pools.write(store, volume.map_id, 64, b"y" * 64)
        pools.check_clean(store)


def test_a_commit_after_one_that_failed_is_refused(pool_home: Path) -> None:
    """It ended in an assertion: one commit at a time."""
    with _failing_once(pool_home, Fault("write", 1, errno.EIO)) as store:
        with pytest.raises(BackingError):
            store.commit()
        with pytest.raises(PoolReadOnly):
            store.commit()


def test_a_checkpoint_that_failed_is_not_folded_by_the_next(pool_home: Path) -> None:
    """The tables then named a journal segment that had never been started: the pool could not be opened."""
    with _failing_once(pool_home, Fault("write", 3, errno.EIO)) as store:
        with pytest.raises(BackingError):
            store.checkpoint()
        with pytest.raises(PoolReadOnly):
            store.checkpoint()
        media = store.backing.media()  # type: ignore[attr-defined]
    backing = MemoryBacking(pool_home)
    backing.load(media)
    pools.open_tiny(pool_home / "pool", backing=backing).close()


@contextlib.contextmanager
def _failing_once(home: Path, fault: Fault) -> Iterator[Store]:
    """Give a pool with something to commit, where one operation will fail: block, record, acknowledgement, segment."""
    backing = FaultyBacking(home)
    backing.load(make_media(home))
    store = pools.open_tiny(home / "pool", backing=backing)
    backing.arm(fault)
    pools.write(store, pools.new_volume(store, "a").map_id, 0, b"x" * 64)
    yield store
    store.abandon()


def _no_space(*_: object, **__: object) -> None:
    raise NoSpace("the host is full")


def test_shrinking_to_a_part_of_a_block_works_in_a_full_pool(pool_home: Path) -> None:
    """The last block was rewritten before those behind it were dropped: ENOSPC, and a trim that never ended."""
    with pools.open_tiny(pools.make_pool(pool_home, capacity_bytes=20 * 64)) as store:
        volume = pools.new_volume(store, "a")
        pools.write(store, volume.map_id, 0, b"x" * 20 * 64)
        store.commit()
        ranges.drive(store, lambda _: volumes.resize(store, volume.id, 10 * 64 + 7, shrink=True))
        ranges.finish_trim(store, volume.id)
        assert store.catalog.volume(volume.id).trim_from_bytes is None
        ranges.drive(store, lambda _: volumes.resize(store, volume.id, 12 * 64, shrink=False))
        assert pools.read(store, volume.map_id, 0, 12 * 64) == b"x" * (10 * 64 + 7) + bytes(57 + 64)
        pools.check_clean(store)


@pytest.mark.timeout(30)
def test_a_write_over_two_columns_of_a_full_pool_ends(pool_home: Path) -> None:
    """Each column in turn took back the blocks that the other one had just been given, for ever."""
    pool = pools.make_pool(pool_home, capacity_bytes=200 * BLOCK, storages=2)
    with pools.open_tiny(pool) as store:
        volume = pools.new_volume(store, "v")
        stripes.set_count(store, volume.id, 2, unit_bytes=BLOCK)
        for first in range(0, 200, 40):
            pools.write(store, volume.map_id, first * BLOCK, os.urandom(40 * BLOCK))
        with pytest.raises(NoSpace):
            pools.write(store, volume.map_id, 200 * BLOCK, os.urandom(40 * BLOCK))
        pools.discard(store, volume.map_id, 0, 30 * BLOCK)
        store.checkpoint()
        with pytest.raises(NoSpace):
            pools.write(store, volume.map_id, 0, os.urandom(40 * BLOCK))
        pools.write(store, volume.map_id, 0, os.urandom(30 * BLOCK))
        pools.check_clean(store)
