"""Map pages that move from table to table: each move is one journaled change, and applied again at recovery.

Which blocks become free follows from the tables: it is not recorded.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from incfs.catalog import Catalog, Record
from incfs.changes import Change
from incfs.log import IncrementalLog
from incfs.model import Generation, VolumeId
from incfs.overlay import TableKey
from incfs.pool import Pool
from incfs.trails import Trails


class Moves:
    """The moves, in memory and in the pending changes.

    Args:
        catalog: The records.
        log: The tables.
        pool: What becomes free is given to it.
        trails: They take note before an increment is folded.
        pend: Called with a change and how many pages it is about.
        put: Called with a record whose counters changed; these follow from the moves and are not journaled.
    """

    def __init__(
        self,
        catalog: Catalog,
        log: IncrementalLog,
        pool: Pool,
        trails: Trails,
        pend: Callable[[Change, int], None],
        put: Callable[[Record], None],
    ) -> None:
        self._catalog = catalog
        self._log = log
        self._pool = pool
        self._trails = trails
        self._pend = pend
        self._put = put

    def fold(self, volume_id: VolumeId, generation: Generation, page_indexes: list[int]) -> None:
        """Move pages of a removed snapshot's increment to its older neighbour, or free them."""
        self._trails.note_folded(volume_id, generation, page_indexes)
        older = self._catalog.older_generation(volume_id, generation)
        self._pend(["fold", volume_id, generation, older, page_indexes], len(page_indexes))
        self.apply_fold(volume_id, generation, older, page_indexes)

    def apply_fold(self, volume_id: VolumeId, generation: Generation, older: Generation, pages: Iterable[int]) -> None:
        """Do what ``fold`` says, in memory."""
        gained = 0
        for page_index in pages:
            freed, moved = self._log.fold(volume_id, generation, older, page_index)
            self._pool.free(freed)
            gained += moved
        self._add_held(volume_id, older, gained)

    def empty(self, volume_id: VolumeId, page_indexes: list[int]) -> None:
        """Drop pages of a removed volume's lookup table."""
        self._pend(["empty", volume_id, page_indexes], len(page_indexes))
        self.apply_empty(volume_id, page_indexes)

    def apply_empty(self, volume_id: VolumeId, page_indexes: Iterable[int]) -> None:
        """Do what ``empty`` says, in memory."""
        for page_index in page_indexes:
            self._pool.free(self._log.drop_page(volume_id, page_index))

    def unroll(self, volume_id: VolumeId, page_indexes: list[int]) -> None:
        """Carry out a rollback for some pages: what the undone increments say becomes the current contents."""
        undone = self._catalog.undone(volume_id)
        self._pend(["unroll", volume_id, undone, page_indexes], len(page_indexes))
        self.apply_unroll(volume_id, undone, page_indexes)

    def apply_unroll(self, volume_id: VolumeId, undone: Sequence[Generation], pages: Iterable[int]) -> None:
        """Do what ``unroll`` says, in memory; doing it again changes nothing."""
        for page_index in pages:
            found = self._log.plan_unroll(volume_id, undone, page_index)
            self._log.unroll(volume_id, undone, page_index, found.current)
            self._pool.free(found.freed)
            self._add_held(volume_id, undone[0], -found.released)

    def relocate(self, table: TableKey, page_index: int, moves: Mapping[int, tuple[int, int]]) -> None:
        """Let mappings name other blocks, which are leased and hold the same data."""
        moved = self._log.relocate(table, page_index, moves)
        assert moved == dict(moves), "planned in the same step"
        flat = [value for slot, (old, new) in sorted(moved.items()) for value in (slot, old, new)]
        self._pend(["move", table.volume_id, table.generation, page_index, flat], 1)
        self._exchange(moved)

    def apply_relocate(self, table: TableKey, page_index: int, triples: Iterable[tuple[int, int, int]]) -> None:
        """Do what ``relocate`` says, in memory, where mappings are still the old ones."""
        moved = self._log.relocate(table, page_index, {slot: (old, new) for slot, old, new in triples})
        self._pool.adopt(new for _, new in moved.values())
        self._exchange(moved)

    def _exchange(self, moved: Mapping[int, tuple[int, int]]) -> None:
        self._pool.commit(new for _, new in moved.values())
        self._pool.free(old for old, _ in moved.values())

    def _add_held(self, volume_id: VolumeId, generation: Generation, blocks: int) -> None:
        if blocks:
            snapshot = self._catalog.snapshot_by_generation(volume_id, generation)
            self._put(replace(snapshot, held_blocks=snapshot.held_blocks + blocks))
