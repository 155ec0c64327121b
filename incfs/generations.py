"""The snapshots or the bookmarks of one volume, found by generation, name or uuid whatever their number is.

Pure.  One without a name is being removed: it is listed only if asked for, and answers to no name.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection
from typing import Generic, Protocol, TypeVar

from incfs.model import Generation


class Named(Protocol):
    """What has a generation of its own within its volume, and names."""

    @property
    def generation(self) -> Generation:
        """Its number."""

    @property
    def uuid(self) -> str:
        """What it is known by elsewhere."""

    @property
    def names(self) -> Collection[str]:
        """What it is called; none once it is being removed."""


Point = TypeVar("Point", bound=Named)


class Generations(Generic[Point]):
    """One volume's snapshots, or its bookmarks, oldest first.  Owner thread."""

    def __init__(self) -> None:
        self._found: dict[Generation, Point] = {}
        self._order: list[Generation] = []
        self._removed: list[Generation] = []
        self._names: dict[str, Generation] = {}
        self._uuids: dict[str, Generation] = {}

    def put(self, point: Point) -> None:
        """Add one, or replace the one of the same generation."""
        generation = point.generation
        old = self._found.get(generation)
        if old is None:
            insort(self._order, generation)
        else:
            self._unname(old)
        self._found[generation] = point
        if point.names:
            self._names.update(dict.fromkeys(point.names, generation))
            self._uuids[point.uuid] = generation
        else:
            insort(self._removed, generation)

    def drop(self, generation: Generation) -> None:
        """Forget one; one that is not there, too."""
        old = self._found.pop(generation, None)
        if old is not None:
            del self._order[bisect_left(self._order, generation)]
            self._unname(old)

    def _unname(self, old: Point) -> None:
        if not old.names:
            del self._removed[bisect_left(self._removed, old.generation)]
            return
        for index, key in (*((self._names, name) for name in old.names), (self._uuids, old.uuid)):
            if index.get(key) == old.generation:
                del index[key]

    def get(self, generation: Generation) -> Point | None:
        """Look one up."""
        return self._found.get(generation)

    def named(self, name: str) -> Point | None:
        """Look one up by name, or by ``uuid:...``."""
        generation = self._names.get(name)
        if generation is None and name.startswith("uuid:"):
            generation = self._uuids.get(name[5:])
        return None if generation is None else self._found[generation]

    def listed(self, *, removed: bool) -> list[Point]:
        """List all, with those being removed if asked for."""
        found = (self._found[generation] for generation in self._order)
        return [point for point in found if point.names or removed]

    def since(self, generation: Generation) -> list[Generation]:
        """List the generations from one on, with those being removed: they still have an increment, or a trail."""
        return self._order[bisect_left(self._order, generation) :]

    def before(self, generation: Generation) -> Generation:
        """Give the next older generation, 0 without one; one that is being removed counts."""
        position = bisect_left(self._order, generation)
        return self._order[position - 1] if position else Generation(0)

    def newest_named(self, generation: Generation) -> Generation:
        """Give the newest generation up to one that is not being removed, 0 without one."""
        for position in range(bisect_right(self._order, generation) - 1, -1, -1):
            if self._found[self._order[position]].names:
                return self._order[position]
        return Generation(0)

    @property
    def newest(self) -> Generation:
        """The newest generation, 0 without one; one that is being removed counts."""
        return self._order[-1] if self._order else Generation(0)

    @property
    def removed(self) -> list[Generation]:
        """The generations that are being removed, oldest first."""
        return list(self._removed)
