"""Stripe maps: where new blocks go, and that old ones stay."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from incfs import stripes
from incfs.blocks import split_address
from incfs.errors import StorageNotFound, UsageError
from incfs.extents import page_entries
from incfs.model import HOLE, StorageId, Volume
from incfs.planes import HAS_NATIVE
from incfs.store import Store
from tests.support import pools

BLOCK = pools.BLOCK


@pytest.fixture(params=["python", pytest.param("native", marks=pytest.mark.skipif(not HAS_NATIVE, reason="no C"))])
def store(request: pytest.FixtureRequest, pool_home: Path) -> Iterator[Store]:
    options = replace(pools.tiny_options(), data_plane=request.param)
    opened = pools.open_tiny(pools.make_pool(pool_home, storages=3), options)
    yield opened
    opened.abandon()


def noise(count: int, seed: int = 1) -> bytes:
    return Random(seed).randbytes(count * BLOCK)


def places(store: Store, volume: Volume, count: int) -> list[int]:
    """Storage volume of each of the first blocks; 0 for a hole."""
    store.absorb()
    entries = page_entries(store, volume.map_id, 0)
    addresses = [entries.get(block, (0, 0))[0] for block in range(count)]
    return [split_address(address)[0] if address > HOLE else 0 for address in addresses]


def striped(store: Store, columns: int, unit: int) -> Volume:
    volume = pools.new_volume(store, "db", 1 << 20)
    return stripes.set_count(store, volume.id, columns, unit_bytes=unit * BLOCK)


def test_stripes_rotate_over_the_columns(store: Store) -> None:
    volume = striped(store, 3, 2)
    pools.write(store, volume.map_id, 0, noise(14))
    assert places(store, volume, 14) == [1, 1, 2, 2, 3, 3, 1, 1, 2, 2, 3, 3, 1, 1]
    assert pools.read(store, volume.map_id, 0, 14 * BLOCK) == noise(14)
    pools.check_clean(store)


def test_a_stripe_is_where_it_is_whatever_is_written_before(store: Store) -> None:
    volume = striped(store, 2, 4)
    pools.write(store, volume.map_id, 6 * BLOCK, noise(4))
    pools.write(store, volume.map_id, 1 * BLOCK, noise(1))
    assert places(store, volume, 10) == [0, 1, 0, 0, 0, 0, 2, 2, 1, 1]


def test_blocks_of_a_unit_lie_together(store: Store) -> None:
    volume = striped(store, 2, 8)
    for block in range(64):
        pools.write(store, volume.map_id, block * BLOCK, noise(1, seed=block))
    store.absorb()
    entries = page_entries(store, volume.map_id, 0)
    for first in range(0, 64, 8):
        addresses = [entries[first + i][0] for i in range(8)]
        assert addresses == list(range(addresses[0], addresses[0] + 8))


def test_another_column_is_for_new_stripes_only(store: Store) -> None:
    volume = striped(store, 2, 1)
    pools.write(store, volume.map_id, 0, noise(6))
    volume = stripes.set_columns(store, volume.id, [StorageId(3), StorageId(1), StorageId(2)], unit_bytes=BLOCK)
    pools.write(store, volume.map_id, 6 * BLOCK, noise(6))
    assert places(store, volume, 12) == [1, 2, 1, 2, 1, 2, 3, 1, 2, 3, 1, 2]
    assert [row[2:] for row in volume.stripes] == [(1, 2), (3, 1, 2)]


def test_stripes_are_the_same_after_a_crash_and_after_a_checkpoint(pool_home: Path) -> None:
    store = pools.open_tiny(pools.make_pool(pool_home, storages=3))
    volume = striped(store, 2, 1)
    store.commit()
    for _ in range(2):
        store = pools.crash(store)
        pools.write(store, volume.map_id, 0, noise(4))
        assert places(store, volume, 4) == [1, 2, 1, 2]
        assert store.catalog.volume(volume.id).stripes == volume.stripes
        store.checkpoint()
    pools.check_clean(store)
    store.abandon()


def test_a_full_column_gives_way_to_the_others(pool_home: Path) -> None:
    store = pools.open_tiny(pools.make_pool(pool_home / "small", capacity_bytes=300 * BLOCK, storages=3))
    volume = striped(store, 2, 1)
    for first in range(0, 290, 10):
        pools.write(store, volume.map_id, first * BLOCK, noise(10, seed=first + 1))
    assert set(places(store, volume, 290)) == {1, 2, 3}
    pools.check_clean(store)
    store.abandon()


def test_what_makes_no_stripes_is_refused(store: Store) -> None:
    volume = pools.new_volume(store, "db", 1 << 20)
    with pytest.raises(UsageError):
        stripes.set_count(store, volume.id, 4, unit_bytes=BLOCK)
    with pytest.raises(UsageError):
        stripes.set_columns(store, volume.id, [StorageId(1), StorageId(1)], unit_bytes=BLOCK)
    with pytest.raises(UsageError):
        stripes.set_count(store, volume.id, 2, unit_bytes=BLOCK + 1)
    with pytest.raises(StorageNotFound):
        stripes.set_columns(store, volume.id, [StorageId(9)], unit_bytes=BLOCK)
