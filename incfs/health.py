"""How a pool is, as one line for people and an exit code for monitoring.  Reads facts only.

sound       0
degraded    4   something is missing, and data or a second copy of it with it
full        13  writes fail
read-only   1   a write failed, or the whole pool is damaged: nothing changes any more
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

EXIT_CODES: Final = {"sound": 0, "degraded": 4, "full": 13, "read-only": 1}
_ORDER: Final = ("read-only", "degraded", "full")
"""Worst first."""
_ADVICE: Final = {
    "missing": "mount its disk and then the pool again",
    "mismatch": "bring its own image back and mount the pool again",
    "truncated": "restore the image, or save what is left with `incfs pool repair --to NEWDIR`",
    "silent": "its disk does not answer: look at the host's log",
    "degraded": "`incfs storage resilver {id}`, or `--replace LEG --path FILE` for a disk that is lost",
}
_SINCE: Final = {"silent": "host-silent", "degraded": "leg-failed"}
"""State of a storage volume -> the event that told of it."""

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Health:
    """What there is to say of a pool."""

    state: str
    reasons: tuple[str, ...]
    """What, since when as far as that is known, and what to do; none of a sound one."""

    @property
    def line(self) -> str:
        """Say all of it."""
        return f"{self.state}: {'; '.join(self.reasons)}" if self.reasons else self.state

    @property
    def exit_code(self) -> int:
        """Give what monitoring wants."""
        return EXIT_CODES[self.state]

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {"state": self.state, "reasons": list(self.reasons), "line": self.line, "exit_code": self.exit_code}


def judge(pool: Facts, storages: Iterable[Facts], copies: Iterable[Facts], events: Iterable[Facts]) -> Health:
    """Judge a pool by its own facts, those of its storage volumes and copies of the metadata, and its events."""
    found = list(_findings(pool, storages, copies, list(events)))
    worst = min((_ORDER.index(state) for state, _ in found), default=None)
    return Health("sound" if worst is None else _ORDER[worst], tuple(reason for _, reason in found))


def _findings(
    pool: Facts, storages: Iterable[Facts], copies: Iterable[Facts], events: list[Facts]
) -> Iterator[tuple[str, str]]:
    if pool["read_only"]:
        yield "read-only", f"{pool['failure']}; mend the cause, then unmount and mount again"
    for storage in storages:
        state, number = storage["state"], storage["id"]
        if state in _ADVICE:
            what = f"storage volume {number} ({storage['path']}) is {state}"
            if state == "degraded":
                what = f"storage volume {number} is a {protection(storage)}"
            since = _since(events, _SINCE.get(state), f"storage {number}")
            yield "degraded", f"{what}{since}; {_ADVICE[state].format(id=number)}"
    for copy in copies:
        if copy["state"] != "online":
            why = f"the metadata in {copy['path']} is not up to date ({copy['reason']})"
            yield "degraded", f"{why}; `incfs pool metadata add {copy['path']}` once its disk is there"
    if not pool["is_proved"]:
        yield "degraded", "its parts are of different times; `incfs pool check` proves what they hold"
    if pool["free_bytes"] == 0:
        yield "full", "no block is free; remove snapshots, or `incfs storage add`"


def _since(events: list[Facts], kind: str | None, subject: str) -> str:
    times = [event["time"] for event in events if event["kind"] == kind and event["subject"] == subject]
    return f" since {times[-1].partition('.')[0]}Z" if times else ""


def protection(storage: Facts) -> str:
    """Say against what a storage volume stands: ``mirror 2/2``, ``raid6``, ``mirror 1/2 on raid1``, or ``none``."""
    legs, below = storage["legs"], storage["redundancy"]
    if not legs:
        return str(below)
    online = sum(leg["state"] == "online" for leg in legs)
    return f"mirror {online}/{len(legs)}" + ("" if below == "none" else f" on {below}")
