"""The slow half of a commit and of a checkpoint: what reaches the disk, in which order.

Both are made by the store on the owner thread; their ``run*`` methods touch only what was
frozen for them, so a worker thread may execute them while the owner goes on.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from incfs.blocks import split_address
from incfs.catalog import Record, RecordId, record_puts
from incfs.changes import Change, MapRun, encode_body, map_runs
from incfs.codec import checksum
from incfs.epoch import Point
from incfs.errors import ChecksumMismatch
from incfs.journal import Journal
from incfs.metadata import TableCopies
from incfs.model import HOLE, StorageId
from incfs.overlay import Layer
from incfs.pool import Pool
from incfs.tables import Puts, space_key

PAGE_COST_BYTES = 16384
"""Most that folding one map page can add to the tables' file: the page and its branch."""
_FOLD_COST_BYTES = 1 << 20
"""And what a fold adds besides."""


def fold_bytes(page_count: int) -> int:
    """Say how much the tables' file may grow by when so many pages, records and bitmaps are folded into it."""
    return _FOLD_COST_BYTES + page_count * PAGE_COST_BYTES


def stored_runs(changes: list[Change]) -> Iterator[MapRun]:
    """Yield the runs of a record that have data, in the order of the record's data."""
    for change in changes:
        if change[0] == "map":
            yield from (run for run in map_runs(change[2]) if run.address > HOLE)


def stored_blocks(changes: list[Change]) -> int:
    """Count the blocks of ``stored_runs``, without decoding them."""
    flats = [change[2] for change in changes if change[0] == "map"]
    return sum(count for flat in flats for count, address in zip(flat[1::4], flat[2::4], strict=True) if address > HOLE)


@dataclass(slots=True)
class Commit:
    """One journal record in the making."""

    sequence: int
    changes: list[Change]
    """Empty when all is in records that the data plane's own threads have begun: these are waited for (I13)."""
    pool: Pool
    journal: Journal
    block_bytes: int
    small_bytes: int
    """Up to this much data goes into the record."""
    folded_sequence: int
    """The last commit that the tables contain."""
    is_last: bool = False
    """Whether the next segment follows."""
    is_durable: bool = False

    def run(self) -> None:
        """Make everything up to the commit durable: data first or inside the record, then the record (I2).

        Durability: durable on return.

        Raises:
            MetadataFull: The journal's disk has no room for the record.  Nothing is harmed: it may be run again, and
                must be before any other.
            BackingError: A write or sync failed; the pool must become read-only.
            ChecksumMismatch: The host returned other data than was just written.
        """
        if self.is_durable:
            return
        if self.changes:
            self._append_record()
        else:
            self.journal.settle()
        self.is_durable = True

    def _append_record(self) -> None:
        data = b""
        moves = any(change[0] == "move" for change in self.changes)  # their data is only in the images
        if not moves and stored_blocks(self.changes) * self.block_bytes <= self.small_bytes:
            data = b"".join(self._read_back(run) for run in stored_runs(self.changes))
        else:
            self.pool.sync()
        body = encode_body(self.changes, data, self.folded_sequence)
        self.journal.append(self.sequence, body, is_last=self.is_last)

    def _read_back(self, run: MapRun) -> bytes:
        storage_id, block_index = split_address(run.address)
        volume = self.pool.volumes[storage_id]
        data = volume.read_blocks(block_index, run.block_count)
        for i, crc in enumerate(run.checksums):
            if self._is_wrong(data, i, crc) and volume.heal(block_index + i, crc) is not None:
                data = volume.read_blocks(block_index, run.block_count)
            if self._is_wrong(data, i, crc):
                raise ChecksumMismatch(
                    f"{volume.file.path}: block {block_index + i} differs from what was written to it a moment ago"
                )
        return data

    def _is_wrong(self, data: bytes, number: int, crc: int) -> bool:
        return checksum(data[number * self.block_bytes : (number + 1) * self.block_bytes]) != crc


class Stamps(Protocol):
    """Stamps images and legs with the epoch that holds."""

    def write_stamps(self, point: Point) -> None:
        """Write what they say from a checkpoint on."""

    def sync_stamped(self, point: Point) -> None:
        """Make all data durable, and what they say."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One fold of the journal into the tables."""

    commit: Commit | None
    sequence: int
    segment_number: int
    """The journal segment that holds what comes after ``sequence``."""
    nonce: int
    last_volume_id: int
    """Highest id ever given to a volume: the records forget it when that volume is gone."""
    layer: Layer
    records: dict[RecordId, Record | None]
    groups: dict[tuple[StorageId, int], int]
    freed: "array[int]"
    pool: Pool
    journal: Journal
    tables: TableCopies
    stamps: Stamps

    @property
    def _point(self) -> Point:
        """What images and legs say from this checkpoint on."""
        return Point(self.segment_number, self.sequence)

    def run_commit(self) -> None:
        """Make the checkpoint's own commit durable and start the next journal segment.

        Raises:
            MetadataFull, BackingError: As ``Commit.run``.
        """
        if self.commit is not None:
            self.commit.run()
        self.journal.start_segment(self.sequence + 1, self.nonce)

    def write_stamps(self) -> None:
        """Write what images and legs say from this checkpoint on; ``run_fold`` makes it durable.

        Raises:
            NoSpace: A host has no room; nothing was harmed, and it may be tried again.
            BackingError: As ``Commit.run``.
        """
        self.stamps.write_stamps(self._point)

    def reserve(self) -> None:
        """Make sure that the host has room for the tables to grow, and write the stamps, which may need some, too.

        LMDB reports a full disk as an I/O error, when it is too late: ask beforehand.

        Raises:
            NoSpace: It has not; nothing was changed, and it may be asked again.
            BackingError: As ``Commit.run``.
        """
        self.write_stamps()
        pages = sum(len(pages) for pages in self.layer.values()) + len(self.groups) + len(self.records)
        self.tables.reserve(fold_bytes(pages))

    def run_fold(self) -> None:
        """Make all data durable, with a stamp that names this checkpoint on each image; then the tables.

        So tables that lack it are known to be older than the images, before what it frees is used again.

        Atomicity: one LMDB transaction; before its commit the journal still has everything.

        Raises:
            MetadataFull: The tables' disk has no room after all; it may be run again.
            BackingError: As ``Commit.run``.
        """
        self.stamps.sync_stamped(self._point)
        values = record_puts(self.records)
        values["space"] = {
            space_key(*key): bits.to_bytes((bits.bit_length() + 7) // 8, "little") if bits else None
            for key, bits in self.groups.items()
        }
        facts = {"sequence": self.sequence, "segment": self.segment_number, "last_volume": self.last_volume_id}
        self.tables.write(self.layer, Puts(values, facts))
