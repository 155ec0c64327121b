"""Plans: a year of hourly runs, missed runs, clocks that jump, space that is short."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import ClassVar
from zoneinfo import ZoneInfo

import pytest

from incfs.policy.document import parse_policy
from incfs.policy.facts import PoolFacts, ReplicaFacts, SnapshotFacts, VolumeFacts
from incfs.policy.periods import moment, nanoseconds
from incfs.policy.plan import Plan, Prune, TakeSnapshots, Work
from incfs.policy.planner import first_runs, plan
from incfs.policy.rules import Keep

START = datetime(2026, 1, 1, 0, 0, 20, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


class Simulated:
    """A pool that does what plans say."""

    def __init__(self, text: str, *volumes: str, held_bytes: int = 0) -> None:
        self.policy = parse_policy(text)
        self.facts = PoolFacts(tuple(VolumeFacts(name) for name in volumes))
        self.held_bytes = held_bytes
        self.made = 0

    def run(self, when: datetime) -> Plan:
        """Plan and carry out."""
        made = plan(self.policy, self.facts, nanoseconds(when))
        for action in made.actions:
            if isinstance(action, TakeSnapshots):
                self.facts = replace(
                    self.facts, volumes=tuple(self._taken(v, action, when) for v in self.facts.volumes)
                )
        for action in made.actions:
            if isinstance(action, Prune):
                self.facts = replace(self.facts, volumes=tuple(self._pruned(v, action) for v in self.facts.volumes))
        self.facts = replace(self.facts, runs=made.runs)
        return made

    def _taken(self, volume: VolumeFacts, action: TakeSnapshots, when: datetime) -> VolumeFacts:
        if volume.name not in action.volumes:
            return volume
        self.made += 1
        assert action.name not in [s.name for s in volume.snapshots]
        new = SnapshotFacts(action.name, f"u{self.made}", nanoseconds(when), self.made, self.held_bytes)
        return replace(volume, snapshots=(*volume.snapshots, new))

    @staticmethod
    def _pruned(volume: VolumeFacts, action: Prune) -> VolumeFacts:
        if volume.name != action.volume:
            return volume
        left = tuple(s for s in volume.snapshots if s.uuid != action.uuid)
        assert len(left) == len(volume.snapshots) - 1
        return replace(volume, snapshots=left)

    def volume(self, name: str = "db") -> VolumeFacts:
        """Look one up."""
        return next(v for v in self.facts.volumes if v.name == name)

    def replicas(self, *replicas: ReplicaFacts) -> None:
        """Say who has what."""
        self.facts = replace(self.facts, volumes=tuple(replace(v, replicas=replicas) for v in self.facts.volumes))

    def times(self) -> list[datetime]:
        """List when the snapshots of ``db`` were taken."""
        return [moment(s.created_ns) for s in self.volume().snapshots]


class Grid:
    """The documented grid, said in another way: of all snapshots ever taken, by the calendar's own names."""

    FORMS: ClassVar = {
        "hourly": "%Y-%m-%d %H %z",
        "daily": "%Y-%m-%d",
        "weekly": "%G-%V",
        "monthly": "%Y-%m",
        "yearly": "%Y",
    }

    def __init__(self, zone: ZoneInfo) -> None:
        self.zone = zone
        self.ever: list[tuple[datetime, dict[str, str]]] = []
        self.newest: dict[str, dict[str, datetime]] = {rule: {} for rule in self.FORMS}

    def add(self, when: datetime) -> None:
        """Take a snapshot."""
        names = {rule: when.astimezone(self.zone).strftime(form) for rule, form in self.FORMS.items()}
        self.ever.append((when, names))
        for rule, name in names.items():
            self.newest[rule][name] = when

    def wanted(self, rules: dict[str, int]) -> set[datetime]:
        """List what a policy keeps."""
        last = [when for when, _ in self.ever[-60:]]
        wanted = set(last[-rules["last"] :]) | {w for w in last if w >= last[-1] - timedelta(days=rules["days"])}
        return wanted.union(*(list(self.newest[rule].values())[-rules[rule] :] for rule in self.FORMS))

    def since(self, first: datetime, rule: str, count: int) -> set[datetime]:
        """List the newest of each of the newest periods that have one since a time."""
        return set(list({names[rule]: when for when, names in self.ever if when >= first}.values())[-count:])


RULES = {"last": 3, "hourly": 24, "daily": 7, "weekly": 5, "monthly": 6, "yearly": 2, "days": 2}
KEEP = 'keep = { last = 3, hourly = 24, daily = 7, weekly = 5, monthly = 6, yearly = 2, within = "2d" }'


@pytest.mark.slow
def test_a_year_of_hourly_runs_is_the_documented_grid() -> None:
    """Replicas come and go, the pool is away for days; leap day, ends of years, both changes of the clocks."""
    zone = ZoneInfo("Europe/Berlin")
    pool = Simulated(f'[pool]\ntimezone = "Europe/Berlin"\n[volume."*"]\nschedule = "hourly"\n{KEEP}\n', "db")
    hungry = Keep(daily=5, monthly=2)
    ever = Grid(zone)
    near, far = ReplicaFacts("near"), ReplicaFacts("far", keep=hungry)
    start = datetime(2027, 12, 1, 0, 0, 20, tzinfo=UTC)
    for hour in range(366 * 24):
        now = start + hour * HOUR
        day = hour // 24
        if 100 <= day < 104:
            continue  # switched off
        made = pool.run(now)
        assert [a.name for a in made.actions if isinstance(a, TakeSnapshots)] == [f"auto-{now:%Y-%m-%dT%H%MZ}"]
        assert made.next_due_ns == nanoseconds(now.replace(second=0) + HOUR)
        ever.add(now)
        if hour and (hour % 23 == 0 or day in {88, 119, 330}):
            check_grid(pool, ever, near, far)
        newest = pool.volume().snapshots[-1]
        # One is away in most weeks, the other from March to October.
        if day // 7 % 4 == 0:
            near = replace(near, common_uuid=newest.uuid)
        if day < 90 or day > 320:
            far = replace(far, common_uuid=newest.uuid)
        pool.replicas(near, far)


def check_grid(pool: Simulated, ever: Grid, near: ReplicaFacts, far: ReplicaFacts) -> None:
    when_of = {s.uuid: moment(s.created_ns) for s in pool.volume().snapshots}
    common = when_of[str(far.common_uuid)]
    wanted = ever.wanted(RULES) | {when_of[str(near.common_uuid)], common}
    wanted |= ever.since(common, "daily", 5) | ever.since(common, "monthly", 2)
    assert set(pool.times()) == wanted, sorted(set(pool.times()) ^ wanted)


HOURLY = '[volume."*"]\nschedule = "hourly"\nkeep = { last = 100 }\n'


def test_missed_runs_are_caught_up_once() -> None:
    pool = Simulated(HOURLY, "db")
    assert len(pool.run(START).actions) == 1
    assert pool.run(START + HOUR / 2).actions == ()
    (action,) = pool.run(START + 5.5 * HOUR).actions
    assert action.reason == "hourly: due since 2026-01-01T05:00Z, last ran 2026-01-01T00:00Z"
    assert pool.run(START + 5.6 * HOUR).actions == ()
    assert len(pool.run(START + 6 * HOUR).actions) == 1


def test_groups_share_a_schedule_and_hooks() -> None:
    text = HOURLY + '[volume."b*"]\nbefore = ["/bin/true"]\n[volume."c"]\nschedule = "never"\n'
    pool = Simulated(text, "a1", "a2", "b1", "b2", "c")
    taken = [a for a in pool.run(START).actions if isinstance(a, TakeSnapshots)]
    assert [(a.volumes, a.hooks.before) for a in taken] == [(("a1", "a2"), ()), (("b1", "b2"), ("/bin/true",))]
    assert len({a.name for a in taken}) == 1


@pytest.mark.parametrize("jump", [HOUR / 2, 3 * HOUR, 400 * DAY, 20000 * DAY])
def test_a_clock_set_back_stops_nothing(jump: timedelta) -> None:
    pool = Simulated(HOURLY, "db")
    for n in range(4):
        pool.run(START + n * HOUR)
    back = START + 3 * HOUR - jump
    first = pool.run(back)
    assert first.actions == ()
    taken = [a for n in range(1, 4) for a in pool.run(back + n * HOUR).actions]
    assert len(taken) == 3
    assert all(isinstance(a, TakeSnapshots) for a in taken)


def test_a_clock_set_ahead_prunes_nothing_for_a_day_and_back_again_nothing_at_all() -> None:
    pool = Simulated('[volume."*"]\nschedule = "hourly"\nkeep = { within = "1d" }\n', "db")
    for n in range(30):
        pool.run(START + n * HOUR)
    before = pool.times()
    ahead = START + 9999 * DAY
    for n in range(24):
        made = pool.run(ahead + n * HOUR)
        assert not [a for a in made.actions if isinstance(a, Prune)]
        assert "nothing is pruned until" in made.notes[0]
    for n in range(31, 40):
        made = pool.run(START + n * HOUR)
        assert not made.notes[1:]
    assert set(before[-20:]) <= set(pool.times())
    assert pool.run(START + 41 * HOUR).notes or pool.times()


def test_a_name_that_is_taken_gets_a_number() -> None:
    pool = Simulated('[volume."*"]\nschedule = "hourly"\n', "db")
    pool.run(START)
    pool.facts = replace(pool.facts, runs={})
    (action,) = pool.run(START + timedelta(seconds=5)).actions
    assert isinstance(action, TakeSnapshots)
    assert action.name == "auto-2026-01-01T0000Z.2"


def test_a_volume_without_a_schedule_is_pruned_all_the_same() -> None:
    pool = Simulated(HOURLY, "db")
    for n in range(5):
        pool.run(START + n * HOUR)
    pool.policy = parse_policy('[volume."*"]\nkeep = { last = 2 }\n')
    made = pool.run(START + 5 * HOUR)
    assert [a.reason for a in made.actions] == ["no rule keeps it"] * 3
    assert made.next_due_ns is None


def test_space_that_is_short_takes_the_oldest_of_those_who_agree() -> None:
    text = (
        '[pool]\nlow_water = "10%"\n'
        + HOURLY
        + '[volume."a*"]\nprune_when_low = true\nkeep = { last = 2, daily = 9 }\n'
    )
    pool = Simulated(text, "a1", "a2", "b", held_bytes=10)
    for n in range(4):
        pool.run(START + n * DAY)
    pool.facts = replace(pool.facts, free_bytes=75, capacity_bytes=1000)
    made = [a for a in pool.run(START + 3 * DAY + HOUR / 2).actions if isinstance(a, Prune)]
    assert [(a.volume, a.name[:15]) for a in made] == [
        ("a1", "auto-2026-01-01"), ("a2", "auto-2026-01-01"), ("a1", "auto-2026-01-02"),
    ]  # fmt: skip
    assert all("space is short" in a.reason for a in made)


def test_scrub_is_due_by_its_schedule() -> None:
    pool = Simulated('[pool]\nscrub = "monthly"\n', "db")
    scrubs = [n for n in range(90) if any(isinstance(a, Work) for a in pool.run(START + n * DAY).actions)]
    assert scrubs == [0, 31, 59]


def test_a_scrub_that_is_new_waits_for_its_next_due_time_and_is_caught_up_then() -> None:
    pool = Simulated('[pool]\nscrub = "monthly"\n', "db")
    pool.facts = replace(pool.facts, set_ns=nanoseconds(START + 3 * HOUR))
    (first,) = first_runs(pool.policy, pool.facts, pool.facts.set_ns)
    assert (first.task, first.due_ns) == ("scrub", nanoseconds(datetime(2026, 2, 1, tzinfo=UTC)))
    # The pool was away when it was due.
    days = [4, 30, 35, 36, 59]
    assert [n for n in days if pool.run(START + n * DAY).actions] == [35, 59]
    assert first_runs(pool.policy, pool.facts, nanoseconds(START)) == []
    # A clock that was set back to before the policy does not make it due at once.
    pool.facts = replace(pool.facts, runs={}, set_ns=nanoseconds(START + 300 * DAY))
    assert pool.run(START + 4 * DAY).actions == ()


def test_volumes_with_the_same_target_and_pace_are_replicated_together() -> None:
    rule = 'replicate = [{ to = "ssh://b/p", every = "daily" }, { to = "/c", every = "1h", keep = { daily = 3 } }]'
    pool = Simulated(f'[volume."*"]\n{rule}\n[volume."x"]\nreplicate = []\n', "a", "b", "x")
    works = [a for a in pool.run(START).actions if isinstance(a, Work)]
    assert [(w.kind, w.target, w.volumes) for w in works] == [
        ("replicate", "ssh://b/p", ("a", "b")), ("replicate", "/c", ("a", "b")),
    ]  # fmt: skip
    assert [w.target for w in pool.run(START + HOUR).actions if isinstance(w, Work)] == ["/c"]
