"""Clones: volumes that read from a snapshot where they have nothing of their own.

Invariants:
    1. A clone's tables own what was written to the clone, nothing else: inherited blocks belong to the origin
       and are freed with it, never by the clone.
    2. A snapshot with clones is not removed, and the origin's volume is older than the clone: no circles.
    3. What a clone inherits never changes: a snapshot is taken only when nothing lies behind its volume's end, so
       a clone that grows shows zeros there.
"""

from incfs import volume
from incfs.model import Snapshot, Volume
from incfs.store import Store


def create(store: Store, origin: Snapshot, name: str) -> Volume:
    """Add a volume that reads as a snapshot until it is written; mode, owner and size are its volume's.

    Atomicity: one change (I6).
    Cost: independent of the size.

    Raises:
        InvalidName, AlreadyExists, LimitExceeded: Of the name.
    """
    like = store.catalog.volume(origin.volume_id)
    return volume.create(
        store, name, origin.size_bytes, mode=like.mode, uid=like.uid, gid=like.gid, origin=origin.map_id
    )
