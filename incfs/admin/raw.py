"""Verbs that copy between volumes and raw images or block devices."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from incfs.admin.verb import Verb, copy_plan, refuse_open
from incfs.channel import Channel, Progress
from incfs.documents import Document, snapshot_document, volume_document
from incfs.errors import UsageError
from incfs.foreign import AUTO, RAW, parse_format
from incfs.targets import find_base, find_table, find_volume

if TYPE_CHECKING:
    from incfs.service import Service


async def import_raw(
    service: "Service",
    *,
    volume: str,
    path: str,
    snapshot: str | None = None,
    incremental: bool = False,
    changed: str | None = None,
    image_format: str | None = None,
    dry_run: bool = False,
    progress: Progress,
) -> Document:
    """Make a volume of an image or block device, or bring one up to date, and take a snapshot; or say how much."""
    chosen = None if image_format is None else parse_format(image_format)
    from incfs import rawcopy, rawimport  # late: an online command does not need the core

    source, ranges = raw_path(service, path), None if changed is None else raw_path(service, changed)
    name = snapshot or rawcopy.new_snapshot_name("import")
    if not incremental:
        if ranges is not None:
            raise UsageError("a list of changed ranges goes with --incremental")
        if dry_run:
            copied_bytes = await rawimport.measure_new(service, volume, source, name, progress, image_format=chosen)
            return copy_plan(copied_bytes, f"so much data is in {path}")
        made, taken = await rawimport.import_new(service, volume, source, name, progress, image_format=chosen)
    else:
        found = find_volume(service, volume)
        refuse_open(service, found, "brought up to date")
        if dry_run:
            copied_bytes = await rawimport.measure_changes(
                service, found, source, progress, changed=ranges, image_format=chosen
            )
            return copy_plan(copied_bytes, f"in so much {path} differs from {found.name}, holes aside")
        made, taken = await rawimport.import_changes(
            service, found, source, name, progress, changed=ranges, image_format=chosen
        )
    return {"volume": volume_document(service, made), "snapshot": snapshot_document(service, taken)}


async def export_raw(
    service: "Service",
    *,
    target: str,
    path: str,
    from_snapshot: str | None = None,
    force: bool = False,
    image_format: str = RAW,
    progress: Progress,
) -> Document:
    """Write a volume or snapshot to a file or block device, or what changed since an older snapshot."""
    chosen = parse_format(image_format)
    if chosen == AUTO or (chosen != RAW and from_snapshot is not None):
        raise UsageError("an export is of a format that is named, and only a raw one is brought up to date")
    from incfs import rawexport  # late: as above

    volume, taken = find_table(service, target)
    base = None if from_snapshot is None else service.branches.base(volume, find_base(service, volume, from_snapshot))
    written = await rawexport.export(
        service, volume, taken, raw_path(service, path), progress, base=base, force=force, image_format=chosen
    )
    return {"export": {"volume": volume.name, "snapshot": written.name, "uuid": written.uuid, "path": path}}


async def stream_raw(service: "Service", channel: Channel, *, target: str, progress: Progress) -> Document:
    """Give the bytes of a volume or snapshot as they are."""
    from incfs import rawexport  # late: as above

    volume, taken = find_table(service, target)
    written = await rawexport.export_stream(service, volume, taken, channel.put, progress)
    return {"export": {"volume": volume.name, "snapshot": written.name, "uuid": written.uuid, "path": None}}


def raw_path(service: "Service", path: str) -> Path:
    """Take a path of a raw image, absolute and outside the mount."""
    given = Path(path)
    if not given.is_absolute():
        raise UsageError(f"the path must be absolute, not {path!r}")
    if service.mounted is not None and service.mounted.holds(given):
        raise UsageError(f"{path} lies in this pool's own mount; use `cp`, which copies inside the pool", path=path)
    return given


VERBS: Final = {
    "raw.import": Verb(import_raw, is_read_only=False, can_stop=True),
    "raw.export": Verb(export_raw, is_read_only=False, can_stop=True),
    "raw.stream": Verb(stream_raw, is_read_only=False, can_stop=True),
}
