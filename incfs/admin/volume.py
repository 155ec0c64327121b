"""Verbs of virtual volumes."""

from typing import TYPE_CHECKING, Final

from incfs.admin.raw import raw_path
from incfs.admin.verb import Verb, copy_plan, in_bytes, plan_document, refuse_in_use, refuse_open, refuse_taken
from incfs.channel import Progress
from incfs.documents import Document, volume_document, volume_removal
from incfs.errors import Busy, UsageError
from incfs.foreign import RAW, parse_format
from incfs.jobs import Request
from incfs.model import Volume, validate_name
from incfs.mover import MoveReport
from incfs.settings import DEFAULT_STRIPE_UNIT_BYTES
from incfs.targets import find_snapshot, find_table, find_volume
from incfs.units import format_size

if TYPE_CHECKING:
    from incfs.service import Service

MAX_EXTENTS: Final = 10_000
"""Most extents in one answer of ``volume.map``; the caller asks again for the rest."""


async def volume_create(
    service: "Service",
    *,
    name: str,
    size_bytes: int | None = None,
    origin: str | None = None,
    digest: bool = False,
    image_format: str | None = None,
    stripe_columns: int | None = None,
    stripe_unit_bytes: int = DEFAULT_STRIPE_UNIT_BYTES,
    progress: Progress,
) -> Document:
    """Create an empty volume, or one over a raw image, perhaps striped over storage volumes."""
    if (size_bytes is None) == (origin is None):
        raise UsageError("a new volume has either a size or an origin, whose size it gets")
    if digest and origin is None:
        raise UsageError("a digest is of an origin; name one")
    if image_format is not None and (origin is None or parse_format(image_format) != RAW):
        raise UsageError("a volume lies over a raw image: --format raw says that an origin is one")
    if stripe_columns is not None:
        service.upkeep.require_columns(stripe_columns, stripe_unit_bytes)
    if origin is not None:
        from incfs.rawimport import create_on_baseline  # late: an online command does not need the core

        volume = await create_on_baseline(
            service, name, raw_path(service, origin), progress, digest=digest, image_format=image_format
        )
    else:
        volume = await service.create_volume(name, size_bytes or 0)
    if stripe_columns is not None:
        volume = await service.upkeep.stripe(volume.id, columns=stripe_columns, unit_bytes=stripe_unit_bytes)
    return {"volume": volume_document(service, volume)}


async def volume_verify(service: "Service", *, volume: str, record: bool = False, progress: Progress) -> Document:
    """Compare the content of the raw image that a volume lies over with the digest that was recorded."""
    found = find_volume(service, volume)
    facts = await service.branches.verify_baseline(found.id, in_bytes(progress), record=record)
    return {
        "verified": {
            "volume": found.name,
            "origin": str(facts.path),
            "size_bytes": facts.size_bytes,
            "digest": facts.digest,
        }
    }


async def volume_list(service: "Service") -> Document:
    """Report every volume, by name, and beside them what is no volume yet but has a name and takes space."""
    return {
        "volumes": [volume_document(service, volume) for volume in service.volumes()],
        "incoming": [volume_document(service, volume) for volume in service.incoming()],
    }


async def volume_show(service: "Service", *, volume: str) -> Document:
    """Report one volume, with its snapshots and who has it open."""
    found = find_volume(service, volume)
    return {
        "volume": {
            **volume_document(service, found),
            "snapshots": [s.name for s in service.snapshots(found.id)],
            "open_by": service.handles.of_volume(found.id),
        }
    }


async def volume_resize(
    service: "Service",
    *,
    volume: str,
    size_bytes: int | None = None,
    change_bytes: int | None = None,
    shrink: bool = False,
) -> Document:
    """Set or change a volume's size.

    What lies beyond a smaller one is lost: that needs ``shrink``, and that nobody has the volume open.
    """
    found = find_volume(service, volume)
    if (size_bytes is None) == (change_bytes is None):
        raise UsageError("a volume gets either a size or a change of it")
    wanted = found.size_bytes + (change_bytes or 0) if size_bytes is None else size_bytes
    if wanted < found.size_bytes and not shrink:
        raise UsageError(
            f"volume {found.name} has {format_size(found.size_bytes)}; what lies beyond "
            f"{format_size(wanted)} would be lost; add --shrink if that is meant",
            volume=found.name,
            size_bytes=found.size_bytes,
        )
    if wanted < 0:
        raise UsageError(f"volume {found.name} has only {format_size(found.size_bytes)}", size_bytes=found.size_bytes)
    if wanted < found.size_bytes:
        refuse_in_use(service, found, "made smaller")
    if service.mounted is not None:
        await service.mounted.resize_volume(found.name, wanted)
    else:
        await service.resize_volume(found.id, wanted, shrink=shrink)
    return {"volume": volume_document(service, service.volume_by_id(found.id))}


async def volume_rename(service: "Service", *, volume: str, name: str) -> Document:
    """Give a volume another name; its snapshots follow."""
    found = find_volume(service, volume)
    refuse_open(service, found, "renamed")
    if service.mounted is not None:
        # A rename in the mount would replace the volume of that name, and knows nothing of names.
        refuse_taken(f"volume {name}", [v.name for v in service.volumes()], validate_name(name))
        await service.mounted.rename_volume(found.name, name)
    else:
        await service.rename_volume(found.id, name)
    return {"volume": volume_document(service, service.volume_by_id(found.id))}


async def volume_clone(service: "Service", *, target: str, name: str) -> Document:
    """Create a volume that reads as a snapshot until it is written."""
    _, origin = find_snapshot(service, target)
    return {"volume": volume_document(service, await service.branches.clone(origin, name))}


async def volume_flatten(service: "Service", *, volume: str, dry_run: bool = False, progress: Progress) -> Document:
    """Copy what a clone inherits, so that it needs its origin no more; ``dry_run`` only says how much."""
    found = find_volume(service, volume)
    if dry_run:
        copied_bytes = await service.branches.count_inherited(found.id) * service.block_bytes
        return copy_plan(copied_bytes, "so much it has from its origin")
    async with service.jobs.under_way(_request("volume.flatten", found), progress, "bytes") as tell:
        flat = await service.branches.flatten(found.id, tell)
    return {"volume": volume_document(service, flat)}


async def volume_rollback(service: "Service", *, target: str, force: bool = False, dry_run: bool = False) -> Document:
    """Let a volume be again what it was at a snapshot; ``force`` gives up newer snapshots and open files."""
    found, taken = find_snapshot(service, target)
    if not force:
        refuse_in_use(service, found, "rolled back")
    doomed = service.branches.newer_snapshots(taken, force=force)
    for snapshot in doomed:
        service.handles.require_closed(snapshot)
    names = [f"{found.name}@{snapshot.name}" for snapshot in doomed]
    document: Document = {"volume": found.name, "to": taken.name, "removed_snapshots": names, "dry_run": dry_run}
    if dry_run:
        return {"rollback": {**document, "freed_bytes": await service.branches.freed_by_roll_back(taken)}}
    if service.mounted is not None:
        await service.mounted.sync_volume(found.name)
    await service.branches.roll_back(found.id, taken.name, force=force)
    if service.mounted is not None:
        await service.mounted.refresh_volume(found.name, service.volume_by_id(found.id).size_bytes)
    return {"rollback": document}


async def volume_remove(service: "Service", *, volume: str, snapshots: bool = False, dry_run: bool = False) -> Document:
    """Remove a volume, with its snapshots when asked; ``dry_run`` only says what would go."""
    found = find_volume(service, volume)
    kept = service.snapshots(found.id)
    refuse_open(service, found, "removed")
    if kept and not snapshots:
        names = ", ".join(snapshot.name for snapshot in kept[:5])
        more = f" and {len(kept) - 5} more" if len(kept) > 5 else ""
        raise Busy(
            f"volume {found.name} has snapshots ({names}{more}); remove them first, or remove it with --snapshots",
            volume=found.name,
            snapshot_count=len(kept),
        )
    removal = volume_removal(service, found, kept)
    if dry_run:
        return {"removal": {"dry_run": True, **removal}}
    if service.mounted is None:
        await service.remove_volume(found.id, snapshots=snapshots)
    else:
        await service.remove_snapshots(kept)
        await service.mounted.remove_volume(found.name)
    return {"removal": {"dry_run": False, **removal}}


async def volume_map(service: "Service", *, target: str, start_bytes: int = 0, limit: int = MAX_EXTENTS) -> Document:
    """Report where a volume or snapshot is stored, from ``start_bytes`` on.

    ``next_bytes`` is where to go on; it is None when nothing is left.
    """
    if start_bytes < 0 or limit < 1:
        raise UsageError(f"volume.map cannot start at {start_bytes} with {limit} extents")
    volume, snapshot = find_table(service, target)
    table = volume if snapshot is None else snapshot
    limit = min(limit, MAX_EXTENTS)
    extents = await service.inspection.extents(table.map_id, start_bytes, limit)
    next_bytes = extents[-1]["offset"] + extents[-1]["length"] if len(extents) == limit else None
    return {"target": target, "extents": extents, "next_bytes": next_bytes}


async def volume_restripe(
    service: "Service",
    *,
    volume: str,
    stripe_columns: int | None = None,
    stripe_unit_bytes: int | None = None,
    new_only: bool = False,
    rate_bytes: int | None = None,
    dry_run: bool = False,
    progress: Progress,
) -> Document:
    """Give new stripes other columns, and unless ``new_only`` move what is stored to them, or only say how much."""
    found, report = find_volume(service, volume), MoveReport()
    row, columns, unit = found.stripe_row, None, DEFAULT_STRIPE_UNIT_BYTES
    if stripe_columns is not None or stripe_unit_bytes is not None:
        unit = stripe_unit_bytes or (row.unit_blocks * service.block_bytes if row is not None else unit)
        columns = stripe_columns or (len(row.columns) if row is not None else 1)
    if dry_run:
        if new_only:
            raise UsageError("--new-only moves nothing that is stored: there is nothing to say beforehand")
        return plan_document(service, await service.upkeep.plan_restripe(found.id, columns=columns, unit_bytes=unit))
    if columns is not None:
        await service.upkeep.stripe(found.id, columns=columns, unit_bytes=unit)
    if not new_only:
        request = _request("volume.restripe", found, rate_bytes=rate_bytes)  # the columns are chosen now
        async with service.jobs.under_way(request, progress) as tell:
            report = await service.upkeep.restripe(found.id, rate_bytes=rate_bytes, progress=tell)
    return {"move": report.to_dict(service.block_bytes)}


async def volume_migrate(
    service: "Service", *, volume: str, rate_bytes: int | None = None, dry_run: bool = False, progress: Progress
) -> Document:
    """Move what a volume stores off storage volumes that its rules do not allow; ``dry_run`` only says how much."""
    found = find_volume(service, volume)
    if dry_run:
        return plan_document(service, await service.upkeep.plan_migration(found.id))
    async with service.jobs.under_way(_request("volume.migrate", found, rate_bytes=rate_bytes), progress) as tell:
        report = await service.upkeep.migrate(found.id, rate_bytes=rate_bytes, progress=tell)
    return {"move": report.to_dict(service.block_bytes)}


def _request(verb: str, volume: Volume, **arguments: int | None) -> Request:
    return Request(verb, f"volume {volume.name}", {"volume": f"uuid:{volume.uuid}", **arguments})


VERBS: Final = {
    "volume.restripe": Verb(volume_restripe, is_read_only=False, can_stop=True),
    "volume.migrate": Verb(volume_migrate, is_read_only=False, can_stop=True),
    "volume.create": Verb(volume_create, is_read_only=False),
    "volume.verify": Verb(volume_verify, is_read_only=False, can_stop=True),
    "volume.list": Verb(volume_list, is_read_only=True),
    "volume.show": Verb(volume_show, is_read_only=True),
    "volume.resize": Verb(volume_resize, is_read_only=False),
    "volume.rename": Verb(volume_rename, is_read_only=False),
    "volume.clone": Verb(volume_clone, is_read_only=False),
    "volume.flatten": Verb(volume_flatten, is_read_only=False, can_stop=True),
    "volume.rollback": Verb(volume_rollback, is_read_only=False),
    "volume.remove": Verb(volume_remove, is_read_only=False),
    "volume.map": Verb(volume_map, is_read_only=True),
}
