"""The verb that lists what the pool did by itself."""

from typing import TYPE_CHECKING, Final

from incfs.admin.verb import Verb
from incfs.documents import Document
from incfs.errors import UsageError

if TYPE_CHECKING:
    from incfs.service import Service

MAX_EVENTS: Final = 1000


async def events_list(service: "Service", *, since: int = 0, limit: int = MAX_EVENTS) -> Document:
    """Report the newest ``limit`` events behind the number ``since``, oldest first."""
    if since < 0 or not 1 <= limit <= MAX_EVENTS:
        raise UsageError(f"events cannot be listed from {since} with a limit of {limit}; it is 1 to {MAX_EVENTS}")
    return {"events": service.events(since, limit)}


VERBS: Final = {"events.list": Verb(events_list, is_read_only=True)}
