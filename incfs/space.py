"""Space for new blocks: who gets how much of it, from which storage volume, and what to do when there is none.

Owns the leases' sizes and the settings of space.  ``steps`` is the one plan of making space; the
synchronous and the asynchronous driver only carry its steps out.

Invariants:
    1. Ordinary leases leave ``reserve_blocks`` free blocks: a discard of a part of a block, which
       needs a new one, works in a full pool.
    2. A storage volume at low water is used, and grown, only when no other that the rules allow
       has room.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from incfs.blocks import split_address
from incfs.catalog import Catalog
from incfs.errors import NoSpace, QuotaExceeded
from incfs.events import EventLog
from incfs.model import MapId, StorageId, Volume, VolumeId, split_map_id
from incfs.placement import Room, Rule, order_rooms, parse_rules
from incfs.pool import Pool
from incfs.settings import PoolSettings, VolumeSettings
from incfs.storage import StorageVolume

MAX_LEASE_BLOCKS = 8192
"""What a second's tenth of writing takes: a lease that is used up before it was added to makes writes wait."""
_MOST_RUNS = 1024
"""Pieces that a lease may come in at once, where free space is scattered: about a millisecond."""
_WAIT_AT_EXTENDS = 4
"""So many times what an image grows by must wait to be free before a write waits for it."""
MOVER = 1 << 31
"""In the lower half of a lease's key, beside the column: blocks for data that moves."""


class Leases(Protocol):
    """What is needed of a data plane."""

    def grant(self, map_id: MapId, address: int, block_count: int, /) -> None:
        """Give a table free blocks."""

    def leased_blocks(self, map_id: MapId, /) -> int:
        """Count those it has not used."""

    def revoke(self, map_id: MapId | None = None, /) -> list[int]:
        """Take them back, from one table or from all."""

    def mapped_delta(self, map_id: MapId, /) -> int:
        """Count the blocks that a table gained since the last seal."""

    @property
    def fresh_count(self) -> int:
        """Mappings appended since the last seal."""


class Step(Enum):
    """Something that may yield free blocks."""

    CHECKPOINT = "checkpoint"
    """Freed blocks become free."""
    RECLAIM = "reclaim"
    """What was removed is taken apart."""


@dataclass(slots=True)
class Growth:
    """Another step: make an image longer."""

    storage: StorageVolume
    block_count: int
    reserve_bytes: int
    refusal: NoSpace | None = None
    """Why it did not grow."""

    def run(self) -> None:
        """Grow.  Any thread, one caller at a time."""
        try:
            self.storage.grow(self.block_count, reserve_bytes=self.reserve_bytes)
        except NoSpace as error:
            self.refusal = error


@dataclass(frozen=True, slots=True)
class NewImage:
    """Another step: bring in another storage volume."""

    rules: tuple[Rule, ...]
    """Which must allow it."""


class Space:
    """Leases, growth and limits of one pool.  Owner thread.

    Args:
        catalog: The pool's records.
        pool: Its storage volumes.
        plane: Where leases go.
        events: Where to tell of what was decided.
        block_bytes: Size of a block.
        extend_bytes: Step of growth, unless the settings say otherwise.
        host_reserve_bytes: What growth leaves on a host filesystem, unless the settings say otherwise.
        reserve_blocks: Free blocks that only urgent requests get.
    """

    def __init__(
        self,
        catalog: Catalog,
        pool: Pool,
        plane: Leases,
        events: EventLog,
        *,
        block_bytes: int,
        extend_bytes: int,
        host_reserve_bytes: int,
        reserve_blocks: int,
    ) -> None:
        self._catalog = catalog
        self._pool = pool
        self._plane = plane
        self._events = events
        self._assigned: dict[MapId, StorageId] = {}
        """Where the last blocks of each lease came from."""
        self._block_bytes = block_bytes
        self._extend_bytes = extend_bytes
        self._host_reserve_bytes = host_reserve_bytes
        self._reserve_blocks = reserve_blocks
        self._lease_blocks: dict[VolumeId, dict[MapId, int]] = {}
        """Volume -> its leases -> the blocks that they asked for last."""
        self._owed: dict[VolumeId, int] = {}
        """Volumes with reservations -> blocks of it that they do not occupy yet."""
        self._refusals: dict[StorageId, NoSpace] = {}
        """Images that could not grow when space was last made."""
        self.checkpoint_refusal: NoSpace | None = None
        """Why a checkpoint could not free anything then."""
        self.targets: dict[MapId, StorageId] = {}
        """Leases whose blocks should come from a certain storage volume."""
        self.settings = PoolSettings()

    # How much there is

    @property
    def extend_bytes(self) -> int:
        """Step in which images grow."""
        return self.settings.extend_bytes or self._extend_bytes

    def reserve_bytes(self, volume: StorageVolume) -> int:
        """Give what growth leaves free on an image's host filesystem."""
        reserve = self.settings.reserve
        return self._host_reserve_bytes if reserve is None else reserve.of(volume.host_total_bytes)

    def is_host_short(self, volume: StorageVolume) -> bool:
        """Tell whether others need what an image's host filesystem has left, by the last look at it."""
        low_water = self.settings.low_water.of(volume.host_total_bytes)
        return volume.host_free_bytes < max(low_water, self.reserve_bytes(volume) + self.extend_bytes)

    def room(self, volume: StorageVolume) -> Room:
        """Tell how full a storage volume is, by the last look at its host filesystem."""
        block = self._block_bytes
        growth = max(0, volume.record.capacity_blocks - volume.grown_blocks) * block
        host = max(0, volume.host_free_bytes - self.reserve_bytes(volume))
        free = max(0, volume.grown_blocks - volume.busy_blocks) * block + min(growth, host)
        used = volume.busy_blocks * block
        low_water = self.settings.low_water.of(used + free)
        return Room(volume.record, used, free, low_water, volume.is_usable)

    def rooms(self) -> list[Room]:
        """Tell how full every storage volume is."""
        return [self.room(volume) for volume in self._pool.volumes.values()]

    def settings_of(self, volume_id: VolumeId) -> VolumeSettings:
        """Give what rules a volume; one that is being removed is ruled by nothing."""
        volume = self._catalog.volumes.get(volume_id)
        return self.settings.volume_settings(volume.name) if volume is not None and volume.name else VolumeSettings()

    def candidates(self, lease: MapId) -> list[Room]:
        """Give the storage volumes that new blocks of a lease may come from, the first to take first."""
        volume_id, _ = split_map_id(lease)
        settings = self.settings_of(volume_id)
        rooms = [room for room in self.rooms() if len(room.storage.leg_paths) >= settings.copies]
        return order_rooms(rooms, parse_rules(settings.place), self._column(lease))

    def _column(self, lease: MapId) -> StorageId | None:
        """Give the storage volume that a lease's blocks belong to; None when any will do."""
        if lease in self.targets:
            return self.targets[lease]
        volume_id, number = split_map_id(lease)
        column = number & ~MOVER
        volume = self._catalog.volumes.get(volume_id)
        row = volume.stripe_row if volume is not None else None
        return StorageId(row.columns[column]) if row is not None and column < len(row.columns) else None

    # Limits

    def used_blocks(self, volume: Volume) -> int:
        """Count what a volume and its snapshots occupy, unsealed writes included."""
        held = sum(s.held_blocks for s in self._catalog.snapshots(volume.id, removed=True))
        return volume.mapped_blocks + held + self._plane.mapped_delta(volume.map_id)

    def quota_left(self, volume_id: VolumeId) -> int | None:
        """Count the blocks that a volume may gain at least; exactly after a seal; None without a quota."""
        quota = self.settings_of(volume_id).quota_bytes
        if quota is None:
            return None
        volume = self._catalog.volume(volume_id)
        # What unsealed writes replaced, the newest snapshot may have to hold: nobody knows yet.
        unknown = self._plane.fresh_count if volume.newest_generation else 0
        return max(0, quota // self._block_bytes - self.used_blocks(volume) - unknown)

    def require_quota(self, volume_id: VolumeId, block_count: int) -> None:
        """Refuse what would lead a volume over its quota.

        Raises:
            QuotaExceeded: It would.
        """
        left = self.quota_left(volume_id)
        if left is not None and block_count > left:
            volume = self._catalog.volume(volume_id)
            raise QuotaExceeded(
                f"volume {volume.name} and its snapshots may occupy {self.settings_of(volume_id).quota_bytes} bytes, "
                f"of which {left * self._block_bytes} are left; raise its quota, or remove data or snapshots",
                volume=volume.name,
            )

    def require_snapshot(self, volume_id: VolumeId) -> None:
        """Refuse another snapshot beyond a volume's limits.

        Raises:
            QuotaExceeded: It has as many as it may have, or they hold as much as they may.
        """
        settings, volume = self.settings_of(volume_id), self._catalog.volume(volume_id)
        taken = self._catalog.snapshots(volume_id)
        held_bytes = sum(snapshot.held_blocks for snapshot in taken) * self._block_bytes
        if settings.snapshot_max is not None and len(taken) >= settings.snapshot_max:
            raise QuotaExceeded(
                f"volume {volume.name} has {len(taken)} snapshots, its limit is {settings.snapshot_max}; remove some",
                volume=volume.name,
            )
        if settings.snapshot_max_bytes is not None and held_bytes > settings.snapshot_max_bytes:
            raise QuotaExceeded(
                f"the snapshots of volume {volume.name} hold {held_bytes} bytes, their limit is "
                f"{settings.snapshot_max_bytes}; remove some",
                volume=volume.name,
            )

    def review(self) -> None:
        """Count anew what reservations are owed; after a change of settings, and now and then."""
        self._owed = {}
        for volume in self._catalog.volumes.values():
            reserved = self.settings_of(volume.id).reservation_bytes // self._block_bytes
            if owed := max(0, reserved - self.used_blocks(volume) if reserved else 0):
                self._owed[volume.id] = owed

    def _allowance(self, lease: MapId, *, urgent: bool) -> int:
        """Count the blocks that a lease may be given now."""
        free = sum(max(0, v.grown_blocks - v.busy_blocks) for v in self._pool.volumes.values() if v.is_usable)
        if urgent:
            return free
        volume_id, _ = split_map_id(lease)
        owed = sum(blocks for other, blocks in self._owed.items() if other != volume_id)
        if owed:
            room = sum(room.free_bytes for room in self.rooms() if room.is_usable) // self._block_bytes
            return min(free, room - owed) - self._reserve_blocks
        return free - self._reserve_blocks

    # Leases

    def grant(self, lease: MapId, block_count: int, *, urgent: bool = False, is_scarce: bool = False) -> bool:
        """Lease blocks to a table until it has ``block_count``; False when too few are free.

        Leases double while a table keeps asking, so that sequential writes stay sequential; not where space is scarce.
        """
        leases = self._lease_blocks.setdefault(split_map_id(lease)[0], {})
        wanted = leases[lease] = max(block_count, min(MAX_LEASE_BLOCKS, 2 * leases.get(lease, 8)))
        left = self.quota_left(split_map_id(lease)[0])
        if left is not None:
            wanted = max(block_count, min(wanted, left))
        missing = block_count - self._plane.leased_blocks(lease)
        while missing > 0:
            found = self._allocate(lease, min(missing if is_scarce else wanted, self._allowance(lease, urgent=urgent)))
            if found is None:
                return False
            missing -= found
        return True

    def top_up(self, lease: MapId) -> None:
        """Add to a lease before it is used up, as far as there is space and the quota allows."""
        leased, left = self._plane.leased_blocks(lease), self.quota_left(split_map_id(lease)[0])
        if left is None or leased < left:
            self.grant(lease, leased + 1)

    def is_short(self, lease: MapId) -> bool:
        """Tell whether fewer blocks are free for a lease than it is given at a time: images should grow meanwhile."""
        volumes = [self._pool.volumes[room.storage.id] for room in self.candidates(lease) if room.is_usable]
        free = sum(max(0, volume.grown_blocks - volume.busy_blocks) for volume in volumes)
        return free - self._reserve_blocks < self._lease_blocks.get(split_map_id(lease)[0], {}).get(lease, 0)

    def _allocate(self, lease: MapId, block_count: int) -> int | None:
        """Lease up to so many blocks; None when a storage volume must grow first."""
        rooms = self.candidates(lease) if block_count > 0 else []
        growth = self.next_growth(lease)
        for tier in _tiers(rooms, self._column(lease)):
            runs = self._pool.allocate(lease, block_count, tier, most_runs=_MOST_RUNS)
            if runs:
                for run in runs:
                    self._plane.grant(lease, *run)
                self._tell_assignment(lease, split_address(runs[0][0])[0], rooms)
                return sum(count for _, count in runs)
            if growth is not None and growth.storage.record.id in tier:
                return None
        return None

    def _tell_assignment(self, lease: MapId, storage_id: StorageId, rooms: list[Room]) -> None:
        """Note that a volume's new blocks come from another storage volume because one is at low water."""
        before = self._assigned.get(lease, storage_id)
        self._assigned[lease] = storage_id
        low = [room.storage.id for room in rooms if room.is_low]
        if before != storage_id and before in low and storage_id not in low:
            volume = self._catalog.volume(split_map_id(lease)[0])
            self._events.record(
                "assigned",
                f"volume {volume.name}",
                f"storage {before} is at low water: new blocks come from storage {storage_id}",
                storage=storage_id,
            )

    def revoke(self, table: MapId) -> None:
        """Take back what a live table and its columns leased and do not use."""
        volume_id, generation = split_map_id(table)
        for lease in self._lease_blocks.pop(volume_id, {}) if not generation else ():
            self._pool.release(self._plane.revoke(lease))
            self._pool.forget(lease)
            self._assigned.pop(lease, None)

    def revoke_all(self) -> None:
        """Take back from every table what it leased and does not use."""
        self._lease_blocks.clear()
        self._pool.release(self._plane.revoke())

    # Making space

    def next_growth(self, lease: MapId) -> Growth | None:
        """Choose the image to grow for a lease: the first candidate that can."""
        limit = self.settings.extend_max_bytes
        most = max(1, self.extend_bytes // self._block_bytes)
        if limit is not None:
            grown = sum(volume.grown_blocks for volume in self._pool.volumes.values())
            most = min(most, limit // self._block_bytes - grown)
        for room in self.candidates(lease) if most > 0 else ():
            volume = self._pool.volumes[room.storage.id]
            if room.storage.id not in self._refusals and volume.grown_blocks < volume.record.capacity_blocks:
                return Growth(volume, most, self.reserve_bytes(volume))
        return None

    def can_grow(self, lease: MapId) -> bool:
        """Tell whether some image has room to grow now, by the last look at its host filesystem."""
        volumes = [self._pool.volumes[room.storage.id] for room in self.candidates(lease)]
        return any(
            volume.grown_blocks < volume.record.capacity_blocks
            and volume.host_free_bytes - self.reserve_bytes(volume) >= self._block_bytes
            for volume in volumes
        )

    def _lacking(self, needs: Mapping[MapId, int], *, urgent: bool, is_scarce: bool = False) -> MapId | None:
        """Grant what is needed; give the first lease that it is too little for."""
        for lease, block_count in needs.items():
            if not self.grant(lease, block_count, urgent=urgent, is_scarce=is_scarce):
                return lease
        return None

    def grant_all(self, needs: Mapping[MapId, int], *, urgent: bool = False) -> bool:
        """Grant what several leases need; False when too few blocks are free."""
        return self._lacking(needs, urgent=urgent) is None

    def steps(self, needs: Mapping[MapId, int], *, urgent: bool = False) -> Iterator[Step | Growth | NewImage]:
        """Yield what to do, one after the other, until every lease has the blocks that it needs, all at once.

        Raises:
            NoSpace: Nothing is left to do, and they have not.
        """
        self._refusals.clear()
        self.checkpoint_refusal = None
        may_add = bool(self.settings.directories)
        while (lease := self._lacking(needs, urgent=urgent)) is not None:
            growth = self.next_growth(lease)
            if self._frees_much(growth):
                yield Step.CHECKPOINT
                continue
            if growth is None and not may_add:
                break
            if growth is None:
                may_add = False
                yield NewImage(self._rules(lease))
                continue
            yield growth
            if growth.refusal is not None:
                self._refusals[growth.storage.record.id] = growth.refusal
        else:
            return
        self.revoke_all()
        if self._lacking(needs, urgent=urgent, is_scarce=True) is not None:
            yield Step.RECLAIM
            yield Step.CHECKPOINT
        if (lease := self._lacking(needs, urgent=urgent, is_scarce=True)) is not None:
            raise self._full(lease)

    def _rules(self, lease: MapId) -> tuple[Rule, ...]:
        """Give what a storage volume must be for a lease's blocks."""
        settings = self.settings_of(split_map_id(lease)[0])
        return parse_rules(settings.place) + ((Rule("mirrored", "yes", True),) if settings.copies > 1 else ())

    def _frees_much(self, growth: Growth | None) -> bool:
        """Tell whether a checkpoint frees enough to be waited for, if there is room for one.

        Growing takes milliseconds, and what is punched is given back to the host: as long as an image can grow,
        only a multiple of that makes a write wait; the store asks for checkpoints before (``wants_checkpoint``).
        """
        enough_bytes = self.extend_bytes * (_WAIT_AT_EXTENDS if growth is not None else 1)
        return self.checkpoint_refusal is None and self._pool.freed_blocks * self._block_bytes >= enough_bytes

    def _full(self, lease: MapId) -> NoSpace:
        settings = self.settings_of(split_map_id(lease)[0])
        rules = [*settings.place, *([f"copies={settings.copies}"] if settings.copies > 1 else [])]
        if rules and not self.candidates(lease):
            return NoSpace(f"no storage volume meets the placement rules {', '.join(rules)}; add one that does")
        reasons = [str(error) for error in self._refusals.values()] or [
            "its storage volumes are at their capacity limits"
        ]
        if self.checkpoint_refusal is not None:
            reasons.append(f"freed blocks wait for a checkpoint: {self.checkpoint_refusal}")
        return NoSpace("the pool is full: " + "; ".join(reasons) + "; add one with `incfs storage add`, or remove data")


def _tiers(rooms: list[Room], column: StorageId | None) -> Iterator[list[StorageId]]:
    """Give sets of candidates: one is used up, and grown as far as it can, before the next is touched."""
    high = [room.storage.id for room in rooms if not room.is_low]
    if column in high:
        yield [column]
        high.remove(column)
    yield high
    yield [room.storage.id for room in rooms if room.is_low]
