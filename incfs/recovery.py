"""Create a pool; open one, replaying what its journal has beyond the last checkpoint.

Replay is deterministic and changes nothing durable before its own checkpoint, but for block
data that records carry (which it writes to where it belongs, as often as it is cut off).
"""

import contextlib
import time
import uuid as uuids
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from incfs import copymaker
from incfs.backing import Backing
from incfs.blocks import split_address
from incfs.catalog import KINDS, record_from, record_puts
from incfs.changes import Change, MapRun, decode_body, map_runs, move_triples
from incfs.codec import Entries
from incfs.epoch import EPOCH_NAME, Point, Stamp, Standing
from incfs.errors import (
    AlreadyExists,
    BackingError,
    FormatError,
    ImageMismatch,
    IncfsError,
    JournalDamaged,
    LimitExceeded,
    NotAPool,
    UsageError,
)
from incfs.gather import gather
from incfs.groups import group_start
from incfs.image import DATA_OFFSET_BYTES
from incfs.journal import Journal, JournalRecord, journal_paths
from incfs.lock import LOCK_NAME, PoolLock
from incfs.metadata import TABLES_NAME
from incfs.model import (
    DEFAULT_BLOCK_BYTES,
    HOLE,
    MAX_LEGS,
    MAX_STORAGE_ID,
    PAGE_BLOCKS,
    REDUNDANCIES,
    Generation,
    Storage,
    StorageId,
    Volume,
    VolumeId,
    map_id,
)
from incfs.muster import Expected, degrade, muster
from incfs.options import Options
from incfs.overlay import TableKey
from incfs.parts import create_standing, first_epoch
from incfs.pool import Pool
from incfs.sealed import seal_pages
from incfs.store import Store, new_nonce
from incfs.superblock import (
    ANNOUNCED_NAME,
    SUPERBLOCK_NAME,
    Superblock,
    announce_superblock,
    is_block_size,
    publish_superblock,
    read_superblock,
)
from incfs.tables import LMDB_LIB_VERSION, Puts, Tables

DEFAULT_JOURNAL_BYTES = 16 << 20
MIN_JOURNAL_BYTES = 64 << 10
IMAGES_NAME = "images"
UNLIMITED_BLOCKS = 1 << 47
"""Capacity of a storage volume without a limit of its own: its host filesystem is the limit."""


def create_pool(
    directory: Path,
    *,
    block_bytes: int = DEFAULT_BLOCK_BYTES,
    capacity_bytes: int | None = None,
    directories: Sequence[Path] = (),
    journal_bytes: int = DEFAULT_JOURNAL_BYTES,
    mirrors: Sequence[Path] = (),
    backing: Backing | None = None,
) -> Superblock:
    """Make a pool with one storage volume in each image directory, or with one that is mirrored.

    Args:
        directory: Made if missing; otherwise it may hold empty directories, and what a creation
            left that was cut off.
        block_bytes: A power of two, 64 to 65536.
        capacity_bytes: Most that all storage volumes together may grow to; None for no limit.
        directories: Where the images go; ``DIRECTORY/images`` without any.  Each is made if missing, but not what it
            lies in: that is a disk that is not mounted.
        journal_bytes: Size of each of the two journal segments, at least 64 KiB.
        mirrors: Directories for further legs of the only storage volume.
        backing: The host's files, unless a test brings its own.

    Durability: durable on return.
    Atomicity: until the superblock is written, last, the directory is not a pool; what fails leaves no file but a lock.

    Raises:
        UsageError: A size makes no sense.
        AlreadyExists: The directory is not empty.
        PoolLocked: Another process creates a pool there.
        BackingError, NoSpace: The host failed.
    """
    if not is_block_size(block_bytes):
        raise UsageError(f"block size must be a power of two from 64 to 65536 bytes, not {block_bytes}")
    if journal_bytes < MIN_JOURNAL_BYTES or journal_bytes % 4096:
        raise UsageError(f"journal size must be a multiple of 4096 of at least {MIN_JOURNAL_BYTES}")
    if capacity_bytes is not None and capacity_bytes < block_bytes * max(1, len(directories)):
        raise UsageError(f"capacity of {capacity_bytes} bytes is less than one block per storage volume")
    _require_parents(directory, directories)
    backing = backing or Backing()
    backing.make_directory(directory)
    backing.sync_directory(directory.parent)
    places = list(directories) or [directory / IMAGES_NAME]
    _require_empty(directory)
    lock = PoolLock(directory)
    try:
        _clear_half_made(backing, directory, [*places, *mirrors])
        _require_empty(directory)
        superblock = Superblock(str(uuids.uuid4()), block_bytes, journal_bytes, LMDB_LIB_VERSION, time.time_ns())
        announce_superblock(backing, directory, superblock)
        _create_files(backing, directory, superblock, places, capacity_bytes, mirrors)
        publish_superblock(backing, directory)
    except IncfsError:
        with contextlib.suppress(IncfsError):  # what is left is removed by the next creation here
            _clear_half_made(backing, directory, [*places, *mirrors])
        raise
    finally:
        lock.release()
    return superblock


def _require_parents(directory: Path, places: Sequence[Path]) -> None:
    for place in places:
        if not place.parent.is_dir() and place.parent != directory:
            raise UsageError(
                f"there is no {place.parent} for {place.name}: mount its disk, or make the directory first"
            )


def _create_files(
    backing: Backing,
    directory: Path,
    superblock: Superblock,
    places: Sequence[Path],
    capacity_bytes: int | None,
    mirrors: Sequence[Path],
) -> None:
    pool = Pool(directory, UUID(superblock.uuid), superblock.block_bytes, backing)
    records, epoch = [], first_epoch()
    for place in (*places, *mirrors):
        backing.make_directory(place)
        backing.sync_directory(place.parent)
    for number, place in enumerate(places, 1):
        capacity = None if capacity_bytes is None else capacity_bytes // len(places)
        record = new_storage(superblock, directory, place, StorageId(number), capacity_bytes=capacity, mirrors=mirrors)
        pool.images.create(record, Stamp(epoch, Point(1, 0)))
        records.append(record)
    uuid, size = UUID(superblock.uuid), superblock.journal_bytes
    create_standing(backing, directory, uuid, Standing(epoch))
    Journal.create(backing, directory, uuid, segment_bytes=size, nonce=new_nonce(), epoch=epoch)
    tables = Tables(directory / TABLES_NAME, backing, create=True)
    try:
        values = record_puts({("storage", (record.id,)): record for record in records})
        tables.write({}, Puts(values, {"sequence": 0, "segment": 1, "last_volume": 0}))
    finally:
        tables.close()


def create_mirrored_pool(
    directory: Path,
    *,
    metadata_mirrors: Sequence[Path],
    with_images: bool = False,
    force: bool = False,
    backing: Backing | None = None,
    **options: Any,
) -> Superblock:
    """Make a pool whose metadata is in further directories, too.

    Args:
        directory: As ``create_pool``.
        metadata_mirrors: The others.
        with_images: Let each directory have a leg of the first storage volume.
        force: Also on one filesystem.
        backing: As ``create_pool``.
        options: As ``create_pool``.

    Durability: durable on return.
    Atomicity: cut off, it leaves a pool with fewer copies, or none.

    Raises:
        UsageError, AlreadyExists: A directory cannot be used; nothing was made.
        IncfsError: As ``create_pool``.
    """
    backing = backing or Backing()
    places = [directory, *metadata_mirrors]
    copymaker.require_separate(backing, places, force=force)
    for place in metadata_mirrors:
        copymaker.require_free(place)
    if with_images:
        options["mirrors"] = [place / IMAGES_NAME for place in metadata_mirrors]
    superblock = create_pool(directory, backing=backing, **options)
    with open_store(directory, backing=backing) as store:
        for place in metadata_mirrors:
            copymaker.bring_back(store, copymaker.announce(store, place, force=force))
    return superblock


def _is_half_made(directory: Path) -> bool:
    return not (directory / SUPERBLOCK_NAME).exists() and (directory / ANNOUNCED_NAME).exists()


def _require_empty(directory: Path) -> None:
    """Refuse a directory that holds a file, but for what a creation left that was cut off."""
    found = [path for path in directory.iterdir() if path.name != LOCK_NAME]
    if not _is_half_made(directory) and any(not path.is_dir() or any(path.iterdir()) for path in found):
        kind = "a pool already" if (directory / SUPERBLOCK_NAME).exists() else "not empty"
        raise AlreadyExists(f"{directory} is {kind}; choose another directory", path=str(directory))


def _clear_half_made(backing: Backing, directory: Path, places: Sequence[Path]) -> None:
    """Remove the files of a pool that never was one: its announcement last, for this may be cut off, too."""
    if not _is_half_made(directory):
        return
    tables = directory / TABLES_NAME
    doomed = [*journal_paths(directory), tables, tables.with_name(f"{TABLES_NAME}-lock"), directory / EPOCH_NAME]
    try:
        uuid = read_superblock(backing, directory, ANNOUNCED_NAME).uuid
    except (NotAPool, FormatError):
        uuid = ""  # it is durable before an image is made
    for place in places if uuid else ():
        doomed += place.glob(_image_name(uuid, "*"))
    for path in doomed:
        if path.exists():
            backing.remove(path)
            backing.sync_directory(path.parent)
    backing.remove(directory / ANNOUNCED_NAME)
    backing.sync_directory(directory)


def _image_name(uuid: str, storage_id: StorageId | str, leg: int = 0) -> str:
    return f"incfs-{uuid[:8]}-{storage_id}{f'.leg{leg}' if leg else ''}.img"


def new_storage(
    superblock: Superblock,
    directory: Path,
    path: Path,
    storage_id: StorageId,
    *,
    capacity_bytes: int | None = None,
    storage_class: str = "",
    redundancy: str = "none",
    mirrors: Sequence[Path] = (),
) -> Storage:
    """Describe a new storage volume.

    Args:
        superblock: Of the pool.
        directory: Of the pool.
        path: The image file, or a directory to make it in.
        storage_id: A free one.
        capacity_bytes: Most that the image may grow to; None for no limit.
        storage_class: What placement rules call it.
        redundancy: What lies below it.
        mirrors: Further image files, or directories for them: legs of a mirror.
    """
    stored, *legs = (
        stored_path(directory, leg, _image_name(superblock.uuid, storage_id, number))
        for number, leg in enumerate((path, *mirrors))
    )
    blocks = UNLIMITED_BLOCKS if capacity_bytes is None else capacity_bytes // superblock.block_bytes
    return Storage(
        storage_id, str(uuids.uuid4()), stored, blocks, time.time_ns(), storage_class, redundancy, mirrors=tuple(legs)
    )


def stored_path(directory: Path, path: Path, name: str) -> str:
    """Give an image's path as a record has it: relative when inside the pool's directory.

    Args:
        directory: The pool's.
        path: The file, or a directory to make it in.
        name: What it is called there.
    """
    path = path.resolve()
    if path.is_dir():
        path = path / name
    home = directory.resolve()
    return str(path.relative_to(home) if path.is_relative_to(home) else path)


def make_storage(
    store: Store,
    path: Path,
    *,
    capacity_bytes: int | None = None,
    storage_class: str = "",
    redundancy: str = "none",
    mirrors: Sequence[Path] = (),
    force: bool = False,
) -> Storage:
    """Create the image of another storage volume; the caller puts its record.  Any thread.

    Raises:
        UsageError: The capacity is less than a block, or the redundancy is unknown.
        AlreadyExists: The file is there already.
        LimitExceeded: The pool has 65535 storage volumes.
    """
    if redundancy not in REDUNDANCIES:
        raise UsageError(f"unknown redundancy {redundancy!r}; known are {', '.join(REDUNDANCIES)}")
    if capacity_bytes is not None and capacity_bytes < store.block_bytes:
        raise UsageError(f"capacity of {capacity_bytes} bytes is less than one block")
    # Not one of a storage volume that was removed: the data plane still knows its file.
    storage_id = StorageId(max(store.catalog.storages.keys() | store.pool.retired.keys(), default=0) + 1)
    if storage_id > MAX_STORAGE_ID:
        raise LimitExceeded(f"a pool can have {MAX_STORAGE_ID} storage volumes")
    record = new_storage(
        store.superblock,
        store.home,
        path,
        storage_id,
        capacity_bytes=capacity_bytes,
        storage_class=storage_class,
        redundancy=redundancy,
        mirrors=mirrors,
    )
    if mirrors:
        _require_separate_legs(store, record, force=force)
    _clear_half_added(store, record)
    store.pool.images.create(record, Stamp(store.standing.settled, store.point))
    return record


def _require_separate_legs(store: Store, record: Storage, *, force: bool) -> None:
    """Refuse legs that one failure would take away together."""
    paths = store.pool.images.leg_paths(record)
    if len(paths) > MAX_LEGS:
        raise UsageError(f"a mirror has at most {MAX_LEGS} legs, not {len(paths)}")
    devices = [store.backing.measure_directory(path.parent)[2] for path in paths]
    if len(set(paths)) < len(paths) or (len(set(devices)) < len(devices) and not force):
        raise UsageError(
            f"the legs {', '.join(map(str, paths))} lie on one filesystem, whose failure would take all of them; "
            f"choose directories on different disks, or say --force"
        )


def _clear_half_added(store: Store, record: Storage) -> None:
    """Remove images without blocks that have the names of the next ones: an addition was cut off."""
    for leg, path in enumerate(store.pool.images.leg_paths(record)):
        if path.name != _image_name(store.superblock.uuid, record.id, leg) or not path.is_file():
            continue
        file = store.backing.open(path)
        try:
            is_empty = file.length_bytes() <= DATA_OFFSET_BYTES
        finally:
            file.close()
        if is_empty:
            store.backing.remove(path)


def open_store(directory: Path, options: Options | None = None, backing: Backing | None = None) -> Store:
    """Open a pool: take its lock, check it, recover it.

    Raises:
        NotAPool, UnsupportedFormat, FormatError: The directory is no pool this incfs can read.
        PoolLocked: Another process has it open.
        ImageMismatch: An image is missing, truncated or another one, and the options do not allow that.
        EpochMismatch: Directory and images are of different times, and the options do not allow that; nothing was
            touched.
        MetadataStale: The newest metadata is in copies that are away.
        JournalDamaged: Committed changes are lost; nothing was touched.
    """
    backing = backing or Backing()
    with contextlib.ExitStack() as stack:
        gathered = gather(directory, backing)
        stack.callback(gathered.close)
        store = Store(directory, gathered, backing, options or Options())
        stack.pop_all()
        stack.callback(store.abandon)
        folded, segment = _load_records(store)
        store.loaded_sequence = folded
        records = _read_journal(store, segment, folded)
        muster(store, _expected(store, records, Point(segment, folded)))
        _attach_all(store)
        replayed = _replay(store, records, folded)
        _verify_lengths(store)
        if store.failure is None:
            store.fold_recovered(replayed)
            store.set_aside(store.unfolded_pages)
            store.note_left_copies()
            copymaker.bring_all_back(store)
            store.pool.doubt()
            store.look_at_metadata()
        else:
            store.keep_recovered(replayed)
        store.pool.images.close_kept()
        stack.pop_all()
        return store


def _load_records(store: Store) -> tuple[int, int]:
    """Read the records of the last checkpoint; give the commit that it ends with, and the segment that follows."""
    with store.tables.reading() as reader:
        for kind in KINDS:
            for body in reader.bodies(kind):
                store.catalog.load(kind, body)
        sequence, segment, last_volume = reader.checkpoint()
    store.catalog.last_volume_id = max(store.catalog.last_volume_id, VolumeId(last_volume))
    return sequence, segment


def _attach_all(store: Store) -> None:
    """Open what the records name, and load the bitmaps."""
    for record in store.catalog.storages.values():
        _attach(store, record)
    for volume in store.catalog.volumes.values():
        store.baselines.need(volume.baseline)
    with store.tables.reading() as reader:
        for storage_id, group_index, bits in reader.space():
            store.pool.volume(StorageId(storage_id)).load(group_index, bits)
        for storage_id, group_index, bits in reader.stale():
            store.pool.load_stale(StorageId(storage_id), group_index, bits)


def _attach(store: Store, record: Storage) -> None:
    try:
        store.pool.attach(record)
    except (BackingError, ImageMismatch) as error:
        degrade(store, error)
        if store.options.salvage:
            with contextlib.suppress(BackingError):
                store.pool.attach_unproved(record)
                return
        store.pool.attach_absent(record, error)


def _attach_or_renew(store: Store, record: Storage) -> None:
    if record.id in store.pool.volumes:
        store.pool.renew_replayed(record)
    else:
        _attach(store, record)


def _verify_lengths(store: Store) -> None:
    try:
        store.pool.verify_lengths()
    except ImageMismatch as error:
        degrade(store, error)


def _read_journal(store: Store, segment: int, sequence: int) -> list[JournalRecord]:
    # All of them are looked at before the first is applied: that writes to the images.
    cut = store.options.salvage is not None and store.options.salvage.cut_journal
    records = list(store.journal.replay(segment, sequence, cut=cut))
    for record in records:
        _require_tables(store, decode_body(record.body).folded_sequence, sequence)
    return records


def _expected(store: Store, records: Sequence[JournalRecord], folded: Point) -> Expected:
    """Tell what tables and journal expect of the images."""
    reached = Point(store.journal.segment.number, records[-1].sequence if records else folded.sequence)
    expected = Expected(dict(store.catalog.storages), folded, reached)
    with store.tables.reading() as reader:
        for storage_id, group_index, bits in reader.space():
            expected.need(StorageId(storage_id), group_start(group_index) + bits.bit_length())
    for record in records:
        changes, data, _ = decode_body(record.body)
        for change in changes:
            match change:
                case ["put", "storage", value]:
                    storage = record_from("storage", value)
                    assert isinstance(storage, Storage)
                    expected.storages[storage.id] = storage
                case ["drop", "storage", [int(number)]]:
                    expected.storages.pop(StorageId(number), None)
                case ["map", int(_), flat] if not data:  # else it is written again
                    for run in map_runs(flat):
                        storage_id, block_index = split_address(run.address)
                        expected.need(storage_id, block_index + run.block_count)
    return expected


def _replay(store: Store, records: Sequence[JournalRecord], sequence: int) -> int:
    for record in records:
        try:
            apply_record(store, record)
        except (AssertionError, IndexError, KeyError) as error:
            # Both are sound by themselves, and yet a block has two owners or none.
            raise JournalDamaged(
                f"journal record {record.sequence} does not go with the tables of {store.directory} ({error}); "
                f"one of the two is of another time; see `incfs pool repair`"
            ) from error
        sequence = record.sequence
    return sequence


def _require_tables(store: Store, folded_sequence: int, sequence: int) -> None:
    if folded_sequence > sequence:
        raise FormatError(
            f"{store.directory / TABLES_NAME} is older than the journal: it ends at commit {sequence}, "
            f"the journal was written when it contained {folded_sequence}; see `incfs pool repair`"
        )


def apply_record(store: Store, record: JournalRecord) -> None:
    """Apply one journal record to memory, and the data it carries to the images."""
    changes, data, _ = decode_body(record.body)
    blocks = _DataCursor(data, store.block_bytes)
    for change in changes:
        _apply(store, change, blocks)
    if blocks.left:
        raise FormatError(f"journal record {record.sequence} has {blocks.left} bytes of data too many")


class _DataCursor:
    """Hands out the data of a record run by run."""

    def __init__(self, data: bytes, block_bytes: int) -> None:
        self._data = data
        self._block_bytes = block_bytes
        self._position = 0
        self.has_data = bool(data)

    @property
    def left(self) -> int:
        return len(self._data) - self._position

    def take(self, block_count: int) -> bytes:
        end = self._position + block_count * self._block_bytes
        if end > len(self._data):
            raise FormatError("journal record carries less data than its mappings need")
        data, self._position = self._data[self._position : end], end
        return data


def _apply(store: Store, change: Change, blocks: _DataCursor) -> None:
    match change:
        case ["map", int(volume_id), flat]:
            _apply_map(store, VolumeId(volume_id), list(map_runs(flat)), blocks)
        case ["put", kind, value]:
            record = record_from(kind, value)
            store.catalog.put(record)
            if isinstance(record, Volume):
                store.baselines.need(record.baseline)
            if isinstance(record, Storage):
                _attach_or_renew(store, record)
        case ["drop", str(kind), [*numbers]]:
            store.catalog.drop((kind, tuple(numbers)))
            if kind == "storage":
                store.pool.retire(StorageId(numbers[0]))
        case ["written", int(volume_id), int(written_ns)]:
            store.apply_written(VolumeId(volume_id), written_ns)
        case _:
            _apply_move(store, change)


def _apply_move(store: Store, change: Change) -> None:
    """Apply a change of tables alone."""
    match change:
        case ["fold", int(volume_id), int(generation), int(older), [*pages]]:
            store.moves.apply_fold(VolumeId(volume_id), Generation(generation), Generation(older), pages)
        case ["note", int(volume_id), int(generation), int(keeper), [*pages]]:
            store.trails.apply_note(VolumeId(volume_id), Generation(generation), Generation(keeper), pages)
        case ["forget", int(volume_id), int(generation), int(keeper), [*pages]]:
            store.trails.apply_forget(VolumeId(volume_id), Generation(generation), Generation(keeper), pages)
        case ["empty", int(volume_id), [*pages]]:
            store.moves.apply_empty(VolumeId(volume_id), pages)
        case ["unroll", int(volume_id), [*generations], [*pages]]:
            store.moves.apply_unroll(VolumeId(volume_id), generations, pages)
        case ["move", int(volume_id), int(generation), int(page_index), flat]:
            store.moves.apply_relocate(TableKey(volume_id, generation), page_index, move_triples(flat))
        case _:
            raise FormatError(f"journal: malformed change {str(change)[:80]}")


def _apply_map(store: Store, volume_id: VolumeId, runs: list[MapRun], blocks: _DataCursor) -> None:
    for run in runs:
        if run.address > HOLE:
            storage_id, block_index = split_address(run.address)
            volume = store.pool.volume(storage_id)
            if blocks.has_data:
                data = blocks.take(run.block_count)
                if volume.state == "online" and store.mismatch is None:
                    volume.write_blocks(block_index, data)
            store.pool.adopt(range(run.address, run.address + run.block_count))
    live = TableKey(volume_id)
    pages = [(index, _entries(members), store.log.entries(live, index)) for index, members in _by_page(runs)]
    store.append_mappings(store.catalog.volume(volume_id), seal_pages(map_id(volume_id), pages))


def _by_page(runs: list[MapRun]) -> Iterator[tuple[int, list[MapRun]]]:
    members: list[MapRun] = []
    for run in runs:
        if members and members[0].first_block // PAGE_BLOCKS != run.first_block // PAGE_BLOCKS:
            yield members[0].first_block // PAGE_BLOCKS, members
            members = []
        members.append(run)
    if members:
        yield members[0].first_block // PAGE_BLOCKS, members


def _entries(runs: list[MapRun]) -> Entries:
    return {
        run.first_block % PAGE_BLOCKS + i: (
            run.address + i if run.address > HOLE else run.address,
            run.checksums[i] if run.checksums else 0,
        )
        for run in runs
        for i in range(run.block_count)
    }
