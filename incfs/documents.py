"""The JSON-ready documents that describe volumes, snapshots and removals.

Sizes in bytes, times in RFC 3339.  Reads the service's memory and changes nothing.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from incfs.model import IMPORTING_SUFFIX, Bookmark, Snapshot, Volume, split_map_id
from incfs.units import format_time

if TYPE_CHECKING:
    from incfs.service import Service

Document = dict[str, Any]


def origin_name(service: "Service", volume: Volume) -> str | None:
    """Name the snapshot that a clone reads from; None when it is no clone."""
    if not volume.origin:
        return None
    if volume.baseline:
        return str(volume.baseline["path"])
    origin_id, generation = split_map_id(volume.origin)
    return f"{service.volume_by_id(origin_id).name}@{service.snapshot_by_generation(origin_id, generation).name}"


def holds_document(snapshot: Snapshot) -> list[Document]:
    """Describe the holds of a snapshot that are in force."""
    in_force = snapshot.holds_at(time.time_ns())
    return [{"tag": tag, "expires": expires and format_time(expires)} for tag, expires in sorted(in_force.items())]


def volume_state(volume: Volume) -> str | None:
    """Say what a volume is beside an ordinary one."""
    if volume.receive_lead:
        return "receiving"
    if volume.name.endswith(IMPORTING_SUFFIX):
        return "importing"
    return "replica" if volume.is_replica else None


def volume_document(service: "Service", volume: Volume) -> Document:
    """Describe a volume."""
    block_bytes = service.block_bytes
    snapshots = service.snapshots(volume.id)
    return {
        "name": volume.name,
        "uuid": volume.uuid,
        "id": volume.id,
        "size_bytes": volume.size_bytes,
        "mapped_bytes": service.mapped_bytes(volume.map_id),
        "held_bytes": sum(snapshot.held_blocks for snapshot in snapshots) * block_bytes,
        "snapshot_count": len(snapshots),
        "is_replica": volume.is_replica,
        "is_receiving": bool(volume.receive_lead),
        "state": volume_state(volume),
        "origin": origin_name(service, volume),
        "origin_digest": volume.baseline.get("digest"),
        "flattened": not volume.origin or volume.flat_generation is not None,
        "stripe_columns": list(volume.stripe_row.columns) if volume.stripe_row else [],
        "stripe_unit_bytes": volume.stripe_row.unit_blocks * block_bytes if volume.stripe_row else None,
        "mode": f"{volume.mode:04o}",
        "uid": volume.uid,
        "gid": volume.gid,
        "created": format_time(volume.created_ns),
        "modified": format_time(volume.modified_ns),
        "changed": format_time(volume.changed_ns),
        "accessed": format_time(volume.accessed_ns),
    }


def snapshot_document(service: "Service", snapshot: Snapshot) -> Document:
    """Describe a snapshot."""
    block_bytes = service.block_bytes
    volume = service.volume_by_id(snapshot.volume_id)
    return {
        "name": f"{volume.name}@{snapshot.name}",
        "volume": volume.name,
        "snapshot": snapshot.name,
        "uuid": snapshot.uuid,
        "generation": snapshot.generation,
        "size_bytes": snapshot.size_bytes,
        "mapped_bytes": snapshot.mapped_blocks * block_bytes,
        "held_bytes": snapshot.held_blocks * block_bytes,
        "created": format_time(snapshot.created_ns),
        "tag": snapshot.tag,
        "clones": [clone.name for clone in service.clones(snapshot) if clone.name],
        "holds": [hold["tag"] for hold in holds_document(snapshot)],
    }


def bookmark_documents(service: "Service", volume: Volume, bookmarks: Sequence[Bookmark]) -> list[Document]:
    """Describe bookmarks, a document for each name."""
    snapshots = {taken.uuid: taken.name for taken in service.snapshots(volume.id)}
    return [
        {
            "name": f"{volume.name}#{name}",
            "volume": volume.name,
            "bookmark": name,
            "uuid": bookmark.uuid,
            "generation": bookmark.generation,
            "size_bytes": bookmark.size_bytes,
            "snapshot": snapshots.get(bookmark.uuid, ""),
            "taken": format_time(bookmark.taken_ns),
            "created": format_time(created_ns),
        }
        for bookmark in bookmarks
        for name, created_ns in sorted(bookmark.names.items())
    ]


def volume_removal(service: "Service", volume: Volume, snapshots: list[Snapshot]) -> Document:
    """Say what removing a volume with all its snapshots frees; exact, as nothing shares."""
    block_bytes = service.block_bytes
    items = [
        {
            "name": f"{volume.name}@{snapshot.name}",
            "freed_bytes": snapshot.held_blocks * block_bytes,
            "reason": "snapshot of the volume",
        }
        for snapshot in snapshots
    ]
    live = {
        "name": volume.name,
        "freed_bytes": service.mapped_bytes(volume.map_id),
        "reason": "current contents of the volume",
    }
    items.append(live)
    return {"items": items, "freed_bytes": sum(item["freed_bytes"] for item in items)}
