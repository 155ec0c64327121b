"""The incremental log: where each virtual block's data is, now and at every snapshot.

Owns the LMDB environment (the only importer of ``lmdb``; its errors never leave here), the
lookup tables, the increments, and the overlay of changes since the last checkpoint.  Never
touches storage volumes: it says which addresses became unreachable, the store frees them.

Invariants:
    1. A lookup table holds the *sealed* current contents: no write that is not sealed yet.
    2. A virtual block is in the increment of the newest snapshot S exactly if its mapping
       was replaced since S.  So each stored block is in one table once (I9).
    3. Pages are read from LMDB and composed with the overlay in one step of the owner
       thread, or fetched in a worker and composed only if no checkpoint ended in between.
"""

import logging
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lmdb

from incfs.backing import Backing
from incfs.codec import Entries, decode_entries, encode_entries, open_value, pack, seal_value, unpack
from incfs.errors import BackingError, FormatError, NoSpace
from incfs.model import HOLE, INHERIT, STALE_GROUPS, Appended, SealedPage, StorageId, VolumeId, map_id
from incfs.overlay import Chain, Layer, Overlay, TableKey
from incfs.tablesfile import MARK_MODULUS, TablesFile, damaged_values, key_mark, value_mark

logger = logging.getLogger(__name__)

LMDB_LIB_VERSION = 0
"""Engine 0.9: ``lmdb`` 3 bundles two, whose files differ."""
DATABASES = ("meta", "map", "inc", "space", "volume", "snapshot", "storage", "policy")
INITIAL_MAP_BYTES = 1 << 30
_MAP_KEY = struct.Struct(">IQ")
_INC_KEY = struct.Struct(">IIQ")
_CHECKPOINT_KEY = b"checkpoint"
_SPACE_KEY = struct.Struct(">HQ")


def page_key(table: TableKey, page_index: int) -> tuple[str, bytes]:
    """Name the database and the key of a page."""
    if table.generation:
        return "inc", _INC_KEY.pack(*table, page_index)
    return "map", _MAP_KEY.pack(table.volume_id, page_index)


def space_key(storage_id: int, group_index: int) -> bytes:
    """Make the key of a bitmap of live blocks."""
    return _SPACE_KEY.pack(storage_id, group_index)


@dataclass(frozen=True, slots=True)
class Puts:
    """What one checkpoint writes besides pages."""

    values: dict[str, dict[bytes, bytes | None]]
    """Database -> key -> value (None deletes)."""
    checkpoint: dict[str, Any]
    """The checkpoint's own facts."""


class Tables:
    """The LMDB environment.

    Args:
        path: Its file, which is proved to be whole before LMDB may have it.
        backing: The host's files.
        create: Make the file.
        map_bytes: Address space to begin with.

    Concurrency: any number of readers in any thread; one writer.

    Raises:
        FormatError: The file is damaged, or not the one that was last written.
        BackingError: It is missing, or the host failed.
    """

    def __init__(
        self, path: Path, backing: Backing, *, create: bool = False, map_bytes: int = INITIAL_MAP_BYTES
    ) -> None:
        self._path = path
        self._backing = backing
        self._marks = (0, 0) if create else self._prove()
        self._reader_count = 0
        self._readers_changed = threading.Condition()
        with self._translated("open"):
            self._env = lmdb.open(
                str(path),
                subdir=False,
                map_size=map_bytes,
                max_dbs=len(DATABASES),
                mode=0o600,
                max_readers=64,
                lib_version=LMDB_LIB_VERSION,
            )
            self._databases = {name: self._env.open_db(name.encode()) for name in DATABASES}
        self._grow_map_if_needed()

    def _prove(self, transaction: int | None = None) -> tuple[int, int]:
        """Prove the file as it is after a transaction; give the sums of its marks.

        A value that is damaged by itself is left to whoever reads it.
        """
        file = self._backing.open(self._path)
        try:
            tables = TablesFile(file, transaction)
            survey = tables.prove(DATABASES)
            expected = self._recorded_marks(tables)
            if expected[0] != survey.keys:
                raise FormatError(f"{self._path} is damaged: keys are missing, or are of another time")
            if expected[1] != survey.values:
                self._explain_values(tables)
            return survey.keys, survey.values
        finally:
            file.close()

    def _recorded_marks(self, tables: TablesFile) -> tuple[int, int]:
        for entry in tables.entries(tables.databases()["meta"]):
            if entry.key == _CHECKPOINT_KEY:
                return _marks_of(unpack(open_value(entry.key, tables.value(entry))))
        raise FormatError(f"{self._path} holds no checkpoint record")

    def _explain_values(self, tables: TablesFile) -> None:
        damaged = damaged_values(tables, "meta")
        if not damaged:
            raise FormatError(f"{self._path} is damaged: values are of another time")
        for database, key in damaged[:10]:
            logger.warning("%s: the value of %s %s is damaged", self._path, database, key.hex())

    @contextmanager
    def _translated(self, action: str) -> Iterator[None]:
        try:
            yield
        except lmdb.MapFullError as error:
            raise NoSpace(f"the metadata map of {self._path} is full") from error
        except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError) as error:
            raise FormatError(f"cannot {action} {self._path}: {error}") from error
        except (lmdb.Error, OSError) as error:
            raise BackingError(f"cannot {action} {self._path}: {error}") from error

    @contextmanager
    def reading(self) -> Iterator["Reader"]:
        """Give a consistent view of the last checkpoint."""
        with self._readers_changed:
            self._reader_count += 1
        try:
            with self._translated("read"), self._env.begin() as transaction:
                yield Reader(transaction, self._databases, self._prove)
        finally:
            with self._readers_changed:
                self._reader_count -= 1
                self._readers_changed.notify_all()

    def write(self, layer: Layer, puts: Puts) -> None:
        """Fold a frozen layer and other values into the tables, in one transaction.

        Durability: all of it is durable on return, or nothing of it is visible.
        Cost: proportional to the pages in ``layer``.
        """
        self._grow_map_if_needed()
        before = self._marks
        try:
            with self._translated("write"), self._env.begin(write=True) as transaction:
                for table in sorted(layer):
                    for page_index in sorted(layer[table]):
                        self._fold(transaction, table, page_index, layer)
                for database, values in puts.values.items():
                    for key in sorted(values):
                        self._put(transaction, database, key, values[key])
                facts = {**puts.checkpoint, "key_mark": self._marks[0], "value_mark": self._marks[1]}
                value = seal_value(_CHECKPOINT_KEY, pack(facts))
                transaction.put(_CHECKPOINT_KEY, value, db=self._databases["meta"])
        except BaseException:
            self._marks = before
            raise

    def _fold(self, transaction: Any, table: TableKey, page_index: int, layer: Layer) -> None:
        database, key = page_key(table, page_index)
        patch = layer[table][page_index]
        stored: Entries = {}
        if not patch.is_whole:
            value = transaction.get(key, db=self._databases[database])
            stored = decode_entries(open_value(key, value)) if value is not None else {}
        entries = patch.apply(stored)
        if not table.generation:
            entries = {index: entry for index, entry in entries.items() if entry[0] != INHERIT}
        self._put(transaction, database, key, encode_entries(entries) if entries else None)

    def _put(self, transaction: Any, database: str, key: bytes, body: bytes | None) -> None:
        keys, values = self._marks
        old = transaction.get(key, db=self._databases[database])
        if old is not None:
            keys -= key_mark(database, key)
            values -= value_mark(database, key, bytes(old[-4:]))
        if body is not None:
            value = seal_value(key, body)
            keys += key_mark(database, key)
            values += value_mark(database, key, value[-4:])
            transaction.put(key, value, db=self._databases[database])
        elif old is not None:
            transaction.delete(key, db=self._databases[database])
        self._marks = keys % MARK_MODULUS, values % MARK_MODULUS

    def _grow_map_if_needed(self) -> None:
        """Keep half of the map free: LMDB cannot even delete in a full one.

        It is remapped only while nobody reads, as LMDB demands.
        """
        if self.used_bytes() * 2 <= self.map_bytes():
            return
        with self._readers_changed, self._translated("grow the map of"):
            self._readers_changed.wait_for(lambda: not self._reader_count)
            self._env.set_mapsize(self.map_bytes() * 4)

    def used_bytes(self) -> int:
        """Tell how much of the map has ever been used."""
        return int(self._env.info()["last_pgno"] + 1) * int(self._env.stat()["psize"])

    def map_bytes(self) -> int:
        """Tell the size of the map."""
        return int(self._env.info()["map_size"])

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


class Reader:
    """One read transaction over the tables."""

    def __init__(
        self, transaction: Any, databases: dict[str, Any], prove: Callable[[int | None], tuple[int, int]]
    ) -> None:
        self._transaction = transaction
        self._databases = databases
        self._prove = prove

    def prove(self) -> None:
        """Prove the structure of the file as this reader sees it.

        Raises:
            FormatError: It is damaged.
        """
        self._prove(self._transaction.id())

    def get(self, database: str, key: bytes) -> bytes | None:
        """Read one value.

        Raises:
            FormatError: Its checksum is wrong.
        """
        value = self._transaction.get(key, db=self._databases[database])
        return None if value is None else open_value(key, value)

    def items(self, database: str, start: bytes = b"", prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, sealed value) from the first key at or after ``start``, while it has the prefix."""
        with self._transaction.cursor(db=self._databases[database]) as cursor:
            if not cursor.set_range(max(start, prefix)):
                return
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield bytes(key), bytes(value)

    def page(self, table: TableKey, page_index: int) -> Entries:
        """Read the mappings of one page; empty when there is none."""
        database, key = page_key(table, page_index)
        body = self.get(database, key)
        return {} if body is None else decode_entries(body)

    def page_indexes(self, table: TableKey, start: int = 0) -> Iterator[int]:
        """Yield the stored pages of a table from ``start`` on."""
        database, first = page_key(table, start)
        for key, _ in self.items(database, first, first[:-8]):
            yield int.from_bytes(key[-8:], "big")

    def pages(self, table: TableKey) -> Iterator[tuple[int, Entries]]:
        """Yield every stored page of a table."""
        database, first = page_key(table, 0)
        for key, value in self.items(database, first, first[:-8]):
            yield int.from_bytes(key[-8:], "big"), decode_entries(open_value(key, value))

    def all_pages(self) -> Iterator[tuple[TableKey, int, Entries]]:
        """Yield every map page of every table: of the lookup tables, then of the increments."""
        for database, size in (("map", _MAP_KEY.size), ("inc", _INC_KEY.size)):
            for key, value in self.items(database):
                if len(key) != size:
                    raise FormatError(f"page under a bad key {key.hex()}")
                table = TableKey(int.from_bytes(key[:4], "big"), int.from_bytes(key[4:-8], "big"))
                yield table, int.from_bytes(key[-8:], "big"), decode_entries(open_value(key, value))

    def bodies(self, database: str) -> Iterator[bytes]:
        """Yield the verified values of a database, in the order of their keys."""
        for key, value in self.items(database):
            yield open_value(key, value)

    def space(self) -> Iterator[tuple[int, int, int]]:
        """Yield (storage volume id, group index, bits) of every bitmap of live blocks."""
        yield from (found for found in self._bitmaps() if found[1] < STALE_GROUPS)

    def stale(self) -> Iterator[tuple[int, int, int]]:
        """Yield the same of the bitmaps of blocks that stale legs of mirrors lack."""
        yield from ((i, group - STALE_GROUPS, bits) for i, group, bits in self._bitmaps() if group >= STALE_GROUPS)

    def _bitmaps(self) -> Iterator[tuple[int, int, int]]:
        for key, value in self.items("space"):
            if len(key) != _SPACE_KEY.size:
                raise FormatError(f"bitmap under a bad key {key.hex()}")
            storage_id, group_index = _SPACE_KEY.unpack(key)
            yield storage_id, group_index, int.from_bytes(open_value(key, value), "little")

    def checkpoint(self) -> tuple[int, int, int]:
        """Read (sequence of the last commit contained, journal segment that follows, last volume id given out)."""
        body = self.get("meta", _CHECKPOINT_KEY)
        value = unpack(body) if body is not None else None
        match value:
            case {"sequence": int(sequence), "segment": int(segment), "last_volume": int(last_volume)}:
                return sequence, segment, last_volume
        raise FormatError("the tables hold no valid checkpoint record")


class MadePages(Protocol):
    """A table that is not stored."""

    def page(self, page_index: int) -> Entries:
        """Make a page.  Any thread."""

    def page_indexes(self, start: int, limit: int | None) -> list[int]:
        """List pages that may hold mappings, ascending from ``start``, at most ``limit`` of them."""


class Unrolled(NamedTuple):
    """What a rollback does to one page."""

    current: Entries
    """Mappings that become current again."""
    freed: list[int]
    """Stored addresses that nothing refers to any more."""
    released: int
    """Stored blocks that the oldest increment gives up."""


class IncrementalLog:
    """The mappings of every volume: looked up, appended, moved between tables.

    Concurrency: the owner thread only, but for ``fetch``.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._overlay = Overlay()
        self._replaced: dict[tuple[int, int], tuple[int, int]] = {}
        """(volume, page) -> (generation of the newest snapshot, indexes in its increment)."""
        self._emptied_to: dict[TableKey, int] = {}
        self.baselines: Mapping[StorageId, MadePages] = {}
        """Tables of volume 0: their pages are made, not stored."""
        self.epoch = 0
        """Rises when a checkpoint ends: pages fetched before are stale."""

    def append(self, volume_id: int, newest_generation: int, page_index: int, changes: Iterable[Appended]) -> list[int]:
        """Append mappings of one page; the replaced ones move into the increment or become free.

        Args:
            volume_id: The volume.
            newest_generation: Of its newest snapshot; 0 without one.
            page_index: The page.
            changes: Each index at most once.

        Returns:
            The stored addresses that nothing refers to any more.
        """
        try:
            replaced = self._replaced_bits(volume_id, newest_generation, page_index) if newest_generation else -1
        except FormatError as error:
            return self._append_beside_damage(volume_id, page_index, changes, error)
        live = self._overlay.patch(TableKey(volume_id), page_index).entries
        freed: list[int] = []
        kept: Entries = {}
        for change in changes:
            live[change.slot] = change.address, change.checksum
            if not replaced >> change.slot & 1:
                kept[change.slot] = change.old_address, change.old_checksum
                replaced |= 1 << change.slot
            elif change.old_address > HOLE:
                freed.append(change.old_address)
        if kept:
            self._overlay.patch(TableKey(volume_id, newest_generation), page_index).entries.update(kept)
            self._replaced[volume_id, page_index] = newest_generation, replaced
        return freed

    def _append_beside_damage(
        self, volume_id: int, page_index: int, changes: Iterable[Appended], error: FormatError
    ) -> list[int]:
        """The newest increment's page is lost: nobody knows which replaced blocks it has, so none becomes free."""
        logger.warning("volume %d, page %d: replaced blocks stay in use: %s", volume_id, page_index, error)
        live = self._overlay.patch(TableKey(volume_id), page_index).entries
        live.update({change.slot: (change.address, change.checksum) for change in changes})
        return []

    def _replaced_bits(self, volume_id: int, generation: int, page_index: int) -> int:
        known, bits = self._replaced.get((volume_id, page_index), (0, 0))
        if known != generation:
            bits = sum(1 << index for index in self.entries(TableKey(volume_id, generation), page_index))
            self._replaced[volume_id, page_index] = generation, bits
        return bits

    def forget(self, volume_id: int, page_index: int) -> None:
        """Drop what is cached of a page; it is read again when needed."""
        self._replaced.pop((volume_id, page_index), None)

    def entries(self, table: TableKey, page_index: int) -> Entries:
        """Read one page of one table as it stands."""
        stored: Entries = {}
        if not self._overlay.hides(table, page_index):
            with self._tables.reading() as reader:
                stored = reader.page(table, page_index)
        return self._overlay.compose(table, page_index, stored)

    def fetch(self, chain: Chain, page_index: int) -> list[list[Entries]]:
        """Read the stored form of one page of several tables.  Any thread."""
        with self._tables.reading() as reader:
            return [[self._stored(reader, table, page_index) for table in link] for link in chain]

    def _stored(self, reader: Reader, table: TableKey, page_index: int) -> Entries:
        if table.volume_id:
            return reader.page(table, page_index)
        return self.baselines[StorageId(table.generation)].page(page_index)

    def resolve(self, chain: Chain, page_index: int, stored: Sequence[Sequence[Entries]]) -> Entries:
        """Give a page as a snapshot (or the live volume) sees it.

        Args:
            chain: What ``Catalog.chain`` gives: increments from the snapshot on, oldest first, then the lookup table;
                the same of the origin.
            page_index: The page.
            stored: What ``fetch`` returned for the same chain, in the same epoch.
        """
        resolved: Entries = {}
        for link, pages in zip(chain, stored, strict=True):
            own: Entries = {}
            for table, entries in zip(link, pages, strict=True):
                if composed := self._overlay.compose(table, page_index, entries):
                    own = {**composed, **own}
            resolved = {**own, **{index: entry for index, entry in resolved.items() if entry[0] != INHERIT}}
        return resolved

    def appended(self, volume_id: int, page_index: int, new: Entries) -> SealedPage:
        """Describe mappings that are going to be appended, with what the lookup table itself has for them now."""
        old = self.entries(TableKey(volume_id), page_index)
        changes = [Appended(slot, *entry, *old.get(slot, (INHERIT, 0))) for slot, entry in new.items()]
        return SealedPage(map_id(VolumeId(volume_id)), page_index, changes)

    def page_indexes(self, table: TableKey, start: int = 0, limit: int | None = None) -> list[int]:
        """List pages that may hold mappings, ascending from ``start``, at most ``limit`` of them."""
        if not table.volume_id:
            return self.baselines[StorageId(table.generation)].page_indexes(start, limit)
        changed: list[int] = sorted({index for index in self._overlay.pages(table) if index >= start})[:limit]
        with self._tables.reading() as reader:
            stored: list[int] = []
            for index in reader.page_indexes(table, start):
                if limit is not None and len(stored) >= limit:
                    break
                stored.append(index)
        return sorted({*changed, *stored})[:limit]

    def next_page(self, chain: Chain, start: int) -> int | None:
        """Find the first page at or after ``start`` that may hold mappings in one of several tables.

        Cost: one look-up for each table.
        """
        found: set[int] = set()
        with self._tables.reading() as reader:
            for table in (table for link in chain for table in link):
                if not table.volume_id:
                    found.update(self.page_indexes(table, start, 1))
                    continue
                found.update(index for index in self._overlay.pages(table) if index >= start)
                found.update(islice(reader.page_indexes(table, start), 1))
        return min(found, default=None)

    def occupied_pages(self, table: TableKey, limit: int) -> list[int]:
        """List pages that do hold mappings, at most ``limit``, for a table that is being emptied.

        It goes on where the last call for the table ended, and begins again at the end, since
        emptied pages stay listed until a checkpoint.
        """
        start = self._emptied_to.get(table, 0)
        found: list[int] = []
        while len(found) < limit and (listed := self.page_indexes(table, start, limit)):
            found += [index for index in listed if self.entries(table, index)]
            start = listed[-1] + 1
        if not found and self._emptied_to.pop(table, 0):
            return self.occupied_pages(table, limit)
        if found:
            self._emptied_to[table] = start
        return found

    def fold(self, volume_id: int, generation: int, older_generation: int, page_index: int) -> tuple[list[int], int]:
        """Move one page of a snapshot's increment to that of its older neighbour.

        Returns:
            The addresses that became free, and how many stored blocks the neighbour gained.
        """
        table = TableKey(volume_id, generation)
        moved = self.entries(table, page_index)
        self._overlay.replace(table, page_index, {})
        self.forget(volume_id, page_index)
        if not older_generation:
            return [address for address, _ in moved.values() if address > HOLE], 0
        older = TableKey(volume_id, older_generation)
        known = self.entries(older, page_index)
        gained = {index: entry for index, entry in moved.items() if index not in known}
        if gained:
            self._overlay.patch(older, page_index).entries.update(gained)
        freed = [entry[0] for index, entry in moved.items() if index in known and entry[0] > HOLE]
        return freed, sum(address > HOLE for address, _ in gained.values())

    def plan_unroll(self, volume_id: int, undone: Sequence[int], page_index: int) -> Unrolled:
        """Say what a rollback does to one page.

        Args:
            volume_id: The volume.
            undone: The generations whose increments are undone, oldest first.
            page_index: The page.
        """
        current: Entries = {}
        unused: list[int] = []
        released = 0
        for generation in undone:
            entries = self.entries(TableKey(volume_id, generation), page_index)
            unused += [address for index, (address, _) in entries.items() if index in current]
            current = {**entries, **current}
            if generation == undone[0]:
                released = sum(address > HOLE for address, _ in entries.values())
        live = self.entries(TableKey(volume_id), page_index)
        unused += [live[index][0] for index in current if index in live]
        return Unrolled(current, [address for address in unused if address > HOLE], released)

    def unroll(self, volume_id: int, undone: Sequence[int], page_index: int, current: Entries) -> None:
        """Let the lookup table have what ``plan_unroll`` said, and empty the increments' pages."""
        if current:
            self._overlay.patch(TableKey(volume_id), page_index).entries.update(current)
            for generation in undone:
                self._overlay.replace(TableKey(volume_id, generation), page_index, {})
        self.forget(volume_id, page_index)

    def drop_page(self, volume_id: int, page_index: int) -> list[int]:
        """Empty one page of a lookup table whose volume is gone; return what became free."""
        table = TableKey(volume_id)
        dropped = self.entries(table, page_index)
        self._overlay.replace(table, page_index, {})
        self.forget(volume_id, page_index)
        return [address for address, _ in dropped.values() if address > HOLE]

    def relocate(
        self, table: TableKey, page_index: int, moves: Mapping[int, tuple[int, int]]
    ) -> dict[int, tuple[int, int]]:
        """Let mappings name other addresses, where they still name the old ones; give those that did.

        Args:
            table: Whose page.
            page_index: The page.
            moves: Index -> (old address, new address).
        """
        entries = self.entries(table, page_index)
        moved = {slot: move for slot, move in moves.items() if entries.get(slot, (INHERIT, 0))[0] == move[0]}
        if moved:
            changed = {slot: (new, entries[slot][1]) for slot, (_, new) in moved.items()}
            self._overlay.patch(table, page_index).entries.update(changed)
        return moved

    def freeze(self) -> Layer:
        """Start a checkpoint: later changes go to a new layer."""
        return self._overlay.freeze()

    def thaw(self) -> None:
        """End a checkpoint: its layer is in the tables now."""
        self._overlay.thaw()
        self.epoch += 1

    @property
    def overlay_pages(self) -> int:
        """Changed pages held in memory until the next checkpoint."""
        return self._overlay.page_count


def _marks_of(value: Any) -> tuple[int, int]:
    match value:
        case {"key_mark": int(keys), "value_mark": int(values)}:
            return keys, values
    raise FormatError("the tables hold no valid checkpoint record")
