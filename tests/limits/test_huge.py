"""Volumes of 1 PiB and of almost 8 EiB cost what their data costs."""

from pathlib import Path

import pytest

from incfs import extents
from incfs import snapshot as snapshots
from incfs import volume as volumes
from incfs.errors import LimitExceeded, NoData
from incfs.model import MAX_VOLUME_BYTES
from incfs.options import Options
from incfs.planes import HAS_NATIVE, PlaneKind
from incfs.recovery import create_pool, open_store
from tests.support.pools import check_clean, diff, discard, new_volume, read, reclaim, resize, write
from tests.support.work import count_work

BLOCK = 4096
PLANES: list[PlaneKind] = ["python", "native"] if HAS_NATIVE else ["python"]
EDGE = b"edge" * 2048


@pytest.mark.parametrize("size", [1 << 50, MAX_VOLUME_BYTES], ids=["1 PiB", "8 EiB"])
@pytest.mark.parametrize("plane", PLANES)
def test_huge_volume(plane: PlaneKind, size: int, pool_home: Path) -> None:
    create_pool(pool_home / "pool", block_bytes=BLOCK)
    store = open_store(pool_home / "pool", Options(dump_interval_s=None, data_plane=plane, extend_bytes=1 << 20))
    try:
        volume = new_volume(store, "huge", size)
        places = [0, 12_345, size // 3, size // 2 // BLOCK * BLOCK - 100, size - len(EDGE)]
        for place in places:
            write(store, volume.map_id, place, EDGE)
        store.checkpoint()
        assert store.pool.used_blocks() <= 3 * len(places)
        for place in places:
            assert read(store, volume.map_id, place, len(EDGE)) == EDGE
        assert read(store, volume.map_id, size // 5, 1 << 20) == bytes(1 << 20)
        (taken,) = snapshots.create(store, [(volume.id, "s")])
        write(store, volume.map_id, size - BLOCK, b"x" * BLOCK)
        assert [e.offset_bytes for e in diff(store, taken, snapshots.create(store, [(volume.id, "t")])[0])] == [
            size - BLOCK
        ]
        stored = [e for e in extents.extents(store, volume.map_id) if e.address > 1]
        assert sum(e.length_bytes for e in stored) == store.catalog.volume(volume.id).mapped_blocks * BLOCK
        # Searching skips what is empty: a step of it takes a bounded number of look-ups.
        found, at = extents.seek(store, volume.map_id, 1 << 30, data=True)
        assert (found, at) == (True, size // 3 // BLOCK * BLOCK)
        assert count_work(lambda: extents.seek(store, volume.map_id, size // 3 + (1 << 30), data=True)) < 20_000
        with pytest.raises(NoData):
            extents.seek(store, volume.map_id, size, data=True)
        discard(store, volume.map_id, BLOCK, size - BLOCK)
        assert read(store, volume.map_id, size // 3, len(EDGE)) == bytes(len(EDGE))
        assert read(store, volume.map_id, size - BLOCK, BLOCK) == b"x" * BLOCK
        resize(store, volume.id, 100)
        resize(store, volume.id, size)
        assert read(store, volume.map_id, 0, BLOCK) == EDGE[:100] + bytes(BLOCK - 100)
        assert read(store, volume.map_id, size - BLOCK, BLOCK) == bytes(BLOCK)
        assert read(store, taken.map_id, size - len(EDGE), len(EDGE)) == EDGE
        check_clean(store)
        with pytest.raises(LimitExceeded):
            write(store, volume.map_id, MAX_VOLUME_BYTES - 10, b"x" * 11)
        with pytest.raises(LimitExceeded):
            new_volume(store, "larger", MAX_VOLUME_BYTES + 1)
        volumes.remove(store, volume.id, snapshots=True)
        reclaim(store)
        store.checkpoint()
        assert store.pool.used_blocks() == 0
    finally:
        store.abandon()
