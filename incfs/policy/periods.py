"""Natural periods: hours, days, weeks, months and years of a time zone.  Pure.

A period is named by the instant at which it starts, so two moments are in the same one
exactly if their starts are equal.  Weeks start on Monday (ISO 8601).  On the days on which
the clocks change a local day has 23 or 25 hours, and each of these is an hour of its own.
"""

from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final

PERIODS: Final = ("hourly", "daily", "weekly", "monthly", "yearly")
_NS: Final = 1_000_000_000


def moment(time_ns: int) -> datetime:
    """Give a time in ns since 1970 as a moment, to the microsecond."""
    seconds, rest_ns = divmod(time_ns, _NS)
    return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=rest_ns // 1000)


def nanoseconds(when: datetime) -> int:
    """Undo ``moment``, exactly."""
    passed = when - datetime(1970, 1, 1, tzinfo=UTC)
    return (passed.days * 86400 + passed.seconds) * _NS + passed.microseconds * 1000


def period_start(when: datetime, period: str, zone: tzinfo) -> datetime:
    """Give the start of the period that a moment is in, in UTC."""
    local = when.astimezone(zone)
    if period == "hourly":
        return when.astimezone(UTC) - _into_hour(local)
    day = local.date()
    if period == "weekly":
        day -= timedelta(days=day.weekday())
    elif period == "monthly":
        day = day.replace(day=1)
    elif period == "yearly":
        day = day.replace(month=1, day=1)
    # A midnight that the change of the clocks leaves out counts from the change.
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)


def _into_hour(local: datetime) -> timedelta:
    return timedelta(minutes=local.minute, seconds=local.second, microseconds=local.microsecond)


_LONGEST: Final = {"hourly": 1, "daily": 30, "weekly": 8 * 24, "monthly": 32 * 24, "yearly": 367 * 24}
"""Hours from a start that lead into the next period for certain, and into no later one."""


def next_start(when: datetime, period: str, zone: tzinfo) -> datetime:
    """Give the start of the period after the one that a moment is in, in UTC."""
    start = period_start(when, period, zone)
    return period_start(start + timedelta(hours=_LONGEST[period]), period, zone)
