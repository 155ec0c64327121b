"""The life of virtual volumes: made, resized, renamed, removed; what was removed is reclaimed.

Each function is one step of the owner thread.
"""

import os
import uuid as uuids
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from incfs import bookmarks
from incfs.errors import AlreadyExists, Busy, LimitExceeded, UsageError
from incfs.memory import one_step
from incfs.model import (
    MAX_VOLUME_BYTES,
    MAX_XATTR_BYTES,
    NO_ORIGIN,
    Generation,
    MapId,
    Volume,
    VolumeId,
    map_id,
    validate_name,
)
from incfs.overlay import TableKey
from incfs.ranges import TrimPending
from incfs.rollback import unroll
from incfs.snapshot import require_removable
from incfs.store import Store
from incfs.transfers import require_not_receiving, require_ordinary


@one_step
def create(
    store: Store,
    name: str,
    size_bytes: int,
    *,
    mode: int,
    uid: int | None = None,
    gid: int | None = None,
    origin: MapId = NO_ORIGIN,
    baseline: Mapping[str, Any] | None = None,
) -> Volume:
    """Add a volume that reads as zeros, or as its origin.

    Without ``uid`` and ``gid`` it belongs to the user of this process, who may use it in a pool of his own.

    Raises:
        InvalidName, AlreadyExists, LimitExceeded: Of the name, and of the size.
        MetadataFull: The metadata's disk is full.
    """
    store.require_room()
    validate_name(name)
    _require_free_name(store, name)
    _require_size(size_bytes)
    volume_id = VolumeId(store.catalog.last_volume_id + 1)
    if volume_id >= 1 << 32:
        raise LimitExceeded("the pool has given out all 2^32 volume ids")
    uid, gid = os.geteuid() if uid is None else uid, os.getegid() if gid is None else gid
    now = store.clock()
    volume = Volume(volume_id, str(uuids.uuid4()), name, size_bytes, 0, mode & 0o777, uid, gid, now, now, now, now)
    volume = replace(volume, origin=origin, baseline=baseline or {})
    store.add(volume)
    return volume


def _require_free_name(store: Store, name: str) -> None:
    if store.catalog.has_name(name):
        raise AlreadyExists(f"there is a volume {name!r} already", volume=name)


def _require_size(size_bytes: int) -> None:
    if not 0 <= size_bytes <= MAX_VOLUME_BYTES:
        raise LimitExceeded(f"a volume can have 0 to {MAX_VOLUME_BYTES} bytes, not {size_bytes}")


def resize(store: Store, volume_id: VolumeId, size_bytes: int, *, shrink: bool) -> Volume:
    """Set the size.  A smaller one loses what lies behind it, once ``trim`` has run.

    Raises:
        UsageError: Smaller, without ``shrink``.
        LimitExceeded: Beyond the largest volume.
        TrimPending: An earlier shrink is not finished.
    """
    volume = store.catalog.volume(volume_id)
    require_ordinary(volume, "be resized")
    if size_bytes < volume.size_bytes and not shrink:
        raise UsageError(
            f"volume {volume.name} has {volume.size_bytes} bytes; to cut it to {size_bytes} and lose the rest, "
            f"say --shrink",
            volume=volume.name,
        )
    return set_size(store, volume_id, size_bytes)


@one_step
def set_size(store: Store, volume_id: VolumeId, size_bytes: int) -> Volume:
    """Set the size, also of a volume that changes by streams only.

    Raises:
        LimitExceeded, TrimPending: As ``resize``.
    """
    _require_size(size_bytes)
    volume = store.catalog.volume(volume_id)
    if volume.trim_from_bytes is not None:
        raise TrimPending(store, volume_id)
    now = store.clock()
    trim_from = size_bytes if size_bytes < volume.size_bytes else None
    return store.amend(volume, size_bytes=size_bytes, modified_ns=now, changed_ns=now, trim_from_bytes=trim_from)


@one_step
def rename(store: Store, volume_id: VolumeId, new_name: str, *, over: bool = False) -> Volume:
    """Give a volume another name.

    Args:
        store: The pool.
        volume_id: The volume.
        new_name: Its new name.
        over: Remove a volume that has that name, in the same commit.

    Raises:
        InvalidName, AlreadyExists: Of the name.
        Busy: The volume to remove has snapshots.
    """
    validate_name(new_name)
    volume = store.catalog.volume(volume_id)
    if volume.name == new_name:
        return volume
    if over and store.catalog.has_name(new_name):
        doomed = store.catalog.volume_named(new_name)
        require_not_receiving(doomed, "be replaced")
        _require_no_snapshots(store, doomed)
        store.amend(doomed, name="")
    else:
        _require_free_name(store, new_name)
    return store.amend(volume, name=new_name, changed_ns=store.clock())


@one_step
def exchange(store: Store, first_id: VolumeId, second_id: VolumeId) -> None:
    """Swap the names of two volumes."""
    first, second = store.catalog.volume(first_id), store.catalog.volume(second_id)
    store.amend(first, name="")
    store.amend(second, name=first.name)
    store.amend(first, name=second.name)


def _require_no_snapshots(store: Store, volume: Volume) -> None:
    names = [snapshot.name for snapshot in store.catalog.snapshots(volume.id)]
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise Busy(
            f"volume {volume.name} has snapshots ({shown}); remove them first, or remove it with --snapshots",
            volume=volume.name,
            snapshots=names,
        )


@one_step
def remove(store: Store, volume_id: VolumeId, *, snapshots: bool) -> None:
    """Take a volume out of the namespace; ``reclaim`` frees its blocks later.

    Raises:
        Busy: It has snapshots and ``snapshots`` is false, or one of them has clones.
    """
    volume = store.catalog.volume(volume_id)
    require_not_receiving(volume, "be removed")
    if not snapshots:
        _require_no_snapshots(store, volume)
    kept = store.catalog.snapshots(volume_id)
    require_removable(store, kept)
    for snapshot in kept:
        store.amend(snapshot, name="")
    store.amend(volume, name="")


def set_attributes(store: Store, volume_id: VolumeId, **attributes: int) -> Volume:
    """Change mode, uid, gid, accessed_ns or modified_ns; durable with the next commit."""
    store.require_writable()
    return store.touch(store.catalog.volume(volume_id), changed_ns=store.clock(), **attributes)


def set_xattrs(store: Store, volume_id: VolumeId, xattrs: Mapping[str, bytes]) -> None:
    """Replace a volume's extended attributes.

    Raises:
        LimitExceeded: Together they are too large.
    """
    store.require_writable()
    total = sum(len(name.encode()) + len(value) for name, value in xattrs.items())
    if total > MAX_XATTR_BYTES:
        raise LimitExceeded(f"extended attributes of {total} bytes; at most {MAX_XATTR_BYTES} fit")
    store.touch(store.catalog.volume(volume_id), xattrs=dict(xattrs), changed_ns=store.clock())


@one_step
def reclaim(store: Store, volume_id: VolumeId, page_count: int) -> bool:
    """Unroll a rollback; free blocks of removed snapshots, trails of removed bookmarks, a removed volume; one step.

    A removed snapshot waits for removed clones of it that are still open, and its volume with it.

    Returns:
        Whether nothing is left to do now.
    """
    volume = store.catalog.volume(volume_id)
    if volume.rollback_to:
        unroll(store, volume_id, page_count)
        return False
    removed = store.catalog.removed_generations(volume_id)
    unneeded = [generation for generation in removed if not store.catalog.clones(map_id(volume_id, generation))]
    if unneeded:
        _fold_some(store, volume, min(unneeded), page_count)
        return False
    if not bookmarks.forget_some(store, volume, page_count):
        return False
    if volume.name or removed:
        return True
    pages = store.log.occupied_pages(TableKey(volume_id), page_count)
    if pages:
        store.moves.empty(volume_id, pages)
        return False
    store.evict(volume.map_id)
    store.drop(("volume", (volume_id,)))
    return True


def _fold_some(store: Store, volume: Volume, generation: Generation, page_count: int) -> None:
    snapshot = store.catalog.snapshot_by_generation(volume.id, generation)
    pages = store.log.occupied_pages(TableKey(volume.id, generation), page_count)
    older = store.catalog.older_generation(volume.id, generation)
    for page in pages if older else ():
        store.log.entries(TableKey(volume.id, older), page)  # a damaged one is noticed before anything changes
    if pages:
        store.moves.fold(volume.id, generation, pages)
        return
    store.evict(snapshot.map_id)
    store.drop(("snapshot", (volume.id, generation)))
    store.amend(volume, newest_generation=store.catalog.newest_generation(volume.id))
    cut_flat_origin(store, volume.id)


def cut_flat_origin(store: Store, volume_id: VolumeId) -> None:
    """Cut the origin of a flattened clone, unless a snapshot still inherits from it; within a step."""
    volume = store.catalog.volume(volume_id)
    if volume.flat_generation is None:
        return
    kept = store.catalog.snapshots(volume_id, removed=True)
    if not any(snapshot.generation <= volume.flat_generation for snapshot in kept):
        store.amend(volume, origin=NO_ORIGIN, baseline={}, flat_generation=None)
