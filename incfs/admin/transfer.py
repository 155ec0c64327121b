"""Verbs of streams: sent from snapshots, received into volumes."""

from typing import TYPE_CHECKING, Final

from incfs.admin.verb import Verb, in_bytes
from incfs.channel import Channel, Progress
from incfs.documents import Document, snapshot_document
from incfs.errors import UsageError
from incfs.sender import SendPlan
from incfs.stream.encoder import DEFAULT_LEVEL
from incfs.targets import find_snapshot, split_base

if TYPE_CHECKING:
    from incfs.service import Service


async def transfer_send(
    service: "Service",
    channel: Channel,
    *,
    targets: list[str],
    base: str | None = None,
    every: bool = False,
    token: str | None = None,
    level: int = DEFAULT_LEVEL,
    rate_bytes: int | None = None,
    dry_run: bool = False,
    progress: Progress,
) -> Document:
    """Send snapshots, or the rest of what a token stands for; ``dry_run`` makes the stream and only counts it."""
    plan = _plan(service, targets, base, every=every, token=token)
    put = _count_only if dry_run else channel.put
    rate = None if dry_run else rate_bytes
    sent = await service.transfers.send(plan, put, level=level, rate_bytes=rate, progress=in_bytes(progress))
    return {
        "stream": {
            "dry_run": dry_run,
            "stream_bytes": sent.stream_bytes,
            "snapshots": [snapshot_document(service, taken) for taken in sent.snapshots],
        }
    }


async def _count_only(data: bytes) -> None:
    """The pace counts."""


def _plan(service: "Service", targets: list[str], base: str | None, *, every: bool, token: str | None) -> SendPlan:
    if token is not None:
        if targets or base is not None or every:
            raise UsageError("a token says what to send: name nothing else beside it")
        return service.transfers.plan_resume(token)
    wanted = [find_snapshot(service, target) for target in targets]
    if base is not None:
        owner, base = split_base(base)
        if owner is not None and [service.volume(owner).id] != [volume.id for volume, _ in wanted]:
            raise UsageError(f"the base is of volume {owner}; name it as SNAP or #MARK, or send that volume alone")
    return service.transfers.plan(wanted, base=base, every=every)


async def transfer_receive(
    service: "Service", channel: Channel, *, names: list[str], replica: bool = False, progress: Progress
) -> Document:
    """Take a stream into volumes, named as at the sender unless ``names`` says otherwise."""
    work = await service.transfers.receive(names, channel.take, is_replica=replica, progress=in_bytes(progress))
    return {
        "snapshots": [snapshot_document(service, taken) for taken in work.published],
        "received_bytes": work.received_bytes,
    }


async def transfer_heal(service: "Service", channel: Channel, *, volume: str, progress: Progress) -> Document:
    """Write damaged blocks of a volume's snapshots again from a stream that carries the same snapshots."""
    work = await service.transfers.heal(volume, channel.take, progress=in_bytes(progress))
    return {
        "healed": {
            "snapshots": work.snapshots,
            "healed_bytes": work.healed_blocks * service.block_bytes,
            "lost_bytes": work.lost_blocks * service.block_bytes,
        }
    }


async def transfer_token(service: "Service", *, volume: str) -> Document:
    """Report the token with which a sender goes on with an unfinished receive."""
    return {"token": service.transfers.token(volume)}


async def transfer_abort(service: "Service", *, volume: str) -> Document:
    """End an unfinished receive; its volumes are as they were before."""
    return {"volume_count": len(await service.transfers.abort(volume))}


VERBS: Final = {
    "transfer.send": Verb(transfer_send, is_read_only=True),
    "transfer.receive": Verb(transfer_receive, is_read_only=False),
    "transfer.heal": Verb(transfer_heal, is_read_only=False),
    "transfer.token": Verb(transfer_token, is_read_only=True),
    "transfer.abort": Verb(transfer_abort, is_read_only=False),
}
