"""Map pages that become resident because a request lacked one.

Loads more than was asked for where that is cheap: what follows in a sequence, and neighbours that hold nothing.
"""

import contextlib
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Final

from incfs.codec import Entries
from incfs.committer import offload
from incfs.errors import FormatError
from incfs.log import IncrementalLog
from incfs.model import PAGE_BLOCKS, MapId, split_map_id
from incfs.overlay import Chain
from incfs.store import Store

_AHEAD_PAGES: Final = 4
"""Pages that are loaded with one, in a sequence: 8 MiB at 4 KiB a block, and 0.5 ms of the owner thread."""
_NEIGHBOURS: Final = 128
"""Pages of which the empty ones are loaded with an empty one: 256 MiB at 4 KiB a block, and 0.5 ms."""
_MOST_TABLES: Final = 8
"""Of a chain, each of which is looked through for those."""
_SEQUENCES: Final = 16

Stored = list[list[Entries]]


class PageLoader:
    """Makes pages of open tables resident."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sequences: deque[tuple[MapId, int]] = deque(maxlen=_SEQUENCES)
        """Tables whose pages were loaded lately, and the page that would be next."""

    async def load(self, table: MapId, page_index: int) -> None:
        """Load a page, unless a checkpoint or a snapshot came between: then the caller asks again."""
        log, catalog = self._store.log, self._store.catalog
        tables, thaw_count = catalog.chain(table), log.thaw_count
        wanted = range(page_index, page_index + 1 + self._count_ahead(table, page_index))
        self._sequences.append((table, wanted.stop))
        neighbours = self._neighbours(table, page_index, tables)
        stored = await offload(lambda: _fetch(log, tables, wanted, neighbours))
        if thaw_count != log.thaw_count or tables != catalog.chain(table):
            return
        for index, pages in stored.items():
            if not self._store.plane.is_resident(table, index):
                self._store.install(table, index, self._store.resolve(tables, index, pages))

    def _count_ahead(self, table: MapId, page_index: int) -> int:
        """Count the pages to load with one: none unless the one before was the last that was loaded of the table."""
        if (table, page_index) not in self._sequences or self._is_rolled_back(table):
            return 0
        behind = self._page_count(table) - 1 - page_index
        return max(0, min(behind, _AHEAD_PAGES, self._store.options.page_cache_pages // 8))

    def _neighbours(self, table: MapId, page_index: int, tables: Chain) -> range:
        """Give the pages around one of which the empty ones may be loaded: none when others had to go for them."""
        most = self._store.options.page_cache_pages
        count = min(_NEIGHBOURS, most // 8)
        has_room = count and self._store.plane.page_count + count <= most
        if not has_room or self._is_rolled_back(table) or sum(map(len, tables)) > _MOST_TABLES:
            return range(0)
        first = page_index - page_index % count
        return range(first, min(first + count, self._page_count(table)))

    def _is_rolled_back(self, table: MapId) -> bool:
        """Tell whether pages of the table change when they are loaded."""
        return bool(self._store.catalog.volume(split_map_id(table)[0]).rollback_to)

    def _page_count(self, table: MapId) -> int:
        return -(-self._store.catalog.size_bytes(table) // (PAGE_BLOCKS * self._store.block_bytes))


def _fetch(log: IncrementalLog, tables: Chain, wanted: Sequence[int], neighbours: Sequence[int]) -> dict[int, Stored]:
    """Read the stored form of pages, as far as they are sound; the first must be.  Any thread."""
    asked = log.fetch(tables, wanted[0])
    stored = {wanted[0]: asked}
    with contextlib.suppress(FormatError):  # whoever asks for that page is told
        for index in wanted[1:]:
            stored[index] = log.fetch(tables, index)
    if neighbours and not any(chain.from_iterable(asked)):
        occupied = log.stored_pages(tables, neighbours[0], neighbours[-1] + 1)
        stored |= {index: asked for index in neighbours if index not in occupied and index not in stored}
    return stored
