"""What an open pool keeps in memory: nothing of what is gone, and no more than OPERATING says."""

import gc
import os
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from incfs import removal
from incfs import snapshot as snapshots
from incfs import volume as volumes
from incfs.model import PAGE_BLOCKS
from incfs.options import Options
from incfs.planes import HAS_NATIVE, PlaneKind
from incfs.recovery import create_pool, open_store
from incfs.store import Store
from tests.support.child import in_a_child
from tests.support.pools import discard, new_volume, read, reclaim, write

BLOCK = 512
PAGE = PAGE_BLOCKS * BLOCK
PLANES: list[PlaneKind] = ["python", "native"] if HAS_NATIVE else ["python"]
CONTAINERS = (dict, list, set, deque)


def sizes_within(found: Any, name: str, seen: set[int]) -> dict[str, int]:
    """The length of each container that can be reached through attributes of the product's own objects."""
    if id(found) in seen:
        return {}
    seen.add(id(found))
    if isinstance(found, CONTAINERS):
        inner = list(found.values()) if isinstance(found, dict) else list(found)
        sizes = {name: len(found)}
        for item in inner[:50]:
            if type(item).__module__.startswith("incfs.") or isinstance(item, CONTAINERS):
                for key, size in sizes_within(item, f"{name}[]", seen).items():
                    sizes[key] = sizes.get(key, 0) + size
        return sizes
    if not type(found).__module__.startswith("incfs."):
        return {}
    sizes = {}
    slots = [n for cls in type(found).__mro__ for n in getattr(cls, "__slots__", ())]
    for attribute in [*vars(found)] if hasattr(found, "__dict__") else slots:
        sizes |= sizes_within(getattr(found, attribute, None), f"{name}.{attribute}", seen)
    return sizes


def churn(store: Store, number: int) -> None:
    """A volume's whole life."""
    volume = new_volume(store, f"churn{number}", 4 * PAGE)
    store.serve(volume.map_id)
    for page in range(4):
        write(store, volume.map_id, page * PAGE, b"a" * BLOCK)
    for name in ("s", "t"):
        snapshots.create(store, [(volume.id, name)])
        write(store, volume.map_id, 0, name.encode() * BLOCK)
        read(store, store.catalog.snapshot(volume.id, name).map_id, 0, BLOCK)
    discard(store, volume.map_id, PAGE, 2 * PAGE)
    store.commit()
    store.unserve(volume.map_id)
    removal.remove(store, [store.catalog.snapshot(volume.id, "s")])
    reclaim(store)
    store.checkpoint()
    volumes.remove(store, volume.id, snapshots=True)
    reclaim(store)
    store.checkpoint()


@pytest.mark.parametrize("plane", PLANES)
def test_nothing_is_kept_of_volumes_and_snapshots_that_are_gone(plane: PlaneKind, pool_home: Path) -> None:
    """The pool kept the place of the last allocation of every table there had ever been."""
    create_pool(pool_home / "pool", block_bytes=BLOCK, journal_bytes=1 << 16)
    store = open_store(pool_home / "pool", Options(dump_interval_s=None, data_plane=plane, extend_bytes=1 << 20))
    try:
        kept = new_volume(store, "kept", PAGE)
        write(store, kept.map_id, 0, b"k" * BLOCK)
        for number in range(10):
            churn(store, number)
        before = sizes_within(store, "store", set())
        for number in range(10, 40):
            churn(store, number)
        after = sizes_within(store, "store", set())
        assert len(before) > 20
        assert after == before
        assert store.plane.page_count <= 1
    finally:
        store.abandon()


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


MIB = 1 << 20
PAGES = 1024
"""An eighth of the default page cache: costs are the same for each page."""
PAGE_COST = 9 << 10
"""OPERATING: 8 KiB for each resident page, and the allocator's waste."""
OVERLAY_PAGES = 256
OVERLAY_COST = 200 << 10
"""OPERATING: at most 200 KiB for each changed page until the checkpoint, when all 512 mappings of it changed."""


@pytest.mark.parametrize("plane", PLANES)
def test_memory_stays_within_the_stated_bound(plane: PlaneKind, pool_home: Path) -> None:
    create_pool(pool_home / "pool", block_bytes=BLOCK)

    def work() -> None:
        options = Options(dump_interval_s=None, data_plane=plane, page_cache_pages=PAGES)
        store = open_store(pool_home / "pool", options)
        volume = new_volume(store, "v", 1 << 40)
        write(store, volume.map_id, 0, b"x" * BLOCK)
        store.checkpoint()
        start = resident_bytes()
        for page in range(3 * PAGES):  # more than fit
            read(store, volume.map_id, page * PAGE, BLOCK)
        assert store.plane.page_count <= PAGES
        cached = resident_bytes()
        print(f"{plane}: {(cached - start) // PAGES} bytes for each of {PAGES} resident pages")
        assert cached - start < PAGES * PAGE_COST + 4 * MIB
        for page in range(OVERLAY_PAGES):
            write(store, volume.map_id, page * PAGE, os.urandom(PAGE))
            if page % 8 == 0:
                store.commit()
        changed = resident_bytes()
        print(f"{plane}: {(changed - cached) // OVERLAY_PAGES} bytes for each of {OVERLAY_PAGES} whole changed pages")
        assert changed - cached < OVERLAY_PAGES * OVERLAY_COST + 4 * MIB
        for _ in range(3):
            store.checkpoint()
            for page in range(OVERLAY_PAGES):
                write(store, volume.map_id, page * PAGE, os.urandom(BLOCK))
        print(f"{plane}: {(resident_bytes() - start) // MIB} MiB more than at the start in the end")
        assert resident_bytes() <= changed + 8 * MIB
        store.abandon()

    in_a_child(work)
