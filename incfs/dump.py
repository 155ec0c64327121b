"""The metadata as text: ``pool dump``, and the pool made anew from it, ``pool restore``.

A dump is a stream of lines, each one JSON document, described in ``docs/FORMAT.md``: a
header, the records, the map pages, an end with counts and a digest.  Writing one needs a
reader of the tables; restoring trusts nothing in it (I11) and writes the superblock last.
"""

import gzip
import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path
from types import NoneType
from typing import IO, Any
from uuid import UUID

from incfs.backing import Backing, translate, translated
from incfs.baseline import BaselineFacts
from incfs.blocks import bit_mask, split_address
from incfs.catalog import KINDS, Catalog, Record, RecordId, record_from, record_id, record_puts
from incfs.codec import Entries, encode_record, entry_runs, unpack
from incfs.errors import AlreadyExists, FormatError, IncfsError, UnsupportedFormat, UsageError
from incfs.journal import Journal
from incfs.log import Puts, Reader, Tables, space_key
from incfs.model import (
    HOLE,
    MAX_GENERATION,
    MAX_POLICY_BYTES,
    MAX_VOLUME_BYTES,
    PAGE_BLOCKS,
    REDUNDANCIES,
    Generation,
    Snapshot,
    Storage,
    StorageId,
    StoredPolicy,
    Volume,
    split_map_id,
    validate_name,
)
from incfs.overlay import Layer, Patch, TableKey
from incfs.pool import GROUP_BLOCKS, Pool
from incfs.store import TABLES_NAME, Store, new_nonce
from incfs.superblock import FORMAT_VERSION, SUPERBLOCK_NAME, Superblock, decode_fields, write_superblock

DUMP_VERSION = 1
COPY_SUFFIX = ".dump.gz"
"""Behind the name of an image: the automatic copy beside it."""
MAX_LINE_BYTES = 1 << 20
MAX_JOURNAL_BYTES = 1 << 30
_BATCH_PAGES = 4096
_GZIP_MAGIC = b"\x1f\x8b"


# ------------------------------------------------------------------------------------ dump


def dump_lines(reader: Reader, superblock: Superblock, image_path: Callable[[Storage], Path]) -> Iterator[str]:
    """Yield a dump of one checkpoint, line by line.

    Raises:
        FormatError: Something in the tables is damaged; what came before is sound.
    """
    digest = blake2b(digest_size=16)
    counts = {"records": 0, "pages": 0}
    for kind, document in _documents(reader, superblock, image_path):
        if kind:
            counts[kind] += 1
        line = json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n"
        digest.update(line.encode())
        yield line
    yield json.dumps({"end": {**counts, "digest": digest.hexdigest()}}, sort_keys=True) + "\n"


def _documents(
    reader: Reader, superblock: Superblock, image_path: Callable[[Storage], Path]
) -> Iterator[tuple[str, Any]]:
    sequence, _, last_volume = reader.checkpoint()
    head = {"dump": DUMP_VERSION, "format": FORMAT_VERSION, "pool": asdict(superblock), "created_ns": time.time_ns()}
    yield "", {**head, "sequence": sequence, "last_volume": last_volume}
    for kind in ("storage", "volume", "snapshot", "policy"):
        for body in reader.bodies(kind):
            record = record_from(kind, unpack(body))
            if isinstance(record, Storage):
                record = replace(record, path=str(image_path(record).resolve()))
            yield "records", {"record": kind, "value": _to_text(encode_record(record))}
    for table, page_index, entries in reader.all_pages():
        runs = [[first, count, address, _crcs(entries, first, count)] for first, count, address in entry_runs(entries)]
        yield "pages", {"page": [*table, page_index], "runs": runs}


def _crcs(entries: Entries, first: int, count: int) -> str:
    if entries[first][0] <= HOLE:
        return ""
    return struct.pack(f">{count}I", *(entries[i][1] for i in range(first, first + count))).hex()


def _to_text(value: dict[str, Any]) -> dict[str, Any]:
    if "xattrs" in value:
        return {**value, "xattrs": {name: content.hex() for name, content in value["xattrs"].items()}}
    return value


def write_dump(store: Store, path: Path) -> int:
    """Write a dump of the last checkpoint to a file, compressed if it is named ``.gz``.  Any thread.

    Durability: durable on return.
    Atomicity: the file appears whole; one that was there is replaced.

    Returns:
        Its length in bytes.

    Raises:
        UsageError: There is a device or something else that must not be replaced.
    """
    _require_replaceable(path)
    temporary = path.with_name(path.name + ".new")
    with translated(temporary, "replace"):
        temporary.unlink(missing_ok=True)
    file = store.backing.create(temporary)
    try:
        position = 0
        with store.tables.reading() as reader:
            lines = dump_lines(reader, store.superblock, store.pool.image_path)
            for piece in _compressed(lines) if path.suffix == ".gz" else _joined(lines):
                file.pwrite(position, piece)
                position += len(piece)
        file.sync()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        file.close()
    store.backing.replace(temporary, path)
    store.backing.sync_directory(path.parent)
    return position


def _require_replaceable(path: Path) -> None:
    with translated(path, "examine"):
        is_replaceable = path.name and (path.is_file() or not path.exists())
    if not is_replaceable:
        raise UsageError(f"{path} is not an ordinary file, which a dump may replace; name another one")


def _joined(lines: Iterable[str]) -> Iterator[bytes]:
    pieces: list[str] = []
    for line in lines:
        pieces.append(line)
        if len(pieces) >= 256:
            yield "".join(pieces).encode()
            pieces = []
    yield "".join(pieces).encode()


def _compressed(lines: Iterable[str]) -> Iterator[bytes]:
    for piece in _joined(lines):
        # One gzip member for each piece: files of several are files like any other.
        yield gzip.compress(piece, 6)


def copy_path(store: Store, storage: Storage) -> Path:
    """Name the automatic copy beside an image."""
    image = store.pool.image_path(storage)
    return image.with_name(image.name + COPY_SUFFIX)


def copies_are_due(store: Store, interval_s: float) -> bool:
    """Tell whether an image has no copy that is younger than ``interval_s``.

    Raises:
        BackingError: The host does not tell.
    """
    oldest = time.time() - interval_s
    return any(_is_older(copy_path(store, storage), oldest) for storage in store.catalog.storages.values())


def _is_older(path: Path, oldest: float) -> bool:
    try:
        return path.stat().st_mtime < oldest
    except FileNotFoundError:
        return True
    except OSError as error:
        raise translate(error, path, "examine") from error


def write_copies(store: Store) -> None:
    """Write a dump beside each image; the one that was there is kept as ``.1``.  Any thread.

    Raises:
        IncfsError: A copy could not be written; the others were.
    """
    failure: IncfsError | None = None
    for storage in list(store.catalog.storages.values()):
        path = copy_path(store, storage)
        try:
            fresh = path.with_name("." + path.name)
            write_dump(store, fresh)
            if path.exists():
                store.backing.replace(path, path.with_name(path.name + ".1"))
            store.backing.replace(fresh, path)
        except IncfsError as error:
            failure = error
    if failure is not None:
        raise failure


# --------------------------------------------------------------------------------- restore


@contextmanager
def open_dump(path: Path) -> Iterator[Iterator[bytes]]:
    """Give the lines of a dump file, decompressed if need be.

    Raises:
        FormatError: A line is too long, or the compression is damaged.
        BackingError: The file cannot be read.
    """
    try:
        plain = path.open("rb")
    except OSError as error:
        raise translate(error, path, "open") from error
    with closing(plain):
        is_packed = plain.read(2) == _GZIP_MAGIC
        plain.seek(0)
        yield _lines(gzip.GzipFile(fileobj=plain) if is_packed else plain, path)


def _lines(stream: "IO[bytes] | gzip.GzipFile", path: Path) -> Iterator[bytes]:
    try:
        while line := stream.readline(MAX_LINE_BYTES):
            if not line.endswith(b"\n"):
                raise FormatError(f"{path}: a line is longer than {MAX_LINE_BYTES} bytes, or cut off")
            yield line
    except (EOFError, gzip.BadGzipFile) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise translate(error, path, "read") from error
    except Exception as error:
        if type(error).__module__ == "zlib":
            raise FormatError(f"{path} is damaged: {error}") from error
        raise


class MetadataBuilder:
    """Makes the metadata of a pool from records and map pages that nobody vouches for.

    Args:
        superblock: Of the pool.
        directory: Where the metadata is to be; empty.
        images: Paths of images that are not where their records say.
        backing: The host's files.

    Raises:
        AlreadyExists: The directory is not empty.
    """

    def __init__(self, superblock: Superblock, directory: Path, images: Mapping[int, Path], backing: Backing) -> None:
        self._superblock = superblock
        self._directory = directory
        self._images = images
        self._backing = backing
        self.catalog = Catalog()
        self._owned: dict[tuple[int, int], int] = {}
        self._mapped: dict[TableKey, int] = {}
        self._layer: Layer = {}
        self._layer_pages = 0
        backing.make_directory(directory)
        if any(directory.iterdir()):
            raise AlreadyExists(f"{directory} is not empty; choose another directory", path=str(directory))
        self._tables = Tables(directory / TABLES_NAME, backing, create=True)

    def add_record(self, record: Record) -> None:
        """Take a record.

        Raises:
            FormatError: A value in it is impossible.
        """
        _validate(record, self._superblock.block_bytes)
        if record_id(record) in self.catalog:
            raise FormatError(f"two records of {record_id(record)}")
        if isinstance(record, Snapshot) and record.volume_id not in self.catalog.volumes:
            raise FormatError(f"snapshot {record.name!r} of volume {record.volume_id}, which there is not")
        if isinstance(record, Volume) and record.name and self.catalog.has_name(record.name):
            raise FormatError(f"two volumes are named {record.name!r}")
        if isinstance(record, Storage):
            record = self._placed(record)
        self.catalog.put(record)

    def _placed(self, record: Storage) -> Storage:
        path = Path(os.path.realpath(self._images.get(record.id, self._directory / record.path)))
        home = self._directory.resolve()
        return replace(record, path=str(path.relative_to(home) if path.is_relative_to(home) else path))

    def add_page(self, table: TableKey, page_index: int, entries: Entries) -> None:
        """Take a map page.

        Raises:
            FormatError: Its table does not exist, or it names a block that does not exist or has an owner.
        """
        numbers = (table.volume_id, table.generation)
        identity: RecordId = ("snapshot", numbers) if table.generation else ("volume", numbers[:1])
        if identity not in self.catalog:
            raise FormatError(f"page {page_index} of table {table}, which there is not")
        if not 0 <= page_index <= MAX_VOLUME_BYTES // self._superblock.block_bytes // PAGE_BLOCKS:
            raise FormatError(f"page {page_index} of table {table} is behind the end of any volume")
        if page_index in self._layer.get(table, {}):
            raise FormatError(f"two pages {page_index} of table {table}")
        stored = 0
        for _, count, address in entry_runs(entries):
            if address > HOLE:
                self._own(address, count)
                stored += count
        self._mapped[table] = self._mapped.get(table, 0) + stored
        self._layer.setdefault(table, {})[page_index] = Patch(entries, is_whole=True)
        self._layer_pages += 1
        if self._layer_pages >= _BATCH_PAGES:
            self._tables.write(self._layer, Puts({}, {"sequence": 0, "segment": 1, "last_volume": 0}))
            self._layer, self._layer_pages = {}, 0

    def _own(self, address: int, count: int) -> None:
        storage_id, block_index = split_address(address)
        storage = self.catalog.storages.get(storage_id)
        if storage is None or block_index + count > storage.capacity_blocks:
            raise FormatError(f"a page names block {block_index}+{count} of storage volume {storage_id}: not there")
        parts = []
        while count:
            group, start = divmod(block_index, GROUP_BLOCKS)
            step = min(count, GROUP_BLOCKS - start)
            mask = bit_mask(start, step)
            if self._owned.get((storage_id, group), 0) & mask:
                raise FormatError(f"block {block_index} of storage volume {storage_id} has two owners")
            parts.append((group, mask))
            block_index += step
            count -= step
        for group, mask in parts:
            self._owned[storage_id, group] = self._owned.get((storage_id, group), 0) | mask

    def finish_tables(self, *, last_volume: int, sequence: int = 0, segment: int = 1) -> None:
        """Write the rest of the tables, counted anew, as of a commit and a journal segment."""
        try:
            self._recount()
            values = record_puts({record_id(record): record for record in self.catalog.records()})
            values["space"] = {
                space_key(*key): bits.to_bytes((bits.bit_length() + 7) // 8, "little")
                for key, bits in self._owned.items()
            }
            facts = {
                "sequence": sequence,
                "segment": segment,
                "last_volume": max(last_volume, self.catalog.last_volume_id),
            }
            self._tables.write(self._layer, Puts(values, facts))
        finally:
            self._tables.close()

    def finish(self, *, last_volume: int, with_images: bool = True) -> None:
        """Write everything else, the superblock last.

        Durability: durable on return.

        Raises:
            ImageMismatch: An image is missing, too short or another one.
        """
        try:
            self._require_references()
            if with_images:
                self._require_images()
        except BaseException:
            self._tables.close()
            raise
        self.finish_tables(last_volume=last_volume)
        uuid, size = UUID(self._superblock.uuid), self._superblock.journal_bytes
        Journal.create(self._backing, self._directory, uuid, segment_bytes=size, nonce=new_nonce())
        write_superblock(self._backing, self._directory, self._superblock)

    def abandon(self) -> None:
        """Let go of what was begun; the directory never becomes a pool."""
        self._tables.close()

    def missing_blocks(self) -> dict[RecordId, int]:
        """Tell how many stored blocks each volume's and snapshot's own table lacks, by its record."""
        missing: dict[RecordId, int] = {}
        for volume in self.catalog.volumes.values():
            if not volume.rollback_to:
                missing["volume", (volume.id,)] = volume.mapped_blocks - self._mapped.get(TableKey(volume.id), 0)
            for s in self.catalog.snapshots(volume.id, removed=True):
                held = self._mapped.get(TableKey(volume.id, s.generation), 0)
                missing["snapshot", (volume.id, s.generation)] = s.held_blocks - held
        return {identity: count for identity, count in missing.items() if count}

    def _require_references(self) -> None:
        for volume in self.catalog.volumes.values():
            rollback = (volume.rollback_to, volume.rollback_mark)
            known = [("snapshot", (volume.id, generation)) in self.catalog for generation in rollback]
            if any(rollback) and not (rollback[0] < rollback[1] and all(known)):
                raise FormatError(f"volume {volume.id} is rolled back to a snapshot that there is not")
            origin = split_map_id(volume.origin)
            if volume.baseline or (volume.origin and not origin[0]):
                if origin[0] or int(origin[1]) != int(BaselineFacts.decode(volume.baseline).id):
                    raise FormatError(f"volume {volume.id} has a baseline that is not its origin")
                continue
            if volume.name and volume.origin and (origin[0] >= volume.id or ("snapshot", origin) not in self.catalog):
                raise FormatError(f"volume {volume.id} is a clone of snapshot {origin}, which there is not")

    def _recount(self) -> None:
        for volume in list(self.catalog.volumes.values()):
            snapshots = self.catalog.snapshots(volume.id, removed=True)
            newest = max((s.generation for s in snapshots), default=Generation(0))
            mapped = self._mapped.get(TableKey(volume.id), 0)
            if volume.rollback_to:  # the tables follow later
                mapped = volume.mapped_blocks
            last = Generation(max(newest, volume.last_generation))
            self.catalog.put(replace(volume, mapped_blocks=mapped, newest_generation=newest, last_generation=last))
            for snapshot in snapshots:
                held = self._mapped.get(TableKey(volume.id, snapshot.generation), 0)
                self.catalog.put(replace(snapshot, held_blocks=held))

    def _require_images(self) -> None:
        pool = Pool(self._directory, UUID(self._superblock.uuid), self._superblock.block_bytes, self._backing)
        try:
            for storage in self.catalog.storages.values():
                pool.attach(storage)
            for (storage_id, group), bits in self._owned.items():
                volume = pool.volume(StorageId(storage_id))
                volume.require_grown(group, bits)  # before bitmaps are made for all blocks up to that one
                volume.load(group, bits)
            pool.verify_lengths()
        finally:
            pool.close()


def restore(
    lines: Iterable[bytes], directory: Path, *, images: Mapping[int, Path] | None = None, backing: Backing | None = None
) -> dict[str, Any]:
    """Make a pool's metadata in ``directory`` from a dump, over the images that exist.

    Durability: durable on return.
    Atomicity: until the superblock is written, last, the directory is not a pool.

    Returns:
        Facts: uuid, the dump's time and sequence, how many volumes and snapshots.

    Raises:
        FormatError: The dump is damaged, cut off or impossible.
        UnsupportedFormat: A newer incfs wrote it.
        AlreadyExists: The directory is not empty.
        ImageMismatch: An image is missing, too short or another one.
    """
    if (directory / SUPERBLOCK_NAME).exists():
        raise AlreadyExists(f"{directory} is a pool already", path=str(directory))
    documents = _checked_documents(lines)
    head: dict[str, Any] = next(documents, {})
    superblock, last_volume = _read_head(head)
    builder = MetadataBuilder(superblock, directory, images or {}, backing or Backing())
    try:
        for document in documents:
            _add(builder, document)
    except BaseException:
        builder.abandon()
        raise
    unknown = set(images or {}) - set(builder.catalog.storages)
    if unknown:
        builder.abandon()
        raise UsageError(f"the dump has no storage volume {min(unknown)}")
    builder.finish(last_volume=last_volume)
    volumes = [volume for volume in builder.catalog.volumes.values() if volume.name]
    return {
        "directory": str(directory),
        "uuid": superblock.uuid,
        "dump_created_ns": head["created_ns"],
        "dump_sequence": head["sequence"],
        "volume_count": len(volumes),
        "snapshot_count": sum(len(builder.catalog.snapshots(volume.id)) for volume in volumes),
    }


def _checked_documents(lines: Iterable[bytes]) -> Iterator[Any]:
    """Yield the documents before the end, and prove the end."""
    digest = blake2b(digest_size=16)
    counts = {"records": 0, "pages": 0}
    stream = iter(lines)
    for number, line in enumerate(stream, 1):
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"line {number} of the dump is not JSON") from error
        if not isinstance(document, dict):
            raise FormatError(f"line {number} of the dump is not a document")
        if "end" in document:
            if document["end"] != {**counts, "digest": digest.hexdigest()} or next(stream, None) is not None:
                raise FormatError("the dump is damaged: its end does not match what came before")
            return
        digest.update(line)
        counts["records"] += "record" in document
        counts["pages"] += "page" in document
        yield document
    raise FormatError("the dump is cut off: it has no end")


def _read_head(head: Any) -> tuple[Superblock, int]:
    match head:
        case {"dump": int(version), "format": int(written), "pool": dict(fields), "last_volume": int(last_volume),
              "created_ns": int(_), "sequence": int(_)}:  # fmt: skip
            pass
        case _:
            raise FormatError("this is no dump of an incfs pool")
    if version > DUMP_VERSION or written > FORMAT_VERSION:
        raise UnsupportedFormat(f"the dump has version {version} of format {written}; use a newer incfs")
    superblock = decode_fields(json.dumps(fields).encode(), Path("the dump's header"))
    if not (65536 <= superblock.journal_bytes <= MAX_JOURNAL_BYTES) or superblock.journal_bytes % 4096:
        raise FormatError(f"the dump has a journal size of {superblock.journal_bytes} bytes")
    if not 0 <= last_volume < 1 << 32:
        raise FormatError(f"the dump has a last volume id of {last_volume}")
    return superblock, last_volume


def _add(builder: MetadataBuilder, document: Any) -> None:
    match document:
        case {"record": str(kind), "value": dict(value)} if kind in KINDS:
            builder.add_record(record_from(kind, _from_text(value)))
        case {"page": [int(volume), int(generation), int(page_index)], "runs": list(runs)}:
            builder.add_page(TableKey(volume, generation), page_index, _entries(runs))
        case _:
            raise FormatError(f"the dump has an unknown document: {str(document)[:80]}")


def _from_text(value: dict[str, Any]) -> dict[str, Any]:
    xattrs = value.get("xattrs")
    if not isinstance(xattrs, dict):
        return value
    try:
        return {**value, "xattrs": {name: bytes.fromhex(content) for name, content in xattrs.items()}}
    except (TypeError, ValueError) as error:
        raise FormatError("the dump has an extended attribute that is not hexadecimal") from error


def _entries(runs: list[Any]) -> Entries:
    entries: Entries = {}
    for run in runs:
        match run:
            case [int(first), int(count), int(address), str(crcs)]:
                pass
            case _:
                raise FormatError(f"the dump has a run that is none: {str(run)[:80]}")
        stored = address > HOLE
        if first < 0 or not 0 < count <= PAGE_BLOCKS - first or not 0 <= address < 1 << 64:
            raise FormatError(f"the dump has a run out of range: {str(run)[:80]}")
        try:
            checksums = bytes.fromhex(crcs)
        except ValueError as error:
            raise FormatError("the dump has checksums that are not hexadecimal") from error
        if len(checksums) != (4 * count if stored else 0):
            raise FormatError("the dump has a run with the wrong number of checksums")
        for i in range(count):
            if first + i in entries:
                raise FormatError("the dump has a page with two mappings of one block")
            crc = int.from_bytes(checksums[4 * i : 4 * i + 4], "big") if stored else 0
            entries[first + i] = (address + i if stored else address, crc)
    return entries


def _validate(record: Record, block_bytes: int) -> None:
    """Refuse values that no pool has."""
    match record:
        case Storage():
            sound = 1 <= record.id <= 65535 and 0 < record.capacity_blocks <= 1 << 48
            sound = sound and record.redundancy in REDUNDANCIES and "\0" not in record.path
        case Volume():
            sound = 1 <= record.id < 1 << 32 and 0 <= record.size_bytes <= MAX_VOLUME_BYTES
            sound = sound and 0 <= record.mode <= 0o7777 and 0 <= record.last_generation <= MAX_GENERATION
            sound = sound and 0 <= record.uid < 1 << 32 and 0 <= record.gid < 1 << 32
            sound = sound and all(isinstance(v, bytes) for v in record.xattrs.values())
            _validate_name(record.name, "volume")
        case Snapshot():
            sound = 1 <= record.generation <= MAX_GENERATION and 0 <= record.size_bytes <= MAX_VOLUME_BYTES
            sound = sound and 0 <= record.mapped_blocks <= MAX_VOLUME_BYTES // block_bytes
            sound = sound and all(type(when) in {int, NoneType} for when in record.holds.values())
            for name in (record.name, *record.holds):
                _validate_name(name, "snapshot")
        case StoredPolicy():
            size = len(record.text.encode("utf-8", "surrogatepass"))
            sound = size <= MAX_POLICY_BYTES and all(type(when) is int for when in record.runs.values())
    values = encode_record(record)
    sound = sound and all(0 <= value < 1 << 63 for value in values.values() if isinstance(value, int))
    sound = sound and (isinstance(record, StoredPolicy) or _is_uuid(record.uuid))
    try:
        "".join([*(value for value in values.values() if isinstance(value, str)), *values.get("xattrs", ())]).encode()
    except ValueError:
        sound = False
    if not sound:
        raise FormatError(f"a record holds a value that cannot be: {str(record)[:200]}")


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


def _validate_name(name: str, what: str) -> None:
    try:
        if name:
            validate_name(name, what=what)
    except UsageError as error:
        raise FormatError(f"a {what} record holds a bad name: {error}") from error
