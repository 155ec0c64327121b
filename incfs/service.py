"""The pool as tasks see it: every operation, awaited; locks, worker threads, background work.

Owns the trio side of an open pool.  The core below is synchronous and belongs to the trio
thread; only what may block on a disk runs in worker threads.
"""

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import trio

from incfs import dump, extents, ranges, recovery, removal, snapshot, status, stripes, volume
from incfs.branches import Branches
from incfs.check import Checker, CheckReport, Progress
from incfs.committer import COMMIT_AT_MAPPINGS, Committer, offload
from incfs.dataplane import DataPlane
from incfs.driver import Driver
from incfs.errors import Busy, IncfsError, NoData, VolumeNotFound
from incfs.events import KEPT_EVENTS
from incfs.extents import Extent
from incfs.histogram import Histogram
from incfs.keeper import Keeper
from incfs.model import PAGE_BLOCKS, Facts, Generation, MapId, Snapshot, Storage, Volume, VolumeId, split_map_id
from incfs.options import Options
from incfs.policies import Policies
from incfs.reclaimer import Reclaimer
from incfs.scrubstate import last_end_ns
from incfs.settings import PoolSettings
from incfs.store import Store
from incfs.transfers import require_not_receiving, require_ordinary
from incfs.transport import Transfers
from incfs.upkeep import Upkeep

logger = logging.getLogger(__name__)

_EXTENTS_STEP = 8
"""Stretches listed between two chances for others to run."""
_COPY_BYTES = 1 << 20
_MAX_COPY_BYTES = 1 << 30


class MountHook(Protocol):
    """What the mount does for the service: changes that the kernel must see go through it."""

    def holds(self, path: Path) -> bool:
        """Tell whether a path lies in the mount."""

    async def sync_volume(self, name: str) -> None:
        """Flush what the kernel has cached of a volume."""

    async def resize_volume(self, name: str, size_bytes: int) -> None:
        """Truncate through the mount."""

    async def rename_volume(self, old: str, new: str) -> None:
        """Rename through the mount."""

    async def refresh_volume(self, name: str, size_bytes: int) -> None:
        """Have the kernel forget what it has cached of a volume, and take its size."""

    async def remove_volume(self, name: str) -> None:
        """Unlink through the mount."""

    async def rename_snapshot(self, volume: str, old: str, new: str) -> None:
        """Rename through the mount."""


class Service:
    """An open pool for many tasks.

    Concurrency: the trio thread.  Data operations may be cancelled at any await; a change of
    volumes or snapshots that has begun is completed.
    """

    def __init__(self, store: Store, nursery: trio.Nursery) -> None:
        self._store = store
        self._committer = Committer(store, nursery)
        self._handles: dict[MapId, list[str]] = {}
        self._reclaimer = Reclaimer(store, self._committer, self._handles.__contains__)
        self._driver = Driver(store, self._committer, self._reclaimer)
        self._keeper = self._driver.keeper = Keeper(store, self._driver.space_lock, self._add_image)
        self.branches = Branches(store, self._committer, self._driver, self._reclaimer)
        """Clones, holds, going back."""
        self.upkeep = Upkeep(store, self._committer, self._driver)
        self.transfers = Transfers(
            store, self._committer, self._driver, self, self._reclaimer, self.branches.note_changed
        )
        """Streams in and out."""
        self.mounted: MountHook | None = None
        self.durations: Mapping[str, Histogram] = {}
        """How long requests of the kernel took, by operation; the mount fills it."""
        self.policies = Policies(store, self._committer, self.apply_settings)
        """The policy and what it has done."""

    # Look-ups

    @property
    def directory(self) -> Path:
        """The pool directory."""
        return self._store.directory

    @property
    def block_bytes(self) -> int:
        """Size of a block."""
        return self._store.block_bytes

    def facts(self) -> dict[str, Any]:
        """Report the pool's identity, sizes and state."""
        return status.pool_facts(self._store)

    def storages(self) -> list[dict[str, Any]]:
        """Report every storage volume."""
        return [
            {**status.storage_facts(self._store, s), **self._keeper.storage_outlook(s.id)}
            for s in self._store.catalog.storages.values()
        ]

    def checksum_errors(self) -> int:
        """Count the copies of blocks that were found wrong since the pool was opened."""
        return self._store.checksum_errors + sum(v.healed_blocks for v in self._store.pool.volumes.values())

    def scrub_ended(self) -> float | None:
        """Tell when the last whole scrub ended, in seconds since 1970."""
        ended_ns = last_end_ns(self._store.directory)
        return None if ended_ns is None else ended_ns / 1e9

    def event_counts(self) -> dict[str, int]:
        """Count the events of each kind since the pool was opened."""
        return self._store.events.counts

    def volumes(self) -> list[Volume]:
        """List the volumes by name."""
        named = (v for v in self._store.catalog.volumes.values() if v.name and not v.is_hidden)
        return sorted(named, key=lambda v: v.name)

    @property
    def volume_count(self) -> int:
        """How many volumes have a name."""
        return self._store.catalog.volume_count

    def volume(self, name: str) -> Volume:
        """Look up a volume by name or ``uuid:...``."""
        found = self._store.catalog.volume_named(name)
        if found.is_hidden:
            raise VolumeNotFound(f"volume {name} is still being received; its first snapshot is not complete")
        return found

    def volume_by_id(self, volume_id: VolumeId) -> Volume:
        """Look up a volume, also one that was unlinked but is open."""
        return self._store.catalog.volume(volume_id)

    def snapshots(self, volume_id: VolumeId) -> list[Snapshot]:
        """List a volume's snapshots, oldest first."""
        return self._store.catalog.snapshots(volume_id)

    def clones(self, taken: Snapshot) -> list[Volume]:
        """List the volumes that read from a snapshot."""
        return self._store.catalog.clones(taken.map_id)

    def snapshot(self, volume_id: VolumeId, name: str) -> Snapshot:
        """Look up a snapshot by name or ``uuid:...``."""
        return self._store.catalog.snapshot(volume_id, name)

    def snapshot_by_generation(self, volume_id: VolumeId, generation: Generation) -> Snapshot:
        """Look up a snapshot by its number."""
        return self._store.catalog.snapshot_by_generation(volume_id, generation)

    def mapped_bytes(self, table: MapId) -> int:
        """Tell how much of a volume or snapshot is stored, what it inherits not counted, unsealed writes included."""
        return self.stat(table)[1].mapped_blocks * self.block_bytes

    def stat(self, table: MapId) -> tuple[int, Facts]:
        """Tell size and facts of a volume or snapshot, with what went past Python."""
        self._store.catch_up()
        facts = self._store.catalog.facts(table)
        volume_id, generation = split_map_id(table)
        # The data plane counts what a clone inherits like its own: there, until the next seal, unsealed writes miss.
        is_exact = not generation and not self.volume_by_id(volume_id).origin
        unsealed = self._store.plane.mapped_delta(table) if is_exact else 0
        return self._store.catalog.size_bytes(table), facts._replace(mapped_blocks=facts.mapped_blocks + unsealed)

    @property
    def server(self) -> object:
        """What hot threads serve from; None where the data plane is Python's."""
        return None if isinstance(self._store.plane, DataPlane) else self._store.plane.server()

    # Open files

    def open_handle(self, table: MapId, holder: str) -> None:
        """Note that a file is open: it stays readable although its name goes.

        Raises:
            Busy: It is a volume that receives a stream.
        """
        volume_id, generation = split_map_id(table)
        if not generation:
            require_not_receiving(self.volume_by_id(volume_id), "be opened")
        self._handles.setdefault(table, []).append(holder)
        self._store.serve(table)

    def close_handle(self, table: MapId) -> None:
        """Note that one is closed."""
        holders = self._handles[table]
        holders.pop()
        if not holders:
            del self._handles[table]
            self._store.unserve(table)
            self._reclaimer.reclaim_soon()

    def require_ordinary(self, volume_id: VolumeId) -> None:
        """Refuse to have a volume changed that changes by streams only.

        Raises:
            Busy, ReplicaReadOnly: It receives one, or is a replica.
        """
        require_ordinary(self.volume_by_id(volume_id), "be written")

    def holders(self, volume_id: VolumeId) -> list[str]:
        """Name who has the volume or one of its snapshots open."""
        return [h for table, held in self._handles.items() if split_map_id(table)[0] == volume_id for h in held]

    def table_holders(self, table: MapId) -> list[str]:
        """Name who has a volume's current contents, or a snapshot, open."""
        return list(self._handles.get(table, ()))

    # Data

    async def read(self, table: MapId, offset_bytes: int, length_bytes: int) -> bytes:
        """Read a range; short only at the end of the volume."""
        return await self._driver.drive(
            lambda wait: ranges.read(self._store, table, offset_bytes, length_bytes, wait=wait)
        )

    async def write(self, table: MapId, offset_bytes: int, data: bytes) -> int:
        """Write a range; the volume grows when it ends behind its size.

        Durability: none until ``commit``.
        """
        data = bytes(data)
        written = await self._driver.drive(lambda wait: ranges.write(self._store, table, offset_bytes, data, wait=wait))
        self._commit_if_large()
        return written

    async def discard(self, table: MapId, offset_bytes: int, length_bytes: int) -> None:
        """Let a range read as zeros and give its space back; the size stays."""
        end = offset_bytes + length_bytes
        while offset_bytes < end:
            offset_bytes = await self._discard_step(table, offset_bytes, end)
            await trio.lowlevel.checkpoint()

    async def _discard_step(self, table: MapId, start: int, end: int) -> int:
        return await self._driver.drive(lambda wait: ranges.discard(self._store, table, start, end, wait=wait))

    async def seek(self, table: MapId, offset_bytes: int, *, data: bool) -> int:
        """Find the next data, or hole, at or after an offset; the end counts as a hole.

        Raises:
            NoData: At or behind the end, or no data follows.
        """
        found = False
        while not found:
            found, offset_bytes = extents.seek(self._store, table, offset_bytes, data=data)
            await trio.lowlevel.checkpoint()
        return offset_bytes

    async def clone_range(
        self, source: MapId, source_bytes: int, target: MapId, target_bytes: int, length_bytes: int
    ) -> int:
        """Copy a range inside the pool; holes stay holes.  Give the bytes copied (at most 1 GiB)."""
        end = min(source_bytes + min(length_bytes, _MAX_COPY_BYTES), self._store.catalog.size_bytes(source))
        shift = target_bytes - source_bytes
        position = source_bytes
        while position < end:
            data_start = min(end, await self._next_data(source, position, end))
            if data_start > position:
                await self._clear(target, position + shift, data_start - position)
                position = data_start
                continue
            data = await self.read(source, position, min(_COPY_BYTES, end - position))
            position += await self.write(target, position + shift, data)
        return max(0, end - source_bytes)

    async def _next_data(self, table: MapId, position: int, end: int) -> int:
        try:
            return await self.seek(table, position, data=True)
        except NoData:
            return end

    async def _clear(self, table: MapId, offset_bytes: int, length_bytes: int) -> None:
        await self.discard(table, offset_bytes, length_bytes)
        volume_id, _ = split_map_id(table)
        if self.volume_by_id(volume_id).size_bytes < offset_bytes + length_bytes:
            await self.resize_volume(volume_id, offset_bytes + length_bytes)

    async def commit(self) -> None:
        """Make everything written before the call durable.

        Durability: durable on return.
        """
        await self._committer.commit()

    async def checkpoint(self) -> None:
        """Fold the journal into the tables and give freed space back."""
        await self._committer.checkpoint()

    # Volumes

    async def create_volume(
        self, name: str, size_bytes: int = 0, *, mode: int = 0o600, uid: int = 0, gid: int = 0
    ) -> Volume:
        """Add a volume that reads as zeros."""
        created = volume.create(self._store, name, size_bytes, mode=mode, uid=uid, gid=gid)
        created = stripes.follow_settings(self._store, created.id, self._store.space.settings_of(created.id))
        await self.commit()
        return created

    async def resize_volume(self, volume_id: VolumeId, size_bytes: int, *, shrink: bool = False) -> Volume:
        """Set a volume's size; what lies behind a smaller one is lost."""
        await self._driver.drive(lambda _: volume.resize(self._store, volume_id, size_bytes, shrink=shrink))
        with trio.CancelScope(shield=True):  # until it is trimmed, a volume that shrank is served by Python alone
            await self._driver.trim(volume_id)
        await self.commit()
        return self.volume_by_id(volume_id)

    async def rename_volume(self, volume_id: VolumeId, new_name: str, *, replace: bool = False) -> Volume:
        """Give a volume another name; with ``replace`` over one that has it."""
        renamed = volume.rename(self._store, volume_id, new_name, over=replace)
        self._reclaimer.reclaim_soon()
        await self.commit()
        return renamed

    async def exchange_volumes(self, first_id: VolumeId, second_id: VolumeId) -> None:
        """Swap the names of two volumes."""
        volume.exchange(self._store, first_id, second_id)
        await self.commit()

    async def remove_volume(self, volume_id: VolumeId, *, snapshots: bool = False) -> None:
        """Remove a volume: its name at once, its blocks in the background when it is closed.

        Raises:
            Busy: It has snapshots, and ``snapshots`` is false or one of them is open.
        """
        for taken in self.snapshots(volume_id) if snapshots else ():
            self.require_closed(taken)
        volume.remove(self._store, volume_id, snapshots=snapshots)
        self._reclaimer.reclaim_soon()
        await self.commit()

    async def set_attributes(self, volume_id: VolumeId, **attributes: int) -> Volume:
        """Change mode, uid, gid, accessed_ns, modified_ns; durable with the next commit."""
        return volume.set_attributes(self._store, volume_id, **attributes)

    async def set_xattr(self, volume_id: VolumeId, name: str, value: bytes) -> None:
        """Set an extended attribute; durable with the next commit."""
        xattrs = self.volume_by_id(volume_id).xattrs
        volume.set_xattrs(self._store, volume_id, {**xattrs, name: value})

    async def remove_xattr(self, volume_id: VolumeId, name: str) -> None:
        """Remove an extended attribute; durable with the next commit."""
        xattrs = self.volume_by_id(volume_id).xattrs
        volume.set_xattrs(self._store, volume_id, {key: value for key, value in xattrs.items() if key != name})

    # Snapshots

    async def create_snapshots(self, wanted: Sequence[tuple[VolumeId, str]], *, tag: str = "") -> list[Snapshot]:
        """Take snapshots of several volumes at one point in time, in one commit.

        Every write that was acknowledged before the call is in them, also those that only
        the kernel has yet.
        """
        for volume_id, _ in wanted:
            self._store.space.require_snapshot(volume_id)
        if self.mounted is not None:
            for volume_id, _ in wanted:
                await self.mounted.sync_volume(self.volume_by_id(volume_id).name)
        taken = await self._driver.drive(lambda _: snapshot.create(self._store, wanted, tag=tag))
        await self.commit()
        return taken

    async def rename_snapshot(self, volume_id: VolumeId, old: str, new: str) -> Snapshot:
        """Give a snapshot another name."""
        renamed = snapshot.rename(self._store, volume_id, old, new)
        await self.commit()
        return renamed

    async def remove_snapshot(self, volume_id: VolumeId, name: str) -> None:
        """Remove a snapshot: its name at once, its blocks in the background.

        Raises:
            Busy: It is open, is held or has clones.
        """
        await self.remove_snapshots([self.snapshot(volume_id, name)])

    async def remove_snapshots(self, doomed: Sequence[Snapshot]) -> None:
        """Remove snapshots, all or none: their names at once, their blocks in the background.

        Raises:
            Busy: One is open, is held or has clones.
        """
        for taken in doomed:
            self.require_closed(taken)
        removal.remove(self._store, doomed)
        self._reclaimer.reclaim_soon()
        await self.commit()

    def require_closed(self, taken: Snapshot) -> None:
        """Refuse to remove a snapshot that is open.

        Raises:
            Busy: It names the holders.
        """
        holders = self._handles.get(taken.map_id)
        if holders:
            whose = f"{self.volume_by_id(taken.volume_id).name}@{taken.name}"
            raise Busy(f"snapshot {whose} is open by {', '.join(holders)}; close it first", holders=list(holders))

    async def diff(
        self, volume_id: VolumeId, from_name: str | None, to_name: str, *, start_bytes: int, limit: int
    ) -> tuple[list[dict[str, Any]], int | None]:
        """List the stretches that may differ between two snapshots, as the newer one has them.

        Returns:
            At most ``limit`` of them from ``start_bytes`` on, and where to go on, None when nothing is left.
        """
        newer = self.snapshot(volume_id, to_name)
        older = None if from_name is None else self.snapshot(volume_id, from_name)
        pinned = [s.map_id for s in (older, newer) if s is not None]
        for table in pinned:
            self.open_handle(table, "snapshot diff")
        try:
            found: list[Extent] = []
            page_bytes = self.block_bytes * PAGE_BLOCKS
            for page in snapshot.changed_pages(self._store, older, newer, start_bytes // page_bytes):
                for extent in snapshot.changed_extents(self._store, older, newer, page):
                    if extent.offset_bytes + extent.length_bytes > start_bytes:
                        extents.join_extents(
                            found, extents.cut(extent, start_bytes, self.block_bytes), self.block_bytes
                        )
                if len(found) > limit:
                    break
                await trio.lowlevel.checkpoint()
            rest = found[limit].offset_bytes if len(found) > limit else None
            return [status.extent_document(extent) for extent in found[:limit]], rest
        finally:
            for table in pinned:
                self.close_handle(table)

    async def plan_removal(self, volume_id: VolumeId, doomed: Sequence[Snapshot]) -> removal.Freed:
        """Count what removing a set of snapshots of one volume frees, in blocks."""
        freed = removal.Freed()
        for freed in removal.plan(self._store, volume_id, {taken.generation for taken in doomed}):  # noqa: B007
            await trio.lowlevel.checkpoint()
        return freed

    async def extents(self, table: MapId, start_bytes: int, limit: int) -> list[dict[str, Any]]:
        """List where a volume or snapshot is stored, at most ``limit`` stretches from ``start_bytes``."""
        found: list[Extent] = []
        size = self._store.catalog.size_bytes(table)
        while start_bytes < size and len(found) < limit:
            for extent, _ in zip(extents.extents(self._store, table, start_bytes), range(_EXTENTS_STEP), strict=False):
                extents.join_extents(found, extent, self.block_bytes)
                start_bytes = extent.offset_bytes + extent.length_bytes
            await trio.lowlevel.checkpoint()
        return [status.extent_document(extent) for extent in found[:limit]]

    # Storage volumes, checks

    def apply_settings(self, settings: PoolSettings) -> None:
        """Let these settings rule from now on; they last until the pool is closed."""
        self._store.space.settings = settings
        self._store.space.review()
        self._keeper.look_soon()

    async def add_storage(
        self,
        path: str,
        *,
        capacity_bytes: int | None = None,
        storage_class: str = "",
        redundancy: str = "none",
        mirrors: Sequence[str] = (),
        force: bool = False,
    ) -> dict[str, Any]:
        """Make an image, or the legs of a mirror, and let the pool allocate from it.

        Raises:
            UsageError: The capacity is too small, or the redundancy is unknown.
            AlreadyExists: The file is there already.
        """
        async with self._driver.space_lock:
            return await self._add_made(
                lambda: recovery.make_storage(
                    self._store,
                    Path(path),
                    capacity_bytes=capacity_bytes,
                    storage_class=storage_class,
                    redundancy=redundancy,
                    mirrors=[Path(leg) for leg in mirrors],
                    force=force,
                )
            )

    async def _add_image(self, directory: str) -> dict[str, Any]:
        return await self._add_made(lambda: recovery.make_storage(self._store, Path(directory)))

    async def _add_made(self, make: Callable[[], Storage]) -> dict[str, Any]:
        record = await offload(make)
        self._store.begin_change()
        self._store.pool.attach(record)
        self._store.change(record)
        await self.commit()
        return status.storage_facts(self._store, record)

    def record_event(self, kind: str, subject: str, reason: str, **facts: Any) -> None:
        """Note what was done without being asked for, and why."""
        self._store.events.record(kind, subject, reason, **facts)

    def snapshot_refusal(self, volume_id: VolumeId) -> IncfsError | None:
        """Say why no snapshot of a volume may be taken, or None."""
        try:
            self._store.space.require_snapshot(volume_id)
        except IncfsError as error:
            return error
        return None

    def events(self, since: int = 0, limit: int = KEPT_EVENTS) -> list[dict[str, Any]]:
        """List the newest events behind a number, oldest first."""
        return [event.to_dict() for event in self._store.events.since(since, limit)]

    async def check(self, data: bool, progress: Progress | None = None) -> CheckReport:
        """Check the pool as of now; with ``data`` every live block is read."""

        def run() -> CheckReport:
            def report(done: int, total: int) -> None:
                trio.from_thread.check_cancelled()
                if progress is not None:
                    progress(done, total)

            with self._store.tables.reading() as reader:
                return Checker(reader, self._store.pool.volumes, self.block_bytes, data=data, progress=report).run()

        self._store.pool.frees_held += 1
        try:
            if self._store.failure is None:
                await self.checkpoint()
            return await offload(run)
        finally:
            self._store.pool.frees_held -= 1

    async def dump(self, path: Path) -> int:
        """Write the metadata as of now to a file as text; give its length in bytes."""
        if self._store.failure is None:
            await self.checkpoint()
        return await offload(lambda: dump.write_dump(self._store, path))

    async def debug_dump(self) -> list[dict[str, Any]]:
        """List every record of the tables, as of now."""
        if self._store.failure is None:
            await self.checkpoint()
        return await offload(lambda: status.dump_tables(self._store.tables))

    async def debug_map(self, table: MapId, page_index: int) -> list[dict[str, Any]]:
        """List the mappings of one page."""
        self._store.catalog.size_bytes(table)
        return status.dump_page(self._store, table, page_index)

    async def debug_journal(self) -> list[dict[str, Any]]:
        """List the journal's records that no checkpoint has folded yet."""
        return await offload(lambda: status.dump_journal(self._store.journal))

    # Background work

    def fail(self, reason: str) -> None:
        """Make the pool read-only after something that nobody expected (I10)."""
        self._store.fail(IncfsError(reason))

    async def wait_reclaimed(self) -> None:
        """Wait until the blocks of everything that was removed are free."""
        await self._reclaimer.wait_idle()

    async def run(self, scope: trio.CancelScope) -> None:
        """Do the background work until ``scope`` is cancelled."""
        with scope:
            await self._run()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._committer.run)
            nursery.start_soon(self._committer.run_timers)
            nursery.start_soon(self._reclaimer.run)
            nursery.start_soon(self._trim_interrupted)
            nursery.start_soon(self._attend)
            nursery.start_soon(self._keeper.run)

    async def _attend(self) -> None:
        """Do what the data plane's own threads need of the owner thread."""
        wanted = self._store.watch()
        while wanted is not None:
            await trio.lowlevel.wait_readable(wanted)
            self._store.attend()
            self._commit_if_large()

    def _commit_if_large(self) -> None:
        if self._store.pending_mappings >= COMMIT_AT_MAPPINGS:
            self._committer.commit_soon()

    async def _trim_interrupted(self) -> None:
        """Finish what a shrink had begun when the pool was last cut off."""
        for volume_id, found in list(self._store.catalog.volumes.items()):
            if found.trim_from_bytes is None or self._store.failure is not None:
                continue
            try:
                await self._driver.trim(volume_id)
            except IncfsError as error:
                logger.warning("volume %s: what a shrink left is not dropped yet: %s", found.name, error)

    async def close(self) -> None:
        """Make everything durable and fold it into the tables.

        Raises:
            PoolReadOnly: The pool failed; what was committed before is recovered at the next open.
        """
        if self._store.failure is None:
            self._committer.is_closing = True
            await self.checkpoint()


@asynccontextmanager
async def open_service(
    directory: Path, options: Options | None = None, *, degraded: bool = False
) -> AsyncIterator[Service]:
    """Open a pool under its lock, recover it, and run its background work meanwhile.

    Args:
        directory: The pool.
        options: How it behaves.
        degraded: Open it also when images are missing, read-only.

    Durability: on a normal exit everything is durable and folded into the tables.

    Raises:
        IncfsError: As ``recovery.open_store``, and whatever closing meets.
    """
    chosen = options or Options()
    if degraded:
        chosen = replace(chosen, degraded=True)
    store = await offload(lambda: recovery.open_store(directory, chosen))
    try:
        async with trio.open_nursery() as nursery:
            service = Service(store, nursery)
            service.policies.load()
            # Closing needs the background work: it outlives a cancellation that comes as the caller ends.
            background = trio.CancelScope(shield=True)
            nursery.start_soon(service.run, background)
            try:
                yield service
                with trio.CancelScope(shield=True):
                    await service.close()
            finally:
                background.cancel()
    finally:
        store.abandon()
