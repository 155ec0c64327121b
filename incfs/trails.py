"""Trails: which blocks were written since a bookmark, where no increment tells it any more.

While a bookmark's snapshot is there, its increment and those behind it say what was written since.  When an increment
is folded, its keys would be lost, or be mixed with what was written before the bookmark: then the bookmark's *trail*,
a set of virtual blocks, takes note of them.

The *keeper* for a point of a volume is the newest bookmark at or before it, unless an increment lies between: that one
tells it.  Invariants, where "between" has the first and not the last:
    1. What was written between a bookmark and a snapshot is the union of the increments and the trails between.
       Trails of bookmarks that are being removed count, until the keeper has taken what they know.
    2. A trail names nothing that was written behind the next snapshot that is there, so the union is exact.
    3. While a snapshot is there that is older than a bookmark, its increment has every block that the trail names.
"""

from collections.abc import Callable, Iterable, Sequence

from incfs.catalog import Catalog
from incfs.changes import Change
from incfs.log import IncrementalLog
from incfs.model import MAX_GENERATION, Generation, Volume, VolumeId
from incfs.overlay import TableKey
from incfs.sealed import Sealed


class Trails:
    """The trails, in memory and in the pending changes.

    Args:
        catalog: The records.
        log: The tables.
        pend: Called with a change and how many pages it is about.
    """

    def __init__(self, catalog: Catalog, log: IncrementalLog, pend: Callable[[Change, int], None]) -> None:
        self._catalog = catalog
        self._log = log
        self._pend = pend

    def _keeper(self, volume_id: VolumeId, generation: Generation, older: Generation) -> Generation:
        """Give the bookmark that keeps what was written from a generation on; 0 if none does.

        Args:
            volume_id: The volume.
            generation: Bookmarks up to this one may keep it.
            older: The next older increment, 0 without one: if it is not older than the bookmark, it has it.
        """
        found = self._catalog.newest_bookmark(volume_id, generation)
        return found if found > older else Generation(0)

    def note_written(self, volume: Volume, sealed: Sealed) -> None:
        """Take note of sealed mappings; this follows from the "map" change."""
        keeper = self._keeper(volume.id, Generation(MAX_GENERATION), volume.newest_generation)
        for page_index, first, end in sealed.pages if keeper else ():
            self._log.note(TableKey(volume.id, keeper, is_trail=True), page_index, sealed.slots[first:end])

    def note_folded(self, volume_id: VolumeId, generation: Generation, page_indexes: Sequence[int]) -> None:
        """Take note of pages of an increment that is about to be folded."""
        keeper = self._keeper(volume_id, generation, self._catalog.older_generation(volume_id, generation))
        if keeper:
            self._pend(["note", volume_id, generation, keeper, list(page_indexes)], 0)
            self.apply_note(volume_id, generation, keeper, page_indexes)

    def apply_note(
        self, volume_id: VolumeId, generation: Generation, keeper: Generation, page_indexes: Iterable[int]
    ) -> None:
        """Do what "note" says, in memory."""
        trail = TableKey(volume_id, keeper, is_trail=True)
        for page_index in page_indexes:
            self._log.note(trail, page_index, self._log.entries(TableKey(volume_id, generation), page_index))

    def hand_on(self, volume: Volume, generation: Generation, page_indexes: Sequence[int]) -> None:
        """Let pages of a removed bookmark's trail go to the keeper for what was written before it, if there is one."""
        older = self._catalog.older_generation(volume.id, generation)
        keeper = self._keeper(volume.id, Generation(generation - 1), older) if volume.name else Generation(0)
        self._pend(["forget", volume.id, generation, keeper, list(page_indexes)], len(page_indexes))
        self.apply_forget(volume.id, generation, keeper, page_indexes)

    def apply_forget(
        self, volume_id: VolumeId, generation: Generation, keeper: Generation, page_indexes: Iterable[int]
    ) -> None:
        """Do what "forget" says, in memory."""
        trail = TableKey(volume_id, generation, is_trail=True)
        for page_index in page_indexes:
            if keeper:
                noted = self._log.noted(trail, page_index)
                self._log.note(TableKey(volume_id, keeper, is_trail=True), page_index, noted)
            self._log.forget_noted(trail, page_index)
