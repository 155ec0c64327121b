"""Natural periods, schedules and cron forms, also where the clocks change."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incfs.errors import UsageError
from incfs.policy.cron import parse_cron
from incfs.policy.periods import PERIODS, moment, nanoseconds, next_start, period_start
from incfs.policy.schedule import parse_schedule
from incfs.units import format_duration, parse_duration, parse_percent

BERLIN = ZoneInfo("Europe/Berlin")
ZONES = [ZoneInfo(name) for name in ("UTC", "Europe/Berlin", "America/Sao_Paulo", "Asia/Kathmandu", "Pacific/Apia")]
MOMENTS = st.datetimes(datetime(1995, 1, 1), datetime(2045, 1, 1)).map(lambda t: t.replace(tzinfo=UTC))


def at(text: str) -> datetime:
    """Read a moment in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("period", "when", "start", "following"),
    [
        ("hourly", "2026-11-22T19:47:11", "2026-11-22T19:00", "2026-11-22T20:00"),
        ("daily", "2026-11-22T19:47:11", "2026-11-21T23:00", "2026-11-22T23:00"),
        ("daily", "2026-11-22T23:30", "2026-11-22T23:00", "2026-11-23T23:00"),
        ("daily", "2026-03-29T12:00", "2026-03-28T23:00", "2026-03-29T22:00"),
        ("daily", "2026-10-25T12:00", "2026-10-24T22:00", "2026-10-25T23:00"),
        ("weekly", "2026-11-22T19:47", "2026-11-15T23:00", "2026-11-22T23:00"),
        ("weekly", "2027-01-01T12:00", "2026-12-27T23:00", "2027-01-03T23:00"),
        ("monthly", "2024-02-29T12:00", "2024-01-31T23:00", "2024-02-29T23:00"),
        ("yearly", "2026-12-31T22:59", "2025-12-31T23:00", "2026-12-31T23:00"),
        ("yearly", "2026-12-31T23:00", "2026-12-31T23:00", "2027-12-31T23:00"),
    ],
)
def test_periods_in_berlin(period: str, when: str, start: str, following: str) -> None:
    assert period_start(at(when), period, BERLIN) == at(start)
    assert next_start(at(when), period, BERLIN) == at(following)


def test_the_hour_that_comes_twice_is_two_hours() -> None:
    first, second = at("2026-10-25T00:30"), at("2026-10-25T01:30")
    assert first.astimezone(BERLIN).hour == second.astimezone(BERLIN).hour == 2
    assert period_start(first, "hourly", BERLIN) == at("2026-10-25T00:00")
    assert period_start(second, "hourly", BERLIN) == at("2026-10-25T01:00")


@given(MOMENTS, st.sampled_from(PERIODS), st.sampled_from(ZONES))
def test_a_moment_is_in_its_period_and_its_start_too(when: datetime, period: str, zone: ZoneInfo) -> None:
    start, following = period_start(when, period, zone), next_start(when, period, zone)
    assert start <= when < following
    assert period_start(start, period, zone) == start
    assert period_start(following - timedelta(microseconds=1), period, zone) == start
    assert next_start(start, period, zone) == following == period_start(following, period, zone)


@given(st.integers(0, 1 << 62))
def test_times_are_exact_to_the_microsecond(time_ns: int) -> None:
    assert nanoseconds(moment(time_ns)) == time_ns // 1000 * 1000


@pytest.mark.parametrize(
    ("text", "when", "latest", "following"),
    [
        ("hourly", "2026-11-22T19:47", "2026-11-22T19:00", "2026-11-22T20:00"),
        ("15m", "2026-11-22T19:47", "2026-11-22T19:45", "2026-11-22T20:00"),
        ("2w", "1970-01-20T00:00", "1970-01-15T00:00", "1970-01-29T00:00"),
        ("*/15 * * * *", "2026-11-22T19:47", "2026-11-22T19:45", "2026-11-22T20:00"),
        ("0 3 * * *", "2026-11-22T19:47", "2026-11-22T03:00", "2026-11-23T03:00"),
        ("0 3 * * mon-fri", "2026-11-22T19:47", "2026-11-20T03:00", "2026-11-23T03:00"),
        ("0 0 29 2 *", "2026-11-22T19:47", "2024-02-29T00:00", "2028-02-29T00:00"),
        ("0 0 29 2 *", "2099-01-01T00:00", "2096-02-29T00:00", "2104-02-29T00:00"),
        ("30 4 1,15 * 5", "2026-11-22T19:47", "2026-11-20T04:30", "2026-11-27T04:30"),
        ("0 0 1 jan *", "2026-11-22T19:47", "2026-01-01T00:00", "2027-01-01T00:00"),
        ("5/20 8-10/2 * * 7", "2026-11-22T09:00", "2026-11-22T08:45", "2026-11-22T10:05"),
    ],
)
def test_schedules(text: str, when: str, latest: str, following: str) -> None:
    schedule = parse_schedule(text)
    assert schedule is not None
    assert schedule.latest(at(when), ZoneInfo("UTC")) == at(latest)
    assert schedule.following(at(when), ZoneInfo("UTC")) == at(following)
    assert schedule.latest(at(latest), ZoneInfo("UTC")) == at(latest), "what is due now has been due"


def test_cron_where_the_clocks_change() -> None:
    night = parse_cron("30 2 * * *")
    # 29 March: 02:30 is left out, and counts at what would have been it.
    assert night.following(at("2026-03-28T12:00"), BERLIN) == at("2026-03-29T01:30")
    # 25 October: 02:30 comes twice, and counts once.
    assert night.following(at("2026-10-24T12:00"), BERLIN) == at("2026-10-25T00:30")
    assert night.following(at("2026-10-25T00:30"), BERLIN) == at("2026-10-26T01:30")
    hours: list[datetime] = []
    when = at("2026-10-24T21:59")
    while len(hours) < 25:
        when = parse_cron("0 * * * *").following(when, BERLIN)
        hours.append(when)
    assert hours == [at("2026-10-24T22:00") + timedelta(hours=n) for n in range(25)]


@given(
    MOMENTS,
    st.sampled_from(["hourly", "weekly", "7m", "0 3 * * *", "*/7 1-5 * * *", "0 0 1 * 3", "59 23 31 12 *"]),
    st.sampled_from(ZONES),
)
def test_nothing_is_due_between_the_latest_and_the_following(when: datetime, text: str, zone: ZoneInfo) -> None:
    schedule = parse_schedule(text)
    assert schedule is not None
    latest, following = schedule.latest(when, zone), schedule.following(when, zone)
    assert latest <= when < following
    assert schedule.following(latest, zone) == following
    assert schedule.latest(following - timedelta(microseconds=1), zone) == latest


@pytest.mark.parametrize(
    "text",
    ["", "often", "30s", "0m", "367d", "-5m", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *",
     "* * 30 2 *", "* * * 13 *", "* * * * 8", "*/0 * * * *", "5-1 * * * *", "a * * * *", "*/x * * * *", "1, * * * *"],
)  # fmt: skip
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(UsageError):
        parse_schedule(text)


def test_never_is_no_schedule() -> None:
    assert parse_schedule("never") is None


@given(st.integers(1, 10**8))
def test_durations_are_read_back(duration_s: int) -> None:
    assert parse_duration(format_duration(duration_s)) == duration_s


@pytest.mark.parametrize("text", ["", "m", "-1s", "5 years", "1h30m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "5", "101%", "-1%", "%"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(UsageError):
        parse_percent(text)
