"""What an open pool is in memory: records, tables, bitmaps, the data plane, and what waits for a commit.

Everything here belongs to the owner thread.  ``store`` makes it durable.

Invariants:
    1. Changes reach memory (log, pool, catalog) and the pending list in one step of the
       owner thread, so memory is always the last commit plus the pending list.
    2. After a failure (``fail``) nothing is changed any more (I10).
    3. Records change within a ``step``, which seals when it begins; nothing is sealed in it (I12).
    4. A record is changed by fields, from what it is at that moment: nobody puts back what he read before.
"""

import logging
import time
from collections import ChainMap, Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID

from incfs.account import Account
from incfs.backing import Backing
from incfs.baseline import Baselines
from incfs.blocks import stored_addresses
from incfs.catalog import Catalog, Record, RecordId, RecordT, record_id
from incfs.changes import Change, map_change
from incfs.codec import Entries, encode_record
from incfs.dataplane import Batch, DataPlane
from incfs.epoch import NEVER, Stamp, Standing
from incfs.errors import BackingError, IncfsError, MetadataFull, PoolReadOnly
from incfs.events import EventLog
from incfs.log import IncrementalLog
from incfs.metadata import TableCopies
from incfs.model import (
    HOLE,
    INHERIT,
    Facts,
    MapId,
    Snapshot,
    Storage,
    Volume,
    VolumeId,
    map_id,
    split_map_id,
)
from incfs.moves import Moves
from incfs.options import Options
from incfs.overlay import Chain, TableKey
from incfs.planes import PlaneKind, make_plane
from incfs.pool import Pool
from incfs.sealed import Sealed
from incfs.settings import VolumeSettings
from incfs.space import Space
from incfs.superblock import Superblock
from incfs.trails import Trails

logger = logging.getLogger(__name__)
StoreT = TypeVar("StoreT", bound="Memory")
Args = ParamSpec("Args")
Result = TypeVar("Result")

_SEAL_AT = 2048
"""Unsealed mappings that trigger a seal: bounds how long one keeps the owner thread."""
_PAGE_WEIGHT = 64
"""What a folded or emptied page counts as among the pending mappings."""


class Memory:
    """An open pool, without its way to the disk.

    Concurrency: the owner thread, unless a method says otherwise.
    """

    def __init__(
        self,
        directory: Path,
        superblock: Superblock,
        backing: Backing,
        tables: TableCopies,
        options: Options,
        *,
        home: Path,
    ) -> None:
        self.directory = directory
        self.home = home
        """Where relative paths of images start: another directory, when the pool is opened by another copy of it."""
        self.superblock = superblock
        self.options = options
        self.catalog = Catalog()
        self.failure: IncfsError | None = None
        self.no_room: MetadataFull | None = None
        """Why writes are refused until the metadata has room again; no failure."""
        self.mismatch: IncfsError | None = None
        """Why directory and images do not belong together, when the pool was opened only to be looked at."""
        self.clock: Callable[[], int] = time.time_ns
        """Nanoseconds since 1970, for the records' times."""
        self.pending_mappings = 0
        """Mappings appended since the last commit was begun."""
        self.checksum_errors = 0
        """Reads that found no right copy."""
        self.sequence = 0
        """Of the last commit begun."""
        self.durable_sequence = 0
        """Of the last commit whose flush is known to have ended (I13)."""
        self.standing = Standing(NEVER)
        """Which epoch the pool is in; settled once it was opened to be written."""
        self.backing = backing
        self.tables = tables
        self.log = IncrementalLog(tables)
        salvage = options.salvage
        self.pool = Pool(
            salvage.images_home if salvage else home, UUID(superblock.uuid), superblock.block_bytes, backing
        )
        if salvage:
            self.pool.images.moved = salvage.image_paths
        # An image that is away has no descriptor: only the Python plane turns that into an error of its range.
        kind: PlaneKind = "python" if options.degraded or salvage else options.data_plane
        self.baselines = self.log.baselines = Baselines(superblock.block_bytes)
        files: Any = ChainMap[Any, Any](self.pool.volumes, self.baselines)
        self.plane = make_plane(kind, superblock.block_bytes, files, backing)
        self.events = EventLog(None if salvage else directory, self.clock)
        self.account = Account(
            self.catalog,
            self.pool,
            self.plane,
            block_bytes=superblock.block_bytes,
            extend_bytes=options.extend_bytes,
            host_reserve_bytes=options.host_reserve_bytes,
            reserve_blocks=options.reserve_blocks,
        )
        self.space = Space(
            self.catalog, self.pool, self.plane, self.events, self.account, block_bytes=superblock.block_bytes
        )
        self.trails = Trails(self.catalog, self.log, self._pend_move)
        self.moves = Moves(self.catalog, self.log, self.pool, self.trails, self._pend_move, self._put)
        self._pending: list[Change] = []
        self._touched: dict[RecordId, None] = {}
        self._served: dict[MapId, tuple[int, Facts, bool, VolumeSettings]] = {}
        """Open tables -> (size, facts, whether the data plane's own threads may write, what rules the volume)."""
        self._quiet: Counter[MapId] = Counter()
        """Tables that the data plane's own threads must not write."""
        self._is_watched = False
        """Whether somebody attends to the data plane's own threads."""
        self._step: _Step | None = None
        """The step under way."""

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
            self.events.record("read-only", "pool", str(error))
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

    def require_room(self) -> None:
        """Refuse what would add to the metadata while its disk is full.

        Raises:
            MetadataFull: It is; what makes room goes on.
        """
        if self.no_room is not None:
            raise MetadataFull(self.no_room.message, **self.no_room.facts)

    # Changes: memory and pending list in one step

    @contextmanager
    def step(self) -> Iterator[None]:
        """Change records, in one step of the owner thread: no await, no yield in it.

        All that was written before the step comes before its changes; what the data plane's own threads write
        meanwhile comes behind them (I12).  A step within a step is part of it.

        Atomicity: its changes are in one commit.  When it ends with an error after it changed something, the pool
        is read-only: memory is no state that anybody committed.

        Raises:
            PoolReadOnly: As ``require_writable``.
        """
        if self._step is not None:
            yield
            return
        self.require_writable()
        self.absorb()
        self._step = step = _Step(self.plane.seal_count)
        try:
            yield
            if self.plane.seal_count != step.seal_count:
                raise IncfsError("unexpected: something was sealed within a step")
        except BaseException as error:
            if step.has_changed:
                self.fail(IncfsError(f"a change was begun and not ended: {error!r}"))
            raise
        finally:
            self._step = None

    def add(self, *records: Record) -> None:
        """Add new records, in order; within a step."""
        for record in records:
            assert record_id(record) not in self.catalog, "amend changes those that are there"
            self._change(record)

    def amend(self, record: RecordT, **fields: Any) -> RecordT:
        """Change fields of a record, within a step; the others stay as they are now, whatever the caller looked at.

        Returns:
            The record as it is then.
        """
        changed = replace(self.catalog.current(record), **fields)
        self._change(changed)
        return changed

    def touch(self, record: RecordT, **fields: Any) -> RecordT:
        """As ``amend``, also outside of a step: the latest state of the record goes into the next commit."""
        changed = replace(self.catalog.current(record), **fields)
        self._put(changed)
        self._touched[record_id(changed)] = None
        self.plane.close_journal()
        return changed

    def _change(self, record: Record) -> None:
        self._note_change()
        self._put(record)
        self._touched.pop(record_id(record), None)
        self._pend(["put", record_id(record)[0], encode_record(record)])

    def _note_change(self) -> None:
        assert self._step is not None, "records change within a step"
        self._step.has_changed = True

    def _put(self, record: Record) -> None:
        before = self.catalog.volumes.get(record.id) if isinstance(record, Volume) else None
        self.catalog.put(record)
        if isinstance(record, Volume):
            self.baselines.need(record.baseline)
        if isinstance(record, Storage) and record.id in self.pool.volumes:
            self.pool.renew(record)
        if isinstance(record, Volume) and before is not None and _reads_otherwise(record, before):
            for table in self.catalog.readers(record.id):  # what they have of the origin is loaded as their own now
                self.plane.evict(table)
        if isinstance(record, Volume) and record.stripes != (before.stripes if before is not None else ()):
            self._stripe(record)
        if isinstance(record, Volume | Snapshot) and self._served:
            volume_id = record.id if isinstance(record, Volume) else record.volume_id
            for table in [table for table in self._served if split_map_id(table)[0] == volume_id]:
                self.serve(table)

    def _stripe(self, volume: Volume) -> None:
        """Let new blocks go where the volume's newest stripe row says."""
        row = volume.stripe_row
        self.space.revoke(volume.map_id)
        self.plane.stripe(volume.map_id, *((row.unit_blocks, len(row.columns)) if row is not None else (1, 1)))

    def _stripe_all(self) -> None:
        for volume in self.catalog.volumes.values():
            if volume.stripes:
                self._stripe(volume)

    def drop(self, identity: RecordId) -> None:
        """Remove a record, within a step."""
        self._note_change()
        self.catalog.drop(identity)
        self._touched.pop(identity, None)
        self._pend(["drop", identity[0], list(identity[1])])

    def _pend(self, change: Change) -> None:
        """Let a change wait for the next commit; what the data plane's own threads committed came before it."""
        self.plane.close_journal()
        self._take_committed(self.plane.take_committed())
        self._pending.append(change)

    def relocate(self, table: TableKey, page_index: int, moves: Mapping[int, tuple[int, int]]) -> None:
        """Let mappings of a page name other blocks with the same data, for all who see them."""
        self.moves.relocate(table, page_index, moves)
        flat = [(slot, old, new) for slot, (old, new) in moves.items()]
        self.plane.move(self.catalog.readers(VolumeId(table.volume_id)), page_index, flat)

    def _pend_move(self, change: Change, page_count: int) -> None:
        self._pend(change)
        self.pending_mappings += page_count * _PAGE_WEIGHT

    def note_failed_legs(self) -> bool:
        """Record legs of mirrors that were left behind, for the data plane, too; durable with the next commit.

        Returns:
            Whether there were any.
        """
        has_failed = False
        for storage_id, volume in self.pool.volumes.items():
            if volume.mirror is None or not volume.mirror.failed:
                continue
            has_failed = True
            failed, volume.mirror.failed = volume.mirror.failed, {}
            self.touch(volume.record, **_without_legs(volume.record, failed, volume.mirror.stamps))
            self.plane.attach(storage_id)
            for number, reason in failed.items():
                self.events.record("leg-failed", f"storage {storage_id}", f"leg {number}: {reason}", leg=number)
        return has_failed

    # What the data plane wrote

    def absorb(self) -> None:
        """Seal the data plane and append what it wrote to the log; within a step nothing: that was done when it began.

        Cost: 1 to 1.5 us for each mapping since the last seal.
        """
        if self._step is not None:
            return
        batch = self.plane.seal()
        self._take_committed(batch.committed)
        self._take(batch)
        for sealed in batch.tables:
            self._pending.append(map_change(sealed))
            self.pending_mappings += len(sealed.slots)
        for table, written_ns in [*batch.written, *self.plane.written()]:
            self._note_written(split_map_id(table)[0], written_ns, self.touch)

    def catch_up(self) -> None:
        """Take over what the data plane's own threads committed, and when they wrote."""
        self._take_committed(self.plane.take_committed())
        for table, written_ns in self.plane.written():
            self._note_written(split_map_id(table)[0], written_ns, self.touch)

    def _take_committed(self, committed: list[tuple[int, Batch]]) -> None:
        for sequence, batch in committed:
            self._take(batch)
            for table, written_ns in batch.written:
                self.apply_written(split_map_id(table)[0], written_ns)
            self.sequence = sequence
        self.durable_sequence = max(self.durable_sequence, self.plane.durable_sequence)

    def _take(self, batch: Batch) -> None:
        """Append a sealed batch to the log."""
        self.pool.release(batch.dropped)
        for sealed in batch.tables:
            volume = self.catalog.volume(split_map_id(sealed.map_id)[0])
            self.append_mappings(volume, self._owned(volume.id, sealed) if volume.origin else sealed)

    def apply_written(self, volume_id: VolumeId, written_ns: int) -> None:
        """Set a volume's time of modification, as a journal record says it."""
        self._note_written(volume_id, written_ns, lambda volume, **times: self._put(replace(volume, **times)))

    def _note_written(self, volume_id: VolumeId, written_ns: int, amend: Callable[..., object]) -> None:
        volume = self.catalog.volume(volume_id)
        if written_ns > volume.modified_ns:
            amend(volume, modified_ns=written_ns, changed_ns=written_ns)

    def _owned(self, volume_id: VolumeId, sealed: Sealed) -> Sealed:
        """Say what a clone's own table had: the data plane does not tell its blocks from those of the origin."""
        old: list[tuple[int, int]] = []
        for page_index, first, end in sealed.pages:
            entries = self.log.entries(TableKey(volume_id), page_index)
            old += [entries.get(slot, (INHERIT, 0)) for slot in sealed.slots[first:end]]
        return sealed.replacing(old)

    def append_mappings(self, volume: Volume, sealed: Sealed) -> None:
        """Append sealed mappings: into the log, the bitmaps and the counters."""
        new = stored_addresses(sealed.addresses)
        replaced = len(stored_addresses(sealed.old_addresses))
        freed = self.log.append(volume.newest_generation, sealed)
        self.trails.note_written(volume, sealed)
        self.pool.commit(new)
        self.pool.free(freed)
        mapped = len(new) - replaced
        held = replaced - len(freed)
        if mapped:
            self._put(replace(volume, mapped_blocks=volume.mapped_blocks + mapped))
        if held:
            snapshot = self.catalog.snapshot_by_generation(volume.id, volume.newest_generation)
            self._put(replace(snapshot, held_blocks=snapshot.held_blocks + held))

    def seal_if_large(self) -> None:
        """Seal when many mappings wait for it."""
        if self.plane.fresh_count >= _SEAL_AT:
            self.absorb()

    def watch(self) -> int | None:
        """Give a descriptor that is readable when the data plane wants ``attend``; None when it never will."""
        if isinstance(self.plane, DataPlane):
            return None
        self._is_watched = True
        return self.plane.watch(_SEAL_AT)

    def attend(self) -> list[MapId]:
        """Take over what the data plane's own threads wrote, and add to their leases before they are used up.

        Returns:
            The leases for which too few blocks are free, now or the next time.
        """
        assert not isinstance(self.plane, DataPlane)
        try:
            low = self.plane.attend()
        except BackingError as error:
            self.fail(error)
        if self.failure is not None:
            return []
        self._take_committed(self.plane.take_committed())
        for lease in low:  # before the seal: writes wait when one is used up
            self.space.top_up(lease)
        self.seal_if_large()
        return [lease for lease in low if self.space.is_short(lease)]

    # What the data plane may serve by itself

    def serve(self, table: MapId) -> None:
        """Let the data plane's own threads serve an open table, as far as its records allow."""
        volume_id, generation = split_map_id(table)
        is_writable = not generation and self.catalog.volume(volume_id).trim_from_bytes is None
        is_writable = is_writable and not self._quiet[table]
        is_writable = is_writable and self.failure is None and self.no_room is None
        settings = self.account.settings_of(volume_id)
        served = self.catalog.size_bytes(table), self.catalog.facts(table), is_writable, settings
        if self._served.get(table) != served:
            self._served[table] = served
            self.plane.serve(
                table,
                *served[:2],
                is_writable=is_writable,
                keep_zeros=not settings.zero_elision,
                verify=settings.verifies_reads,
            )

    def write_served(self, table: MapId, offset_bytes: int, data: bytes) -> bool:
        """Write a range as the data plane's own threads do; False when only the owner thread may.  Any thread.

        Raises:
            BackingError: The host refused; whoever asked lets the pool fail.
        """
        assert not isinstance(self.plane, DataPlane)
        return self.plane.write_served(table, offset_bytes, data)

    @property
    def has_threads(self) -> bool:
        """Whether the data plane may be used by other threads."""
        return not isinstance(self.plane, DataPlane)

    def serve_anew(self) -> None:
        """Let other settings rule what is served."""
        for table in list(self._served):
            self.serve(table)

    @contextmanager
    def quiet(self, table: MapId) -> Iterator[None]:
        """Have the data plane's own threads hand over writes of a table meanwhile: no step of ours is interleaved."""
        self._quiet[table] += 1
        try:
            if table in self._served:
                self.serve(table)
            yield
        finally:
            self._quiet[table] -= 1
            if table in self._served:
                self.serve(table)

    def is_served(self, lease: MapId) -> bool:
        """Tell whether the data plane's own threads may use a lease: that of an open live volume, or a column of it."""
        return map_id(split_map_id(lease)[0]) in self._served

    def unserve(self, table: MapId) -> None:
        """End ``serve``: nobody has the table open."""
        if self._served.pop(table, None) is not None:
            self.plane.unserve(table)

    # The data plane's needs

    def load(self, table: MapId, page_index: int) -> None:
        """Make a page resident, reading the tables here."""
        chain = self.catalog.chain(table)
        self.install(table, page_index, self.resolve(chain, page_index, self.log.fetch(chain, page_index)))

    def resolve(self, chain: Chain, page_index: int, stored: Sequence[Sequence[Entries]]) -> Entries:
        """Resolve a page that is about to become resident; as ``IncrementalLog.resolve``.

        The log may lag behind what the data plane's own threads committed, and the page may have
        been evicted since: what they committed comes first.
        """
        self._take_committed(self.plane.take_committed())
        return self.log.resolve(chain, page_index, stored)

    def install(self, table: MapId, page_index: int, entries: dict[int, tuple[int, int]]) -> None:
        """Make a resolved page resident, evicting others beyond the memory bound."""
        limit = self.options.page_cache_pages
        if self.plane.page_count >= limit:
            for evicted_map, evicted_page in self.plane.shrink(limit - limit // 8):
                self.log.forget(split_map_id(evicted_map)[0], evicted_page)
        volume_id, generation = split_map_id(table)
        volume = self.catalog.volume(volume_id)
        if volume.rollback_to and not generation and self.failure is None:
            # Without a step: what is not sealed is of other pages, since those stay resident.
            self.moves.unroll(volume_id, [page_index])
        self.plane.load(table, page_index, entries, hole=HOLE if volume.origin else INHERIT)

    def evict(self, table: MapId) -> None:
        """Forget the resident pages and the lease of a table that is going away.

        Whoever can write it by himself has been stopped before the last seal (``quiet``): pages with unsealed
        mappings would stay.
        """
        self.absorb()
        self.plane.evict(table)
        self.space.revoke(table)
        if not split_map_id(table)[1]:
            self.plane.stripe(table, 1, 1)

    def reclaim_leases(self) -> None:
        """Take back from every table what it leased and does not use."""
        self.absorb()
        self.space.revoke_all()

    @property
    def freed_bytes(self) -> int:
        """Space that the next checkpoint makes free."""
        return self.pool.freed_blocks * self.block_bytes


@dataclass(slots=True)
class _Step:
    seal_count: int
    """Of the data plane, when the step began."""
    has_changed: bool = False


def one_step(function: Callable[Concatenate[StoreT, Args], Result]) -> Callable[Concatenate[StoreT, Args], Result]:
    """Make a whole function, whose first argument is the store, one ``Memory.step``."""

    @wraps(function)
    def within(store: StoreT, /, *args: Args.args, **named: Args.kwargs) -> Result:
        with store.step():
            return function(store, *args, **named)

    return within


def _without_legs(record: Storage, failed: Collection[int], stamps: Mapping[int, Stamp]) -> dict[str, Any]:
    """Tell what a record says once legs are stale, and when they were left behind, as far as that is known."""
    left = {leg: (leg, s.epoch.counter, s.epoch.nonce, *s.point) for leg, s in stamps.items() if leg in failed}
    known = {leg[0]: leg for leg in record.left_legs} | {
        leg: entry for leg, entry in left.items() if leg not in record.stale_legs
    }
    stale = tuple(sorted({*record.stale_legs, *failed}))
    return {"stale_legs": stale, "left_legs": tuple(known[leg] for leg in sorted(known))}


def _reads_otherwise(record: Volume, before: Volume) -> bool:
    """Whether what a volume inherits is another origin's, or is looked at with other eyes."""
    return (record.origin, record.baseline) != (before.origin, before.baseline)
