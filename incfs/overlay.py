"""Changes of map pages that no checkpoint has folded into the tables yet.  Pure, in memory.

Owns two layers: *active* takes new changes, *frozen* is what a running checkpoint writes.
A page as it stands is: the stored page, then the frozen patch, then the active one.
"""

from collections.abc import Iterator
from typing import NamedTuple

from incfs._mappings import Page
from incfs.codec import Entries


class TableKey(NamedTuple):
    """Names a table of pages: a lookup table (generation 0), a snapshot's increment or a bookmark's trail."""

    volume_id: int
    generation: int = 0
    is_trail: bool = False


Chain = tuple[tuple[TableKey, ...], ...]
"""The tables that answer for a page.  In a link the first table that has a block answers for it; the next link,
of the origin, answers for blocks that nobody has, and for those that are inherited."""


class Patch(NamedTuple):
    """Changed mappings of one page."""

    page: Page
    is_whole: bool = False
    """They are the whole page: what lies below no longer counts."""

    def apply(self, below: Entries) -> Entries:
        """Give the page as it is with this patch on top; ``below`` stays as it is."""
        return self.page.over({} if self.is_whole else below)


Layer = dict[TableKey, dict[int, Patch]]


class Overlay:
    """The active and the frozen layer.

    Concurrency: the owner thread changes the active layer; a frozen one is read-only and
    may be read by a checkpoint in another thread.
    """

    def __init__(self) -> None:
        self._active: Layer = {}
        self._frozen: Layer = {}
        self._active_count = self._frozen_count = 0

    def change(self, table: TableKey, page_index: int) -> Page:
        """Return the active changes of a page, made empty when there are none."""
        pages = self._active.setdefault(table, {})
        found = pages.get(page_index)
        if found is None:
            found = pages[page_index] = Patch(Page())
            self._active_count += 1
        return found.page

    def replace(self, table: TableKey, page_index: int, entries: Entries) -> None:
        """Let the page be exactly ``entries`` from now on."""
        pages = self._active.setdefault(table, {})
        self._active_count += page_index not in pages
        pages[page_index] = Patch(Page(entries), is_whole=True)

    def compose(self, table: TableKey, page_index: int, stored: Entries) -> Entries:
        """Give the page as it stands, over its stored form."""
        for layer in (self._frozen, self._active):
            found = layer.get(table, {}).get(page_index)
            if found is not None:
                stored = found.apply(stored)
        return stored

    def hides(self, table: TableKey, page_index: int) -> bool:
        """Tell whether the stored form of the page does not matter."""
        return any(
            found.is_whole
            for layer in (self._frozen, self._active)
            if (found := layer.get(table, {}).get(page_index)) is not None
        )

    def is_changed(self, table: TableKey, page_index: int) -> bool:
        """Tell whether a page has changes."""
        return any(page_index in layer.get(table, ()) for layer in (self._frozen, self._active))

    def pages(self, table: TableKey) -> Iterator[int]:
        """Yield the indexes of changed pages, in no order, some twice."""
        for layer in (self._frozen, self._active):
            yield from layer.get(table, ())

    def freeze(self) -> Layer:
        """Start a checkpoint: what is active becomes frozen, and is returned."""
        assert not self._frozen, "one checkpoint at a time"
        self._frozen, self._active = self._active, {}
        self._frozen_count, self._active_count = self._active_count, 0
        return self._frozen

    def thaw(self) -> None:
        """Forget the frozen layer: a checkpoint has made it durable."""
        self._frozen = {}
        self._frozen_count = 0

    @property
    def page_count(self) -> int:
        """Changed pages held in memory."""
        return self._frozen_count + self._active_count
