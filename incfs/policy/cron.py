"""The cron form of a schedule: minute, hour, day of the month, month, day of the week.  Pure.

Own code: five fields are a hundred lines, and what happens on the days on which the clocks
change must be exactly what is said here, which no library promises.

A local time that the change of the clocks leaves out counts one hour later; one that comes
twice counts once, the first time, unless the hour field is ``*`` or ``*/N``: then each hour
that passes counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Final

from incfs.errors import UsageError

_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: Final[tuple[tuple[str, int, int, tuple[str, ...]], ...]] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, ("", *_MONTHS)),
    ("day of the week", 0, 7, _DAYS),
)
_LONGEST_DAYS: Final = 8 * 366 + 7
"""29 February is left out for eight years around 2100."""


@dataclass(frozen=True, slots=True)
class Cron:
    """A schedule in cron form."""

    text: str
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    """0 is Sunday."""
    is_either_day: bool
    """Both kinds of days are given: one of them is enough, as in every cron."""
    is_every_hour: bool

    def latest(self, when: datetime, zone: tzinfo) -> datetime:
        """Give the last time that was due at a moment or before it, in UTC."""
        day = when.astimezone(zone).date()
        for back in range(_LONGEST_DAYS):
            due = [t for t in self._times(day - timedelta(days=back), zone) if t <= when]
            if due:
                return max(due)
        raise AssertionError(f"{self.text} is never due")

    def following(self, when: datetime, zone: tzinfo) -> datetime:
        """Give the first time that is due after a moment, in UTC."""
        day = when.astimezone(zone).date()
        for ahead in range(_LONGEST_DAYS):
            due = [t for t in self._times(day + timedelta(days=ahead), zone) if t > when]
            if due:
                return min(due)
        raise AssertionError(f"{self.text} is never due")

    def has_day(self, day: date) -> bool:
        """Tell whether it is due on a day."""
        if day.month not in self.months:
            return False
        by_date, by_weekday = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return by_date or by_weekday if self.is_either_day else by_date and by_weekday

    def _times(self, day: date, zone: tzinfo) -> Iterator[datetime]:
        if not self.has_day(day):
            return
        for hour in self.hours:
            for minute in self.minutes:
                local = datetime(day.year, day.month, day.day, hour, minute, tzinfo=zone)
                yield local.astimezone(UTC)
                if self.is_every_hour:
                    yield local.replace(fold=1).astimezone(UTC)


def parse_cron(text: str) -> Cron:
    """Read five fields of numbers, names, ``*``, ranges, lists and steps.

    Raises:
        UsageError: Something else, or a day that never comes.
    """
    parts = text.lower().split()
    if len(parts) != len(_FIELDS):
        raise UsageError(f"{text!r} is no cron form: it has {len(parts)} fields, not 5")
    minutes, hours, days, months, weekdays = (
        _parse_field(part, *limits) for part, limits in zip(parts, _FIELDS, strict=True)
    )
    cron = Cron(
        text=" ".join(parts),
        minutes=tuple(sorted(minutes)),
        hours=tuple(sorted(hours)),
        days=frozenset(days),
        months=frozenset(months),
        weekdays=frozenset(day % 7 for day in weekdays),
        is_either_day=parts[2][0] != "*" and parts[4][0] != "*",
        is_every_hour=parts[1][0] == "*",
    )
    # 2000 was a leap year, and within 28 years every date has been every day of the week.
    if not any(cron.has_day(date(2000, 1, 1) + timedelta(days=n)) for n in range(28 * 366)):
        raise UsageError(f"{text!r} is never due: no such day")
    return cron


def _parse_field(text: str, name: str, low: int, high: int, names: tuple[str, ...]) -> set[int]:
    found: set[int] = set()
    for part in text.split(","):
        span, slash, step = part.partition("/")
        if slash and not (step.isascii() and step.isdigit() and int(step)):
            raise UsageError(f"{part!r} in the {name} of a cron form: the step must be a number above 0")
        first, dash, last = span.partition("-")
        if span == "*":
            start, end = low, high
        else:
            start = _number(first, name, low, high, names)
            # "5/10" runs to the end, as in every cron.
            end = _number(last, name, low, high, names) if dash else high if slash else start
        if start > end:
            raise UsageError(f"{part!r} in the {name} of a cron form runs backwards")
        found.update(range(start, end + 1, int(step or 1)))
    return found


def _number(text: str, name: str, low: int, high: int, names: tuple[str, ...]) -> int:
    if text and text in names:
        return names.index(text)
    if text.isascii() and text.isdigit() and low <= int(text) <= high:
        return int(text)
    raise UsageError(f"{text!r} is no {name} of a cron form: {low} to {high} is")
