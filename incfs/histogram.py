"""How often operations ran and how long they took.  Pure."""

from bisect import bisect_left
from typing import Final

BUCKETS_S: Final = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
"""Upper bounds of the duration histogram; a last bucket has none."""


class Histogram:
    """How often an operation ran and how long it took."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def add(self, duration_s: float) -> None:
        """Count one run."""
        self.counts[bisect_left(BUCKETS_S, duration_s)] += 1
        self.sum_s += duration_s
