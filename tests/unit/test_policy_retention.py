"""Retention: a table for each rule, a year of hourly runs, and what is never pruned."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incfs.policy.facts import ReplicaFacts, SnapshotFacts, VolumeFacts
from incfs.policy.periods import nanoseconds
from incfs.policy.retention import decide, spare
from incfs.policy.rules import ALL, Keep

NOW = datetime(2026, 11, 22, 19, 30, tzinfo=UTC)
HOUR = timedelta(hours=1)


def snapshot(when: datetime, number: int = 1, **facts: object) -> SnapshotFacts:
    """Make a snapshot that is named by its time."""
    name = f"{when:%Y-%m-%dT%H:%M}"
    return SnapshotFacts(name, f"{name}#{number}", nanoseconds(when), number, **facts)  # type: ignore[arg-type]


def volume(times: Iterable[datetime], *replicas: ReplicaFacts) -> VolumeFacts:
    """Make a volume with snapshots of these times."""
    return VolumeFacts("db", tuple(snapshot(when, n) for n, when in enumerate(times, 1)), replicas)


def kept(found: VolumeFacts, keep: Keep | None, zone: tzinfo = UTC, now: datetime = NOW) -> list[str]:
    """Give the names that are kept, oldest first."""
    return [d.snapshot.name for d in decide(found, keep, zone, nanoseconds(now)) if d.is_kept]


HALF_HOURS = [NOW - n * HOUR / 2 for n in range(200, -1, -1)]


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        (Keep(last=3), ["2026-11-22T18:30", "2026-11-22T19:00", "2026-11-22T19:30"]),
        (Keep(hourly=3), ["2026-11-22T17:30", "2026-11-22T18:30", "2026-11-22T19:30"]),
        (Keep(daily=3), ["2026-11-20T23:30", "2026-11-21T23:30", "2026-11-22T19:30"]),
        (Keep(daily=99), [f"2026-11-{d}T23:30" for d in (18, 19, 20, 21)] + ["2026-11-22T19:30"]),
        (Keep(weekly=2), ["2026-11-22T19:30"]),
        (Keep(monthly=1, yearly=1), ["2026-11-22T19:30"]),
        (Keep(within_s=5400), ["2026-11-22T18:00", "2026-11-22T18:30", "2026-11-22T19:00", "2026-11-22T19:30"]),
        (Keep(last=2, daily=2), ["2026-11-21T23:30", "2026-11-22T19:00", "2026-11-22T19:30"]),
    ],
)
def test_each_rule(keep: Keep, wanted: list[str]) -> None:
    assert kept(volume(HALF_HOURS), keep) == wanted


@pytest.mark.parametrize(
    ("keep", "times", "wanted"),
    [
        # Weeks start on Monday, and the week of 1 January may be the old year's.
        (Keep(weekly=2), ["2026-12-27", "2026-12-28", "2027-01-01", "2027-01-03"], ["2026-12-27", "2027-01-03"]),
        (Keep(yearly=2), ["2025-12-31", "2026-12-31", "2027-01-01"], ["2026-12-31", "2027-01-01"]),
        (Keep(monthly=2), ["2024-02-28", "2024-02-29", "2024-03-01"], ["2024-02-29", "2024-03-01"]),
        # Periods without a snapshot do not count.
        (Keep(daily=2), ["2019-05-01", "2022-01-01", "2026-11-01"], ["2022-01-01", "2026-11-01"]),
        (Keep(within_s=86400), ["2019-05-01", "2019-05-02"], ["2019-05-01", "2019-05-02"]),
        (Keep(yearly=ALL), ["2001-05-01", "2001-06-01", "2022-01-01"], ["2001-06-01", "2022-01-01"]),
    ],
)
def test_ends_of_years_and_gaps(keep: Keep, times: list[str], wanted: list[str]) -> None:
    found = volume([datetime.fromisoformat(t).replace(tzinfo=UTC) for t in times])
    assert [name[:10] for name in kept(found, keep, now=NOW + timedelta(days=365))] == wanted


def test_days_are_the_zone_s() -> None:
    times = [datetime(2026, 11, 21, 22, 30, tzinfo=UTC), datetime(2026, 11, 21, 23, 30, tzinfo=UTC)]
    assert len(kept(volume(times), Keep(daily=2))) == 1
    assert len(kept(volume(times), Keep(daily=2), ZoneInfo("Europe/Berlin"))) == 2


def test_only_what_the_policy_made_is_counted_and_pruned() -> None:
    own = [snapshot(NOW - n * HOUR, 9 - n) for n in (3, 2, 1)]
    other = [snapshot(NOW - n * HOUR / 4, 20 - n, is_policy=False) for n in (2, 1)]
    found = VolumeFacts("db", (*own, *other))
    assert kept(found, Keep(last=1)) == [own[2].name, other[0].name, other[1].name]
    everything = decide(found, Keep(last=1), UTC, nanoseconds(NOW), prune_all=True)
    assert [d.snapshot.name for d in everything if d.is_kept] == [other[1].name]


def test_snapshots_of_the_future_stay_and_count_for_nothing() -> None:
    found = volume([NOW - 2 * HOUR, NOW - HOUR, NOW + 900 * HOUR, NOW + 901 * HOUR])
    assert len(kept(found, Keep(last=1))) == 3
    assert kept(found, Keep(last=1))[0] == snapshot(NOW - HOUR).name


def test_every_decision_has_a_reason() -> None:
    held = snapshot(NOW - 9 * HOUR, 1, holds=("backup",), clones=("copy",))
    found = VolumeFacts("db", (held, snapshot(NOW - HOUR, 2), snapshot(NOW, 3)))
    assert [(d.is_kept, d.reasons) for d in decide(found, Keep(last=1, hourly=1), UTC, nanoseconds(NOW))] == [
        (True, ("held: backup", "origin of copy")),
        (False, ("no rule keeps it",)),
        (True, ("last 1 of 1", "hourly 1 of 1")),
    ]
    assert decide(found, None, UTC, nanoseconds(NOW))[1].reasons == ('keep = "all"',)


def test_what_a_replica_needs_stays() -> None:
    times = [NOW - n * 12 * HOUR for n in range(9, -1, -1)]
    common = volume(times).snapshots[2]
    plain = volume(times, ReplicaFacts("b", common.uuid))
    assert kept(plain, Keep(last=1)) == [common.name, snapshot(times[-1]).name]
    # It wants one for each of three days, counted from what it has.
    hungry = volume(times, ReplicaFacts("b", common.uuid, Keep(daily=3)))
    assert len(kept(hungry, Keep(last=1))) == 1 + 3
    never_served = volume(times, ReplicaFacts("b", None, Keep(daily=2)))
    assert len(kept(never_served, Keep(last=1))) == 2


def test_short_of_space_the_oldest_go_first_and_the_newest_stay() -> None:
    held = snapshot(NOW - 5 * HOUR, 1, holds=("x",))
    found = VolumeFacts("db", (held, *(snapshot(NOW - n * HOUR, 9 - n) for n in (4, 3, 2, 1))))
    for keep, count in ((Keep(last=3, hourly=9), 1), (Keep(hourly=9), 3), (None, 3)):
        names = [d.snapshot.name for d in spare(decide(found, keep, UTC, nanoseconds(NOW)), keep)]
        assert names == [snapshot(NOW - n * HOUR).name for n in (4, 3, 2)][:count]


SNAPSHOTS = st.lists(
    st.builds(
        lambda hours, holds, clones, own: (hours, {"holds": holds, "clones": clones, "is_policy": own}),
        st.integers(-50, 20000), st.sampled_from([(), ("h",)]), st.sampled_from([(), ("c",)]), st.booleans(),
    ), max_size=30,
)  # fmt: skip
COUNTS = st.integers(0, 4)
KEEPS = st.builds(Keep, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, st.integers(0, 90000))


@given(SNAPSHOTS, KEEPS, st.data(), st.booleans())
def test_a_hold_a_clone_origin_and_a_common_snapshot_are_never_pruned(made, keep, data, prune_all) -> None:
    snapshots = tuple(snapshot(NOW - hours * HOUR, n, **facts) for n, (hours, facts) in enumerate(made, 1))
    common = data.draw(st.sampled_from([None, *(s.uuid for s in snapshots)]))
    found = VolumeFacts("db", snapshots, (ReplicaFacts("b", common, data.draw(st.none() | KEEPS)),))
    decisions = decide(found, keep, UTC, nanoseconds(NOW), prune_all=prune_all)
    assert sorted(d.snapshot.uuid for d in decisions) == sorted(s.uuid for s in snapshots)
    gone = {d.snapshot.uuid for d in decisions if not d.is_kept}
    gone |= {d.snapshot.uuid for d in spare(decisions, keep)}
    for each in snapshots:
        if each.holds or each.clones or each.uuid == common or each.created_ns > nanoseconds(NOW):
            assert each.uuid not in gone
        if not each.is_policy and not prune_all:
            assert each.uuid not in gone
    assert all(d.reasons for d in decisions)


@given(SNAPSHOTS, KEEPS)
def test_pruning_twice_is_pruning_once(made, keep) -> None:
    snapshots = tuple(snapshot(NOW - hours * HOUR, n, **facts) for n, (hours, facts) in enumerate(made, 1))
    first = [d.snapshot for d in decide(VolumeFacts("db", snapshots), keep, UTC, nanoseconds(NOW)) if d.is_kept]
    again = decide(VolumeFacts("db", tuple(first)), keep, UTC, nanoseconds(NOW))
    assert all(d.is_kept for d in again)
