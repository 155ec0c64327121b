"""From samples to medians, ratios and goals.  Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

Key = tuple[str, str, str, str]
"""(place, access, job, metric)."""


@dataclass(frozen=True, slots=True)
class Result:
    """The samples of one subject in one line."""

    values: dict[int, float]
    """Round -> value."""
    unit: str
    is_rate: bool

    @property
    def median(self) -> float:
        """The middle."""
        return median(self.values.values())

    @property
    def spread(self) -> float:
        """Distance of the extremes, as a part of the median."""
        return (max(self.values.values()) - min(self.values.values())) / self.median if self.median else 0.0


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast a subject is as a peer: of the medians, and the extremes over the rounds."""

    value: float
    low: float
    high: float


Results = dict[Key, dict[str, Result]]


def collect(samples: Iterable[dict[str, Any]]) -> Results:
    """Gather the samples of each line and subject."""
    results: Results = {}
    for sample in samples:
        key = (sample["place"], sample["access"], sample["job"], sample["metric"])
        line = results.setdefault(key, {})
        result = line.setdefault(sample["subject"], Result({}, sample["unit"], sample["is_rate"]))
        result.values[sample["round"]] = sample["value"]
    return results


def ratio(subject: Result, peer: Result) -> Ratio:
    """Compare two subjects; more is always better."""
    each = [
        _quotient(subject, value, peer.values[number])
        for number, value in subject.values.items()
        if number in peer.values
    ]
    of_medians = _quotient(subject, subject.median, peer.median)
    return Ratio(of_medians, min(each, default=of_medians), max(each, default=of_medians))


def _quotient(subject: Result, mine: float, others: float) -> float:
    upper, lower = (mine, others) if subject.is_rate else (others, mine)
    return upper / lower if lower else float("inf")


@dataclass(frozen=True, slots=True)
class Goal:
    """What is aimed at: ``subjects`` at least ``at_least`` times as fast as ``peer``."""

    work: str
    key: Key
    peer: str
    at_least: float
    subjects: tuple[str, ...] = ("incfs-native", "incfs-python")
    peer_metric: str = ""
    """Compared with this metric of the subject itself instead of with a peer."""


_NATIVE: Final = "incfs-native"
_PYTHON: Final = "incfs-python"


def _of(work: str, place: str, job: str, peer: str, at_least: float, access: str = "file") -> Goal:
    """Make a goal of the native plane; the Python plane's peer is the binding's own pass-through."""
    key = (place, access, job, "tps" if job == "pgbench" else "rate")
    return Goal(work, key, peer, at_least, (_NATIVE,))


def _floors(results: Results) -> list[Goal]:
    """Both pass-throughs on every fio job, where both were measured."""
    pairs = (("floor-threads", 0.7, _NATIVE), ("floor-pyfuse3", 0.75, _PYTHON))
    return [
        Goal(f"{key[2]}, {key[1]}, {key[0]}", key, floor, at_least, (subject,))
        for key, line in results.items()
        for floor, at_least, subject in pairs
        if key[3] == "rate" and floor in line and subject in line
    ]


def goals(results: Results) -> list[Goal]:
    """List every goal."""
    fixed = [
        *(
            _of(f"4 KiB random {kind}, direct, depth {depth}, {place}",
                place, f"rand{kind}-4k-qd{depth}", "qemu", least)
            for place, depth, least in (("tmpfs", 16, 3), ("tmpfs", 1, 2.5), ("disk", 16, 1.5))
            for kind in ("read", "write")
        ),
        *(
            _of(f"4 KiB random write, direct, depth {depth}, right after a snapshot, {place}", place,
                f"overwrite-snapshotted-qd{depth}", "qemu", 5)
            for place in ("tmpfs", "disk")
            for depth in (1, 16)
        ),
        *(
            _of(f"1 MiB sequential {kind}, direct, {place}", place, f"{kind}-1m", "qemu", least)
            for place in ("tmpfs", "disk")
            for kind, least in (("read", 3), ("write", 1.5))
        ),
        *(_of(f"4 KiB random buffered write, {p}", p, "randwrite-4k-buffered", "qemu", 8) for p in ("tmpfs", "disk")),
        _of("4 KiB write + fsync, 1 job, disk", "disk", "fsync-4k-1", "qemu", 2),
        _of("4 KiB write + fsync, 1 job, disk", "disk", "fsync-4k-1", "plain", 1.0),
        _of("4 KiB write + fsync, 8 jobs, disk", "disk", "fsync-4k-8", "qemu", 3),
        *(
            _of(f"pgbench, {access}, {place}", place, "pgbench", "qemu", 1.5, access)
            for place in ("tmpfs", "disk")
            for access in ("loop-direct", "loop-buffered")
        ),
    ]  # fmt: skip
    own = [
        goal
        for place in ("tmpfs", "disk")
        for goal in (
            Goal(f"snapshot of a full volume, {place}", (place, "file", "snapshot", "make-full"),
                 "itself, empty", 1 / 1.2, peer_metric="make-empty"),
            Goal(f"live read with 1,000 snapshots, {place}", (place, "file", "thousand-snapshots", "thousand"),
                 "itself, none", 0.95, peer_metric="none"),
        )
    ]  # fmt: skip
    stalls = [
        Goal(f"4 KiB random {kind}, depth {depth}, slowest but 1 in 1,000 while checkpoints run, {place}",
             (place, "file", "checkpoints", f"{kind}-qd{depth}-p99.9"), "20 ms", 1.0, peer_metric="limit")
        for place in ("tmpfs", "disk")
        for kind in ("write", "read")
        for depth in (1, 16)
    ]  # fmt: skip
    return [*fixed, *own, *stalls, *_floors(results)]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal and what was measured of it."""

    goal: Goal
    subject: str
    measured: Ratio

    @property
    def is_met(self) -> bool:
        """Whether the ratio of the medians reaches the goal."""
        return self.measured.value >= self.goal.at_least


def judge(results: Results) -> list[Verdict]:
    """Compare what was measured with the goals; what was not measured is left out."""
    verdicts = []
    for goal in goals(results):
        line = results.get(goal.key, {})
        for subject in goal.subjects:
            peers = results.get((*goal.key[:3], goal.peer_metric), {}) if goal.peer_metric else line
            peer = peers.get(subject if goal.peer_metric else goal.peer)
            if subject in line and peer is not None:
                verdicts.append(Verdict(goal, subject, ratio(line[subject], peer)))
    return verdicts
