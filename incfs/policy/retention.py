"""Which snapshots of a volume stay, each with its reasons.  Pure.

Rules:
    1. Only snapshots that the policy made are counted and pruned (all of them with
       ``prune = "all"``).
    2. The rules of ``keep`` are ORed.  A natural period keeps its newest snapshot, and the
       newest N periods *that have one* count: a pause, or a wrong clock, does not empty the grid.
    3. ``within`` is measured from the newest snapshot, not from now, for the same reason.
    4. A snapshot dated later than now is kept and counts for nothing.
    5. Never pruned: what is held, the origin of a clone, the newest snapshot that a replica has
       too, and what a replica's own rules want of what it has not got yet.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from functools import lru_cache

from incfs.policy.facts import ReplicaFacts, SnapshotFacts, VolumeFacts
from incfs.policy.periods import PERIODS, moment, nanoseconds, period_start
from incfs.policy.rules import ALL, Keep
from incfs.units import format_duration

Reasons = dict[str, list[str]]
"""UUID of a snapshot -> why it is kept."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a snapshot and why."""

    snapshot: SnapshotFacts
    is_kept: bool
    reasons: tuple[str, ...]
    is_protected: bool = False
    """Kept whatever the rules say, also when space is short."""
    is_counted: bool = True
    """The rules look at it."""


def newest_first(snapshots: Iterable[SnapshotFacts]) -> list[SnapshotFacts]:
    """Sort by time; of the same time, by generation."""
    return sorted(snapshots, key=lambda s: (s.created_ns, s.generation), reverse=True)


def select(snapshots: Iterable[SnapshotFacts], keep: Keep, zone: tzinfo) -> Reasons:
    """Give the snapshots that a set of rules wants, each with the rules that do."""
    ordered = newest_first(snapshots)
    reasons: Reasons = {}
    for number, snapshot in enumerate(ordered[: keep.last], 1):
        reasons.setdefault(snapshot.uuid, []).append(_counted("last", number, keep.last))
    for period in PERIODS:
        for number, snapshot in enumerate(_newest_of_periods(ordered, period, keep.count(period), zone), 1):
            reasons.setdefault(snapshot.uuid, []).append(_counted(period, number, keep.count(period)))
    for snapshot in ordered if keep.within_s else ():
        if snapshot.created_ns >= ordered[0].created_ns - keep.within_s * 1_000_000_000:
            reasons.setdefault(snapshot.uuid, []).append(f"within {format_duration(keep.within_s)} of the newest")
    return reasons


def _counted(rule: str, number: int, count: int) -> str:
    return f"{rule} {number} of {'all' if count == ALL else count}"


def _newest_of_periods(ordered: Sequence[SnapshotFacts], period: str, count: int, zone: tzinfo) -> list[SnapshotFacts]:
    found: list[SnapshotFacts] = []
    start_ns: int | None = None
    for snapshot in ordered if count else ():
        # From newest to oldest: what is not before the period's start is in it, and the calendar need not be asked.
        if start_ns is not None and snapshot.created_ns >= start_ns:
            continue
        if len(found) == count:
            break
        found.append(snapshot)
        start_ns = _period_of(snapshot.created_ns, period, zone)
    return found


@lru_cache(maxsize=1 << 16)
def _period_of(created_ns: int, period: str, zone: tzinfo) -> int:
    """The same few hundred snapshots are asked about in each run, and a zone's calendar takes 10 us."""
    return nanoseconds(period_start(moment(created_ns), period, zone))


def protections(volume: VolumeFacts, zone: tzinfo) -> Reasons:
    """Give the snapshots of a volume that must not go, each with what needs it."""
    reasons: Reasons = {}
    for snapshot in volume.snapshots:
        why = [f"held: {tag}" for tag in snapshot.holds] + [f"origin of {name}" for name in snapshot.clones]
        if why:
            reasons[snapshot.uuid] = why
    for replica in volume.replicas:
        for uuid, reason in _needs(volume, replica, zone):
            reasons.setdefault(uuid, []).append(reason)
    return reasons


def _needs(volume: VolumeFacts, replica: ReplicaFacts, zone: tzinfo) -> Iterable[tuple[str, str]]:
    common = next((s for s in volume.snapshots if s.uuid == replica.common_uuid), None)
    if common is not None:
        yield common.uuid, f"latest common snapshot with {replica.target}"
    if replica.keep is not None:
        newer = [s for s in volume.snapshots if common is None or s.generation >= common.generation]
        for uuid in select(newer, replica.keep, zone):
            if common is None or uuid != common.uuid:
                yield uuid, f"{replica.target} still needs it"


def decide(
    volume: VolumeFacts, keep: Keep | None, zone: tzinfo, now_ns: int, *, prune_all: bool = False
) -> list[Decision]:
    """Decide on every snapshot of a volume, oldest first.

    Args:
        volume: The volume.
        keep: Its rules; None keeps everything.
        zone: Of the natural periods.
        now_ns: The time, in ns since 1970.
        prune_all: Count and prune also what the policy has not made.
    """
    protected = protections(volume, zone)
    counted = [s for s in volume.snapshots if _why_uncounted(s, now_ns, prune_all=prune_all) is None]
    wanted = {s.uuid: ['keep = "all"'] for s in counted} if keep is None else select(counted, keep, zone)
    return [
        _decision(s, protected.get(s.uuid, []), _why_uncounted(s, now_ns, prune_all=prune_all), wanted.get(s.uuid, []))
        for s in reversed(newest_first(volume.snapshots))
    ]


def _why_uncounted(snapshot: SnapshotFacts, now_ns: int, *, prune_all: bool) -> str | None:
    if snapshot.created_ns > now_ns:
        return "dated later than now"
    return None if snapshot.is_policy or prune_all else "not made by the policy"


def _decision(snapshot: SnapshotFacts, protected: list[str], uncounted: str | None, wanted: list[str]) -> Decision:
    reasons = (*protected, *([uncounted] if uncounted else ()), *wanted)
    return Decision(
        snapshot,
        is_kept=bool(reasons),
        reasons=reasons or ("no rule keeps it",),
        is_protected=bool(protected or uncounted),
        is_counted=uncounted is None,
    )


def spare(decisions: Sequence[Decision], keep: Keep | None) -> list[Decision]:
    """Give what may go when space is short, oldest first: all but the protected and the newest.

    At least the newest one stays, and as many as ``last`` says.
    """
    counted = [d for d in decisions if d.is_kept and d.is_counted]
    newest = 1 if keep is None else max(1, keep.last)
    return [d for d in counted[:-newest] if not d.is_protected]
