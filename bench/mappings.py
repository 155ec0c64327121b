"""Make a pool whose one volume has many fragmented mappings, without writing their data.

usage: python -m bench.mappings POOL COUNT

The mappings are appended through the core, as a commit does; the blocks they name are zeros in the image, with the
checksum of zeros, so they can be read.  No two neighbours in the volume are neighbours in the image: the most that
so many mappings can cost.
"""

import random
import sys
from pathlib import Path

from incfs import volume as volumes
from incfs.codec import checksum
from incfs.model import PAGE_BLOCKS, MapId
from incfs.options import Options
from incfs.recovery import create_pool, open_store
from incfs.sealed import seal_pages
from incfs.store import Store

BLOCK_BYTES = 512
"""Small, so that the image of ten million blocks has 5 GB."""
_PAGES_PER_CHECKPOINT = 2048


def make_pool(directory: Path, count: int) -> None:
    """Make the pool; its volume is called ``many``."""
    create_pool(directory, block_bytes=BLOCK_BYTES)
    store = open_store(directory, Options(extend_bytes=1 << 30))
    page_count = -(-count // PAGE_BLOCKS)
    made = volumes.create(store, "many", page_count * PAGE_BLOCKS * BLOCK_BYTES, mode=0o600, uid=0, gid=0)
    crc = checksum(bytes(BLOCK_BYTES))
    for page_index in range(page_count):
        addresses = _take(store, made.map_id, PAGE_BLOCKS)
        random.Random(page_index).shuffle(addresses)
        entries = {slot: (address, crc) for slot, address in enumerate(addresses)}
        current = store.catalog.volume(made.id)
        store.append_mappings(current, seal_pages(made.map_id, [(page_index, entries, {})]))
        if page_index % _PAGES_PER_CHECKPOINT == _PAGES_PER_CHECKPOINT - 1:
            store.checkpoint()
    store.close()


def _take(store: Store, table: MapId, count: int) -> list[int]:
    taken: list[int] = []
    while len(taken) < count:
        found = store.pool.allocate(table, count - len(taken))
        if not found:
            growth = store.space.next_growth(table)
            assert growth is not None
            growth.run()
            growth.end()
            continue
        taken += [address for first, length in found for address in range(first, first + length)]
    return taken


if __name__ == "__main__":
    make_pool(Path(sys.argv[1]), int(sys.argv[2]))
