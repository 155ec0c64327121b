"""What ``stat`` and ``getfattr`` show: attributes and read-only facts of volumes, snapshots and directories."""

import os
import stat
import time
from typing import TYPE_CHECKING, Final

import pyfuse3

from incfs.inodes import Kind, kind_of, volume_of
from incfs.model import Facts, MapId, Snapshot, Volume, split_map_id

if TYPE_CHECKING:
    from incfs.service import Service

ATTRIBUTES_TIMEOUT_S: Final = 1.0
"""The kernel forgets attributes by itself after a write; this bounds how long ``st_blocks`` may lag behind the
write-back.  Zero would cost a request for every cached read."""


FIXED_TIMEOUT_S: Final = 3600.0
_STARTED_NS: Final = time.time_ns()
"""The times of what exists only while mounted."""


def entry(inode: int, mode: int, *, links: int = 1) -> pyfuse3.EntryAttributes:
    """Return attributes with what all inodes share.

    Names are never cached (``entry_timeout`` 0): commands add, rename and remove them without the kernel.
    """
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = inode
    attributes.st_mode = mode
    attributes.st_nlink = links
    attributes.st_uid = os.geteuid()
    attributes.st_gid = os.getegid()
    attributes.entry_timeout = 0
    attributes.attr_timeout = ATTRIBUTES_TIMEOUT_S
    return attributes


def fixed_entry(inode: int) -> pyfuse3.EntryAttributes:
    """Return the attributes of the root, ``.snapshots``, ``.incfs`` and the status files; these never change.

    A status file has size 0, like those in /proc: it is made when it is opened.
    """
    match kind_of(inode):
        case Kind.STATUS_FILE:
            attributes = entry(inode, stat.S_IFREG | 0o444)
        case Kind.ROOT:
            attributes = entry(inode, stat.S_IFDIR | 0o755, links=4)
        case _:
            attributes = entry(inode, stat.S_IFDIR | 0o555, links=2)
    attributes.entry_timeout = attributes.attr_timeout = FIXED_TIMEOUT_S
    attributes.st_atime_ns = attributes.st_mtime_ns = attributes.st_ctime_ns = _STARTED_NS
    return attributes


def table_entry(table: MapId, size_bytes: int, facts: Facts, block_bytes: int) -> pyfuse3.EntryAttributes:
    """Return the attributes of a live volume or of a snapshot; ``reply_attributes`` in C makes the same."""
    attributes = entry(table, stat.S_IFREG | facts.mode, links=facts.link_count)
    attributes.st_uid, attributes.st_gid = facts.uid, facts.gid
    attributes.st_size = size_bytes
    attributes.st_blocks = facts.mapped_blocks * block_bytes // 512
    attributes.st_blksize = max(block_bytes, 4096)
    attributes.st_atime_ns = facts.accessed_ns
    attributes.st_mtime_ns = facts.modified_ns
    attributes.st_ctime_ns = facts.changed_ns
    return attributes


def snapshot_directory_entry(volume: Volume, inode: int) -> pyfuse3.EntryAttributes:
    """Return the attributes of ``.snapshots/NAME``.

    Who may read the volume may list and enter, who may write it may take and remove snapshots.  These attributes
    are not cached, so a changed mode shuts the directory, and with it the snapshots, at once.
    """
    mode = stat.S_IFDIR | (volume.mode & 0o666) | ((volume.mode & 0o444) >> 2)
    attributes = entry(inode, mode, links=2)
    attributes.st_uid, attributes.st_gid = volume.uid, volume.gid
    attributes.st_ctime_ns = attributes.st_mtime_ns = volume.changed_ns
    attributes.attr_timeout = 0
    return attributes


def facts_of(service: "Service", inode: int) -> dict[str, str]:
    """Return the facts shown as ``user.incfs.*``: of the pool on the root, of the object elsewhere."""
    match kind_of(inode):
        case Kind.ROOT:
            return _pool_facts(service)
        case Kind.VOLUME:
            return _volume_facts(service, service.volume_by_id(volume_of(inode)))
        case Kind.SNAPSHOT:
            volume_id, generation = split_map_id(MapId(inode))
            return _snapshot_facts(service, service.snapshot_by_generation(volume_id, generation))
        case _:
            return {}


def _pool_facts(service: "Service") -> dict[str, str]:
    facts = service.facts()
    return {"pool": str(service.directory), "uuid": str(facts["uuid"]), "pid": str(os.getpid())}


def _volume_facts(service: "Service", volume: Volume) -> dict[str, str]:
    return {
        "uuid": volume.uuid,
        "id": str(volume.id),
        "size_bytes": str(volume.size_bytes),
        "mapped_bytes": str(service.mapped_bytes(volume.map_id)),
        "snapshots": str(len(service.snapshots(volume.id))),
        "newest_generation": str(volume.newest_generation),
        **_origin_facts(service, volume),
    }


def _origin_facts(service: "Service", volume: Volume) -> dict[str, str]:
    if not volume.origin:
        return {}
    if volume.baseline:
        return {"origin": str(volume.baseline["path"])}
    origin_id, generation = split_map_id(volume.origin)
    origin = service.snapshot_by_generation(origin_id, generation)
    return {"origin": f"{service.volume_by_id(origin_id).name}@{origin.name}", "origin_uuid": origin.uuid}


def _snapshot_facts(service: "Service", snapshot: Snapshot) -> dict[str, str]:
    origin = service.volume_by_id(snapshot.volume_id)
    return {
        "uuid": snapshot.uuid,
        "generation": str(snapshot.generation),
        "size_bytes": str(snapshot.size_bytes),
        "mapped_bytes": str(service.mapped_bytes(snapshot.map_id)),
        "origin": origin.name,
        "origin_uuid": origin.uuid,
        "tag": snapshot.tag,
    }
