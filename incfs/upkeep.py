"""What the service does with storage volumes and with where data lies: additions, stripes, moves, removal.

Owns nothing but references to the parts of an open pool; the trio thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from incfs import recovery, relocation, status, stripes
from incfs.committer import Committer, offload
from incfs.driver import Driver
from incfs.errors import Busy, IncfsError, UsageError
from incfs.mirrors import Mirrors, Progress
from incfs.model import Storage, StorageId, Volume, VolumeId
from incfs.mover import MovePlan, Mover, MoveReport
from incfs.placement import Room
from incfs.settings import Directory
from incfs.store import Store
from incfs.units import format_size

_EVEN_PERCENT = 5
"""Storage volumes whose shares in use differ by less are balanced."""


class Upkeep:
    """The verbs of storage volumes and data placement on an open pool."""

    def __init__(self, store: Store, committer: Committer, driver: Driver) -> None:
        self._store = store
        self._committer = committer
        self._driver = driver
        self._mover = Mover(store, committer, driver)
        self.mirrors = Mirrors(store, committer, self._mover.lock, driver.space_lock)

    # Storage volumes come

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

    async def add_image(self, directory: Directory) -> dict[str, Any]:
        """Make an image in a directory, of its class.  Under the space lock."""
        path, storage_class = Path(directory.path), directory.storage_class
        return await self._add_made(lambda: recovery.make_storage(self._store, path, storage_class=storage_class))

    async def _add_made(self, make: Callable[[], Storage]) -> dict[str, Any]:
        record = await offload(make)
        volume = await offload(lambda: self._store.pool.open(record))
        with self._store.step():
            self._store.pool.add(volume)
            self._store.add(record)
        await self._committer.commit()
        return status.storage_facts(self._store, record)

    # Stripes

    def require_columns(self, count: int, unit_bytes: int) -> None:
        """Refuse a number of columns that cannot be had, before anything is changed.

        Raises:
            UsageError: There are not so many usable storage volumes, or the unit is not whole blocks.
        """
        usable = sum(room.is_usable for room in self._store.account.rooms())
        if not 1 <= count <= usable:
            raise UsageError(f"{count} stripe columns need as many storage volumes; {usable} can be used: add some")
        stripes.require_unit(self._store, unit_bytes)

    async def stripe(self, volume_id: VolumeId, *, columns: int | Sequence[StorageId], unit_bytes: int) -> Volume:
        """Let new stripes of a volume rotate over so many, or over these, storage volumes.

        Raises:
            UsageError, StorageNotFound: As ``stripes.set_count`` and ``stripes.set_columns``.
        """
        if isinstance(columns, int):
            changed = stripes.set_count(self._store, volume_id, columns, unit_bytes=unit_bytes)
        else:
            changed = stripes.set_columns(self._store, volume_id, columns, unit_bytes=unit_bytes)
        await self._committer.commit()
        return changed

    async def restripe(self, volume_id: VolumeId, *, rate_bytes: int | None, progress: Progress) -> MoveReport:
        """Move what a volume and its snapshots store to where the newest stripe row says."""
        volume = self._store.catalog.volume(volume_id)
        if volume.stripe_row is None:
            raise _not_striped(volume)
        return await self._mover.move(relocation.follow_stripes(volume_id), [volume_id], rate_bytes, progress)

    async def plan_restripe(self, volume_id: VolumeId, *, columns: int | None, unit_bytes: int) -> MovePlan:
        """Say what ``restripe`` would move, after a ``stripe`` with these columns if any are given; change nothing."""
        volume = self._store.catalog.volume(volume_id)
        row = volume.stripe_row
        if columns is not None:
            chosen = stripes.choose(self._store, volume_id, columns)
            row = stripes.new_row(self._store, chosen, unit_bytes=unit_bytes)
        if row is None:
            raise _not_striped(volume)
        count = await self._mover.count(relocation.follow_stripes(volume_id, row), [volume_id])
        over = ", ".join(map(str, row.columns))
        return MovePlan(count, f"so much lies elsewhere than its stripes over storage volumes {over} have it")

    # Moves

    async def migrate(self, volume_id: VolumeId, *, rate_bytes: int | None, progress: Progress) -> MoveReport:
        """Move what a volume and its snapshots store off storage volumes that its placement rules do not allow."""
        wish = relocation.follow_rules(self._store, volume_id)
        return await self._mover.move(wish, [volume_id], rate_bytes, progress)

    async def plan_migration(self, volume_id: VolumeId) -> MovePlan:
        """Say what ``migrate`` would move; change nothing."""
        wish = relocation.follow_rules(self._store, volume_id)
        return MovePlan(
            await self._mover.count(wish, [volume_id]), "so much lies on storage volumes that its rules do not allow"
        )

    async def evacuate(self, storage_id: StorageId, *, rate_bytes: int | None, progress: Progress) -> MoveReport:
        """Move everything off a storage volume, which gets nothing new from the beginning of this on.

        Raises:
            NoSpace: The others have no room for it; what was moved stays moved.
            StorageNotFound: No such storage volume.
        """
        store = self._store
        record = self._require_others(storage_id)
        with store.step():
            store.amend(record, is_evacuating=True)
            store.reclaim_leases()
        await self._committer.commit()
        total, report = store.pool.volume(storage_id).live_blocks, MoveReport()
        self._tell("evacuation-begun", storage_id, f"{total * store.block_bytes} bytes move to other storage volumes")
        while store.pool.volume(storage_id).live_blocks > report.unreadable_blocks:
            found = await self._mover.move(
                relocation.leave(storage_id),
                list(store.catalog.volumes),
                rate_bytes,
                lambda done, _: progress(min(total, report.moved_blocks + done), total),
            )
            report.moved_blocks += found.moved_blocks
            report.unreadable_blocks, report.first_error = found.unreadable_blocks, found.first_error
            if not found.moved_blocks:
                break
        left = store.pool.volume(storage_id).live_blocks
        self._tell("evacuation-ended", storage_id, f"{left} blocks are left on it", unreadable=report.unreadable_blocks)
        return report

    def plan_evacuation(self, storage_id: StorageId) -> MovePlan:
        """Say what ``evacuate`` would move, and whether the others have room for it; change nothing.

        Raises:
            UsageError, StorageNotFound: As ``evacuate``.
        """
        self._require_others(storage_id)
        self._store.absorb()
        blocks = self._store.pool.volume(storage_id).live_blocks
        others = [room for room in self._store.account.rooms() if room.is_usable and room.storage.id != storage_id]
        free_bytes = sum(room.free_bytes for room in others)
        lacking = blocks * self._store.block_bytes - free_bytes
        verdict = f"; that is {format_size(lacking)} too little" if lacking > 0 else ""
        return MovePlan(blocks, f"the others can take {format_size(free_bytes)}{verdict}")

    def _require_others(self, storage_id: StorageId) -> Storage:
        record = self._store.catalog.storage(storage_id)
        if len(self._store.catalog.storages) == 1:
            raise UsageError(f"storage volume {storage_id} is the only one; add another first", storage=storage_id)
        return record

    async def cancel_evacuation(self, storage_id: StorageId) -> None:
        """Let a storage volume get new blocks again."""
        with self._store.step():
            self._store.amend(self._store.catalog.storage(storage_id), is_evacuating=False)
        await self._committer.commit()

    async def balance(self, *, rate_bytes: int | None, progress: Progress) -> MoveReport:
        """Move blocks from the fullest storage volumes to the emptiest until their shares in use are about even."""
        total = MoveReport()
        for _ in range(2 * len(self._store.pool.volumes)):
            self._store.absorb()
            plan = _plan_balance([room for room in self._store.account.rooms() if room.is_usable])
            if plan is None:
                break
            source, target, bytes_ = plan
            found = await self._move_some(source, target, bytes_ // self._store.block_bytes, rate_bytes, progress)
            total.moved_blocks += found.moved_blocks
            total.unreadable_blocks += found.unreadable_blocks
            if not found.moved_blocks:
                break
        return total

    def plan_balance(self) -> MovePlan:
        """Say what ``balance`` would move if no volume were striped; change nothing."""
        self._store.absorb()
        rooms = {room.storage.id: room for room in self._store.account.rooms() if room.is_usable}
        block_bytes, moves, total = self._store.block_bytes, [], 0
        for _ in range(2 * len(rooms)):
            plan = _plan_balance(list(rooms.values()))
            if plan is None or (blocks := plan[2] // block_bytes) == 0:
                break
            source, target, _ = plan
            for storage_id, moved in ((source, -blocks * block_bytes), (target, blocks * block_bytes)):
                room = rooms[storage_id]
                rooms[storage_id] = replace(
                    room, used_bytes=room.used_bytes + moved, free_bytes=room.free_bytes - moved
                )
            moves.append(f"{format_size(blocks * block_bytes)} from {source} to {target}")
            total += blocks
        even = f"the shares in use of the storage volumes differ by less than {_EVEN_PERCENT} %"
        return MovePlan(total, ", ".join(moves) + "; striped volumes stay" if moves else even)

    async def _move_some(
        self, source: StorageId, target: StorageId, limit: int, rate_bytes: int | None, progress: Progress
    ) -> MoveReport:
        """Move up to so many blocks of volumes that are not striped."""
        leave, left = relocation.leave(source), limit

        def wish(volume: Volume, virtual_block: int, storage_id: StorageId) -> int | None:
            nonlocal left
            column = leave(volume, virtual_block, storage_id) if left > 0 and volume.stripe_row is None else None
            left -= column is not None
            return column

        volumes = [volume_id for volume_id, v in self._store.catalog.volumes.items() if v.stripe_row is None]
        leases = {relocation.mover_lease(volume_id, 0): target for volume_id in volumes}
        self._store.space.targets.update(leases)
        try:
            return await self._mover.move(wish, volumes, rate_bytes, progress)
        finally:
            for lease in leases:
                self._store.space.targets.pop(lease, None)

    # Storage volumes go

    async def remove_storage(self, storage_id: StorageId) -> None:
        """Take an empty storage volume out of the pool and delete its image.

        Raises:
            Busy: It is not empty.
            UsageError: It is the only one.
        """
        store = self._store
        record = self._require_others(storage_id)
        async with self._driver.space_lock:
            was_evacuating = record.is_evacuating
            with store.step():
                store.amend(record, is_evacuating=True)
                store.reclaim_leases()
            await self._committer.checkpoint()
            volume = store.pool.volume(storage_id)
            if volume.given_blocks:
                with store.step():
                    store.amend(record, is_evacuating=was_evacuating)
                await self._committer.commit()
                raise self._not_empty(storage_id)
            with store.step():
                store.drop(("storage", (storage_id,)))
                store.pool.retire(storage_id)
            await self._committer.checkpoint()
        self._tell("image-removed", storage_id, f"it was empty; {volume.path} is deleted")
        try:
            await offload(lambda: store.pool.delete_image(storage_id))
        except IncfsError as error:
            self._tell("image-left", storage_id, f"it belongs to the pool no more, but could not be deleted: {error}")

    def plan_removal(self, storage_id: StorageId) -> list[str]:
        """Name the image files that ``remove_storage`` would delete; change nothing.

        Raises:
            Busy, UsageError, StorageNotFound: As ``remove_storage``.
        """
        self._require_others(storage_id)
        self._store.absorb()
        if self._store.pool.volume(storage_id).live_blocks:
            raise self._not_empty(storage_id)
        return self.image_files(storage_id)[1:]

    def _not_empty(self, storage_id: StorageId) -> Busy:
        held_bytes = self._store.pool.volume(storage_id).live_blocks * self._store.block_bytes
        return Busy(
            f"storage volume {storage_id} holds {held_bytes} bytes; "
            f"move them with `incfs storage evacuate {storage_id}` first",
            storage=storage_id,
        )

    def image_files(self, storage_id: StorageId) -> list[str]:
        """Give a storage volume's UUID, and where its image files are.

        Raises:
            StorageNotFound: No such storage volume.
        """
        record = self._store.catalog.storage(storage_id)
        return [record.uuid, *map(str, self._store.pool.images.leg_paths(record))]

    async def delete_left(self, uuid: str, paths: Sequence[str]) -> None:
        """Delete image files that a removal, which was cut off, left behind."""
        for path in paths:
            if await offload(lambda: self._store.pool.images.delete_left(Path(path), uuid)):  # noqa: B023
                self._store.events.record("image-removed", path, "its storage volume had been removed from the pool")

    def _tell(self, kind: str, storage_id: StorageId, reason: str, **facts: Any) -> None:
        self._store.events.record(kind, f"storage {storage_id}", reason, **facts)


def _not_striped(volume: Volume) -> UsageError:
    return UsageError(f"volume {volume.name} is not striped; give it columns first", volume=volume.name)


def _plan_balance(rooms: list[Room]) -> tuple[StorageId, StorageId, int] | None:
    """Choose (source, target, bytes) of the move that evens two storage volumes out; None when all are even."""
    shares = {room.storage.id: room.used_bytes / max(1, room.used_bytes + room.free_bytes) for room in rooms}
    if len(shares) < 2:
        return None
    source, target = max(shares, key=lambda i: shares[i]), min(shares, key=lambda i: shares[i])
    if (shares[source] - shares[target]) * 100 < _EVEN_PERCENT:
        return None
    sizes = {room.storage.id: room.used_bytes + room.free_bytes for room in rooms}
    # Moving x bytes brings the shares together when used_s - x and used_t + x are the same part of their sizes.
    bytes_ = (shares[source] - shares[target]) * sizes[source] * sizes[target] / (sizes[source] + sizes[target])
    return source, target, int(bytes_)
