"""The rules of the store, each as one small story; the state machine of tests/model tells the long ones."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from incfs import extents, ranges
from incfs import snapshot as snapshots
from incfs import tables as tables_module
from incfs import volume as volumes
from incfs.backing import Backing, File
from incfs.codec import Entries
from incfs.errors import BackingError, ChecksumMismatch, PoolReadOnly
from incfs.model import HOLE
from incfs.overlay import TableKey
from incfs.planes import HAS_NATIVE
from incfs.store import Store
from incfs.tables import Puts, Reader, Tables
from tests.support import pools
from tests.support.served import Served

BLOCK = pools.BLOCK


@pytest.fixture
def store(pool_home: Path) -> Iterator[Store]:
    opened = pools.open_tiny(pools.make_pool(pool_home))
    yield opened
    opened.abandon()


def test_a_snapshot_keeps_its_bytes(store: Store) -> None:
    """What was written before it and not sealed is in it; what is written after it is not."""
    volume = pools.new_volume(store, "a", 20 * BLOCK)
    pools.write(store, volume.map_id, 0, b"x" * 10 * BLOCK)
    (taken,) = snapshots.create(store, [(volume.id, "s")])
    pools.write(store, volume.map_id, 2 * BLOCK, b"y" * 4 * BLOCK)
    pools.discard(store, volume.map_id, 8 * BLOCK, 20 * BLOCK)
    pools.write(store, volume.map_id, 15 * BLOCK, b"z" * BLOCK)
    store.commit()
    assert pools.read(store, taken.map_id) == b"x" * 10 * BLOCK + bytes(10 * BLOCK)
    pools.check_clean(store)


def test_an_older_snapshot_keeps_what_a_removed_one_held(store: Store) -> None:
    volume = pools.new_volume(store, "a", 4 * BLOCK)
    pools.write(store, volume.map_id, 0, b"x" * 4 * BLOCK)
    (older,) = snapshots.create(store, [(volume.id, "older")])
    pools.write(store, volume.map_id, 0, b"y" * BLOCK)
    snapshots.create(store, [(volume.id, "newer")])
    pools.write(store, volume.map_id, 0, b"z" * 2 * BLOCK)
    pools.remove_snapshot(store, volume.id, "newer")
    pools.reclaim(store)
    assert pools.read(store, older.map_id) == b"x" * 4 * BLOCK
    # Nobody needs "y" any more: 4 blocks of the snapshot and 2 new ones are left.
    assert store.pool.used_blocks() == 6
    pools.check_clean(store)


def test_a_group_snapshot_is_one_commit(store: Store) -> None:
    first, second = pools.new_volume(store, "a", BLOCK), pools.new_volume(store, "b", BLOCK)
    store.commit()
    before = store.sequence
    snapshots.create(store, [(first.id, "s"), (second.id, "s")])
    assert store.sequence == before
    store.commit()
    assert store.sequence == before + 1


def test_a_diff_has_what_changed_and_nothing_else(store: Store) -> None:
    volume = pools.new_volume(store, "a", 1 << 20)
    pools.write(store, volume.map_id, 0, b"x" * 1000 * BLOCK)
    (older,) = snapshots.create(store, [(volume.id, "older")])
    pools.write(store, volume.map_id, 3 * BLOCK, b"y" * BLOCK)
    (newer,) = snapshots.create(store, [(volume.id, "newer")])
    pools.write(store, volume.map_id, 700 * BLOCK, b"z" * BLOCK)
    found = [(e.offset_bytes, e.length_bytes) for e in pools.diff(store, older, newer)]
    assert found == [(3 * BLOCK, BLOCK)]


def test_the_live_volume_has_one_table(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many snapshots there are (I8)."""
    volume = pools.new_volume(store, "a", 4 * BLOCK)
    for number in range(20):
        pools.write(store, volume.map_id, 0, bytes([65 + number]) * 4 * BLOCK)
        snapshots.create(store, [(volume.id, f"s{number}")])
    pools.write(store, volume.map_id, 0, b"live" * BLOCK)
    store.checkpoint()
    store.evict(volume.map_id)
    looked_at, page = [], Reader.page

    def watched(reader: Reader, table: TableKey, page_index: int) -> Entries:
        looked_at.append(table)
        return page(reader, table, page_index)

    monkeypatch.setattr(Reader, "page", watched)
    assert pools.read(store, volume.map_id) == b"live" * BLOCK
    assert looked_at == [TableKey(volume.id)]


def test_a_discard_ends_where_it_is_told(store: Store) -> None:
    volume = pools.new_volume(store, "a")
    data = bytes(range(1, 201)) * 2
    pools.write(store, volume.map_id, 0, data)
    pools.discard(store, volume.map_id, BLOCK, 3 * BLOCK + 10)
    assert pools.read(store, volume.map_id) == data[:BLOCK] + bytes(2 * BLOCK + 10) + data[3 * BLOCK + 10 :]
    pools.discard(store, volume.map_id, 5 * BLOCK, 1 << 40)
    assert store.catalog.volume(volume.id).size_bytes == len(data)


def test_extents_name_the_blocks_that_hold_the_data(store: Store) -> None:
    """Also when they are listed from the middle of a stretch."""
    volume = pools.new_volume(store, "a", 40 * BLOCK)
    data = b"".join(bytes([i]) * BLOCK for i in range(1, 11))
    pools.write(store, volume.map_id, 5 * BLOCK, data)
    for start in (0, 5, 8):
        stored = bytearray(40 * BLOCK)
        for extent in extents.extents(store, volume.map_id, start * BLOCK):
            if extent.address > HOLE:
                index, count = extent.address & 0xFFFFFFFF, extent.length_bytes // BLOCK
                found = store.pool.volumes[extent.address >> 48].read_blocks(index, count)  # type: ignore[index]
                stored[extent.offset_bytes : extent.offset_bytes + extent.length_bytes] = found
        assert stored[start * BLOCK :] == pools.read(store, volume.map_id)[start * BLOCK :]


@pytest.mark.parametrize("where", ["journal.", ".img"])
def test_a_failed_flush_makes_the_pool_read_only(pool_home: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """It is not tried again, nothing more is written, and reads go on (I10)."""
    store = pools.open_tiny(pools.make_pool(pool_home), pools.tiny_options(small_commit_bytes=0))
    volume = pools.new_volume(store, "a", 10 * BLOCK)
    pools.write(store, volume.map_id, 0, b"x" * BLOCK)
    store.commit()
    store.serve(volume.map_id)
    asked = []

    def sync(file: File) -> None:
        if where in file.path.name:
            asked.append(file)
            raise BackingError(f"cannot sync {file.path}", path=str(file.path), action="sync")

    monkeypatch.setattr(File, "sync", sync)
    pools.write(store, volume.map_id, BLOCK, b"y" * BLOCK)
    with pytest.raises(BackingError):
        store.commit()
    for attempt in (store.commit, store.checkpoint, lambda: pools.write(store, volume.map_id, 0, b"z")):
        with pytest.raises(PoolReadOnly):
            attempt()
    assert len(asked) == 1
    assert pools.read(store, volume.map_id, 0, 2 * BLOCK) == b"x" * BLOCK + b"y" * BLOCK
    if HAS_NATIVE:
        assert not Served(store.plane).write(volume.map_id, 0, b"z" * BLOCK)
    store.close()


@pytest.mark.skipif(not HAS_NATIVE, reason="the C data plane was not built")
def test_a_volume_that_shrinks_is_not_written_past_the_owner(store: Store) -> None:
    """Not behind its new end, and not at all until what lay there is dropped."""
    volume = pools.new_volume(store, "a", 20 * BLOCK)
    pools.write(store, volume.map_id, 0, b"x" * 20 * BLOCK)
    store.space.grant(volume.map_id, 8)
    store.serve(volume.map_id)
    served = Served(store.plane)
    assert served.write(volume.map_id, 0, b"y" * BLOCK)
    volumes.resize(store, volume.id, 10 * BLOCK, shrink=True)
    assert not served.write(volume.map_id, 0, b"z" * BLOCK)
    assert served.read(volume.map_id, 9 * BLOCK, 2 * BLOCK) == b"x" * BLOCK
    ranges.finish_trim(store, volume.id)
    assert not served.write(volume.map_id, 10 * BLOCK, b"z" * BLOCK)
    assert served.write(volume.map_id, 9 * BLOCK, b"z" * BLOCK)
    pools.check_clean(store)


def test_lmdb_flushes_what_it_commits(store: Store) -> None:
    """The power cuts of tests/crash take that for granted."""
    flags = store.table_copies.first._env.flags()
    assert flags["sync"]
    assert flags["metasync"]
    assert not flags["writemap"]
    assert not flags["map_async"]


def test_the_tables_map_grows_before_it_is_full(tmp_path: Path) -> None:
    """In a full one LMDB cannot even delete."""
    tables = Tables(tmp_path / "tables", Backing(), create=True, map_bytes=1 << 18)
    for number in range(8):
        values = {number.to_bytes(8, "big"): bytes(100_000)}
        tables.write({}, Puts({"volume": dict(values)}, {"sequence": number, "segment": 1, "last_volume": 0}))
        assert tables.used_bytes() * 2 <= tables.map_bytes() + 400_000
    assert tables.map_bytes() > 1 << 20
    tables.close()


def test_data_that_changed_before_its_commit_is_not_committed(store: Store) -> None:
    """The record would carry what nobody wrote, with a checksum of its own that is right."""
    volume = pools.new_volume(store, "a", BLOCK)
    pools.write(store, volume.map_id, 0, b"x" * BLOCK)
    store.absorb()
    ((address, _),) = store.log.entries(TableKey(volume.id), 0).values()
    store.pool.volumes[address >> 48].write_blocks(address & 0xFFFFFFFF, b"y" * BLOCK)  # type: ignore[index]
    with pytest.raises(ChecksumMismatch):
        store.commit()
    with pytest.raises(PoolReadOnly):
        store.commit()


@pytest.mark.parametrize("has_memory", [True, False])
def test_lmdbs_list_of_readers_is_in_memory_where_that_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_memory: bool
) -> None:
    """A page of it that a full btrfs could not give ended the daemon."""
    if not has_memory:
        monkeypatch.setattr(tables_module, "_IN_MEMORY", tmp_path / "nowhere")
    tables = Tables(tmp_path / "tables", Backing(), create=True)
    assert (tmp_path / "tables-lock").exists() == (not has_memory)
    tables.write({}, Puts({}, {"sequence": 3, "segment": 1, "last_volume": 0}))
    with tables.reading() as reader:
        assert reader.checkpoint()[0] == 3
    tables.close()
