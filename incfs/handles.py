"""Who has which volume or snapshot open: it stays readable although its name goes."""

from collections.abc import Callable

from incfs.errors import Busy
from incfs.model import MapId, Snapshot, VolumeId, split_map_id
from incfs.store import Store
from incfs.transfers import require_not_receiving


class Handles:
    """The open files of one pool.  The trio thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.closed: Callable[[], None]
        """Called when the last one of a table is closed; set by the service."""
        self._holders: dict[MapId, list[str]] = {}

    def __contains__(self, table: object) -> bool:
        return table in self._holders

    def open(self, table: MapId, holder: str) -> None:
        """Note that a file is open: it stays readable although its name goes.

        Raises:
            Busy: It is a volume that receives a stream.
        """
        volume_id, generation = split_map_id(table)
        if not generation:
            require_not_receiving(self._store.catalog.volume(volume_id), "be opened")
        self._holders.setdefault(table, []).append(holder)
        self._store.serve(table)

    def pin(self, table: MapId, holder: str) -> None:
        """Keep a snapshot, or a bookmark whose snapshot may be gone, until ``close``."""
        self._holders.setdefault(table, []).append(holder)

    def close(self, table: MapId) -> None:
        """Note that one is closed."""
        holders = self._holders[table]
        holders.pop()
        if not holders:
            del self._holders[table]
            self._store.unserve(table)
            self.closed()

    def of_volume(self, volume_id: VolumeId) -> list[str]:
        """Name who has the volume or one of its snapshots open."""
        return [h for table, held in self._holders.items() if split_map_id(table)[0] == volume_id for h in held]

    def of_table(self, table: MapId) -> list[str]:
        """Name who has a volume's current contents, or a snapshot, open."""
        return list(self._holders.get(table, ()))

    def require_closed(self, taken: Snapshot) -> None:
        """Refuse to remove a snapshot that is open.

        Raises:
            Busy: It names the holders.
        """
        holders = self._holders.get(taken.map_id)
        if holders:
            whose = f"{self._store.catalog.volume(taken.volume_id).name}@{taken.name}"
            raise Busy(f"snapshot {whose} is open by {', '.join(holders)}; close it first", holders=list(holders))
