"""The store: the only place where data and tables meet.  Commit, checkpoint, recovery.

Owns the order in which things become durable.  Knows neither trio nor FUSE: slow work comes
as ``Commit`` and ``Checkpoint`` objects whose ``run*`` methods a worker thread may execute,
while everything else belongs to one owner thread.

Invariants:
    1. At most one commit runs; record n+1 is begun after n ended (journal invariant 2).
    2. Changes reach memory (log, pool, catalog) and the pending list in one step of the
       owner thread, so memory is always the last commit plus the pending list.
    3. After a failure (``fail``) nothing is written any more (I10).
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID

from incfs.backing import Backing
from incfs.catalog import Catalog, Record, RecordId, record_id
from incfs.changes import Change, map_change
from incfs.checkpoint import Checkpoint, Commit
from incfs.codec import encode_record
from incfs.dataplane import DataPlane
from incfs.errors import IncfsError, NoSpace, PoolReadOnly
from incfs.journal import Journal
from incfs.lock import PoolLock
from incfs.log import IncrementalLog, Tables
from incfs.model import HOLE, Generation, MapId, SealedPage, StorageId, Volume, VolumeId, split_map_id
from incfs.planes import PlaneKind, default_kind, make_plane
from incfs.pool import DEFAULT_EXTEND_BYTES, Pool, PunchPlan
from incfs.superblock import Superblock

logger = logging.getLogger(__name__)

TABLES_NAME = "tables.mdb"
_SEAL_AT = 1024
"""Unsealed mappings that trigger a seal: bounds how long one keeps the owner thread."""
_PAGE_WEIGHT = 64
"""What a folded or emptied page counts as among the pending mappings."""
_MAX_LEASE_BLOCKS = 2048


@dataclass(frozen=True, slots=True)
class Salvage:
    """How to open a copy of a damaged pool's metadata, to save what can be saved."""

    images_home: Path
    """What relative paths of images start from."""
    image_paths: Mapping[StorageId, Path]
    """Images that are not where their records say."""
    cut_journal: bool
    """Take the journal up to its first damage."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an open pool behaves; nothing of it is stored."""

    commit_interval_s: float = 5.0
    """Commit without being asked this often, so that a crash loses little."""
    checkpoint_interval_s: float = 30.0
    page_cache_pages: int = 8192
    """Resident map pages, about 7 KiB of memory each."""
    small_commit_bytes: int = 65536
    """Up to this much data goes into the journal record instead of flushing the images."""
    overlay_pages: int = 4096
    """Changed map pages in memory that trigger a checkpoint."""
    extend_bytes: int = DEFAULT_EXTEND_BYTES
    """Step in which images grow."""
    host_reserve_bytes: int = 16 << 20
    """Space that growth leaves free on an image's host filesystem."""
    data_plane: PlaneKind = field(default_factory=default_kind)
    """Who moves the bytes: ``native`` (C), ``python``, or ``auto``: native where it was built."""
    dump_interval_s: float | None = 86400.0
    """Write the metadata beside the images at the first checkpoint after so many seconds; None: never."""
    degraded: bool = False
    """Open also when an image is missing, cut off or another one: read-only, the rest can be read."""
    salvage: Salvage | None = None


class Store:
    """An open pool.

    Concurrency: the owner thread, unless a method says otherwise.
    """

    def __init__(
        self, directory: Path, superblock: Superblock, backing: Backing, lock: PoolLock, options: Options
    ) -> None:
        self.directory = directory
        self.superblock = superblock
        self.options = options
        self.catalog = Catalog()
        self.failure: IncfsError | None = None
        self.clock: Callable[[], int] = time.time_ns
        """Nanoseconds since 1970, for the records' times."""
        self.pending_mappings = 0
        """Mappings appended since the last commit was begun."""
        self.sequence = 0
        """Of the last commit begun."""
        self.durable_sequence = 0
        self.backing = backing
        self._lock = lock
        self.tables = Tables(directory / TABLES_NAME, backing)
        self.log = IncrementalLog(self.tables)
        try:
            self.journal = Journal.open(
                backing, directory, UUID(superblock.uuid), segment_bytes=superblock.journal_bytes
            )
        except BaseException:
            self.tables.close()
            raise
        salvage = options.salvage
        self.pool = Pool(
            salvage.images_home if salvage else directory, UUID(superblock.uuid), superblock.block_bytes, backing
        )
        if salvage:
            self.pool.image_paths = salvage.image_paths
        # An image that is away has no descriptor: only the Python plane turns that into an error of its range.
        kind: PlaneKind = "python" if options.degraded or salvage else options.data_plane
        self.plane = make_plane(kind, superblock.block_bytes, self.pool.volumes, backing)
        self._pending: list[Change] = []
        self._touched: dict[RecordId, None] = {}
        self._lease_blocks: dict[MapId, int] = {}
        self._folded_sequence = 0
        self._served: dict[MapId, tuple[int, bool]] = {}
        """Open tables -> (size, whether the data plane's own threads may write)."""
        self._commit: Commit | None = None
        self._checkpoint: Checkpoint | None = None

    @property
    def block_bytes(self) -> int:
        """Size of a block."""
        return self.superblock.block_bytes

    # Failsafe

    def fail(self, error: IncfsError) -> None:
        """Refuse every change from now on (I10); the first reason is kept and logged."""
        if self.failure is None:
            logger.error("pool %s is read-only from now on: %s", self.directory, error)
            self.failure = error
            self.plane.freeze()

    def require_writable(self) -> None:
        """Refuse when the pool is read-only.

        Raises:
            PoolReadOnly: An earlier write, sync or commit failed.
        """
        if self.failure is not None:
            raise PoolReadOnly(
                f"pool {self.directory} is read-only since: {self.failure}; "
                f"remove the cause, then unmount and mount again",
                cause=str(self.failure),
            )

    # Changes: memory and pending list in one step

    def begin_change(self) -> None:
        """Start an operation on records: everything written so far comes before it.

        Raises:
            PoolReadOnly: As ``require_writable``.
        """
        self.require_writable()
        self.absorb()

    def change(self, *records: Record) -> None:
        """Put records, in order: one atomic change, after ``begin_change`` in the same step."""
        assert not isinstance(self.plane, DataPlane) or not self.plane.fresh_count, "begin_change comes first"
        for record in records:
            self._put(record)
            self._touched.pop(record_id(record), None)
            self._pending.append(["put", record_id(record)[0], encode_record(record)])

    def touch(self, record: Record) -> None:
        """Put a record whose latest state goes into the next commit."""
        self._put(record)
        self._touched[record_id(record)] = None

    def _put(self, record: Record) -> None:
        self.catalog.put(record)
        if isinstance(record, Volume) and record.map_id in self._served:
            self.serve(record.map_id)

    def drop(self, identity: RecordId) -> None:
        """Remove a record."""
        self.catalog.drop(identity)
        self._touched.pop(identity, None)
        self._pending.append(["drop", identity[0], list(identity[1])])

    def absorb(self) -> None:
        """Seal the data plane and append what it wrote to the log.

        Cost: about 3 us for each mapping since the last seal.
        """
        self.note_writes()
        batch = self.plane.seal()
        self.pool.release(batch.dropped)
        by_volume: dict[VolumeId, list[SealedPage]] = {}
        for page in batch.pages:
            by_volume.setdefault(split_map_id(page.map_id)[0], []).append(page)
        for volume_id, pages in by_volume.items():
            self._pending.append(map_change(volume_id, pages))
            self.pending_mappings += sum(len(page.appended) for page in pages)
            self.append_mappings(self.catalog.volume(volume_id), pages)

    def append_mappings(self, volume: Volume, pages: list[SealedPage]) -> None:
        """Append sealed mappings: into the log, the bitmaps and the counters."""
        new: list[int] = []
        freed: list[int] = []
        replaced = 0
        for page in pages:
            new += [c.address for c in page.appended if c.address > HOLE]
            replaced += sum(c.old_address > HOLE for c in page.appended)
            freed += self.log.append(volume.id, volume.newest_generation, page.page_index, page.appended)
        self.pool.commit(new)
        self.pool.free(freed)
        mapped = len(new) - replaced
        held = replaced - len(freed)
        if mapped:
            self.touch(replace(volume, mapped_blocks=volume.mapped_blocks + mapped))
        if held:
            snapshot = self.catalog.snapshot_by_generation(volume.id, volume.newest_generation)
            self.touch(replace(snapshot, held_blocks=snapshot.held_blocks + held))

    def fold(self, volume_id: VolumeId, generation: Generation, page_indexes: list[int]) -> None:
        """Move pages of a removed snapshot's increment to its older neighbour, or free them."""
        older = self.catalog.older_generation(volume_id, generation)
        self._pending.append(["fold", volume_id, generation, older, page_indexes])
        self.pending_mappings += len(page_indexes) * _PAGE_WEIGHT
        self.apply_fold(volume_id, generation, older, page_indexes)

    def apply_fold(self, volume_id: VolumeId, generation: Generation, older: Generation, pages: Iterable[int]) -> None:
        """Do what ``fold`` says, in memory."""
        gained = 0
        for page_index in pages:
            freed, moved = self.log.fold(volume_id, generation, older, page_index)
            self.pool.free(freed)
            gained += moved
        if gained:
            snapshot = self.catalog.snapshot_by_generation(volume_id, older)
            self.touch(replace(snapshot, held_blocks=snapshot.held_blocks + gained))

    def empty(self, volume_id: VolumeId, page_indexes: list[int]) -> None:
        """Drop pages of a removed volume's lookup table."""
        self._pending.append(["empty", volume_id, page_indexes])
        self.pending_mappings += len(page_indexes) * _PAGE_WEIGHT
        self.apply_empty(volume_id, page_indexes)

    def apply_empty(self, volume_id: VolumeId, page_indexes: Iterable[int]) -> None:
        """Do what ``empty`` says, in memory."""
        for page_index in page_indexes:
            self.pool.free(self.log.drop_page(volume_id, page_index))

    # What the data plane may serve by itself

    def serve(self, table: MapId) -> None:
        """Let the data plane's own threads serve an open table, as far as its records allow."""
        volume_id, generation = split_map_id(table)
        is_writable = not generation and self.catalog.volume(volume_id).trim_from_bytes is None
        allowed = self.catalog.size_bytes(table), is_writable and self.failure is None
        if self._served.get(table) != allowed:
            self._served[table] = allowed
            self.plane.serve(table, allowed[0], is_writable=allowed[1])

    def unserve(self, table: MapId) -> None:
        """End ``serve``: nobody has the table open."""
        if self._served.pop(table, None) is not None:
            self.plane.unserve(table)

    def note_writes(self) -> None:
        """Let volumes know when the data plane's own threads wrote to them."""
        for table, written_ns in self.plane.written():
            volume = self.catalog.volume(split_map_id(table)[0])
            if written_ns > volume.modified_ns:
                self.touch(replace(volume, modified_ns=written_ns, changed_ns=written_ns))

    # The data plane's needs

    def load(self, table: MapId, page_index: int) -> None:
        """Make a page resident, reading the tables here."""
        chain = self.catalog.chain(table)
        self.install(table, page_index, self.log.resolve(chain, page_index, self.log.fetch(chain, page_index)))

    def install(self, table: MapId, page_index: int, entries: dict[int, tuple[int, int]]) -> None:
        """Make a resolved page resident, evicting others beyond the memory bound."""
        limit = self.options.page_cache_pages
        if self.plane.page_count >= limit:
            for evicted_map, evicted_page in self.plane.shrink(limit - limit // 8):
                self.log.forget(split_map_id(evicted_map)[0], evicted_page)
        self.plane.load(table, page_index, entries)

    def evict(self, table: MapId) -> None:
        """Forget the resident pages and the lease of a table that is going away."""
        self.absorb()
        self.plane.evict(table)
        self.pool.release(self.plane.revoke(table))
        self.pool.forget(table)
        self._lease_blocks.pop(table, None)

    def grant(self, table: MapId, block_count: int) -> bool:
        """Lease blocks to a table until it has ``block_count``; False when too few are free.

        Leases double while a table keeps asking, so that sequential writes stay sequential.
        """
        wanted = max(block_count, min(_MAX_LEASE_BLOCKS, 2 * self._lease_blocks.get(table, 8)))
        self._lease_blocks[table] = wanted
        block_count -= self.plane.leased_blocks(table)
        while block_count > 0 and (found := self.pool.allocate(table, wanted)):
            self.plane.grant(table, *found)
            block_count -= found[1]
        return block_count <= 0

    def reclaim_leases(self) -> None:
        """Take back from every table what it leased and does not use."""
        self.absorb()
        addresses = self.plane.revoke()
        self._lease_blocks.clear()
        self.pool.release(addresses)

    def grow(self) -> None:
        """Grow the first storage volume that can.  Any thread, one caller at a time.

        Raises:
            NoSpace: None can.
        """
        blocks = max(1, self.options.extend_bytes // self.block_bytes)
        reasons = []
        for storage_id in sorted(self.pool.volumes):
            try:
                self.pool.volumes[storage_id].grow(blocks, reserve_bytes=self.options.host_reserve_bytes)
            except NoSpace as error:
                reasons.append(str(error))
            else:
                return
        raise NoSpace("the pool is full: " + "; ".join(reasons) + "; add one with `incfs storage add`, or remove data")

    @property
    def freed_bytes(self) -> int:
        """Space that the next checkpoint makes free."""
        return self.pool.freed_blocks * self.block_bytes

    # Commit and checkpoint

    def begin_commit(self) -> Commit | None:
        """Gather everything since the last commit; None when there is nothing.

        The caller runs ``Commit.run`` in any thread, then ``end_commit`` here.
        """
        assert self._commit is None, "one commit at a time"
        self.require_writable()
        self.absorb()
        for identity in self._touched:
            record = self.catalog.get(identity)
            assert record is not None
            self._pending.append(["put", identity[0], encode_record(record)])
        self._touched.clear()
        if not self._pending:
            return None
        self.sequence += 1
        changes, self._pending, self.pending_mappings = self._pending, [], 0
        self._commit = Commit(
            self.sequence,
            changes,
            self.pool,
            self.journal,
            self.block_bytes,
            self.options.small_commit_bytes,
            self._folded_sequence,
        )
        return self._commit

    def end_commit(self, commit: Commit) -> None:
        """Note that a commit is durable."""
        assert commit is self._commit
        self._commit = None
        self.durable_sequence = commit.sequence

    def begin_checkpoint(self, nonce: int) -> Checkpoint:
        """Begin a commit and freeze what it leads to.

        The caller runs ``run_commit`` (any thread), ``end_checkpoint_commit`` (here; commits
        may go on from then), ``run_fold`` (any thread), ``end_checkpoint`` (here), and
        ``Pool.punch`` (any thread) and ``Pool.punched`` (here) with its result.
        """
        commit = self.begin_commit()
        return self._freeze(commit, self.journal.segment.number + 1, nonce)

    def _freeze(self, commit: Commit | None, segment_number: int, nonce: int) -> Checkpoint:
        assert self._checkpoint is None, "one checkpoint at a time"
        groups, freed = self.pool.freeze()
        self._checkpoint = Checkpoint(
            commit=commit,
            sequence=self.sequence,
            segment_number=segment_number,
            nonce=nonce,
            last_volume_id=self.catalog.last_volume_id,
            layer=self.log.freeze(),
            records=self.catalog.freeze(),
            groups=groups,
            freed=freed,
            pool=self.pool,
            journal=self.journal,
            tables=self.tables,
            backing=self.backing,
            tables_path=self.directory / TABLES_NAME,
        )
        return self._checkpoint

    def fold_recovered(self, sequence: int) -> None:
        """After replay: fold it into the tables and go on appending to the same segment.

        Before this is durable the journal is untouched, so recovery may be cut off anywhere
        and begins again (I5).
        """
        self.sequence = self.durable_sequence = sequence
        self._touched.clear()
        checkpoint = self._freeze(None, self.journal.segment.number, 0)
        checkpoint.reserve()
        checkpoint.run_fold()
        self._reuse(checkpoint)

    def keep_recovered(self, sequence: int) -> None:
        """After replay into a pool that must not be written: everything stays in memory."""
        self.sequence = self.durable_sequence = sequence
        self._touched.clear()

    def end_checkpoint_commit(self, checkpoint: Checkpoint) -> None:
        """Note that the checkpoint's own commit is durable."""
        if checkpoint.commit is not None:
            self.end_commit(checkpoint.commit)

    def end_checkpoint(self, checkpoint: Checkpoint) -> PunchPlan:
        """Note that the tables contain the checkpoint; its freed blocks may be used again."""
        assert checkpoint is self._checkpoint
        self._checkpoint = None
        self._folded_sequence = checkpoint.sequence
        self.log.thaw()
        return self.pool.plan_reuse(checkpoint.freed)

    @property
    def has_uncommitted(self) -> bool:
        """Whether a commit would write anything."""
        return bool(self._pending or self._touched or self.plane.fresh_count)

    @property
    def has_unfolded(self) -> bool:
        """Whether a checkpoint would write anything."""
        return self.has_uncommitted or self.durable_sequence > self._folded_sequence

    @property
    def wants_checkpoint(self) -> bool:
        """Whether journal or memory have grown enough for a checkpoint."""
        return (
            self.journal.used_bytes * 2 > self.superblock.journal_bytes
            or self.log.overlay_pages > self.options.overlay_pages
        )

    @property
    def is_checkpointing(self) -> bool:
        """Whether a checkpoint was begun and has not ended."""
        return self._checkpoint is not None

    # Synchronous driving: offline commands, tests

    def commit(self) -> None:
        """Make everything written so far durable.

        Durability: durable on return.
        """
        commit = self.begin_commit()
        if commit is not None:
            self._guard(commit.run)
            self.end_commit(commit)

    def checkpoint(self) -> None:
        """Commit, and fold everything into the tables."""
        if self._checkpoint is not None:
            self._finish(self._checkpoint)
        checkpoint = self.begin_checkpoint(new_nonce())
        self._guard(checkpoint.run_commit)
        self.end_checkpoint_commit(checkpoint)
        self._finish(checkpoint)

    def _finish(self, checkpoint: Checkpoint) -> None:
        """Fold; when the host has no room for that, it may be tried again."""
        checkpoint.reserve()
        self._guard(checkpoint.run_fold)
        self._reuse(checkpoint)

    def _reuse(self, checkpoint: Checkpoint) -> None:
        plan = self.end_checkpoint(checkpoint)
        self.pool.punch(plan)
        self.pool.punched(plan)

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except IncfsError as error:
            self.fail(error)
            raise

    def make_space(self, table: MapId, block_count: int) -> None:
        """Get a lease of ``block_count`` blocks by growing, taking back leases, checkpointing.

        Raises:
            NoSpace: The pool is full.
        """
        try:
            while not self.grant(table, block_count):
                self.grow()
        except NoSpace:
            self.reclaim_leases()
            if not self.grant(table, block_count) and self.pool.freed_blocks:
                self.checkpoint()
            if not self.grant(table, block_count):
                raise

    def watch(self) -> int | None:
        """Give a descriptor that is readable when the data plane wants ``attend``; None when it never will."""
        return None if isinstance(self.plane, DataPlane) else self.plane.watch(_SEAL_AT)

    def attend(self) -> None:
        """Seal what the data plane's own threads wrote, and add to their leases before they are used up."""
        assert not isinstance(self.plane, DataPlane)
        low = self.plane.attend()
        if self.failure is None:
            self.seal_if_large()
            for table in low:
                self.grant(table, self.plane.leased_blocks(table) + 1)

    def seal_if_large(self) -> None:
        """Seal when many mappings wait for it."""
        if self.plane.fresh_count >= _SEAL_AT:
            self.absorb()

    def close(self) -> None:
        """Checkpoint unless the pool failed, and let go of every file.

        Durability: everything is durable on return, or the error is raised; files are closed
        in both cases.
        """
        try:
            if self.failure is None:
                self.checkpoint()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of every file without writing, as a crash would."""
        self.pool.close()
        self.journal.close()
        self.tables.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, IncfsError):
            self.close()
        else:
            self.abandon()


def new_nonce() -> int:
    """Make the random mark of a journal segment."""
    return int.from_bytes(os.urandom(8), "little")
