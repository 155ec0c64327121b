"""When something is due: ``hourly``, ``15m`` or a cron form.  Pure.

Due times are fixed points in time, not distances from the last run.  Whatever was due since
the last run is due now, once: that is how missed runs are caught up.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final

from incfs.errors import UsageError
from incfs.policy.cron import Cron, parse_cron
from incfs.policy.periods import PERIODS, next_start, period_start
from incfs.units import format_duration, parse_duration

MIN_INTERVAL_S: Final = 60
MAX_INTERVAL_S: Final = 366 * 86400
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Natural:
    """At the start of each natural period of the zone."""

    text: str

    def latest(self, when: datetime, zone: tzinfo) -> datetime:
        """Give the last time that was due at a moment or before it, in UTC."""
        return period_start(when, self.text, zone)

    def following(self, when: datetime, zone: tzinfo) -> datetime:
        """Give the first time that is due after a moment, in UTC."""
        return next_start(when, self.text, zone)


@dataclass(frozen=True, slots=True)
class Every:
    """At each multiple of a duration, counted from 1970 in UTC."""

    interval_s: int

    @property
    def text(self) -> str:
        """The form in which it is written."""
        return format_duration(self.interval_s)

    def latest(self, when: datetime, zone: tzinfo) -> datetime:
        """Give the last time that was due at a moment or before it, in UTC."""
        del zone
        step = timedelta(seconds=self.interval_s)
        return _EPOCH + (when - _EPOCH) // step * step

    def following(self, when: datetime, zone: tzinfo) -> datetime:
        """Give the first time that is due after a moment, in UTC."""
        return self.latest(when, zone) + timedelta(seconds=self.interval_s)


Schedule = Natural | Every | Cron


def parse_schedule(text: str) -> Schedule | None:
    """Read a schedule; ``never`` is None.

    Raises:
        UsageError: It is none.
    """
    text = text.strip().lower()
    if text == "never":
        return None
    if text in PERIODS:
        return Natural(text)
    if len(text.split()) > 1:
        return parse_cron(text)
    try:
        interval_s = int(parse_duration(text))
    except UsageError as error:
        raise UsageError(
            f"{text!r} is no schedule; write {', '.join(PERIODS)}, never, a duration such as 15m, or five fields of "
            "cron"
        ) from error
    if not MIN_INTERVAL_S <= interval_s <= MAX_INTERVAL_S:
        raise UsageError(f"a schedule of {text} is out of range: one minute to a year is possible")
    return Every(interval_s)
