"""The incremental log: where each virtual block's data is, now and at every snapshot.

Owns the lookup tables and the increments: what ``tables`` has of them, and the overlay of
changes since the last checkpoint.  Never touches storage volumes: it says which addresses
became unreachable, the store frees them.

Invariants:
    1. A lookup table holds the *sealed* current contents: no write that is not sealed yet.
    2. A virtual block is in the increment of the newest snapshot S exactly if its mapping
       was replaced since S.  So each stored block is in one table once (I9).
    3. Pages are read from LMDB and composed with the overlay in one step of the owner
       thread, or fetched in a worker and composed only if no checkpoint ended in between.
"""

import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, takewhile
from typing import NamedTuple, Protocol

from incfs._mappings import displace
from incfs.blocks import stored_addresses
from incfs.codec import Entries, slot_set
from incfs.errors import FormatError
from incfs.model import HOLE, INHERIT, PAGE_BLOCKS, StorageId, split_map_id
from incfs.overlay import Chain, Layer, Overlay, TableKey
from incfs.sealed import Sealed
from incfs.tables import ReadableTables, Reader

logger = logging.getLogger(__name__)


class MadePages(Protocol):
    """A table that is not stored."""

    def page(self, page_index: int) -> Entries:
        """Make a page.  Any thread."""

    def page_indexes(self, start: int, limit: int | None) -> list[int]:
        """List pages that may hold mappings, ascending from ``start``, at most ``limit`` of them."""


class Unrolled(NamedTuple):
    """What a rollback does to one page."""

    current: Entries
    """Mappings that become current again."""
    freed: list[int]
    """Stored addresses that nothing refers to any more."""
    released: int
    """Stored blocks that the oldest increment gives up."""


class IncrementalLog:
    """The mappings of every volume: looked up, appended, moved between tables.

    Concurrency: the owner thread only, but for ``fetch``.
    """

    def __init__(self, tables: ReadableTables) -> None:
        self._tables = tables
        self._overlay = Overlay()
        self._replaced: dict[tuple[int, int], tuple[int, bytes]] = {}
        """(volume, page) -> (generation of the newest snapshot, indexes in its increment as a bit set)."""
        self._emptied_to: dict[TableKey, int] = {}
        self.baselines: Mapping[StorageId, MadePages] = {}
        """Tables of volume 0: their pages are made, not stored."""
        self.thaw_count = 0
        """Rises when a checkpoint ends: pages fetched before are stale."""

    def append(self, newest_generation: int, sealed: Sealed) -> "array[int]":
        """Append mappings of one volume; the replaced ones move into the increment or become free.

        Args:
            newest_generation: Of its newest snapshot; 0 without one.
            sealed: The mappings.

        Returns:
            The stored addresses that nothing refers to any more.
        """
        table = TableKey(split_map_id(sealed.map_id)[0])
        for page_index, first, end in sealed.pages:
            change = self._overlay.change(table, page_index)
            change.append(sealed.slots, sealed.addresses, sealed.checksums, first, end)
        if not newest_generation:
            return stored_addresses(sealed.old_addresses)
        freed = array("Q")
        for page in sealed.pages:
            freed.frombytes(self._displace(TableKey(table.volume_id, newest_generation), sealed, page))
        return freed

    def _displace(self, increment: TableKey, sealed: Sealed, page: tuple[int, int, int]) -> bytes:
        """Move what was replaced into the newest increment; what replaced it there already, becomes free."""
        page_index, first, end = page
        try:
            known = self._replaced_slots(increment.volume_id, increment.generation, page_index)
        except FormatError as error:
            # The increment's page is lost: nobody knows which replaced blocks it has, so none becomes free.
            where = increment.volume_id, page_index
            logger.warning("volume %d, page %d: replaced blocks stay in use: %s", *where, error)
            return b""
        kept, known, freed = displace(known, sealed.slots, sealed.old_addresses, sealed.old_checksums, first, end)
        if kept:
            self._overlay.change(increment, page_index).update(kept)
            self._replaced[increment.volume_id, page_index] = increment.generation, known
        return freed

    def _replaced_slots(self, volume_id: int, generation: int, page_index: int) -> bytes:
        known, slots = self._replaced.get((volume_id, page_index), (0, b""))
        if known != generation:
            slots = slot_set(self.entries(TableKey(volume_id, generation), page_index))
            self._replaced[volume_id, page_index] = generation, slots
        return slots

    def forget(self, volume_id: int, page_index: int) -> None:
        """Drop what is cached of a page; it is read again when needed."""
        self._replaced.pop((volume_id, page_index), None)

    def entries(self, table: TableKey, page_index: int) -> Entries:
        """Read one page of one table as it stands."""
        stored: Entries = {}
        if not self._overlay.hides(table, page_index):
            with self._tables.reading() as reader:
                stored = reader.page(table, page_index)
        return self._overlay.compose(table, page_index, stored)

    def fetch(self, chain: Chain, page_index: int) -> list[list[Entries]]:
        """Read the stored form of one page of several tables.  Any thread."""
        with self._tables.reading() as reader:
            return [[self._stored(reader, table, page_index) for table in link] for link in chain]

    def _stored(self, reader: Reader, table: TableKey, page_index: int) -> Entries:
        if table.volume_id:
            return reader.page(table, page_index)
        return self.baselines[StorageId(table.generation)].page(page_index)

    def stored_pages(self, chain: Chain, start: int, end: int) -> set[int]:
        """List the pages from ``start`` on and before ``end`` that are stored in one of several tables.  Any thread."""
        found: set[int] = set()
        with self._tables.reading() as reader:
            for table in (table for link in chain for table in link):
                found.update(
                    takewhile(lambda index: index < end, self._stored_indexes(reader, table, start, end - start))
                )
        return found

    def _stored_indexes(self, reader: Reader, table: TableKey, start: int, limit: int | None) -> Iterable[int]:
        """Give the pages that are stored, or made, ascending from ``start``, at most ``limit`` of them."""
        if table.volume_id:
            return islice(reader.page_indexes(table, start), limit)
        return self.baselines[StorageId(table.generation)].page_indexes(start, limit)

    def resolve(self, chain: Chain, page_index: int, stored: Sequence[Sequence[Entries]]) -> Entries:
        """Give a page as a snapshot (or the live volume) sees it.

        Args:
            chain: What ``Catalog.chain`` gives: increments from the snapshot on, oldest first, then the lookup table;
                the same of the origin.
            page_index: The page.
            stored: What ``fetch`` returned for the same chain, in the same epoch.
        """
        resolved: Entries = {}
        for link, pages in zip(chain, stored, strict=True):
            own: Entries = {}
            for table, entries in zip(link, pages, strict=True):
                if composed := self._overlay.compose(table, page_index, entries):
                    own = {**composed, **own}
            resolved = {**own, **{index: entry for index, entry in resolved.items() if entry[0] != INHERIT}}
        return resolved

    def page_indexes(self, table: TableKey, start: int = 0, limit: int | None = None) -> list[int]:
        """List pages that may hold mappings, ascending from ``start``, at most ``limit`` of them."""
        changed = {index for index in self._overlay.pages(table) if index >= start}
        with self._tables.reading() as reader:
            stored = self._stored_indexes(reader, table, start, limit)
            return sorted(changed.union(stored))[:limit]

    def next_page(self, chain: Chain, start: int) -> int | None:
        """Find the first page at or after ``start`` that may hold mappings in one of several tables.

        Cost: one look-up for each table.
        """
        found: set[int] = set()
        with self._tables.reading() as reader:
            for table in (table for link in chain for table in link):
                found.update(index for index in self._overlay.pages(table) if index >= start)
                found.update(self._stored_indexes(reader, table, start, 1))
        return min(found, default=None)

    def occupied_pages(self, table: TableKey, limit: int) -> list[int]:
        """List pages that do hold mappings, at most ``limit``, for a table that is being emptied.

        It goes on where the last call for the table ended, and begins again at the end, since
        emptied pages stay listed until a checkpoint.
        """
        start = self._emptied_to.get(table, 0)
        found: list[int] = []
        while len(found) < limit and (listed := self.page_indexes(table, start, limit)):
            found += [index for index in listed if self.entries(table, index)]
            start = listed[-1] + 1
        if not found and self._emptied_to.pop(table, 0):
            return self.occupied_pages(table, limit)
        if found:
            self._emptied_to[table] = start
        return found

    def fold(self, volume_id: int, generation: int, older_generation: int, page_index: int) -> tuple[list[int], int]:
        """Move one page of a snapshot's increment to that of its older neighbour.

        Returns:
            The addresses that became free, and how many stored blocks the neighbour gained.
        """
        table = TableKey(volume_id, generation)
        moved = self.entries(table, page_index)
        self._overlay.replace(table, page_index, {})
        self.forget(volume_id, page_index)
        if not older_generation:
            return [address for address, _ in moved.values() if address > HOLE], 0
        older = TableKey(volume_id, older_generation)
        known = self.entries(older, page_index)
        gained = {index: entry for index, entry in moved.items() if index not in known}
        if gained:
            self._overlay.change(older, page_index).update(gained)
        freed = [entry[0] for index, entry in moved.items() if index in known and entry[0] > HOLE]
        return freed, sum(address > HOLE for address, _ in gained.values())

    def plan_unroll(self, volume_id: int, undone: Sequence[int], page_index: int) -> Unrolled:
        """Say what a rollback does to one page.

        Args:
            volume_id: The volume.
            undone: The generations whose increments are undone, oldest first.
            page_index: The page.
        """
        current: Entries = {}
        unused: list[int] = []
        released = 0
        for generation in undone:
            entries = self.entries(TableKey(volume_id, generation), page_index)
            unused += [address for index, (address, _) in entries.items() if index in current]
            current = {**entries, **current}
            if generation == undone[0]:
                released = sum(address > HOLE for address, _ in entries.values())
        live = self.entries(TableKey(volume_id), page_index)
        unused += [live[index][0] for index in current if index in live]
        return Unrolled(current, [address for address in unused if address > HOLE], released)

    def unroll(self, volume_id: int, undone: Sequence[int], page_index: int, current: Entries) -> None:
        """Let the lookup table have what ``plan_unroll`` said, and empty the increments' pages."""
        if current:
            self._overlay.change(TableKey(volume_id), page_index).update(current)
            for generation in undone:
                self._overlay.replace(TableKey(volume_id, generation), page_index, {})
        self.forget(volume_id, page_index)

    def noted(self, trail: TableKey, page_index: int) -> Entries:
        """Read one page of a trail; a damaged one has every block, so that nothing that changed is left out."""
        try:
            return self.entries(trail, page_index)
        except FormatError as error:
            logger.warning("volume %d, page %d: counts as changed: %s", trail.volume_id, page_index, error)
            return dict.fromkeys(range(PAGE_BLOCKS), (HOLE, 0))

    def keys(self, table: TableKey, page_index: int) -> Iterable[int]:
        """Give the blocks of a page that an increment or a trail has."""
        return self.noted(table, page_index) if table.is_trail else self.entries(table, page_index)

    def note(self, trail: TableKey, page_index: int, slots: Iterable[int]) -> None:
        """Have a trail name blocks of a page."""
        # A page that is changed already was looked at: what is damaged stays as it is.
        known = {} if self._overlay.is_changed(trail, page_index) else self.noted(trail, page_index)
        new: Entries = {slot: (HOLE, 0) for slot in slots if slot not in known}
        if new:
            self._overlay.change(trail, page_index).update(new)

    def forget_noted(self, trail: TableKey, page_index: int) -> None:
        """Empty one page of a trail."""
        self._overlay.replace(trail, page_index, {})

    def drop_page(self, volume_id: int, page_index: int) -> list[int]:
        """Empty one page of a lookup table whose volume is gone; return what became free."""
        table = TableKey(volume_id)
        dropped = self.entries(table, page_index)
        self._overlay.replace(table, page_index, {})
        self.forget(volume_id, page_index)
        return [address for address, _ in dropped.values() if address > HOLE]

    def relocate(
        self, table: TableKey, page_index: int, moves: Mapping[int, tuple[int, int]]
    ) -> dict[int, tuple[int, int]]:
        """Let mappings name other addresses, where they still name the old ones; give those that did.

        Args:
            table: Whose page.
            page_index: The page.
            moves: Index -> (old address, new address).
        """
        entries = self.entries(table, page_index)
        moved = {slot: move for slot, move in moves.items() if entries.get(slot, (INHERIT, 0))[0] == move[0]}
        if moved:
            changed = {slot: (new, entries[slot][1]) for slot, (_, new) in moved.items()}
            self._overlay.change(table, page_index).update(changed)
        return moved

    def freeze(self) -> Layer:
        """Start a checkpoint: later changes go to a new layer."""
        return self._overlay.freeze()

    def thaw(self) -> None:
        """End a checkpoint: its layer is in the tables now."""
        self._overlay.thaw()
        self.thaw_count += 1

    @property
    def overlay_pages(self) -> int:
        """Changed pages held in memory until the next checkpoint."""
        return self._overlay.page_count
