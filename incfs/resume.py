"""Goes on with the jobs that an earlier daemon of the pool was at when it was cut off."""

import logging
from typing import TYPE_CHECKING

import trio

from incfs.admin import run_verb
from incfs.errors import IncfsError

if TYPE_CHECKING:
    from incfs.jobs import Request
    from incfs.service import Service

logger = logging.getLogger(__name__)


async def resume_jobs(service: "Service") -> None:
    """Do what was left; that one cannot be done is an event, and stops no other."""
    async with trio.open_nursery() as nursery:
        for request in service.jobs.take_left():
            nursery.start_soon(_resume, service, request)


async def _resume(service: "Service", request: "Request") -> None:
    service.record_event("job-resumed", request.subject, f"{request.verb} had been cut off: it goes on")
    try:
        await run_verb(service, request.verb, dict(request.arguments), _unwatched)
    except IncfsError as error:
        service.record_event("job-failed", request.subject, f"{request.verb}: {error}")
    else:
        service.record_event("job-ended", request.subject, f"{request.verb} is through")


def _unwatched(done: int, total: int, unit: str) -> None:
    """Nobody is there to see; ``pool jobs`` tells who asks."""
