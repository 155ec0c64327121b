"""Clones, holds, going back: what the service does with the branches of volumes.

Owns nothing but references to the parts of an open pool; the trio thread.
"""

from collections.abc import Sequence

from incfs import clone, holds
from incfs.committer import Committer
from incfs.model import Snapshot, Volume, VolumeId
from incfs.store import Store


class Branches:
    """The verbs of clones and holds on an open pool.

    A change that has begun is completed; it is durable on return.
    """

    def __init__(self, store: Store, committer: Committer) -> None:
        self._store = store
        self._committer = committer

    async def clone(self, origin: Snapshot, name: str) -> Volume:
        """Add a volume that reads as a snapshot until it is written."""
        made = clone.create(self._store, origin, name)
        await self._committer.commit()
        return made

    async def hold(
        self, wanted: Sequence[tuple[VolumeId, str]], tag: str, *, expires_ns: int | None = None
    ) -> list[Snapshot]:
        """Keep snapshots from being removed; a hold of the same tag is renewed."""
        held = [holds.hold(self._store, volume_id, name, tag, expires_ns=expires_ns) for volume_id, name in wanted]
        await self._committer.commit()
        return held

    async def release(self, wanted: Sequence[tuple[VolumeId, str]], tag: str) -> list[Snapshot]:
        """End the holds of a tag."""
        released = [holds.release(self._store, volume_id, name, tag) for volume_id, name in wanted]
        await self._committer.commit()
        return released
