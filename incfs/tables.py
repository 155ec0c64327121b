"""The tables: lookup tables, increments and records, as they are in LMDB.

Owns the LMDB environment (the only importer of ``lmdb``; its errors never leave here): one
checkpoint is one transaction.  Knows nothing of what has changed since the last one.
"""

import errno
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import lmdb

from incfs.backing import Backing, File, translated
from incfs.codec import (
    Entries,
    decode_entries,
    decode_trail,
    encode_trail,
    fold_entries,
    open_value,
    pack,
    seal_value,
    unpack,
)
from incfs.errors import BackingError, FormatError, MetadataFull, NoSpace, TablesLost
from incfs.mapped import MappedFile
from incfs.model import STALE_GROUPS
from incfs.overlay import Layer, Patch, TableKey
from incfs.tablesfile import MARK_MODULUS, TablesFile, damaged_values, key_mark, value_mark

logger = logging.getLogger(__name__)

LMDB_LIB_VERSION = 0
"""Engine 0.9: ``lmdb`` 3 bundles two, whose files differ."""
_LATER = ("bookmark", "trail")
"""Pools that were made before these databases came get them when they are opened."""
DATABASES = ("meta", "map", "inc", "space", "volume", "snapshot", "storage", "policy", *_LATER)
INITIAL_MAP_BYTES = 1 << 30
_MAP_KEY = struct.Struct(">IQ")
_INC_KEY = struct.Struct(">IIQ")
_READERS_BYTES = 8192
"""More than ``max_readers`` need."""
_IN_MEMORY = Path("/dev/shm")  # noqa: S108 - only a directory of our own in it is used, mode 0700
_EMPTY_PAGE = struct.pack("<QHHHH", 0, 0, 2, 16, 4096)
"""A leaf of LMDB's without keys: what it finds where a page cannot be read.  At others it ends the process."""
_COPY_BYTES = 1 << 20
_QUOTA_TEXT = os.strerror(errno.EDQUOT)
"""LMDB's binding has a class for ENOSPC, and none for that."""
_CHECKPOINT_KEY = b"checkpoint"
_SPACE_KEY = struct.Struct(">HQ")


def page_key(table: TableKey, page_index: int) -> tuple[str, bytes]:
    """Name the database and the key of a page."""
    if table.generation:
        key = _INC_KEY.pack(table.volume_id, table.generation, page_index)
        return "trail" if table.is_trail else "inc", key
    return "map", _MAP_KEY.pack(table.volume_id, page_index)


def decode_page(table: TableKey, body: bytes) -> Entries:
    """Decode a page of a table; that of a trail has holes.

    Raises:
        FormatError: It is none.
    """
    return decode_trail(body) if table.is_trail else decode_entries(body)


def _fold_page(table: TableKey, stored: bytes | None, patch: Patch) -> bytes | None:
    """Encode a page as it is with a patch on top; None when nothing is left of it."""
    if table.is_trail:
        return encode_trail(patch.apply(decode_trail(stored or b""))) or None
    return fold_entries(stored, patch.page, keep_inherited=bool(table.generation))


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


@contextmanager
def _place_for_readers(path: Path) -> Iterator[Path]:
    """Give the name by which LMDB is to open its file: beside that it makes its list of readers.

    The list is mapped, and a page that a full disk cannot give ends the process; btrfs wants room for each change.  So
    it is in memory, and has no name afterwards; only this process needs it.  Where there is no such place, it stays
    beside the file.
    """
    with ExitStack() as stack:
        try:
            scratch = stack.enter_context(TemporaryDirectory(prefix="incfs-", dir=_IN_MEMORY))
            place = Path(scratch) / path.name
            place.symlink_to(path.absolute())
            _reserve_readers(place.with_name(f"{place.name}-lock"))
        except (OSError, NoSpace):
            place = path
            _reserve_readers(place.with_name(f"{place.name}-lock"))
        yield place


def _reserve_readers(path: Path) -> None:
    """Have room for all of LMDB's list of readers."""
    with translated(path, "grow"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, _READERS_BYTES)
        finally:
            os.close(fd)


class ReadableTables(Protocol):
    """Tables as those see them who look things up: in one file, or in several that hold the same."""

    def reading(self) -> "AbstractContextManager[Reader]":
        """Give a consistent view of the last checkpoint."""


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
        self._reserved_end_bytes = 0
        """Up to where the host has set space aside for the file, as far as that is known."""
        self._reader_count = 0
        self._readers_changed = threading.Condition()
        if create:
            self._make_file()
        with _place_for_readers(path) as place, self._translated("open"):
            self._env = lmdb.open(
                str(place),
                subdir=False,
                map_size=map_bytes,
                max_dbs=len(DATABASES),
                mode=0o600,
                max_readers=64,
                lib_version=LMDB_LIB_VERSION,
            )
        self._mapped = MappedFile(path, _EMPTY_PAGE)
        self._mapped.look()
        with self._translated("open"):
            self._databases = {name: self._env.open_db(name.encode()) for name in DATABASES}
        self._grow_map_if_needed()

    def _make_file(self) -> None:
        file = self._backing.create(self._path)
        file.keep_in_place()
        file.close()

    def _prove(self, transaction: int | None = None) -> tuple[int, int]:
        """Prove the file as it is after a transaction; give the sums of its marks.

        A value that is damaged by itself is left to whoever reads it.
        """
        file = self._backing.open(self._path)
        try:
            tables = TablesFile(file, transaction)
            survey = tables.prove(DATABASES, later=_LATER)
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
            text = f"cannot {action} {self._path}: {error}"
            if isinstance(error, lmdb.DiskError) or str(error).endswith(_QUOTA_TEXT):
                # Of pages that only this transaction wrote: to the next it never was.
                raise MetadataFull(f"{text}; free space on its filesystem", path=str(self._path)) from error
            raise BackingError(text) from error

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Let what the body reads be what is in the file, or an error be told.

        To LMDB a page that could not be read is one without keys, so nothing is believed from the first one on.

        Raises:
            TablesLost: A page of the file could not be read.
        """
        self._require_whole()
        try:
            yield
        finally:
            self._require_whole()

    def _require_whole(self) -> None:
        if self._mapped.fault_count:
            raise TablesLost(
                f"{self._path} cannot be read any more: it was cut off, or its disk failed, while the pool is open; "
                f"unmount, look at the disk, then see `incfs pool check`",
                path=str(self._path),
            )

    @contextmanager
    def reading(self) -> Iterator["Reader"]:
        """Give a consistent view of the last checkpoint."""
        with self._readers_changed:
            self._reader_count += 1
        try:
            with self._whole(), self._translated("read"), self._env.begin() as transaction:
                yield Reader(transaction, self._databases, self._prove, self._require_whole)
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
            with self._whole(), self._translated("write"), self._env.begin(write=True) as transaction:
                for table in sorted(layer):
                    for page_index in sorted(layer[table]):
                        self._fold(transaction, table, page_index, layer)
                for database, values in puts.values.items():
                    for key in sorted(values):
                        self._put(transaction, database, key, values[key])
                facts = {**puts.checkpoint, "key_mark": self._marks[0], "value_mark": self._marks[1]}
                value = seal_value(_CHECKPOINT_KEY, pack(facts))
                transaction.put(_CHECKPOINT_KEY, value, db=self._databases["meta"])
                self._require_whole()  # before it is committed
        except BaseException:
            self._marks = before
            raise

    def _fold(self, transaction: Any, table: TableKey, page_index: int, layer: Layer) -> None:
        database, key = page_key(table, page_index)
        patch = layer[table][page_index]
        value = None if patch.is_whole else transaction.get(key, db=self._databases[database])
        self._require_whole()
        stored = open_value(key, value) if value is not None else None
        self._put(transaction, database, key, _fold_page(table, stored, patch))

    def _put(self, transaction: Any, database: str, key: bytes, body: bytes | None) -> None:
        keys, values = self._marks
        old = transaction.get(key, db=self._databases[database])
        self._require_whole()
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
            self._mapped.look()

    @property
    def waits(self) -> bool:
        """Whether a write waits for a disk, so that those of several copies are worth threads of their own."""
        return self._backing.waits

    def reserve(self, length_bytes: int) -> None:
        """Have the host set space aside for the file to grow by so much, unless it has.

        It stays the file's, whoever fills the host's filesystem; LMDB writes nowhere else.

        Raises:
            NoSpace: It has none; nothing was changed.
        """
        file = self._backing.open(self._path)
        try:
            end = file.length_bytes() + length_bytes
            if end > self._reserved_end_bytes:
                self._reserve_up_to(file, end)
        finally:
            file.close()

    def _reserve_up_to(self, file: File, end_bytes: int) -> None:
        try:
            file.reserve(end_bytes)
            self._reserved_end_bytes = end_bytes
        except NoSpace:
            self._reserved_end_bytes = max(self._reserved_end_bytes, file.allocated_bytes())
            raise

    @property
    def reserved_bytes(self) -> int:
        """Tell how much the file can surely grow by."""
        return max(0, self._reserved_end_bytes - self.used_bytes())

    def facts(self) -> tuple[int, int]:
        """Tell what the last checkpoint contains: (journal segment that follows, sequence)."""
        with self.reading() as reader:
            sequence, segment, _ = reader.checkpoint()
        return segment, sequence

    def used_bytes(self) -> int:
        """Tell how much of the map has ever been used."""
        return int(self._env.info()["last_pgno"] + 1) * int(self._env.stat()["psize"])

    def map_bytes(self) -> int:
        """Tell the size of the map."""
        return int(self._env.info()["map_size"])

    def close(self) -> None:
        """Close the environment."""
        self._mapped.close()
        self._env.close()

    def close_when_idle(self) -> None:
        """Close the environment once nobody reads; no reader may come any more."""
        with self._readers_changed:
            self._readers_changed.wait_for(lambda: not self._reader_count)
        self.close()

    def copy_to(self, path: Path) -> None:
        """Make a file that holds the same; nothing may be written meanwhile.

        Durability: its content is durable on return, its name is not.
        """
        source, target = self._backing.open(self._path), self._backing.create(path)
        target.keep_in_place()
        try:
            end = self.used_bytes()
            for offset in range(0, end, _COPY_BYTES):
                target.pwrite(offset, source.pread(offset, min(_COPY_BYTES, end - offset)))
            target.sync()
        finally:
            source.close()
            target.close()


class Reader:
    """One read transaction over the tables."""

    def __init__(
        self,
        transaction: Any,
        databases: dict[str, Any],
        prove: Callable[[int | None], tuple[int, int]],
        require_whole: Callable[[], None],
    ) -> None:
        self._transaction = transaction
        self._databases = databases
        self._prove = prove
        self._require_whole = require_whole

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
        self._require_whole()
        return None if value is None else open_value(key, value)

    def items(self, database: str, start: bytes = b"", prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, sealed value) from the first key at or after ``start``, while it has the prefix."""
        with self._transaction.cursor(db=self._databases[database]) as cursor:
            is_there = cursor.set_range(max(start, prefix))
            while is_there:
                key, value = bytes(cursor.key()), bytes(cursor.value())
                self._require_whole()
                if not key.startswith(prefix):
                    return
                yield key, value
                is_there = cursor.next()
            self._require_whole()

    def page(self, table: TableKey, page_index: int) -> Entries:
        """Read the mappings of one page; empty when there is none."""
        database, key = page_key(table, page_index)
        body = self.get(database, key)
        return {} if body is None else decode_page(table, body)

    def page_indexes(self, table: TableKey, start: int = 0) -> Iterator[int]:
        """Yield the stored pages of a table from ``start`` on."""
        database, first = page_key(table, start)
        for key, _ in self.items(database, first, first[:-8]):
            yield int.from_bytes(key[-8:], "big")

    def pages(self, table: TableKey) -> Iterator[tuple[int, Entries]]:
        """Yield every stored page of a table."""
        database, first = page_key(table, 0)
        for key, value in self.items(database, first, first[:-8]):
            yield int.from_bytes(key[-8:], "big"), decode_page(table, open_value(key, value))

    def all_pages(self) -> Iterator[tuple[TableKey, int, Entries]]:
        """Yield every page of every table: of the lookup tables, of the increments, of the trails."""
        for database, size in (("map", _MAP_KEY.size), ("inc", _INC_KEY.size), ("trail", _INC_KEY.size)):
            for key, value in self.items(database):
                if len(key) != size:
                    raise FormatError(f"page under a bad key {key.hex()}")
                numbers = int.from_bytes(key[:4], "big"), int.from_bytes(key[4:-8], "big")
                table = TableKey(*numbers, is_trail=database == "trail")
                yield table, int.from_bytes(key[-8:], "big"), decode_page(table, open_value(key, value))

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


def _marks_of(value: Any) -> tuple[int, int]:
    match value:
        case {"key_mark": int(keys), "value_mark": int(values)}:
            return keys, values
    raise FormatError("the tables hold no valid checkpoint record")
