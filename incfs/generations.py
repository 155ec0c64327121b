"""The snapshots of one volume, found by generation, name or uuid at a cost that does not grow with their number.

Pure.  A snapshot without a name is being removed: it is listed only if asked for, and answers to no name.
"""

from bisect import bisect_left, insort

from incfs.model import Generation, Snapshot


class Generations:
    """One volume's snapshots, oldest first.  Owner thread."""

    def __init__(self) -> None:
        self._found: dict[Generation, Snapshot] = {}
        self._order: list[Generation] = []
        self._removed: list[Generation] = []
        self._names: dict[str, Generation] = {}
        self._uuids: dict[str, Generation] = {}

    def put(self, snapshot: Snapshot) -> None:
        """Add a snapshot, or replace the one of the same generation."""
        generation = snapshot.generation
        old = self._found.get(generation)
        if old is None:
            insort(self._order, generation)
        else:
            self._unname(old)
        self._found[generation] = snapshot
        if snapshot.name:
            self._names[snapshot.name] = generation
            self._uuids[snapshot.uuid] = generation
        else:
            insort(self._removed, generation)

    def drop(self, generation: Generation) -> None:
        """Forget a snapshot; one that is not there, too."""
        old = self._found.pop(generation, None)
        if old is not None:
            del self._order[bisect_left(self._order, generation)]
            self._unname(old)

    def _unname(self, old: Snapshot) -> None:
        if not old.name:
            del self._removed[bisect_left(self._removed, old.generation)]
            return
        for index, key in ((self._names, old.name), (self._uuids, old.uuid)):
            if index.get(key) == old.generation:
                del index[key]

    def get(self, generation: Generation) -> Snapshot | None:
        """Look up a snapshot."""
        return self._found.get(generation)

    def named(self, name: str) -> Snapshot | None:
        """Look up a snapshot by name, or by ``uuid:...``."""
        generation = self._names.get(name)
        if generation is None and name.startswith("uuid:"):
            generation = self._uuids.get(name[5:])
        return None if generation is None else self._found[generation]

    def listed(self, *, removed: bool) -> list[Snapshot]:
        """List the snapshots, with those being removed if asked for."""
        found = (self._found[generation] for generation in self._order)
        return [snapshot for snapshot in found if snapshot.name or removed]

    def since(self, generation: Generation) -> list[Generation]:
        """List the generations that still have an increment, from one on."""
        return self._order[bisect_left(self._order, generation) :]

    def before(self, generation: Generation) -> Generation:
        """Give the next older generation that still has an increment, 0 without one."""
        position = bisect_left(self._order, generation)
        return self._order[position - 1] if position else Generation(0)

    @property
    def newest(self) -> Generation:
        """The newest generation that still has an increment, 0 without one."""
        return self._order[-1] if self._order else Generation(0)

    @property
    def removed(self) -> list[Generation]:
        """The generations that are being removed, oldest first."""
        return list(self._removed)
