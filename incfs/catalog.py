"""The catalog: every volume, snapshot and storage volume of a pool, in memory.

Owns the records and the names.  Changes are whole records, so that applying one twice does
no harm (recovery is idempotent, I5).  Knows which records the tables do not have yet.
"""

import struct
from collections.abc import Iterator
from typing import Any

from incfs.codec import decode_record, encode_record, pack, unpack
from incfs.errors import FormatError, SnapshotNotFound, StorageNotFound, VolumeNotFound
from incfs.generations import Generations
from incfs.model import Generation, MapId, Snapshot, Storage, StorageId, Volume, VolumeId, split_map_id
from incfs.overlay import TableKey

Record = Volume | Snapshot | Storage
RecordId = tuple[str, tuple[int, ...]]
"""(kind, numbers): names one record."""

KINDS: dict[str, type[Record]] = {"volume": Volume, "snapshot": Snapshot, "storage": Storage}
_KEYS = {"volume": struct.Struct(">I"), "snapshot": struct.Struct(">II"), "storage": struct.Struct(">H")}


def record_id(record: Record) -> RecordId:
    """Name a record."""
    if isinstance(record, Volume):
        return "volume", (record.id,)
    if isinstance(record, Snapshot):
        return "snapshot", (record.volume_id, record.generation)
    return "storage", (record.id,)


def record_from(kind: Any, value: Any) -> Record:
    """Decode a record that was read.

    Raises:
        FormatError: Unknown kind or bad fields.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(f"record of unknown kind {kind!r}")
    return decode_record(KINDS[kind], value)


_NO_SNAPSHOTS = Generations()


class Catalog:
    """The records of one pool.  Owner thread."""

    def __init__(self) -> None:
        self.volumes: dict[VolumeId, Volume] = {}
        self.storages: dict[StorageId, Storage] = {}
        self._snapshots: dict[VolumeId, Generations] = {}
        self._names: dict[str, VolumeId] = {}
        self._uuids: dict[str, VolumeId] = {}
        self._to_reclaim: set[VolumeId] = set()
        self._unsaved: dict[RecordId, Record | None] = {}
        self.last_volume_id = VolumeId(0)

    def load(self, kind: str, body: bytes) -> None:
        """Take over a stored record at open."""
        record = record_from(kind, unpack(body))
        self.put(record)
        self._unsaved.pop(record_id(record))

    def put(self, record: Record) -> None:
        """Add a record, or replace the one of the same id."""
        self._unsaved[record_id(record)] = record
        if isinstance(record, Volume):
            self._put_volume(record)
        elif isinstance(record, Snapshot):
            self._snapshots.setdefault(record.volume_id, Generations()).put(record)
            self._note_removed(record.volume_id)
        else:
            self.storages[record.id] = record

    def _put_volume(self, volume: Volume) -> None:
        self._unname(self.volumes.get(volume.id))
        self.volumes[volume.id] = volume
        self.last_volume_id = max(self.last_volume_id, volume.id)
        if volume.name:
            self._names[volume.name] = volume.id
            self._uuids[volume.uuid] = volume.id
        self._note_removed(volume.id)

    def _unname(self, old: Volume | None) -> None:
        if old is None:
            return
        for index, key in ((self._names, old.name), (self._uuids, old.uuid)):
            if index.get(key) == old.id:
                del index[key]

    def _note_removed(self, volume_id: VolumeId) -> None:
        """Keep ``_to_reclaim`` right after a change of a volume or of one of its snapshots."""
        volume = self.volumes.get(volume_id)
        if volume is not None and (not volume.name or self.oldest_removed(volume_id)):
            self._to_reclaim.add(volume_id)
        else:
            self._to_reclaim.discard(volume_id)

    def drop(self, identity: RecordId) -> None:
        """Forget a record; of one that is not there, too."""
        kind, numbers = identity
        self._unsaved[identity] = None
        if kind == "volume":
            self._unname(self.volumes.pop(VolumeId(numbers[0]), None))
            self._note_removed(VolumeId(numbers[0]))
            if not self._generations(VolumeId(numbers[0])).newest:
                self._snapshots.pop(VolumeId(numbers[0]), None)
        elif kind == "snapshot":
            self._generations(VolumeId(numbers[0])).drop(Generation(numbers[1]))
            self._note_removed(VolumeId(numbers[0]))
        else:
            self.storages.pop(StorageId(numbers[0]), None)

    def get(self, identity: RecordId) -> Record | None:
        """Look up a record by kind and id."""
        kind, numbers = identity
        if kind == "volume":
            return self.volumes.get(VolumeId(numbers[0]))
        if kind == "snapshot":
            return self._generations(VolumeId(numbers[0])).get(Generation(numbers[1]))
        return self.storages.get(StorageId(numbers[0]))

    def __contains__(self, identity: RecordId) -> bool:
        return self.get(identity) is not None

    def volume(self, volume_id: VolumeId) -> Volume:
        """Look up a volume by id, also one that is being removed.

        Raises:
            VolumeNotFound: No such volume.
        """
        found = self.volumes.get(volume_id)
        if found is None:
            raise VolumeNotFound(f"there is no volume with id {volume_id}")
        return found

    def volume_named(self, name: str) -> Volume:
        """Look up a volume by name, or by ``uuid:...``.

        Raises:
            VolumeNotFound: No such volume.
        """
        volume_id = self._uuids.get(name[5:]) if name.startswith("uuid:") else None
        if volume_id is None and name:
            volume_id = self._names.get(name)
        if volume_id is None:
            raise VolumeNotFound(f"there is no volume {name!r}; `incfs volume list` shows them", volume=name)
        return self.volumes[volume_id]

    @property
    def volume_count(self) -> int:
        """How many volumes have a name."""
        return len(self._names)

    def has_name(self, name: str) -> bool:
        """Tell whether a volume has that name."""
        return name in self._names

    def snapshots(self, volume_id: VolumeId, *, removed: bool = False) -> list[Snapshot]:
        """List a volume's snapshots, oldest first; those being removed only if asked for."""
        return self._generations(volume_id).listed(removed=removed)

    def _generations(self, volume_id: VolumeId) -> Generations:
        return self._snapshots.get(volume_id) or _NO_SNAPSHOTS

    def has_snapshot_name(self, volume_id: VolumeId, name: str) -> bool:
        """Tell whether a snapshot of the volume has that name."""
        found = self._generations(volume_id).named(name)
        return found is not None and found.name == name

    def snapshot(self, volume_id: VolumeId, name: str) -> Snapshot:
        """Look up a snapshot by name, or by ``uuid:...``.

        Raises:
            SnapshotNotFound: No such snapshot.
        """
        found = self._generations(volume_id).named(name)
        if found is not None:
            return found
        volume = self.volumes.get(volume_id)
        whose = volume.name if volume else volume_id
        raise SnapshotNotFound(f"volume {whose} has no snapshot {name!r}", volume=whose, snapshot=name)

    def snapshot_by_generation(self, volume_id: VolumeId, generation: Generation) -> Snapshot:
        """Look up a snapshot by its generation.

        Raises:
            SnapshotNotFound: No such snapshot.
        """
        found = self._generations(volume_id).get(generation)
        if found is None:
            raise SnapshotNotFound(f"volume {volume_id} has no snapshot of generation {generation}")
        return found

    def storage(self, storage_id: StorageId) -> Storage:
        """Look up a storage volume.

        Raises:
            StorageNotFound: No such storage volume.
        """
        found = self.storages.get(storage_id)
        if found is None:
            raise StorageNotFound(f"there is no storage volume {storage_id}")
        return found

    def volumes_to_reclaim(self) -> list[VolumeId]:
        """List volumes that were removed, or of which a snapshot was."""
        return sorted(self._to_reclaim)

    def oldest_removed(self, volume_id: VolumeId) -> Generation:
        """Give the oldest snapshot that is being removed, 0 without one."""
        return self._generations(volume_id).oldest_removed

    def newest_generation(self, volume_id: VolumeId) -> Generation:
        """Give the newest snapshot that still has an increment, 0 without one."""
        return self._generations(volume_id).newest

    def older_generation(self, volume_id: VolumeId, generation: Generation) -> Generation:
        """Give the next older snapshot that still has an increment, 0 without one."""
        return self._generations(volume_id).before(generation)

    def increments(self, volume_id: VolumeId, generation: Generation) -> list[TableKey]:
        """List the increments from a snapshot on, oldest first."""
        return [TableKey(volume_id, g) for g in self._generations(volume_id).since(generation)]

    def chain(self, map_id: MapId) -> list[TableKey]:
        """List the tables that answer for a snapshot, in order; for a live volume just its own."""
        volume_id, generation = split_map_id(map_id)
        return [*(self.increments(volume_id, generation) if generation else ()), TableKey(volume_id)]

    def size_bytes(self, map_id: MapId) -> int:
        """Tell the size of a live volume or of a snapshot."""
        volume_id, generation = split_map_id(map_id)
        if generation:
            return self.snapshot_by_generation(volume_id, generation).size_bytes
        return self.volume(volume_id).size_bytes

    def records(self) -> Iterator[Record]:
        """Yield every record."""
        yield from self.storages.values()
        yield from self.volumes.values()
        for generations in self._snapshots.values():
            yield from generations.listed(removed=True)

    def freeze(self) -> dict[RecordId, Record | None]:
        """Start a checkpoint: hand over what changed since the last one."""
        unsaved, self._unsaved = self._unsaved, {}
        return unsaved


def record_puts(unsaved: dict[RecordId, Record | None]) -> dict[str, dict[bytes, bytes | None]]:
    """Encode changed records for the tables."""
    puts: dict[str, dict[bytes, bytes | None]] = {kind: {} for kind in KINDS}
    for (kind, numbers), record in unsaved.items():
        puts[kind][_KEYS[kind].pack(*numbers)] = None if record is None else pack(encode_record(record))
    return puts
