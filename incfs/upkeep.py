"""What the service does with storage volumes and with where data lies: stripes, moves, mirrors, scrubs.

Owns nothing but references to the parts of an open pool; the trio thread.
"""

from collections.abc import Sequence

from incfs import stripes
from incfs.committer import Committer
from incfs.errors import UsageError
from incfs.model import StorageId, Volume, VolumeId
from incfs.store import Store


class Upkeep:
    """The verbs of storage volumes and data placement on an open pool."""

    def __init__(self, store: Store, committer: Committer) -> None:
        self._store = store
        self._committer = committer

    def require_columns(self, count: int, unit_bytes: int) -> None:
        """Refuse a number of columns that cannot be had, before anything is changed.

        Raises:
            UsageError: There are not so many usable storage volumes, or the unit is not whole blocks.
        """
        usable = sum(room.is_usable for room in self._store.space.rooms())
        if not 1 <= count <= usable:
            raise UsageError(
                f"{count} stripe columns need as many storage volumes; {usable} can be used", columns=count
            )
        stripes.require_unit(self._store, unit_bytes)

    async def stripe(self, volume_id: VolumeId, *, columns: int | Sequence[StorageId], unit_bytes: int) -> Volume:
        """Let new stripes of a volume rotate over so many, or over these, storage volumes.

        Raises:
            UsageError, StorageNotFound: As ``stripes.set_count`` and ``stripes.set_columns``.
        """
        if isinstance(columns, int):
            changed = stripes.set_count(self._store, volume_id, columns, unit_bytes=unit_bytes)
        else:
            changed = stripes.set_columns(self._store, volume_id, columns, unit_bytes=unit_bytes)
        await self._committer.commit()
        return changed
