"""The power is cut at every write and sync while a leg of a mirror fails and is resilvered."""

from pathlib import Path

import pytest

from incfs import legs, recovery, relocation
from incfs.model import StorageId, Volume
from incfs.store import Store
from tests.crash.test_power_cut import pattern
from tests.support import pools
from tests.support.recorder import Recorder, make_media
from tests.support.simulator import Simulator

LIMIT = 64
"""States of one cut."""
MIRROR = StorageId(2)


def add_mirror(store: Store) -> None:
    """Let all new blocks come from a mirror of two legs."""
    record = recovery.make_storage(
        store,
        store.directory / "leg0.img",
        capacity_bytes=None,
        storage_class="",
        redundancy="none",
        mirrors=[store.directory / "leg1.img"],
        force=True,
    )
    with store.step():
        store.pool.attach(record)
        store.add(record)
        store.amend(store.catalog.storage(StorageId(1)), is_evacuating=True)


def resilver(store: Store) -> int:
    """Bring leg 1 up to date; give the blocks copied."""
    legs.open_leg(store, MIRROR, 1)
    legs.attach_leg(store, MIRROR, 1)
    copied = 0
    bits = dict(store.pool.volumes[MIRROR].changed)
    for table in relocation.tables(store):
        for page_index in store.log.page_indexes(table):
            lacks = legs.lacking(store, table, page_index, MIRROR, bits)
            assert not legs.copy_lacking(store, MIRROR, 1, lacks)
            copied += len(lacks)
    legs.sync_leg(store, MIRROR, 1)
    legs.finish_resilver(store, MIRROR, 1)
    return copied


def work(recorder: Recorder) -> None:
    store = recorder.store
    add_mirror(store)
    volume = pools.new_volume(store, "a")
    write(store, volume, 0, 4000)
    store.checkpoint()
    mirror = legs.mirror_of(store, MIRROR)
    assert mirror.leave(1, "a test")
    write(store, volume, 200, 500)
    pools.take_snapshots(store, [(volume.id, "s")])
    store.commit()
    recorder.checkpoint(lambda: write(store, volume, 64, 300))
    write(store, volume, 1000, 400)
    assert resilver(store) < 90
    store.commit()
    write(store, volume, 2000, 700)
    store.checkpoint()


def write(store: Store, volume: Volume, offset: int, length: int) -> None:
    pools.write(store, volume.map_id, offset, pattern(offset + length, length))
    if store._commit is None:
        store.commit()


class Scrubber(Simulator):
    """Compares the legs of what was recovered, too."""

    @staticmethod
    def _examine(store: Store) -> bytes:
        found = Simulator._examine(store)
        for table in relocation.tables(store):
            for page_index in store.log.page_indexes(table):
                scrubbed = legs.scrub_blocks(store, legs.page_blocks(store, table, page_index))
                assert not scrubbed.wrong_blocks
        return found


@pytest.mark.parametrize("small_commit_bytes", [0, 65536], ids=["flush-images", "data-in-record"])
def test_a_leg_that_counts_as_sound_has_everything(pool_home: Path, small_commit_bytes: int) -> None:
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes)
    with Recorder(pool_home / "real", make_media(pool_home / "real"), options) as recorder:
        work(recorder)
    Scrubber(pool_home / "cut", options).try_all(recorder.cuts(), LIMIT)
