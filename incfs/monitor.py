"""Watches how full storage volumes and host filesystems are.  No I/O: it is given readings.

Crossing a mark is told once, and again only after it was left behind by a quarter, so that a
pool that hovers at the mark does not tell it all day.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from incfs.model import StorageId
from incfs.placement import Room
from incfs.units import format_size

WINDOW_S: Final = 3600.0
"""Growth is projected from what was used this long ago."""
_SAMPLE_EVERY_S: Final = 30.0
_SECONDS_TO_TELL: Final = 120.0
"""No projection from less than this much of observation."""
_HYSTERESIS: Final = 1.25


@dataclass(frozen=True, slots=True)
class Notice:
    """A mark that was crossed."""

    kind: str
    subject: str
    reason: str
    facts: dict[str, int]


@dataclass(frozen=True, slots=True)
class HostRoom:
    """How full a host filesystem is."""

    device: int
    path: str
    free_bytes: int
    total_bytes: int
    low_water_bytes: int
    reserve_bytes: int


class Trend:
    """How fast something fills up, over a sliding window."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, used_bytes: int) -> None:
        """Take a sample."""
        if self._samples and now_s - self._samples[-1][0] < _SAMPLE_EVERY_S:
            return
        self._samples.append((now_s, used_bytes))
        while now_s - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()

    def seconds_to_fill(self, free_bytes: int) -> float | None:
        """Project when so much is used up; None when it does not grow, or nobody has watched long enough."""
        if len(self._samples) < 2:
            return None
        (first_s, first), (last_s, last) = self._samples[0], self._samples[-1]
        if last_s - first_s < _SECONDS_TO_TELL or last <= first:
            return None
        return free_bytes * (last_s - first_s) / (last - first)


class Monitor:
    """What was seen so far."""

    def __init__(self) -> None:
        self._trends: dict[StorageId, Trend] = {}
        self._raised: set[tuple[str, str]] = set()

    def seconds_to_fill(self, room: Room) -> float | None:
        """Project when a storage volume is full."""
        trend = self._trends.get(room.storage.id)
        return None if trend is None else trend.seconds_to_fill(room.free_bytes)

    def observe(self, now_s: float, rooms: Iterable[Room], hosts: Iterable[HostRoom]) -> list[Notice]:
        """Take readings; give the marks that were crossed since the last ones."""
        notices: list[Notice] = []
        for room in rooms:
            if not room.is_usable:
                continue
            self._trends.setdefault(room.storage.id, Trend()).add(now_s, room.used_bytes)
            subject = f"storage {room.storage.id}"
            notices += self._cross("low-water", subject, room.free_bytes, room.low_water_bytes)
        for host in hosts:
            subject = f"host filesystem of {host.path}"
            notices += self._cross("host-low-water", subject, host.free_bytes, host.low_water_bytes)
            notices += self._cross("host-reserve", subject, host.free_bytes, host.reserve_bytes)
        return notices

    def _cross(self, kind: str, subject: str, free_bytes: int, mark_bytes: int) -> list[Notice]:
        key = kind, subject
        facts = {"free_bytes": free_bytes, "mark_bytes": mark_bytes}
        if key not in self._raised and free_bytes < mark_bytes:
            self._raised.add(key)
            reason = f"{format_size(free_bytes)} free, less than the mark of {format_size(mark_bytes)}"
            return [Notice(kind, subject, reason, facts)]
        if key in self._raised and free_bytes >= mark_bytes * _HYSTERESIS:
            self._raised.remove(key)
            reason = f"{format_size(free_bytes)} free again; the mark is {format_size(mark_bytes)}"
            return [Notice(f"{kind}-over", subject, reason, facts)]
        return []
