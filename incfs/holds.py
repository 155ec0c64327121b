"""Holds: named reasons for which a snapshot must not be removed, for ever or until a time.

A hold with a time is a lease: when the time is past it counts for nothing, and is forgotten when the snapshot's
holds change the next time.
"""

from incfs.errors import Busy, HoldNotFound, LimitExceeded
from incfs.memory import one_step
from incfs.model import Snapshot, VolumeId, validate_name
from incfs.store import Store

MAX_HOLDS = 256
"""Of one snapshot: its record stays small."""


@one_step
def hold(store: Store, volume_id: VolumeId, name: str, tag: str, *, expires_ns: int | None = None) -> Snapshot:
    """Keep a snapshot from being removed; a hold of the same tag is renewed.

    Raises:
        InvalidName: Of the tag.
        SnapshotNotFound: No such snapshot.
        LimitExceeded: It has too many holds.
    """
    validate_name(tag, what="hold")
    snapshot = store.catalog.snapshot(volume_id, name)
    holds = {**snapshot.holds_at(store.clock()), tag: expires_ns}
    if len(holds) > MAX_HOLDS:
        raise LimitExceeded(f"snapshot {name} has {MAX_HOLDS} holds already; release one first")
    return store.amend(snapshot, holds=holds)


@one_step
def release(store: Store, volume_id: VolumeId, name: str, tag: str) -> Snapshot:
    """End a hold.

    Raises:
        SnapshotNotFound, HoldNotFound: No such snapshot, or it is not held by that tag.
    """
    snapshot = store.catalog.snapshot(volume_id, name)
    holds = snapshot.holds_at(store.clock())
    if tag not in holds:
        known = ", ".join(sorted(holds)) or "none"
        raise HoldNotFound(f"snapshot {name} has no hold {tag!r}; it has: {known}", snapshot=name, tag=tag)
    del holds[tag]
    return store.amend(snapshot, holds=holds)


def require_not_held(store: Store, snapshot: Snapshot) -> None:
    """Refuse to remove a snapshot that is held.

    Raises:
        Busy: It names the tags.
    """
    tags = sorted(snapshot.holds_at(store.clock()))
    if tags:
        whose = f"{store.catalog.volume(snapshot.volume_id).name}@{snapshot.name}"
        raise Busy(f"snapshot {whose} is held by {', '.join(tags)}; release that first", snapshot=whose, tags=tags)
