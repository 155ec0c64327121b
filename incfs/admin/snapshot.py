"""Verbs of snapshots."""

import time
from typing import TYPE_CHECKING, Final

from incfs.admin.verb import Verb, refuse_taken
from incfs.documents import Document, holds_document, snapshot_document, snapshot_removal
from incfs.errors import UsageError
from incfs.model import Snapshot, VolumeId, validate_name
from incfs.targets import find_snapshot, find_table, find_volume, split_snapshot, split_target

if TYPE_CHECKING:
    from incfs.service import Service


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


async def snapshot_remove(service: "Service", *, target: str, dry_run: bool = False) -> Document:
    """Remove a snapshot; ``dry_run`` only says what would go."""
    volume, snapshot = find_snapshot(service, target)
    removal = snapshot_removal(service, volume, snapshot)
    if not dry_run and service.mounted is not None:
        await service.mounted.remove_snapshot(volume.name, snapshot.name)
    elif not dry_run:
        await service.remove_snapshot(volume.id, snapshot.name)
    return {"removal": {"dry_run": dry_run, **removal}}


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


async def snapshot_diff(service: "Service", *, target: str, from_snapshot: str | None = None) -> Document:
    """Report the ranges that differ between two snapshots of a volume.

    Without ``from_snapshot`` everything that ``target`` stores is reported.
    """
    volume, snapshot = find_snapshot(service, target)
    if from_snapshot is not None and "@" in from_snapshot:
        owner, from_snapshot = split_target(from_snapshot)
        if find_volume(service, owner).id != volume.id:
            raise UsageError(f"{owner} and {volume.name} are different volumes")
    ranges = await service.diff(volume.id, from_snapshot, snapshot.name)
    return {
        "volume": volume.name,
        "from": from_snapshot,
        "to": snapshot.name,
        "changed_bytes": sum(part["length"] for part in ranges),
        "ranges": ranges,
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
