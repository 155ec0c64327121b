"""When, in a writer's history, was what is found after a cut?

A ``Diary`` is a ``Model`` that notes, beside each step and each acknowledgement, how far something outside had come:
the events of a recording filesystem, or the clock.  ``Moments`` then says for any later point of that which steps must
be there, and finds the one moment that explains what was found.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path

from incfs.options import Options
from incfs.recovery import open_store
from incfs.store import Store
from tests.support import pools
from tests.support.fire import VOLUMES
from tests.support.stamps import Cell, Model, read_sequences


class Diary(Model):
    """A model that notes when things happened.

    Args:
        sector_counts: As of ``Model``.
        now: How far the outside has come.
    """

    def __init__(self, sector_counts: list[int], now: Callable[[], float]) -> None:
        super().__init__(sector_counts)
        self._now = now
        self.begun: list[float] = []
        """When each step was asked for."""
        self.acks: list[tuple[float, int]] = []
        """(when, how many steps) was acknowledged."""

    def _step(self, cells: dict[Cell, int]) -> None:
        self.begun.append(self._now())
        super()._step(cells)

    def acknowledge(self, volumes: Iterable[int] = ()) -> None:
        super().acknowledge(volumes)
        self.acks.append((self._now(), self.acknowledged))


class Moments:
    """Explains what is found at cuts, which come in rising order."""

    def __init__(self, diary: Diary) -> None:
        self._diary = diary
        self._expected = dict(diary._base)
        self._count = 0

    def explain(self, found: dict[Cell, int], cut: float, cut_ended: float | None = None) -> int:
        """Give how many steps after the acknowledged ones were found.

        Args:
            found: What there is.
            cut: What was acknowledged before this must be there.
            cut_ended: What was asked for after this cannot be there; ``cut`` without it.
        """
        acked = bisect_right(self._diary.acks, (cut, float("inf")))
        self._advance(self._diary.acks[acked - 1][1] if acked else 0)
        latest = bisect_right(self._diary.begun, cut if cut_ended is None else cut_ended)
        wrong = {key for key in found.keys() | self._expected.keys() if found.get(key, 0) != self._expected.get(key, 0)}
        for count, step in enumerate(self._diary.steps[self._count : latest]):
            if not wrong:
                return count
            for key, value in step.cells.items():
                (wrong.discard if found.get(key, 0) == value else wrong.add)(key)
        assert not wrong, (
            f"no moment of steps {self._count} to {latest} explains it; at the last, {len(wrong)} cells differ: "
            + ", ".join(f"{key} is {found.get(key, 0)}" for key in sorted(wrong, key=str)[:10])
        )
        return latest - self._count

    def _advance(self, count: int) -> None:
        assert count >= self._count, "cuts come in rising order"
        for step in self._diary.steps[self._count : count]:
            self._expected |= step.cells
        self._count = count


def recover_twice(pool: Path, diary: Diary) -> dict[Cell, int]:
    """Open a pool that was cut off, prove it whole, and give what it holds; the second time it is the same."""
    found = []
    for _ in range(2):
        store = open_store(pool, Options())
        try:
            found.append(_found_in(store, diary))
            report = pools.run_check(store)
            assert report.is_clean, report.problems
        finally:
            store.abandon()
    assert found[0] == found[1], "a second recovery gives something else"
    return found[0]


def _found_in(store: Store, diary: Diary) -> dict[Cell, int]:
    """Read all of an open pool; snapshots must be what they were taken of."""
    cells: dict[Cell, int] = {}
    for number, name in enumerate(VOLUMES):
        volume = store.catalog.volume_named(name)
        data = pools.read(store, volume.map_id)
        cells["size", number] = len(data)
        cells |= {("sector", number, i): s for i, s in enumerate(read_sequences(number, data))}
        for taken in store.catalog.snapshots(volume.id):
            cells["snapshot", number, taken.name] = 1
            expected = diary.frozen[number, taken.name]
            data = pools.read(store, taken.map_id)
            assert len(data) == expected.size_bytes, f"{name}@{taken.name}"
            assert read_sequences(number, data) == expected.sequences, f"{name}@{taken.name}"
    return cells
