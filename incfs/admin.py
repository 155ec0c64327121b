"""What an administrator can ask of an open pool: one async function per verb.

The daemon's control socket and an offline command run the same functions, so both give the
same results.  Each takes plain values and returns a document ready for JSON: sizes and
offsets in bytes, times in RFC 3339.  While the pool is mounted, changes to what the kernel
has cached go through the mount, so that its cache is right by construction.
"""

import inspect
import types
import typing
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from incfs.documents import (
    Document,
    snapshot_document,
    snapshot_removal,
    volume_document,
    volume_removal,
)
from incfs.errors import AlreadyExists, Busy, UsageError
from incfs.model import Volume, validate_name
from incfs.targets import find_snapshot, find_table, find_volume, split_snapshot, split_target
from incfs.units import format_size

if TYPE_CHECKING:
    from incfs.service import Service

Progress = Callable[[int, int, str], None]
"""Called with what is done, the total and their unit; from any thread, often."""

MAX_EXTENTS: Final = 10_000
"""Most extents in one answer of ``volume.map``; the caller asks again for the rest."""


@dataclass(frozen=True, slots=True)
class Verb:
    """A function of this module and how it may be treated."""

    run: Callable[..., Awaitable[Document]]
    is_read_only: bool
    """Changes nothing: may be cancelled when the caller has gone."""


async def run_verb(service: "Service", name: str, arguments: Document, progress: Progress) -> Document:
    """Run the verb ``name`` after checking its arguments against its signature.

    Raises:
        UsageError: No such verb, or arguments that it does not take.
        IncfsError: Whatever the verb raises.
    """
    verb = VERBS.get(name)
    if verb is None:
        raise UsageError(f"no such request: {name!r}; is the daemon older than this command?")
    parameters = inspect.signature(verb.run).parameters
    supplied: Document = {"service": service, "progress": progress}
    own = {key: supplied[key] for key in parameters if key in supplied}
    _check_arguments(name, parameters, arguments)
    return await verb.run(**own, **arguments)


def _check_arguments(verb: str, parameters: typing.Mapping[str, inspect.Parameter], arguments: Document) -> None:
    wanted = {key: p for key, p in parameters.items() if key not in ("service", "progress")}
    for key, value in arguments.items():
        if key not in wanted or not _fits(value, wanted[key].annotation):
            raise UsageError(f"{verb} does not take {key} = {value!r}")
    for key, parameter in wanted.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments:
            raise UsageError(f"{verb} needs {key}")


def _fits(value: object, annotation: Any) -> bool:
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, part) for part in annotation.__args__)
    if typing.get_origin(annotation) is list:
        (part,) = annotation.__args__
        return isinstance(value, list) and all(_fits(item, part) for item in value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


# ---------------------------------------------------------------------------- pool, storage


async def pool_show(service: "Service") -> Document:
    """Report the pool's facts and how much it holds."""
    volumes = service.volumes()
    facts = {
        "directory": str(service.directory),
        "mounted": service.mounted is not None,
        "volume_count": len(volumes),
        "snapshot_count": sum(len(service.snapshots(volume.id)) for volume in volumes),
    }
    return {"pool": {**facts, **service.facts()}}


async def pool_check(service: "Service", *, data: bool = False, progress: Progress) -> Document:
    """Prove from the tables that each block has one owner; with ``data`` read every block."""
    report = await service.check(data, lambda done, total: progress(done, total, "blocks"))
    return {"check": report.to_dict()}


async def pool_dump(service: "Service", *, path: str) -> Document:
    """Write the metadata as text to a file that the caller names absolutely."""
    target = Path(path)
    if not target.is_absolute():
        raise UsageError(f"the dump's path must be absolute, not {path!r}")
    return {"dump": {"path": path, "length_bytes": await service.dump(target)}}


async def storage_add(
    service: "Service",
    *,
    path: str,
    capacity_bytes: int | None = None,
    storage_class: str = "",
    redundancy: str = "none",
) -> Document:
    """Create an image file at ``path`` and let the pool allocate from it."""
    storage = await service.add_storage(
        path,
        capacity_bytes=capacity_bytes,
        storage_class=storage_class,
        redundancy=redundancy,
    )
    return {"storage": storage}


async def storage_list(service: "Service") -> Document:
    """Report every storage volume."""
    return {"storages": service.storages()}


# ---------------------------------------------------------------------------------- volumes


async def volume_create(service: "Service", *, name: str, size_bytes: int) -> Document:
    """Create an empty volume."""
    volume = await service.create_volume(name, size_bytes)
    return {"volume": volume_document(service, volume)}


async def volume_list(service: "Service") -> Document:
    """Report every volume, by name."""
    return {"volumes": [volume_document(service, volume) for volume in service.volumes()]}


async def volume_show(service: "Service", *, volume: str) -> Document:
    """Report one volume, with its snapshots and who has it open."""
    found = find_volume(service, volume)
    return {
        "volume": {
            **volume_document(service, found),
            "snapshots": [s.name for s in service.snapshots(found.id)],
            "open_by": service.holders(found.id),
        }
    }


async def volume_resize(service: "Service", *, volume: str, size_bytes: int, shrink: bool = False) -> Document:
    """Set a volume's size; giving up what lies beyond a smaller size needs ``shrink``."""
    found = find_volume(service, volume)
    if size_bytes < found.size_bytes and not shrink:
        raise UsageError(
            f"volume {found.name} has {format_size(found.size_bytes)}; what lies beyond "
            f"{format_size(size_bytes)} would be lost; add --shrink if that is meant",
            volume=found.name,
            size_bytes=found.size_bytes,
        )
    if service.mounted is not None:
        await service.mounted.resize_volume(found.name, size_bytes)
    else:
        await service.resize_volume(found.id, size_bytes, shrink=shrink)
    return {"volume": volume_document(service, service.volume_by_id(found.id))}


async def volume_rename(service: "Service", *, volume: str, name: str) -> Document:
    """Give a volume another name; its snapshots follow."""
    found = find_volume(service, volume)
    _refuse_open(service, found, "renamed")
    if service.mounted is not None:
        # A rename in the mount would replace the volume of that name, and knows nothing of names.
        _refuse_taken(f"volume {name}", [v.name for v in service.volumes()], validate_name(name))
        await service.mounted.rename_volume(found.name, name)
    else:
        await service.rename_volume(found.id, name)
    return {"volume": volume_document(service, service.volume_by_id(found.id))}


async def volume_remove(service: "Service", *, volume: str, snapshots: bool = False, dry_run: bool = False) -> Document:
    """Remove a volume, with its snapshots when asked; ``dry_run`` only says what would go."""
    found = find_volume(service, volume)
    kept = service.snapshots(found.id)
    _refuse_open(service, found, "removed")
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
        for snapshot in kept:
            await service.mounted.remove_snapshot(found.name, snapshot.name)
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
    extents = await service.extents(table.map_id, start_bytes, limit)
    next_bytes = extents[-1]["offset"] + extents[-1]["length"] if len(extents) == limit else None
    return {"target": target, "extents": extents, "next_bytes": next_bytes}


# -------------------------------------------------------------------------------- snapshots


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


async def snapshot_rename(service: "Service", *, target: str, name: str) -> Document:
    """Give a snapshot another name on the same volume; ``name`` is ``SNAP`` or ``VOL@SNAP``."""
    volume, snapshot = find_snapshot(service, target)
    if "@" in name:
        owner, name = split_snapshot(name)
        if find_volume(service, owner).id != volume.id:
            raise UsageError(f"a snapshot of {volume.name} cannot move to {owner}")
    if service.mounted is not None:
        taken = [s.name for s in service.snapshots(volume.id)]
        _refuse_taken(f"snapshot {volume.name}@{name}", taken, validate_name(name, what="snapshot"))
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


# ------------------------------------------------------------------------------------ debug


async def debug_dump(service: "Service") -> Document:
    """Report every record of the tables."""
    return {"records": await service.debug_dump()}


async def debug_map(service: "Service", *, target: str, page_index: int) -> Document:
    """Report the mappings of one map page."""
    volume, snapshot = find_table(service, target)
    table = volume if snapshot is None else snapshot
    mappings = await service.debug_map(table.map_id, page_index)
    return {"target": target, "page_index": page_index, "mappings": mappings}


async def debug_log(service: "Service") -> Document:
    """Report the journal's records that no checkpoint has folded in yet."""
    return {"records": await service.debug_journal()}


VERBS: Final[dict[str, Verb]] = {
    "pool.show": Verb(pool_show, is_read_only=True),
    "pool.check": Verb(pool_check, is_read_only=True),
    "pool.dump": Verb(pool_dump, is_read_only=True),
    "storage.add": Verb(storage_add, is_read_only=False),
    "storage.list": Verb(storage_list, is_read_only=True),
    "volume.create": Verb(volume_create, is_read_only=False),
    "volume.list": Verb(volume_list, is_read_only=True),
    "volume.show": Verb(volume_show, is_read_only=True),
    "volume.resize": Verb(volume_resize, is_read_only=False),
    "volume.rename": Verb(volume_rename, is_read_only=False),
    "volume.remove": Verb(volume_remove, is_read_only=False),
    "volume.map": Verb(volume_map, is_read_only=True),
    "snapshot.create": Verb(snapshot_create, is_read_only=False),
    "snapshot.list": Verb(snapshot_list, is_read_only=True),
    "snapshot.show": Verb(snapshot_show, is_read_only=True),
    "snapshot.remove": Verb(snapshot_remove, is_read_only=False),
    "snapshot.rename": Verb(snapshot_rename, is_read_only=False),
    "snapshot.diff": Verb(snapshot_diff, is_read_only=True),
    "debug.dump": Verb(debug_dump, is_read_only=True),
    "debug.map": Verb(debug_map, is_read_only=True),
    "debug.log": Verb(debug_log, is_read_only=True),
}


def _refuse_open(service: "Service", volume: Volume, action: str) -> None:
    """Raise Busy, naming the holders, while somebody has the volume open."""
    holders = service.holders(volume.id)
    if holders:
        raise Busy(
            f"volume {volume.name} cannot be {action}: it is open by {', '.join(holders)}; detach or close it first",
            volume=volume.name,
            holders=holders,
        )


def _refuse_taken(what: str, taken: list[str], name: str) -> None:
    """Raise AlreadyExists for a name in use."""
    if name in taken:
        raise AlreadyExists(f"there is a {what} already", name=name)
