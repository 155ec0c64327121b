"""What a verb is, and what several of them refuse."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from incfs.channel import Progress
from incfs.documents import Document
from incfs.errors import AlreadyExists, Busy
from incfs.model import Volume
from incfs.mover import MovePlan

if TYPE_CHECKING:
    from incfs.service import Service


def in_bytes(progress: Progress) -> Callable[[int, int], None]:
    """Make what counts in bytes tell so."""
    return lambda done, total: progress(done, total, "bytes")


@dataclass(frozen=True, slots=True)
class Verb:
    """A function of this package and how it may be treated."""

    run: Callable[..., Awaitable[Document]]
    is_read_only: bool
    """Changes nothing: may be cancelled when the caller has gone."""
    can_stop: bool = False
    """Long work that may be cancelled at any time, and goes on where it ended when it is asked for again."""


def plan_document(service: "Service", plan: MovePlan) -> Document:
    """Describe a move that was not made."""
    return {"plan": {"dry_run": True, **plan.to_dict(service.block_bytes)}}


def copy_plan(copied_bytes: int, reason: str) -> Document:
    """Describe a copy that was not made."""
    return {"plan": {"dry_run": True, "copied_bytes": copied_bytes, "reason": reason}}


def refuse_open(service: "Service", volume: Volume, action: str) -> None:
    """Raise Busy, naming the holders, while somebody has the volume or a snapshot of it open."""
    holders = service.handles.of_volume(volume.id)
    if holders:
        raise busy(volume, holders, action)


def refuse_in_use(service: "Service", volume: Volume, action: str) -> None:
    """Raise Busy, naming the holders, while somebody has the volume's contents of now open, and would lose some."""
    holders = service.handles.of_table(volume.map_id)
    if holders:
        raise busy(volume, holders, action)


def busy(volume: Volume, holders: list[str], action: str) -> Busy:
    """Make the error that says who has a volume open."""
    return Busy(
        f"volume {volume.name} cannot be {action}: it is open by {', '.join(holders)}; detach or close it first",
        volume=volume.name,
        holders=holders,
    )


def refuse_taken(what: str, taken: list[str], name: str) -> None:
    """Raise AlreadyExists for a name in use."""
    if name in taken:
        raise AlreadyExists(f"there is a {what} already", name=name)
