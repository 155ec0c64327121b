"""What the pool did by itself, and why: the newest events in memory and in ``POOL/events.jsonl``.

Each is a line of JSON.  A file of ``MAX_FILE_BYTES`` becomes ``events.jsonl.1`` and a new one is begun,
so the two are bounded.  Events are for people: a crash may lose the last ones, and a file that
cannot be read or written stops nothing.

Concurrency: ``record`` on the owner thread; ``flush`` in any one thread at a time.
"""

import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from incfs.units import format_time

logger = logging.getLogger(__name__)

EVENTS_NAME: Final = "events.jsonl"
MAX_FILE_BYTES: Final = 1 << 20
KEPT_EVENTS: Final = 1000


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened without being asked for, or that an administrator should know."""

    number: int
    """Rises by one with each event of a pool."""
    time_ns: int
    kind: str
    """What happened: ``low-water``, ``image-added``, ...; ``docs/OPERATING.md`` lists them."""
    subject: str
    """What it happened to: ``storage 2``, ``volume db``, ``pool``."""
    reason: str
    """Why."""
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        values = asdict(self)
        return {"number": values.pop("number"), "time": format_time(values.pop("time_ns")), **values}


class EventLog:
    """The events of one pool.

    Args:
        directory: The pool's; None keeps them in memory only.
        clock: Nanoseconds since 1970.
    """

    def __init__(self, directory: Path | None, clock: Callable[[], int]) -> None:
        self._path = directory and directory / EVENTS_NAME
        self._clock = clock
        self._kept: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._unwritten: list[Event] = []
        self.counts: dict[str, int] = {}
        """Events of each kind since the pool was opened."""
        self._load()

    def _load(self) -> None:
        if self._path is None:
            return
        for path in (self._path.with_suffix(".jsonl.1"), self._path):
            try:
                lines = path.read_text().splitlines()
            except FileNotFoundError:
                continue
            except (OSError, UnicodeDecodeError) as error:
                logger.warning("earlier events cannot be read: %s", error)
                continue
            self._kept += [event for line in lines if (event := _decode(line)) is not None]

    def record(self, kind: str, subject: str, reason: str, **facts: Any) -> Event:
        """Note what happened."""
        number = self._kept[-1].number + 1 if self._kept else 1
        event = Event(number, self._clock(), kind, subject, reason, facts)
        self._kept.append(event)
        self._unwritten.append(event)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        logger.info("%s: %s: %s", kind, subject, reason)
        return event

    def since(self, number: int = 0, limit: int = KEPT_EVENTS) -> list[Event]:
        """List the newest ``limit`` events behind a number, oldest first."""
        return [event for event in self._kept if event.number > number][-limit:]

    def flush(self) -> None:
        """Write what was recorded."""
        events, self._unwritten = self._unwritten, []
        if self._path is None or not events:
            return
        try:
            if self._path.exists() and self._path.stat().st_size >= MAX_FILE_BYTES:
                self._path.replace(self._path.with_suffix(".jsonl.1"))
            with self._path.open("a") as file:
                self._path.chmod(0o600)
                file.writelines(_encode(event) + "\n" for event in events)
        except OSError as error:
            logger.warning("events cannot be written: %s", error)


def _encode(event: Event) -> str:
    return json.dumps(asdict(event), default=str)


def _decode(line: str) -> Event | None:
    """Read one line; None for a torn one."""
    try:
        match json.loads(line):
            case {
                "number": int(number),
                "time_ns": int(time_ns),
                "kind": str(kind),
                "subject": str(subject),
                "reason": str(reason),
                "facts": dict(facts),
            }:
                return Event(number, time_ns, kind, subject, reason, facts)
    except ValueError:
        return None
    return None
