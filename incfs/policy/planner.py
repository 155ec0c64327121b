"""Rules, a pool's facts and the time in; a plan out.  Pure.

Clocks: what is due is compared with the last run, so that a missed run is caught up once. A
last run that lies in the future (the clock was set back) counts as now: the next due time
comes as if nothing had been.  When the clock is more than eight days ahead of the last plan,
nothing is pruned for a day: whoever set it wrongly has that day, and a pool that was really
away for so long loses nothing by waiting.

Scrubs and moves take long and disturb: of those, what was missed before the policy was set is not caught up.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, tzinfo
from typing import Final

from incfs.policy.document import PolicyDocument
from incfs.policy.effective import rules_for, rules_for_pool
from incfs.policy.facts import PoolFacts, SnapshotFacts, VolumeFacts
from incfs.policy.periods import moment, nanoseconds
from incfs.policy.plan import Action, Plan, Prune, TakeSnapshots, Work
from incfs.policy.retention import Decision, decide, spare
from incfs.policy.rules import Hooks, PoolRules, VolumeRules
from incfs.policy.schedule import Schedule
from incfs.units import format_size

CLOCK: Final = "clock"
"""The run of the last plan."""
NO_PRUNE_UNTIL: Final = "no prune until"
_DAY_NS: Final = 86400 * 1_000_000_000
_JUMP_NS: Final = 8 * _DAY_NS

Group = tuple[Schedule, Hooks]
"""Volumes that share both are taken at one point in time."""


@dataclass(slots=True)
class _Runs:
    """Which tasks are due, and when each has run."""

    zone: tzinfo
    now: datetime
    before: Mapping[str, int]
    after: dict[str, int] = field(default_factory=dict)
    following: list[datetime] = field(default_factory=list)

    def why_due(self, task: str, schedule: Schedule, *, since_ns: int = 0) -> str | None:
        """Note a run if it is due; give the reason, or None.

        What has never run is not due for what was missed before ``since_ns``.
        """
        self.following.append(schedule.following(self.now, self.zone))
        now_ns = nanoseconds(self.now)
        last_ns = self.before.get(task)
        due = schedule.latest(self.now, self.zone)
        if last_ns is None and nanoseconds(due) <= min(since_ns, now_ns):
            return None
        if last_ns is not None and min(last_ns, now_ns) >= nanoseconds(due):
            self.after[task] = min(last_ns, now_ns)
            return None
        self.after[task] = now_ns
        since = "never ran" if last_ns is None else f"last ran {moment(last_ns):%Y-%m-%dT%H:%MZ}"
        return f"{schedule.text}: due since {due:%Y-%m-%dT%H:%MZ}, {since}"


def plan(policy: PolicyDocument, facts: PoolFacts, now_ns: int) -> Plan:
    """Plan what is to be done now.

    Pruning takes the snapshots of this very plan for taken: whoever carries it out leaves the
    prunes of a volume whose snapshot failed.
    """
    pool = rules_for_pool(policy)
    rules = {volume.name: rules_for(policy, volume.name) for volume in facts.volumes}
    runs = _Runs(pool.timezone, moment(now_ns), facts.runs)
    taken = list(_snapshots(rules, facts, runs, now_ns))
    notes, may_prune = _guard_clock(runs, now_ns)
    pruned = list(_prunes(pool, rules, _with_taken(facts, taken, now_ns), now_ns)) if may_prune else []
    actions: list[Action] = [*taken, *pruned, *_works(pool, rules, runs, facts.set_ns)]
    next_due = min(runs.following, default=None)
    return Plan(tuple(actions), runs.after, None if next_due is None else nanoseconds(next_due), notes)


def _snapshots(rules: Mapping[str, VolumeRules], facts: PoolFacts, runs: _Runs, now_ns: int) -> Iterator[TakeSnapshots]:
    groups: dict[Group, list[VolumeFacts]] = {}
    for volume in facts.volumes:
        rule = rules[volume.name]
        if rule.schedule is not None:
            groups.setdefault((rule.schedule, rule.hooks), []).append(volume)
    for (schedule, hooks), members in groups.items():
        reason = runs.why_due(_task_of(schedule, hooks), schedule)
        if reason is not None:
            yield TakeSnapshots(tuple(v.name for v in members), _free_name(members, now_ns), hooks, reason)


@dataclass(frozen=True, slots=True)
class FirstRun:
    """A work that a policy wants and that has never been done."""

    task: str
    due_ns: int
    """When it is for the first time."""


def first_runs(policy: PolicyDocument, facts: PoolFacts, now_ns: int) -> list[FirstRun]:
    """Tell when scrubs and moves that are new will begin: at their next due time, not when the policy is set."""
    pool = rules_for_pool(policy)
    rules = {volume.name: rules_for(policy, volume.name) for volume in facts.volumes}
    return [
        FirstRun(task, nanoseconds(schedule.following(moment(now_ns), pool.timezone)))
        for task, schedule, _ in _moves(pool, rules)
        if task not in facts.runs
    ]


def _works(pool: PoolRules, rules: Mapping[str, VolumeRules], runs: _Runs, set_ns: int) -> Iterator[Work]:
    for task, schedule, work in _moves(pool, rules):
        if reason := runs.why_due(task, schedule, since_ns=set_ns):
            yield replace(work, reason=reason)
    targets: dict[tuple[Schedule, str], list[str]] = {}
    for name, rule in rules.items():
        for replica in rule.replicate:
            if replica.every is not None:
                targets.setdefault((replica.every, replica.to), []).append(name)
    for (schedule, to), names in targets.items():
        if reason := runs.why_due(f"replicate to {to} {schedule.text}", schedule):
            yield Work("replicate", tuple(names), None, reason, to)


def _moves(pool: PoolRules, rules: Mapping[str, VolumeRules]) -> Iterator[tuple[str, Schedule, Work]]:
    """Give what reads or moves much of the pool: the task, when it is due, the work."""
    for kind, schedule in (("scrub", pool.scrub), ("balance", pool.balance)):
        if schedule is not None:
            yield kind, schedule, Work(kind, (), pool.move_rate_bytes, "")
    groups: dict[Schedule, list[str]] = {}
    for name, rule in rules.items():
        if rule.migrate is not None:
            groups.setdefault(rule.migrate, []).append(name)
    for schedule, names in groups.items():
        yield f"migrate {schedule.text}", schedule, Work("migrate", tuple(names), pool.move_rate_bytes, "")


def _task_of(schedule: Schedule, hooks: Hooks) -> str:
    around = f" between {shlex.join(hooks.before)} and {shlex.join(hooks.after)}" if hooks else ""
    return f"snapshot {schedule.text}{around}"


def snapshot_name(now_ns: int) -> str:
    """Name a snapshot by its time."""
    return f"auto-{moment(now_ns):%Y-%m-%dT%H%MZ}"


def _free_name(volumes: list[VolumeFacts], now_ns: int) -> str:
    taken = {snapshot.name for volume in volumes for snapshot in volume.snapshots}
    name, number = snapshot_name(now_ns), 1
    while name in taken:
        number += 1
        name = f"{snapshot_name(now_ns)}.{number}"
    return name


def _guard_clock(runs: _Runs, now_ns: int) -> tuple[tuple[str, ...], bool]:
    seen_ns = runs.before.get(CLOCK, now_ns)
    until_ns = min(runs.before.get(NO_PRUNE_UNTIL, 0), now_ns + _DAY_NS)
    if now_ns > seen_ns + _JUMP_NS:
        until_ns = now_ns + _DAY_NS
    runs.after[CLOCK] = now_ns
    if until_ns <= now_ns:
        return (), True
    runs.after[NO_PRUNE_UNTIL] = until_ns
    until = f"{moment(until_ns):%Y-%m-%dT%H:%MZ}"
    return (f"nothing is pruned until {until}: the clock went ahead by more than 8 days, or the pool was away",), False


def _with_taken(facts: PoolFacts, taken: list[TakeSnapshots], now_ns: int) -> PoolFacts:
    names = {volume: action.name for action in taken for volume in action.volumes}
    return replace(facts, volumes=tuple(_with_one(v, names.get(v.name), now_ns) for v in facts.volumes))


def _with_one(volume: VolumeFacts, name: str | None, now_ns: int) -> VolumeFacts:
    if name is None:
        return volume
    generation = max((s.generation for s in volume.snapshots), default=0) + 1
    return replace(volume, snapshots=(*volume.snapshots, SnapshotFacts(name, "to be taken", now_ns, generation)))


def decisions_for(rule: VolumeRules, volume: VolumeFacts, zone: tzinfo, now_ns: int) -> list[Decision]:
    """Decide on every snapshot of a volume by its rules, oldest first."""
    return decide(volume, rule.keep, zone, now_ns, prune_all=rule.prune_all)


def _prunes(pool: PoolRules, rules: Mapping[str, VolumeRules], facts: PoolFacts, now_ns: int) -> Iterator[Prune]:
    freed_bytes = 0
    spares: list[tuple[str, SnapshotFacts]] = []
    for volume in facts.volumes:
        rule = rules[volume.name]
        decisions = decisions_for(rule, volume, pool.timezone, now_ns)
        for decision in decisions:
            if not decision.is_kept:
                freed_bytes += decision.snapshot.held_bytes
                yield _prune(volume.name, decision.snapshot, decision.reasons[0])
        if rule.prune_when_low:
            spares += [(volume.name, d.snapshot) for d in spare(decisions, rule.keep)]
    missing_bytes = pool.settings.low_water.of(facts.capacity_bytes) - facts.free_bytes
    spares.sort(key=lambda pair: (pair[1].created_ns, pair[0]))
    for name, snapshot in spares:
        if freed_bytes >= missing_bytes:
            return
        freed_bytes += snapshot.held_bytes
        yield _prune(name, snapshot, f"space is short: {format_size(facts.free_bytes)} free, low water is above")


def _prune(volume: str, snapshot: SnapshotFacts, reason: str) -> Prune:
    return Prune(volume, snapshot.name, snapshot.uuid, snapshot.held_bytes, reason)
