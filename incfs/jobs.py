"""Long jobs that move or verify data: which are under way, noted in ``POOL/jobs.json``.

Each may be cut off anywhere, and goes on where it was when it is begun again.  One that ended, failed or
was stopped is in the file no more; what a killed or unmounted daemon leaves there, the next one goes on
with.  The file is for that only: without it nothing is lost, but a job must be asked for again.  One of a newer
incfs, or one that is damaged, is told of and kept under another name.
"""

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from incfs.committer import offload
from incfs.errors import IncfsError, JobStopped, NotFound
from incfs.store import Store
from incfs.units import format_time

logger = logging.getLogger(__name__)

JOBS_NAME: Final = "jobs.json"
LEFT_NAME: Final = "jobs.json.left"
"""What could not be read, once the file is written anew."""
_VERSION: Final = 1
_RATE_AFTER_S: Final = 0.5
"""A rate over less is none."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be done: a verb and what it needs to go on."""

    verb: str
    subject: str
    """What it is about: ``storage 2``, ``volume db``, ``pool``."""
    arguments: Mapping[str, Any]

    def replaces(self, other: "Request") -> bool:
        """Tell whether the other needs not be done any more once this is."""
        return self.subject == other.subject and self.verb in (other.verb, "storage.remove")


@dataclass
class Job:
    """A request that is under way."""

    number: int
    request: Request
    since_ns: int
    """When it was begun, or went on."""
    unit_bytes: int
    """What one of what it counts is."""
    done: int = 0
    total: int = 0
    first: tuple[int, float] | None = None
    """What was done, and when, as it told so first: one that goes on does not begin with nothing."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope, repr=False)

    @property
    def percent(self) -> int | None:
        """How far it is; None before it knows."""
        return min(100, 100 * self.done // self.total) if self.total else None

    def note(self, done: int, total: int, now_s: float) -> None:
        """Take note of how far it is."""
        self.done, self.total = done, total
        if self.first is None:
            self.first = done, now_s

    def rate_bytes(self, now_s: float) -> int | None:
        """How much it does in a second; None before that can be told."""
        if self.first is None or now_s - self.first[1] < _RATE_AFTER_S:
            return None
        return int((self.done - self.first[0]) * self.unit_bytes / (now_s - self.first[1]))

    def to_dict(self, now_ns: int, now_s: float) -> dict[str, Any]:
        """Give plain values."""
        rate = self.rate_bytes(now_s)
        left_bytes = max(0, self.total - self.done) * self.unit_bytes
        return {
            "number": self.number,
            "job": self.request.verb,
            "subject": self.request.subject,
            "percent": self.percent,
            "since": format_time(self.since_ns),
            "done_bytes": self.done * self.unit_bytes,
            "total_bytes": self.total * self.unit_bytes,
            "rate_bytes": rate,
            "ends": format_time(now_ns + left_bytes * 10**9 // rate) if rate else None,
        }


class Jobs:
    """The jobs of one open pool.  The trio thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._running: dict[int, Job] = {}
        self._left: list[Request] = []
        """What an earlier daemon was at, and nobody has gone on with."""
        self._last_number = 0
        self._saving = trio.Lock()
        self._is_unread = False
        """The file is there and holds what this incfs cannot read."""
        self.is_ending = False
        """Set when the daemon ends: what is cut off now goes on with the next one."""

    def load(self) -> None:
        """Read what an earlier daemon was at.  Any thread."""
        path = self._store.directory / JOBS_NAME
        try:
            self._left = _decode(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, RecursionError) as error:
            self._is_unread = True
            logger.warning(
                "%s cannot be read, so what it names does not go on by itself; `incfs pool jobs` lists what does: %s",
                path, error,
            )  # fmt: skip

    def take_left(self) -> list[Request]:
        """Give what an earlier daemon was at, once, to go on with."""
        left, self._left = self._left, []
        return left

    def running(self) -> list[Job]:
        """List what is under way, oldest first."""
        return list(self._running.values())

    def documents(self) -> list[dict[str, Any]]:
        """Describe what is under way, oldest first."""
        return [job.to_dict(self._store.clock(), time.monotonic()) for job in self._running.values()]

    def about(self, subject: str) -> list[Job]:
        """List the jobs about something, oldest first."""
        return [job for job in self._running.values() if job.request.subject == subject]

    def stop(self, number: int) -> None:
        """Stop a job: what it has moved stays moved.

        Raises:
            NotFound: No such job is under way.
        """
        job = self._running.get(number)
        if job is None:
            raise NotFound(f"no job {number} is under way; `incfs pool jobs` lists them", job=number)
        job.scope.cancel()

    @asynccontextmanager
    async def under_way(
        self, request: Request, progress: Progress | None = None, unit: str = "blocks"
    ) -> AsyncIterator[Callable[[int, int], None]]:
        """Note a job while the body does it; give what to tell progress to.

        Args:
            request: What it is.
            progress: Who else is told, and the unit.
            unit: Of what is done.

        Durability: the note is durable before the body begins.

        Raises:
            JobStopped: Somebody stopped it.
        """
        self._last_number += 1
        unit_bytes = 1 if unit == "bytes" else self._store.block_bytes
        job = Job(self._last_number, request, self._store.clock(), unit_bytes)
        self._running[self._last_number] = job
        self._left = [left for left in self._left if not request.replaces(left)]

        def tell(done: int, total: int) -> None:
            job.note(done, total, time.monotonic())
            if progress is not None:
                progress(done, total, unit)

        try:
            with job.scope:
                await self._save()
                yield tell
        finally:
            if not self.is_ending and self._store.failure is None:
                del self._running[job.number]
                with trio.CancelScope(shield=True):
                    await self._save()
        if job.scope.cancelled_caught:
            raise JobStopped(f"{request.verb} of {request.subject} was stopped; what it did stays done")

    async def _save(self) -> None:
        async with self._saving:
            requests = [job.request for job in self._running.values()] + self._left
            await offload(lambda: self._write(_encode(requests)))

    def _write(self, text: bytes) -> None:
        """Replace the file.  Any thread."""
        path = self._store.directory / JOBS_NAME
        try:
            if self._is_unread:
                self._store.backing.replace(path, path.with_name(LEFT_NAME))
                self._is_unread = False
            self._store.backing.replace_content(path, text)
        except IncfsError as error:
            logger.warning("what jobs are under way cannot be noted, so they will not go on by themselves: %s", error)


def _encode(requests: Sequence[Request]) -> bytes:
    jobs = [[request.verb, request.subject, dict(request.arguments)] for request in requests]
    return json.dumps({"version": _VERSION, "jobs": jobs}).encode()


def _decode(text: str) -> list[Request]:
    match json.loads(text):
        case {"version": int(version)} if version > _VERSION:
            raise ValueError(f"it has version {version}, this incfs knows {_VERSION}")
        case {"version": 1, "jobs": list(jobs)}:
            return [Request(str(verb), str(subject), dict(values)) for verb, subject, values in jobs]
    raise ValueError("it is no list of jobs")
