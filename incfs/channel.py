"""What a request has beside its arguments and its result: bulk data, and how far it is."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from incfs.errors import UsageError

Progress = Callable[[int, int, str], None]
"""Called with what is done, the total and their unit; from any thread, often."""


@dataclass(frozen=True, slots=True)
class Channel:
    """Bulk data of a request, in bounded pieces, beside its arguments and its result."""

    put: Callable[[bytes], Awaitable[None]]
    """Hands bytes to the caller; returns when there is room for more."""
    take: Callable[[], Awaitable[bytes]]
    """Gives the caller's next bytes; none at the end, and when the caller has gone."""


async def _put_nothing(data: bytes) -> None:
    raise UsageError(f"this request has no room for {len(data)} bytes of data")


async def _take_nothing() -> bytes:
    return b""


NO_CHANNEL = Channel(_put_nothing, _take_nothing)
