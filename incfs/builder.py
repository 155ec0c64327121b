"""The metadata of a pool made from records and map pages that nobody vouches for.

Each value is checked (I11), bitmaps and counts are made anew, and the superblock is written last.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from uuid import UUID

from incfs import groups
from incfs._mappings import Page
from incfs.backing import Backing
from incfs.baseline import BaselineFacts
from incfs.blocks import bit_mask, split_address
from incfs.catalog import Catalog, Record, RecordId, record_id, record_puts
from incfs.codec import Entries, entry_runs
from incfs.epoch import EPOCH_NAME, NEVER, Standing
from incfs.errors import AlreadyExists, FormatError, IncfsError
from incfs.journal import Journal, journal_paths
from incfs.metadata import TABLES_NAME
from incfs.model import (
    HOLE,
    MAX_VOLUME_BYTES,
    PAGE_BLOCKS,
    STALE_GROUPS,
    Bookmark,
    Generation,
    Snapshot,
    Storage,
    StorageId,
    Volume,
    split_map_id,
)
from incfs.overlay import Layer, Patch, TableKey
from incfs.parts import create_standing
from incfs.pool import Pool
from incfs.store import new_nonce
from incfs.superblock import SUPERBLOCK_NAME, Superblock, write_superblock
from incfs.tables import Puts, Tables, space_key
from incfs.transfers import decode_receiving
from incfs.validation import validate

_BATCH_PAGES = 4096


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
        self._baselines: dict[StorageId, Path] = {}
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
        validate(record, self._superblock.block_bytes)
        if record_id(record) in self.catalog:
            raise FormatError(f"two records of {record_id(record)}")
        if isinstance(record, Snapshot) and record.volume_id not in self.catalog.volumes:
            raise FormatError(f"snapshot {record.name!r} of volume {record.volume_id}, which there is not")
        if isinstance(record, Bookmark):
            self._require_point(record)
        if isinstance(record, Volume) and record.name and self.catalog.has_name(record.name):
            raise FormatError(f"two volumes are named {record.name!r}")
        if isinstance(record, Storage):
            record = self._placed(record)
        self.catalog.put(record)

    def _require_point(self, record: Bookmark) -> None:
        """Refuse a bookmark of a point that its volume never had, or had as another one."""
        volume = self.catalog.volumes.get(record.volume_id)
        if volume is None or record.generation > volume.last_generation:
            raise FormatError(f"bookmark {record.name!r} of a snapshot that volume {record.volume_id} never had")
        taken = self.catalog.get(("snapshot", (record.volume_id, record.generation)))
        if isinstance(taken, Snapshot) and taken.uuid != record.uuid:
            raise FormatError(f"bookmark {record.name!r} is of another snapshot than {taken.name!r}")
        if any(self.catalog.has_bookmark_name(record.volume_id, name) for name in record.names):
            raise FormatError(f"two bookmarks of volume {record.volume_id} have one name")

    def _placed(self, record: Storage) -> Storage:
        path = self._stored_path(self._images.get(record.id, Path(record.path)))
        return replace(record, path=path, mirrors=tuple(self._stored_path(Path(leg)) for leg in record.mirrors))

    def _stored_path(self, path: Path) -> str:
        path, home = Path(os.path.realpath(self._directory / path)), self._directory.resolve()
        return str(path.relative_to(home) if path.is_relative_to(home) else path)

    def add_page(self, table: TableKey, page_index: int, entries: Entries) -> None:
        """Take a page of a table.

        Raises:
            FormatError: Its table does not exist, or it names a block that does not exist or has an owner.
        """
        numbers = (table.volume_id, table.generation)
        kind = "bookmark" if table.is_trail else "snapshot"
        identity: RecordId = (kind, numbers) if table.generation else ("volume", numbers[:1])
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
        self._layer.setdefault(table, {})[page_index] = Patch(Page(entries), is_whole=True)
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
            group, start = divmod(block_index, groups.GROUP_BLOCKS)
            step = min(count, groups.GROUP_BLOCKS - start)
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
                for key, bits in (self._owned | self._lacking()).items()
            }
            facts = {
                "sequence": sequence,
                "segment": segment,
                "last_volume": max(last_volume, self.catalog.last_volume_id),
            }
            self._tables.write(self._layer, Puts(values, facts))
        finally:
            self._tables.close()

    def _lacking(self) -> dict[tuple[int, int], int]:
        """Nobody knows what stale legs lack: everything, then."""
        storages = self.catalog.storages
        return {
            (storage_id, STALE_GROUPS + group): bits
            for (storage_id, group), bits in self._owned.items()
            if storages[StorageId(storage_id)].stale_legs
        }

    def finish(self, *, last_volume: int, with_images: bool = True) -> None:
        """Write everything else, the superblock last.

        Durability: durable on return.
        Atomicity: what fails leaves the directory empty; a crash leaves no superblock.

        Raises:
            ImageMismatch: An image is missing, too short or another one.
            NoSpace, BackingError: The host failed.
        """
        try:
            self._require_references()
            if with_images:
                self._require_images()
        except BaseException:
            self.abandon()
            raise
        try:
            self._finish_files(last_volume)
        except IncfsError:
            self.abandon()
            raise

    def _finish_files(self, last_volume: int) -> None:
        self.finish_tables(last_volume=last_volume)
        uuid, size = UUID(self._superblock.uuid), self._superblock.journal_bytes
        # Whatever the images were stamped with: the next opening takes them over, and other directories fit no more.
        create_standing(self._backing, self._directory, uuid, Standing(NEVER, is_adopting=True))
        Journal.create(self._backing, self._directory, uuid, segment_bytes=size, nonce=new_nonce())
        write_superblock(self._backing, self._directory, self._superblock)

    def abandon(self) -> None:
        """Undo what was begun: the directory is empty again, and may be chosen once more."""
        self._tables.close()
        names = (SUPERBLOCK_NAME, f"{SUPERBLOCK_NAME}.new", EPOCH_NAME, TABLES_NAME, f"{TABLES_NAME}-lock")
        for path in (*(self._directory / name for name in names), *journal_paths(self._directory)):
            if path.exists():
                self._backing.remove(path)

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
            self._require_receive(volume)
            origin = split_map_id(volume.origin)
            self._require_one_baseline(volume)
            if volume.baseline or (volume.origin and not origin[0]):
                if origin[0] or int(origin[1]) != int(BaselineFacts.decode(volume.baseline).id):
                    raise FormatError(f"volume {volume.id} has a baseline that is not its origin")
                continue
            if volume.name and volume.origin and (origin[0] >= volume.id or ("snapshot", origin) not in self.catalog):
                raise FormatError(f"volume {volume.id} is a clone of snapshot {origin}, which there is not")

    def _require_one_baseline(self, volume: Volume) -> None:
        """Refuse an id for two raw images: the volumes of one would read the other."""
        if volume.baseline:
            facts = BaselineFacts.decode(volume.baseline)
            known = self._baselines.setdefault(facts.id, facts.path)
            if known != facts.path or facts.id in self.catalog.storages:
                raise FormatError(
                    f"baseline {facts.id} is {known} and {facts.path}; name one of them for all its volumes"
                )

    def _require_receive(self, volume: Volume) -> None:
        """The volumes of an unfinished receive and its lead must know of each other."""
        lead = self.catalog.volumes.get(volume.receive_lead)
        if volume.receive_state and lead is not volume:
            raise FormatError(f"volume {volume.id} has the state of a receive that it is not the lead of")
        if volume.receive_lead:
            targets = decode_receiving(lead.receive_state).targets if lead is not None and lead.receive_state else ()
            if volume.id not in targets or targets[0] != volume.receive_lead:
                raise FormatError(f"volume {volume.id} is part of a receive that there is not")

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
