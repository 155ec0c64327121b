"""How often operations ran and how long they took.  Pure."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Final

BUCKETS_S: Final = tuple((1 << bits) / 1e9 for bits in range(12, 36, 2))
"""Upper bounds of the duration histogram, 4 us to 17 s; a last bucket has none.  As in fuse_hot.h."""


class Histogram:
    """How often an operation ran and how long it took."""

    __slots__ = ("counts", "sum_s")

    def __init__(self, counts: Sequence[int] = (0,) * (len(BUCKETS_S) + 1), sum_s: float = 0.0) -> None:
        assert len(counts) == len(BUCKETS_S) + 1
        self.counts = list(counts)
        self.sum_s = sum_s

    def add(self, duration_s: float) -> None:
        """Count one run."""
        self.counts[bisect_left(BUCKETS_S, duration_s)] += 1
        self.sum_s += duration_s


def merge(*parts: Mapping[str, Histogram]) -> dict[str, Histogram]:
    """Add up histograms of the same operation, ordered by its name."""
    merged: dict[str, Histogram] = {}
    for part in parts:
        for name, histogram in part.items():
            before = merged.get(name, Histogram())
            counts = [a + b for a, b in zip(before.counts, histogram.counts, strict=True)]
            merged[name] = Histogram(counts, before.sum_s + histogram.sum_s)
    return dict(sorted(merged.items()))
