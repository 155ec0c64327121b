"""What a name on the command line stands for: ``VOL``, ``VOL@SNAP``, ``VOL#MARK`` or ``uuid:...``.

The only place where such names are taken apart.  Look-ups go to the service's memory; nothing
here changes anything.
"""

from typing import TYPE_CHECKING

from incfs.errors import SnapshotNotFound, UsageError
from incfs.model import Snapshot, Volume, validate_name

if TYPE_CHECKING:
    from incfs.service import Service

UUID_PREFIX = "uuid:"


def split_target(text: str) -> tuple[str, str | None]:
    """Return the volume part and the snapshot part (None without ``@``) of a target.

    Raises:
        UsageError: A part is empty.
        InvalidName: A part cannot be a name.
    """
    volume, at, snapshot = text.partition("@")
    if not volume or (at and not snapshot):
        raise UsageError(f"{text!r} is neither VOL nor VOL@SNAP", target=text)
    if not volume.startswith(UUID_PREFIX):
        validate_name(volume)
    return volume, validate_name(snapshot, what="snapshot") if at else None


def split_snapshot(text: str) -> tuple[str, str]:
    """Return the volume and the snapshot of ``VOL@SNAP``.

    Raises:
        UsageError: The snapshot is missing.
    """
    volume, snapshot = split_target(text)
    if snapshot is None:
        raise UsageError(f"{text!r} names no snapshot; write VOL@SNAP", target=text)
    return volume, snapshot


def split_bookmark(text: str) -> tuple[str, str]:
    """Return the volume and the bookmark of ``VOL#MARK``.

    Raises:
        UsageError: A part is missing.
        InvalidName: A part cannot be a name.
    """
    volume, _, bookmark = text.partition("#")
    if not volume or not bookmark:
        raise UsageError(f"{text!r} names no bookmark; write VOL#MARK", target=text)
    if not volume.startswith(UUID_PREFIX):
        validate_name(volume)
    return volume, validate_name(bookmark, what="bookmark")


def split_base(text: str) -> tuple[str | None, str]:
    """Return the volume, None without one, and what increments start from: ``SNAP``, ``#MARK`` or ``uuid:...``."""
    if "#" in text:
        owner, name = split_bookmark(text) if text[0] != "#" else (None, validate_name(text[1:], what="bookmark"))
        return owner, f"#{name}"
    return split_snapshot(text) if "@" in text else (None, text)


def find_base(service: "Service", volume: Volume, text: str) -> str:
    """Return what increments of a volume start from, as ``Catalog.base`` takes it.

    Raises:
        UsageError: It is of another volume.
    """
    owner, base = split_base(text)
    if owner is not None and service.volume(owner).id != volume.id:
        raise UsageError(f"{text} and {volume.name} are different volumes", target=text)
    return base


def find_volume(service: "Service", text: str) -> Volume:
    """Return the volume that ``VOL`` or ``uuid:...`` names.

    Raises:
        UsageError: It names a snapshot.
        VolumeNotFound: There is none.
    """
    volume, snapshot = split_target(text)
    if snapshot is not None:
        raise UsageError(f"{text!r} names a snapshot; a volume is needed", target=text)
    return service.volume(volume)


def find_snapshot(service: "Service", text: str) -> tuple[Volume, Snapshot]:
    """Return the snapshot that ``VOL@SNAP`` or ``uuid:...`` names, with its volume.

    Raises:
        UsageError: It names no snapshot.
        VolumeNotFound: There is no such volume.
        SnapshotNotFound: There is no such snapshot.
    """
    if text.startswith(UUID_PREFIX) and "@" not in text:
        return _snapshot_by_uuid(service, text)
    volume_name, snapshot_name = split_snapshot(text)
    volume = service.volume(volume_name)
    return volume, service.snapshot(volume.id, snapshot_name)


def find_snapshots(service: "Service", texts: list[str]) -> list[tuple[Volume, Snapshot]]:
    """Return the snapshots that several ``VOL@SNAP``, ``uuid:...`` or ranges ``VOL@A%B`` name, each once.

    A range has both ends in it; without A it begins with the oldest, without B it ends with the newest.

    Raises:
        UsageError: One names no snapshot, or a range ends before it begins.
        VolumeNotFound, SnapshotNotFound: There is no such volume or snapshot.
    """
    found = [pair for text in texts for pair in _find_range(service, text)]
    return list({taken.map_id: (volume, taken) for volume, taken in found}.values())


def _find_range(service: "Service", text: str) -> list[tuple[Volume, Snapshot]]:
    if "%" not in text.partition("@")[2]:
        return [find_snapshot(service, text)]
    volume_name, name = split_snapshot(text)
    volume = service.volume(volume_name)
    taken = service.snapshots(volume.id)
    named = [snapshot for snapshot in taken if snapshot.name == name]
    if named or not taken:
        return [(volume, snapshot) for snapshot in named]
    first, _, last = name.partition("%")
    oldest = service.snapshot(volume.id, first) if first else taken[0]
    newest = service.snapshot(volume.id, last) if last else taken[-1]
    if oldest.generation > newest.generation:
        raise UsageError(f"{text!r}: {oldest.name} is newer than {newest.name}; swap them", target=text)
    return [(volume, s) for s in taken if oldest.generation <= s.generation <= newest.generation]


def find_table(service: "Service", text: str) -> tuple[Volume, Snapshot | None]:
    """Return what ``VOL`` or ``VOL@SNAP`` names; the snapshot is None for the live volume."""
    volume_name, snapshot_name = split_target(text)
    volume = service.volume(volume_name)
    if snapshot_name is None:
        return volume, None
    return volume, service.snapshot(volume.id, snapshot_name)


def _snapshot_by_uuid(service: "Service", text: str) -> tuple[Volume, Snapshot]:
    uuid = text.removeprefix(UUID_PREFIX).lower()
    for volume in service.volumes():
        for snapshot in service.snapshots(volume.id):
            if snapshot.uuid.lower() == uuid:
                return volume, snapshot
    raise SnapshotNotFound(f"no snapshot has the UUID {uuid!r}", uuid=uuid)
