"""Verbs of snapshots."""

import time
from typing import TYPE_CHECKING, Final

from incfs.admin.verb import Verb, refuse_taken
from incfs.documents import Document, holds_document, snapshot_document
from incfs.errors import UsageError
from incfs.model import Snapshot, Volume, VolumeId, validate_name
from incfs.targets import find_base, find_snapshot, find_snapshots, find_table, find_volume, split_snapshot

if TYPE_CHECKING:
    from incfs.service import Service

MAX_RANGES: Final = 10_000
"""Most ranges in one answer of ``snapshot.diff``; the caller asks again for the rest."""


async def snapshot_create(service: "Service", *, targets: list[str]) -> Document:
    """Take snapshots of one or several volumes at one point in time."""
    wanted = [split_snapshot(target) for target in targets]
    pairs = [(find_volume(service, volume).id, snapshot) for volume, snapshot in wanted]
    made = await service.create_snapshots(pairs)
    return {"snapshots": [snapshot_document(service, snapshot) for snapshot in made]}


async def snapshot_list(service: "Service", *, volume: str | None = None) -> Document:
    """Report the snapshots of one volume or of all, oldest first."""
    volumes = service.volumes() if volume is None else [find_volume(service, volume)]
    return {
        "snapshots": [
            snapshot_document(service, snapshot) for owner in volumes for snapshot in service.snapshots(owner.id)
        ]
    }


async def snapshot_show(service: "Service", *, target: str) -> Document:
    """Report one snapshot."""
    _, snapshot = find_snapshot(service, target)
    return {"snapshot": snapshot_document(service, snapshot)}


async def snapshot_remove(service: "Service", *, targets: list[str], dry_run: bool = False) -> Document:
    """Remove snapshots, all or none; ``dry_run`` only says what would go, and what that frees."""
    doomed = find_snapshots(service, targets)
    if dry_run:
        service.branches.require_removable([taken for _, taken in doomed])
        return {"removal": {"dry_run": True, **await _plan_removal(service, doomed)}}
    await service.remove_snapshots([taken for _, taken in doomed])
    items = [{"name": f"{volume.name}@{taken.name}"} for volume, taken in doomed]
    return {"removal": {"dry_run": False, "items": items}}


async def _plan_removal(service: "Service", doomed: list[tuple[Volume, Snapshot]]) -> Document:
    items, freed_blocks = [], 0
    for volume in {volume.id: volume for volume, _ in doomed}.values():
        members = [taken for owner, taken in doomed if owner.id == volume.id]
        freed = await service.inspection.plan_removal(volume.id, members)
        freed_blocks += freed.together
        items += [
            {
                "name": f"{volume.name}@{taken.name}",
                "freed_bytes": freed.alone.get(taken.generation, 0) * service.block_bytes,
                "reason": "what it alone holds",
            }
            for taken in members
        ]
    return {"items": items, "freed_bytes": freed_blocks * service.block_bytes}


async def snapshot_hold(
    service: "Service", *, tag: str, targets: list[str], expires_s: float | int | None = None
) -> Document:
    """Keep snapshots from being removed, for ever or for some seconds."""
    expires_ns = None if expires_s is None else time.time_ns() + int(expires_s * 1e9)
    held = await service.branches.hold(_pairs(service, targets), tag, expires_ns=expires_ns)
    return {"holds": _hold_rows(service, held)}


async def snapshot_release(service: "Service", *, tag: str, targets: list[str]) -> Document:
    """End the holds of a tag."""
    released = await service.branches.release(_pairs(service, targets), tag)
    return {"holds": _hold_rows(service, released)}


async def snapshot_holds(service: "Service", *, target: str | None = None) -> Document:
    """Report the holds of a snapshot, of a volume's snapshots, or of all."""
    if target is None:
        found = [taken for volume in service.volumes() for taken in service.snapshots(volume.id)]
    else:
        volume, taken = find_table(service, target)
        found = service.snapshots(volume.id) if taken is None else [taken]
    return {"holds": _hold_rows(service, found)}


def _pairs(service: "Service", targets: list[str]) -> list[tuple[VolumeId, str]]:
    found = [find_snapshot(service, target) for target in targets]
    return [(volume.id, taken.name) for volume, taken in found]


def _hold_rows(service: "Service", snapshots: list[Snapshot]) -> list[Document]:
    return [
        {"name": f"{service.volume_by_id(taken.volume_id).name}@{taken.name}", **hold}
        for taken in snapshots
        for hold in holds_document(taken)
    ]


async def snapshot_rename(service: "Service", *, target: str, name: str) -> Document:
    """Give a snapshot another name on the same volume; ``name`` is ``SNAP`` or ``VOL@SNAP``."""
    volume, snapshot = find_snapshot(service, target)
    if "@" in name:
        owner, name = split_snapshot(name)
        if find_volume(service, owner).id != volume.id:
            raise UsageError(f"a snapshot of {volume.name} cannot move to {owner}")
    if service.mounted is not None:
        taken = [s.name for s in service.snapshots(volume.id)]
        refuse_taken(f"snapshot {volume.name}@{name}", taken, validate_name(name, what="snapshot"))
        await service.mounted.rename_snapshot(volume.name, snapshot.name, name)
    else:
        await service.rename_snapshot(volume.id, snapshot.name, name)
    return {"snapshot": snapshot_document(service, service.snapshot(volume.id, name))}


async def snapshot_diff(
    service: "Service",
    *,
    target: str,
    from_snapshot: str | None = None,
    start_bytes: int = 0,
    max_results: int = MAX_RANGES,
) -> Document:
    """Report the ranges that differ between a snapshot, or ``#MARK``, and a newer one, from ``start_bytes`` on.

    Without ``from_snapshot`` everything that ``target`` stores is reported.  ``next_offset`` is where to go on; it is
    None when nothing is left.  The keys of the Kubernetes CSI service SnapshotMetadata are there, too.
    """
    volume, snapshot = find_snapshot(service, target)
    if from_snapshot is not None:
        from_snapshot = find_base(service, volume, from_snapshot)
    if start_bytes < 0 or max_results < 1:
        raise UsageError(f"snapshot.diff cannot start at {start_bytes} with {max_results} results")
    found, next_offset = await service.inspection.diff(
        volume.id, from_snapshot, snapshot.name, start_bytes=start_bytes, limit=min(max_results, MAX_RANGES)
    )
    return {
        "volume": volume.name,
        "from": from_snapshot,
        "to": snapshot.name,
        "changed_bytes": sum(part["length"] for part in found),
        "ranges": found,
        "block_metadata_type": "VARIABLE_LENGTH",
        "volume_capacity_bytes": snapshot.size_bytes,
        "block_metadata": [{"byte_offset": part["offset"], "size_bytes": part["length"]} for part in found],
        "next_offset": next_offset,
    }


VERBS: Final = {
    "snapshot.create": Verb(snapshot_create, is_read_only=False),
    "snapshot.list": Verb(snapshot_list, is_read_only=True),
    "snapshot.show": Verb(snapshot_show, is_read_only=True),
    "snapshot.remove": Verb(snapshot_remove, is_read_only=False),
    "snapshot.hold": Verb(snapshot_hold, is_read_only=False),
    "snapshot.release": Verb(snapshot_release, is_read_only=False),
    "snapshot.holds": Verb(snapshot_holds, is_read_only=True),
    "snapshot.rename": Verb(snapshot_rename, is_read_only=False),
    "snapshot.diff": Verb(snapshot_diff, is_read_only=True),
}
