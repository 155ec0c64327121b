"""What a run of the tests has tried, counted over all of its tests and printed at its end."""

from collections import Counter


class Figures(Counter[str]):
    """Counts by name; some count distinct things."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, set[bytes]] = {}

    def count_once(self, name: str, digest: bytes) -> None:
        """Count a thing unless it was counted before."""
        seen = self._seen.setdefault(name, set())
        if digest not in seen:
            seen.add(digest)
            self[name] += 1


FIGURES = Figures()
