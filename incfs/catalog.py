"""The catalog: every volume, snapshot, bookmark and storage volume of a pool, in memory.

Owns the records and the names.  Changes are whole records, so that applying one twice does
no harm (recovery is idempotent, I5).  Knows which records the tables do not have yet.
"""

import struct
from collections.abc import Iterator
from typing import Any, TypeVar

from incfs.codec import decode_record, encode_record, pack, unpack
from incfs.errors import BookmarkNotFound, FormatError, NotFound, SnapshotNotFound, StorageNotFound, VolumeNotFound
from incfs.generations import Generations
from incfs.model import (
    NO_ORIGIN,
    Base,
    Bookmark,
    Facts,
    Generation,
    MapId,
    Snapshot,
    Storage,
    StorageId,
    StoredPolicy,
    Volume,
    VolumeId,
    map_id,
    snapshot_facts,
    split_map_id,
    volume_facts,
)
from incfs.overlay import Chain, TableKey

Record = Volume | Snapshot | Bookmark | Storage | StoredPolicy
RecordT = TypeVar("RecordT", Volume, Snapshot, Bookmark, Storage, StoredPolicy)
RecordId = tuple[str, tuple[int, ...]]
"""(kind, numbers): names one record."""

KINDS: dict[str, type[Record]] = {
    "volume": Volume,
    "snapshot": Snapshot,
    "bookmark": Bookmark,
    "storage": Storage,
    "policy": StoredPolicy,
}
_KEYS = {
    "volume": struct.Struct(">I"),
    "snapshot": struct.Struct(">II"),
    "bookmark": struct.Struct(">II"),
    "storage": struct.Struct(">H"),
    "policy": struct.Struct(">B"),
}
POLICY_ID: RecordId = ("policy", (1,))
"""There is one at the most."""


def record_id(record: Record) -> RecordId:
    """Name a record."""
    if isinstance(record, Volume):
        return "volume", (record.id,)
    if isinstance(record, Snapshot):
        return "snapshot", (record.volume_id, record.generation)
    if isinstance(record, Bookmark):
        return "bookmark", (record.volume_id, record.generation)
    if isinstance(record, Storage):
        return "storage", (record.id,)
    return POLICY_ID


def record_from(kind: Any, value: Any) -> Record:
    """Decode a record that was read.

    Raises:
        FormatError: Unknown kind or bad fields.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(f"record of unknown kind {kind!r}")
    return decode_record(KINDS[kind], value)


_NO_SNAPSHOTS: Generations[Snapshot] = Generations()
_NO_BOOKMARKS: Generations[Bookmark] = Generations()


class Catalog:
    """The records of one pool.  Owner thread."""

    def __init__(self) -> None:
        self.volumes: dict[VolumeId, Volume] = {}
        self.storages: dict[StorageId, Storage] = {}
        self.policy: StoredPolicy | None = None
        self._snapshots: dict[VolumeId, Generations[Snapshot]] = {}
        self._bookmarks: dict[VolumeId, Generations[Bookmark]] = {}
        self._names: dict[str, VolumeId] = {}
        self._uuids: dict[str, VolumeId] = {}
        self._clones: dict[MapId, set[VolumeId]] = {}
        """Origin -> volumes that read from it."""
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
        elif isinstance(record, Bookmark):
            self._bookmarks.setdefault(record.volume_id, Generations()).put(record)
            self._note_removed(record.volume_id)
        elif isinstance(record, Storage):
            self.storages[record.id] = record
        else:
            self.policy = record

    def _put_volume(self, volume: Volume) -> None:
        self._pop_volume(volume.id)
        self.volumes[volume.id] = volume
        self.last_volume_id = max(self.last_volume_id, volume.id)
        if volume.name:
            self._names[volume.name] = volume.id
            self._uuids[volume.uuid] = volume.id
        if volume.origin:
            self._clones.setdefault(volume.origin, set()).add(volume.id)
        self._note_removed(volume.id)

    def _pop_volume(self, volume_id: VolumeId) -> None:
        volume = self.volumes.pop(volume_id, None)
        if volume is None:
            return
        for index, key in ((self._names, volume.name), (self._uuids, volume.uuid)):
            if index.get(key) == volume_id:
                del index[key]
        self._clones.get(volume.origin, set()).discard(volume_id)

    def _note_removed(self, volume_id: VolumeId) -> None:
        """Keep ``_to_reclaim`` right after a change of a volume, or of one of its snapshots or bookmarks."""
        volume = self.volumes.get(volume_id)
        removed = self._generations(volume_id).removed or self._marked(volume_id).removed
        if volume is not None and (not volume.name or volume.rollback_to or removed):
            self._to_reclaim.add(volume_id)
        else:
            self._to_reclaim.discard(volume_id)

    def drop(self, identity: RecordId) -> None:
        """Forget a record; of one that is not there, too."""
        kind, numbers = identity
        self._unsaved[identity] = None
        if kind == "volume":
            self._pop_volume(VolumeId(numbers[0]))
            self._note_removed(VolumeId(numbers[0]))
            if not self._generations(VolumeId(numbers[0])).newest:
                self._snapshots.pop(VolumeId(numbers[0]), None)
            if not self._marked(VolumeId(numbers[0])).newest:
                self._bookmarks.pop(VolumeId(numbers[0]), None)
        elif kind == "snapshot":
            self._generations(VolumeId(numbers[0])).drop(Generation(numbers[1]))
            self._note_removed(VolumeId(numbers[0]))
        elif kind == "bookmark":
            self._marked(VolumeId(numbers[0])).drop(Generation(numbers[1]))
            self._note_removed(VolumeId(numbers[0]))
        elif kind == "storage":
            self.storages.pop(StorageId(numbers[0]), None)
        elif kind == "policy":
            self.policy = None

    def get(self, identity: RecordId) -> Record | None:
        """Look up a record by kind and id."""
        kind, numbers = identity
        if kind == "volume":
            return self.volumes.get(VolumeId(numbers[0]))
        if kind == "snapshot":
            return self._generations(VolumeId(numbers[0])).get(Generation(numbers[1]))
        if kind == "bookmark":
            return self._marked(VolumeId(numbers[0])).get(Generation(numbers[1]))
        if kind == "storage":
            return self.storages.get(StorageId(numbers[0]))
        return self.policy

    def current(self, record: RecordT) -> RecordT:
        """Give what a record is now.

        Raises:
            NotFound: It was removed meanwhile.
        """
        found = self.get(record_id(record))
        if found is None:
            kind, numbers = record_id(record)
            raise NotFound(f"{kind} {'@'.join(map(str, numbers))} is gone: it was removed meanwhile")
        assert isinstance(found, type(record))
        return found

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

    def bookmarks(self, volume_id: VolumeId, *, removed: bool = False) -> list[Bookmark]:
        """List a volume's bookmarks, oldest first; those being removed only if asked for."""
        return self._marked(volume_id).listed(removed=removed)

    def _generations(self, volume_id: VolumeId) -> Generations[Snapshot]:
        return self._snapshots.get(volume_id) or _NO_SNAPSHOTS

    def _marked(self, volume_id: VolumeId) -> Generations[Bookmark]:
        return self._bookmarks.get(volume_id) or _NO_BOOKMARKS

    def has_snapshot_name(self, volume_id: VolumeId, name: str) -> bool:
        """Tell whether a snapshot of the volume has that name."""
        found = self._generations(volume_id).named(name)
        return found is not None and found.name == name

    def _called(self, volume_id: VolumeId) -> str | VolumeId:
        """Say how a message calls a volume."""
        volume = self.volumes.get(volume_id)
        return volume.name if volume else volume_id

    def snapshot(self, volume_id: VolumeId, name: str) -> Snapshot:
        """Look up a snapshot by name, or by ``uuid:...``.

        Raises:
            SnapshotNotFound: No such snapshot.
        """
        found = self._generations(volume_id).named(name)
        if found is not None:
            return found
        whose = self._called(volume_id)
        raise SnapshotNotFound(f"volume {whose} has no snapshot {name!r}", volume=whose, snapshot=name)

    def bookmark(self, volume_id: VolumeId, name: str) -> Bookmark:
        """Look up a bookmark by name, or by ``uuid:...`` of its snapshot.

        Raises:
            BookmarkNotFound: No such bookmark.
        """
        found = self._marked(volume_id).named(name)
        if found is not None:
            return found
        whose = self._called(volume_id)
        raise BookmarkNotFound(f"volume {whose} has no bookmark {name!r}", volume=whose, bookmark=name)

    def has_bookmark_name(self, volume_id: VolumeId, name: str) -> bool:
        """Tell whether a bookmark of the volume has that name."""
        found = self._marked(volume_id).named(name)
        return found is not None and name in found.names

    def bookmark_to_forget(self, volume: Volume) -> Generation:
        """Give a bookmark that is being removed, by itself or with its volume; 0 without one."""
        marked = self._marked(volume.id)
        return next(iter(marked.removed), Generation(0)) if volume.name else marked.newest

    def base(self, volume_id: VolumeId, name: str) -> Base:
        """Look up what increments start from: ``SNAP``, ``#BOOKMARK``, or ``uuid:...`` of either.

        Raises:
            SnapshotNotFound, BookmarkNotFound: There is none.
        """
        if name.startswith("#"):
            return self.bookmark(volume_id, name[1:])
        if name.startswith("uuid:") and self._generations(volume_id).named(name) is None:
            bookmark = self._marked(volume_id).named(name)
            if bookmark is not None:
                return bookmark
        return self.snapshot(volume_id, name)

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
        """List volumes that were removed or rolled back, or of which a snapshot was removed; clones before origins."""
        return sorted(self._to_reclaim, reverse=True)

    def removed_generations(self, volume_id: VolumeId) -> list[Generation]:
        """List the snapshots that are being removed, oldest first."""
        return self._generations(volume_id).removed

    def newest_bookmark(self, volume_id: VolumeId, generation: Generation) -> Generation:
        """Give the newest bookmark of a generation, or of an older one, that is not being removed; 0 without one."""
        return self._marked(volume_id).newest_named(generation)

    def trails(self, volume_id: VolumeId, generation: Generation) -> list[TableKey]:
        """List the trails of bookmarks from a generation on, oldest first, also of those being removed."""
        return [TableKey(volume_id, g, is_trail=True) for g in self._marked(volume_id).since(generation)]

    def newest_generation(self, volume_id: VolumeId) -> Generation:
        """Give the newest snapshot that still has an increment, 0 without one."""
        return self._generations(volume_id).newest

    def older_generation(self, volume_id: VolumeId, generation: Generation) -> Generation:
        """Give the next older snapshot that still has an increment, 0 without one."""
        return self._generations(volume_id).before(generation)

    def increments(self, volume_id: VolumeId, generation: Generation) -> list[TableKey]:
        """List the increments from a snapshot on, oldest first."""
        return [TableKey(volume_id, g) for g in self._generations(volume_id).since(generation)]

    def chain(self, map_id: MapId) -> Chain:
        """List the tables that answer for a volume or a snapshot: its own, then those of its origin, and so on."""
        links = []
        while map_id:
            volume_id, _ = split_map_id(map_id)
            links.append(self._own_tables(map_id))
            volume = self.volumes.get(volume_id)
            map_id = volume.origin if volume is not None else NO_ORIGIN
        return tuple(links)

    def _own_tables(self, map_id: MapId) -> tuple[TableKey, ...]:
        volume_id, generation = split_map_id(map_id)
        if not volume_id:
            return (TableKey(0, generation),)  # a baseline
        newer = self._generations(volume_id).since(generation) if generation else []
        volume = self.volumes.get(volume_id)
        if volume is not None and not 0 < generation < volume.rollback_mark:
            newer += self.undone(volume_id)
        return (*(TableKey(volume_id, g) for g in newer), TableKey(volume_id))

    def undone(self, volume_id: VolumeId) -> list[Generation]:
        """List the increments that a rollback undoes and that are not unrolled yet, oldest first."""
        volume = self.volume(volume_id)
        if not volume.rollback_to:
            return []
        return [g for g in self._generations(volume_id).since(volume.rollback_to) if g < volume.rollback_mark]

    def readers(self, volume_id: VolumeId) -> list[MapId]:
        """List the tables through which blocks of a volume can be seen: its own, and those of its clones."""
        found: list[MapId] = []
        volumes = [volume_id]
        while volumes:
            own = volumes.pop()
            snapshots = [snapshot.map_id for snapshot in self.snapshots(own, removed=True)]
            found += [map_id(own), *snapshots]
            volumes += [clone.id for snapshot in snapshots for clone in self.clones(snapshot)]
        return found

    def clones(self, origin: MapId) -> list[Volume]:
        """List the volumes that read from a snapshot, also those that are being removed."""
        return [self.volumes[volume_id] for volume_id in sorted(self._clones.get(origin, ()))]

    def size_bytes(self, map_id: MapId) -> int:
        """Tell the size of a live volume or of a snapshot."""
        volume_id, generation = split_map_id(map_id)
        if generation:
            return self.snapshot_by_generation(volume_id, generation).size_bytes
        return self.volume(volume_id).size_bytes

    def facts(self, map_id: MapId) -> Facts:
        """Tell what ``stat`` shows of a live volume or of a snapshot."""
        volume_id, generation = split_map_id(map_id)
        volume = self.volume(volume_id)
        if not generation:
            return volume_facts(volume)
        return snapshot_facts(volume, self.snapshot_by_generation(volume_id, generation))

    def records(self) -> Iterator[Record]:
        """Yield every record."""
        yield from self.storages.values()
        yield from self.volumes.values()
        for generations in self._snapshots.values():
            yield from generations.listed(removed=True)
        for marked in self._bookmarks.values():
            yield from marked.listed(removed=True)
        if self.policy is not None:
            yield self.policy

    @property
    def unsaved_count(self) -> int:
        """How many records changed since the last checkpoint began."""
        return len(self._unsaved)

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
