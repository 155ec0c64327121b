"""The pool as tasks see it: every operation, awaited; locks, worker threads, background work.

Owns the trio side of an open pool.  The core below is synchronous and belongs to the trio
thread; only what may block on a disk runs in worker threads.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import trio

from incfs import extents, ranges, recovery, removal, snapshot, status, stripes, volume
from incfs.branches import Branches
from incfs.committer import COMMIT_AT_MAPPINGS, Committer, offload
from incfs.copykeeper import CopyKeeper
from incfs.dataplane import DataPlane
from incfs.driver import Driver
from incfs.errors import BackingError, IncfsError, NoSpace, VolumeNotFound
from incfs.events import KEPT_EVENTS
from incfs.handles import Handles
from incfs.histogram import Histogram
from incfs.inspection import Inspection
from incfs.jobs import Jobs
from incfs.keeper import Keeper
from incfs.model import Facts, Generation, MapId, Snapshot, StorageId, Volume, VolumeId, map_id, split_map_id
from incfs.options import Options
from incfs.policies import Policies
from incfs.ranges import TrimPending
from incfs.reclaimer import Reclaimer
from incfs.settings import PoolSettings
from incfs.store import Store
from incfs.transfers import require_ordinary
from incfs.transport import Transfers
from incfs.unwritable import is_unwritable, opened_unwritable
from incfs.upkeep import Upkeep

logger = logging.getLogger(__name__)

T = TypeVar("T")


class MountHook(Protocol):
    """What the mount does for the service: changes that the kernel must see go through it."""

    def holds(self, path: Path) -> bool:
        """Tell whether a path lies in the mount."""

    async def sync_volume(self, name: str) -> None:
        """Flush what the kernel has cached of a volume."""

    async def at_standstill(self, tables: Collection[MapId], step: Callable[[], T]) -> T:
        """Do a step while nobody can write to volumes, and with all that was written to them."""

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
        self.handles = Handles(store)
        """Who has what open."""
        self._reclaimer = Reclaimer(store, self._committer, self.handles.__contains__)
        self.handles.closed = self._reclaimer.reclaim_soon
        self._driver = Driver(store, self._committer, self._reclaimer)
        self.branches = Branches(store, self._committer, self._driver, self._reclaimer, self.handles)
        """Clones, holds, going back."""
        self.upkeep = Upkeep(store, self._committer, self._driver)
        """Storage volumes, and where data lies."""
        self.copies = CopyKeeper(store, self._committer)
        """Where the metadata is."""
        self._keeper = self._driver.keeper = Keeper(store, self._driver.space_lock, self.upkeep.add_image)
        self._committer.freed = self._keeper.hurry
        self.inspection = Inspection(store, self._committer, self.handles)
        """What only looks."""
        self.transfers = Transfers(
            store, self._committer, self._driver, self.handles, self._reclaimer, self.branches.note_changed
        )
        """Streams in and out."""
        self.mounted: MountHook | None = None
        self.durations: Mapping[str, Histogram] = {}
        """How long requests of the kernel took, by operation; the mount fills it."""
        self.jobs = Jobs(store)
        """Long work that is under way."""
        self.opened_s = trio.current_time()
        self.policies = Policies(store, self._committer, self.apply_settings)
        """The policy and what it has done."""
        self._keeper.low = self.policies.look_soon

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

    async def look_at_hosts(self) -> None:
        """Learn how full the images' filesystems are, from those that answer soon; else that is some seconds old."""
        await self._keeper.hosts.look()

    @property
    def is_full(self) -> bool:
        """Whether a write failed for lack of space, and no space came back since."""
        return self._driver.is_full

    async def wait_full(self) -> None:
        """Wait until the pool is."""
        await self._driver.became_full.wait()

    def metadata_copies(self) -> list[dict[str, Any]]:
        """Report every copy of the metadata."""
        return status.copy_facts(self._store)

    def storages(self) -> list[dict[str, Any]]:
        """Report every storage volume."""
        return [
            {**status.storage_facts(self._store, s), **self._keeper.storage_outlook(s.id), "job": self._job(s.id)}
            for s in self._store.catalog.storages.values()
        ]

    def _job(self, storage_id: StorageId) -> str | None:
        """Say what is done to a storage volume, and how far that is."""
        found = self.jobs.about(f"storage {storage_id}")
        return f"{found[0].request.verb.partition('.')[2]} {found[0].percent or 0}%" if found else None

    def volumes(self) -> list[Volume]:
        """List the volumes by name."""
        named = (v for v in self._store.catalog.volumes.values() if v.name and not v.is_hidden)
        return sorted(named, key=lambda v: v.name)

    def incoming(self) -> list[Volume]:
        """List the volumes that a stream begins to make, and that are none before it is complete, by name."""
        hidden = (v for v in self._store.catalog.volumes.values() if v.name and v.is_hidden)
        return sorted(hidden, key=lambda v: v.name)

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

    def name_of(self, table: MapId) -> str:
        """Give the name of a volume.

        Raises:
            VolumeNotFound: There is none any more, or it has no name.
        """
        found = self.volume_by_id(split_map_id(table)[0])
        if not found.name:
            raise VolumeNotFound(f"volume {found.id} was removed", id=found.id)
        return found.name

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

    def require_ordinary(self, volume_id: VolumeId) -> None:
        """Refuse to have a volume changed that changes by streams only.

        Raises:
            Busy, ReplicaReadOnly: It receives one, or is a replica.
        """
        require_ordinary(self.volume_by_id(volume_id), "be written")

    # Data

    async def read(self, table: MapId, offset_bytes: int, length_bytes: int) -> bytes:
        """Read a range, verified; short only at the end of the volume."""
        return await self._driver.drive(
            lambda wait: ranges.read(self._store, table, offset_bytes, length_bytes, wait=wait),
            may_wait_in_thread=self._store.has_threads,
        )

    async def read_for_user(self, table: MapId, offset_bytes: int, length_bytes: int) -> bytes:
        """Read a range for whoever has the file open, verified or not as the volume's policy says; else as ``read``."""
        verify = self._store.account.settings_of(split_map_id(table)[0]).verifies_reads
        return await self._driver.drive(
            lambda wait: ranges.read(self._store, table, offset_bytes, length_bytes, wait=wait, verify=verify),
            may_wait_in_thread=self._store.has_threads,
        )

    async def write(self, table: MapId, offset_bytes: int, data: bytes) -> int:
        """Write a range; the volume grows when it ends behind its size.

        Durability: none until ``commit``.
        """
        data = bytes(data)
        if not await self._write_in_thread(table, offset_bytes, data):
            await self._driver.drive(lambda wait: ranges.write(self._store, table, offset_bytes, data, wait=wait))
        self._commit_if_large()
        return len(data)

    async def _write_in_thread(self, table: MapId, offset_bytes: int, data: bytes) -> bool:
        """Write without keeping everybody waiting for the host; False when it takes a step of the owner thread.

        A volume that is open, and stays as long as it is, can be written so, if no quota must be looked at.
        """
        store, volume_id = self._store, split_map_id(table)[0]
        if (
            not (store.has_threads and store.is_served(table))
            or store.account.settings_of(volume_id).quota_bytes is not None
        ):
            return False
        store.require_writable()
        try:
            return await self._driver.drive(lambda _: store.write_served(table, offset_bytes, data), in_thread=True)
        except BackingError as error:
            if error.facts.get("action") != "read":
                store.fail(error)
            raise

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

    async def commit(self) -> None:
        """Make everything written before the call durable.

        Durability: durable on return.

        Raises:
            MetadataFull: The metadata's disk is full, and stays so for as long as the settings let writes wait.
            IncfsError: As ``Committer.commit``.
        """
        await self._driver.commit()

    async def checkpoint(self) -> None:
        """Fold the journal into the tables: freed blocks are free."""
        await self._committer.checkpoint()

    # Volumes

    async def create_volume(
        self, name: str, size_bytes: int = 0, *, mode: int = 0o600, uid: int | None = None, gid: int | None = None
    ) -> Volume:
        """Add a volume that reads as zeros."""
        created = volume.create(self._store, name, size_bytes, mode=mode, uid=uid, gid=gid)
        created = stripes.follow_settings(self._store, created.id, self._store.account.settings_of(created.id))
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
            self.handles.require_closed(taken)
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

        There is an instant during the call such that they have every write that had returned by then, also those
        that only the kernel had, and none that began later; but for what goes through shared mappings.

        Raises:
            Busy: The kernel could not bring the volumes to a standstill (``standstill``).
        """
        for volume_id, _ in wanted:
            self._store.account.require_snapshot(volume_id)
        taken: list[Snapshot] | None = None
        while taken is None:
            # Whatever is amiss, or has to be done before, holds up no writer.
            await self._driver.drive(lambda _: snapshot.require_takeable(self._store, wanted))
            taken = await self._create_at_standstill(wanted, tag)
        await self.commit()
        return taken

    async def _create_at_standstill(self, wanted: Sequence[tuple[VolumeId, str]], tag: str) -> list[Snapshot] | None:
        def step() -> list[Snapshot] | None:
            try:
                return snapshot.create(self._store, wanted, tag=tag)
            except TrimPending:
                return None  # somebody shrank one just now

        if self.mounted is None:
            return step()
        return await self.mounted.at_standstill([map_id(volume_id) for volume_id, _ in wanted], step)

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
            self.handles.require_closed(taken)
        removal.remove(self._store, doomed)
        self._reclaimer.reclaim_soon()
        await self.commit()

    # Storage volumes, checks

    def apply_settings(self, settings: PoolSettings) -> None:
        """Let these settings rule from now on; they last until the pool is closed."""
        self._store.account.settings = settings
        self._store.account.review()
        self._store.serve_anew()
        self._keeper.look_soon()

    def record_event(self, kind: str, subject: str, reason: str, **facts: Any) -> None:
        """Note what was done without being asked for, and why."""
        self._store.events.record(kind, subject, reason, **facts)

    def snapshot_refusal(self, volume_id: VolumeId) -> IncfsError | None:
        """Say why no snapshot of a volume may be taken, or None."""
        try:
            self._store.account.require_snapshot(volume_id)
        except IncfsError as error:
            return error
        return None

    def events(self, since: int = 0, limit: int = KEPT_EVENTS) -> list[dict[str, Any]]:
        """List the newest events behind a number, oldest first."""
        return [event.to_dict() for event in self._store.events.since(since, limit)]

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
        # Also after an error: a checkpoint that waits for room would keep whoever closes the pool waiting for ever.
        self._committer.is_closing = True

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._committer.run)
            nursery.start_soon(self._committer.run_timers)
            nursery.start_soon(self._reclaimer.run)
            nursery.start_soon(self._trim_interrupted)
            nursery.start_soon(self._attend)
            nursery.start_soon(self._keeper.run)
            nursery.start_soon(self.copies.run)
            nursery.start_soon(self._keeper.give_back)
            nursery.start_soon(self._keeper.survey)

    async def _attend(self) -> None:
        """Do what the data plane's own threads need of the owner thread."""
        wanted = self._store.watch()
        async with trio.open_nursery() as nursery:
            while wanted is not None:
                await trio.lowlevel.wait_readable(wanted)
                short = self._store.attend()
                if short:
                    nursery.start_soon(self._driver.grow_ahead, short)
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
        """Make everything durable and fold it into the tables; without room for that the journal has all of it.

        Raises:
            PoolReadOnly: The pool failed; what was committed before is recovered at the next open.
        """
        if self._store.failure is not None:
            return
        self._committer.is_closing = True
        self._store.reclaim_leases()
        try:
            await self.checkpoint()
        except NoSpace as error:
            if self._store.failure is not None:
                raise
            await self.commit()  # the checkpoint that lacks room may be an earlier one
            logger.warning("pool %s is closed without a checkpoint: %s", self.directory, error)
        else:
            await self._committer.copy_at_end()
        await self._keeper.give_back_rest()


@asynccontextmanager
async def open_service(
    directory: Path, options: Options | None = None, *, degraded: bool = False, force_older: bool = False
) -> AsyncIterator[Service]:
    """Open a pool under its lock, recover it, and run its background work meanwhile.

    Args:
        directory: The pool.
        options: How it behaves.
        degraded: Open it also when images are missing, read-only.
        force_older: Open it although directory and images are of different times.

    Durability: on a normal exit everything is durable, and folded into the tables if there is room for that.

    Raises:
        IncfsError: As ``recovery.open_store``, and whatever closing meets.
    """
    chosen = options or Options()
    if degraded or force_older:
        chosen = replace(chosen, degraded=degraded or chosen.degraded, force_older=force_older)
    if await offload(lambda: is_unwritable(directory)):
        with contextlib.ExitStack() as stack:
            store = await offload(lambda: stack.enter_context(opened_unwritable(directory, chosen)))
            async with _served(store) as service:
                yield service
        return
    store = await offload(lambda: recovery.open_store(directory, chosen))
    async with _served(store) as service:
        yield service


@asynccontextmanager
async def _served(store: Store) -> AsyncIterator[Service]:
    """Run the background work of an open pool, and close it."""
    try:
        async with trio.open_nursery() as nursery:
            service = Service(store, nursery)
            service.policies.load()
            await offload(service.jobs.load)
            await offload(service.upkeep.mirrors.load)
            # Closing needs the background work: it outlives a cancellation that comes as the caller ends.
            background = trio.CancelScope(shield=True)
            nursery.start_soon(service.run, background)
            try:
                yield service
                with trio.CancelScope(shield=True):
                    await service.close()
            finally:
                background.cancel()
        if store.failure is None:
            await offload(store.raise_epoch)  # not beside a fold, which stamps, too
    finally:
        store.abandon()
