"""Space for new blocks: who gets how much of it, from which storage volume, and what to do when there is none.

Owns the leases' sizes.  How much there is the account says.  ``steps`` is the one plan of making space; the
synchronous and the asynchronous driver only carry its steps out.

Invariants:
    1. Ordinary leases leave ``reserve_blocks`` free blocks: a discard of a part of a block, which
       needs a new one, works in a full pool.
    2. A storage volume at low water is used, and grown, only when no other that the rules allow
       has room.
    3. What is leased has the host's space (I15): where blocks went back to the host, it is asked before.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from incfs.account import Account
from incfs.blocks import split_address
from incfs.catalog import Catalog
from incfs.errors import NoSpace
from incfs.events import EventLog
from incfs.model import MapId, StorageId, VolumeId, split_map_id
from incfs.placement import Room, Rule, order_rooms, parse_rules
from incfs.pool import Pool
from incfs.storage import Backed, Reserve, StorageVolume
from incfs.unbacked import Run

MAX_LEASE_BLOCKS = 8192
"""What a second's tenth of writing takes: a lease that is used up before it was added to makes writes wait."""
_MOST_RUNS = 1024
"""Pieces that a lease, or space from the host, may come in at once, where it is scattered: some milliseconds."""
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


class Step(Enum):
    """Something that may yield free blocks."""

    CHECKPOINT = "checkpoint"
    """Freed blocks become free."""
    RECLAIM = "reclaim"
    """What was removed is taken apart."""


@dataclass(slots=True)
class Growth:
    """Another step: get blocks of an image from its hosts."""

    storage: StorageVolume
    block_count: int
    reserve: Reserve
    unbacked: list[Run]
    """Those to get again; without any the image becomes longer."""
    refusal: NoSpace | None = None
    """Why there are none."""
    _backed: Backed | None = None

    def run(self) -> None:
        """Ask the hosts.  Any thread, one caller at a time; ``end`` follows on the owner thread."""
        try:
            if self.unbacked:
                self._backed = self.storage.back(self.unbacked, reserve=self.reserve)
            else:
                self.storage.grow(self.block_count, reserve=self.reserve)
        except NoSpace as error:
            self.refusal = error

    def end(self) -> None:
        """Let the blocks be free.  Owner thread."""
        if self._backed is not None:
            self.storage.note_backed(self._backed)
            if not self._backed.ready and not self._backed.hollow:
                self.refusal = self._backed.refusal


@dataclass(frozen=True, slots=True)
class NewImage:
    """Another step: bring in another storage volume."""

    rules: tuple[Rule, ...]
    """Which must allow it."""


class Space:
    """Leases and growth of one pool.  Owner thread.

    Args:
        catalog: The pool's records.
        pool: Its storage volumes.
        plane: Where leases go.
        events: Where to tell of what was decided.
        account: Says how much there is.
        block_bytes: Size of a block.
    """

    def __init__(
        self, catalog: Catalog, pool: Pool, plane: Leases, events: EventLog, account: Account, *, block_bytes: int
    ) -> None:
        self._catalog = catalog
        self._pool = pool
        self._plane = plane
        self._events = events
        self._account = account
        self._assigned: dict[MapId, StorageId] = {}
        """Where the last blocks of each lease came from."""
        self._block_bytes = block_bytes
        self._lease_blocks: dict[VolumeId, dict[MapId, int]] = {}
        """Volume -> its leases -> the blocks that they asked for last."""
        self._refusals: dict[StorageId, NoSpace] = {}
        """Images that could get no blocks when space was last made."""
        self.checkpoint_refusal: NoSpace | None = None
        """Why a checkpoint could not free anything then."""
        self.targets: dict[MapId, StorageId] = {}
        """Leases whose blocks should come from a certain storage volume."""

    # Where from

    def candidates(self, lease: MapId) -> list[Room]:
        """Give the storage volumes that new blocks of a lease may come from, the first to take first."""
        volume_id, _ = split_map_id(lease)
        settings = self._account.settings_of(volume_id)
        rooms = [room for room in self._account.rooms() if len(room.storage.leg_paths) >= settings.copies]
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

    # Leases

    def grant(self, lease: MapId, block_count: int, *, urgent: bool = False, is_scarce: bool = False) -> bool:
        """Lease blocks to a table until it has ``block_count``; False when too few are free.

        Leases double while a table keeps asking, so that sequential writes stay sequential; not where space is scarce.
        """
        volume_id, _ = split_map_id(lease)
        leases = self._lease_blocks.setdefault(volume_id, {})
        wanted = leases[lease] = max(block_count, min(MAX_LEASE_BLOCKS, 2 * leases.get(lease, 8)))
        left = self._account.quota_left(volume_id)
        if left is not None:
            wanted = max(block_count, min(wanted, left))
        missing = block_count - self._plane.leased_blocks(lease)
        while missing > 0:
            allowance = self._account.allowance(volume_id, urgent=urgent)
            found = self._allocate(lease, min(missing if is_scarce else wanted, allowance))
            if found is None:
                return False
            missing -= found
        return True

    def top_up(self, lease: MapId) -> None:
        """Add to a lease before it is used up, as far as there is space and the quota allows."""
        leased, left = self._plane.leased_blocks(lease), self._account.quota_left(split_map_id(lease)[0])
        if left is None or leased < left:
            self.grant(lease, leased + 1)

    def is_short(self, lease: MapId) -> bool:
        """Tell whether fewer blocks are free for a lease than it is given at a time: images should grow meanwhile."""
        volumes = [self._pool.volumes[room.storage.id] for room in self.candidates(lease) if room.is_usable]
        free = self._account.at_hand(volumes) - self._account.reserve_blocks
        return free < self._lease_blocks.get(split_map_id(lease)[0], {}).get(lease, 0)

    def _allocate(self, lease: MapId, block_count: int) -> int | None:
        """Lease up to so many blocks; None when a storage volume must grow first."""
        rooms = self.candidates(lease) if block_count > 0 else []
        growing = self._next_to_grow(lease)
        for tier in _tiers(rooms, self._column(lease)):
            runs = self._pool.allocate(lease, block_count, tier, most_runs=_MOST_RUNS)
            if runs:
                for run in runs:
                    self._plane.grant(lease, *run)
                self._tell_assignment(lease, split_address(runs[0][0])[0], rooms)
                return sum(count for _, count in runs)
            if growing is not None and growing.record.id in tier:
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

    def _next_to_grow(self, lease: MapId) -> StorageVolume | None:
        """Choose the image that gets blocks from its hosts for a lease: the first candidate that can."""
        may_be_longer = self._account.growth_limit() > 0
        for room in self.candidates(lease):
            volume = self._pool.volumes[room.storage.id]
            can_be_longer = may_be_longer and volume.grown_blocks < volume.most_blocks
            if room.storage.id not in self._refusals and (volume.unbacked.count or can_be_longer):
                return volume
        return None

    def next_growth(self, lease: MapId) -> Growth | None:
        """Plan the growth for a lease: unbacked blocks first, then a longer image; None when there is no way."""
        volume = self._next_to_grow(lease)
        if volume is None:
            return None
        most = max(1, self._account.extend_bytes // self._block_bytes)
        runs = volume.unbacked.runs(most, _MOST_RUNS)
        return Growth(volume, min(most, self._account.growth_limit()), self._account.reserve_bytes, runs)

    def can_grow(self, lease: MapId) -> bool:
        """Tell whether some image can get blocks now, by the last look at its host filesystem."""
        volumes = [self._pool.volumes[room.storage.id] for room in self.candidates(lease)]
        return any(self._account.can_get_more(volume) for volume in volumes)

    def note_refused(self, storage_id: StorageId) -> None:
        """The host refused to write to leased blocks: ask it anew for every one that nobody has written to yet.

        The caller has sealed: what was not written is leased or free.
        """
        self.revoke_all()
        self._pool.volumes[storage_id].note_refused()

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
        may_add = bool(self._account.settings.directories)
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
        while (lease := self._lacking(needs, urgent=urgent, is_scarce=True)) is not None:
            growth = self.next_growth(lease)  # what became free may have been given back to the host meanwhile
            if growth is None:
                raise self._full(lease)
            yield growth
            if growth.refusal is not None:
                self._refusals[growth.storage.record.id] = growth.refusal

    def _rules(self, lease: MapId) -> tuple[Rule, ...]:
        """Give what a storage volume must be for a lease's blocks."""
        settings = self._account.settings_of(split_map_id(lease)[0])
        return parse_rules(settings.place) + ((Rule("mirrored", "yes", True),) if settings.copies > 1 else ())

    def _frees_much(self, growth: Growth | None) -> bool:
        """Tell whether a checkpoint frees enough to be waited for, if there is room for one.

        Growing takes milliseconds, and what is punched is given back to the host: as long as an image can grow,
        only a multiple of that makes a write wait; the store asks for checkpoints before (``wants_checkpoint``).
        """
        enough_bytes = self._account.extend_bytes * (_WAIT_AT_EXTENDS if growth is not None else 1)
        return self.checkpoint_refusal is None and self._pool.freed_blocks * self._block_bytes >= enough_bytes

    def _full(self, lease: MapId) -> NoSpace:
        settings = self._account.settings_of(split_map_id(lease)[0])
        rules = [*settings.place, *([f"copies={settings.copies}"] if settings.copies > 1 else [])]
        if rules and not self.candidates(lease):
            return NoSpace(f"no storage volume meets the placement rules {', '.join(rules)}; add one that does")
        reasons = [str(error) for error in self._refusals.values()] or [
            "its storage volumes are at their capacity limits"
        ]
        if self.checkpoint_refusal is not None:
            reasons.append(f"freed blocks wait for a checkpoint: {self.checkpoint_refusal}")
        return NoSpace("the pool is full: " + "; ".join(reasons) + "; add one with `incfs storage add`, or remove data")


def refused_storage(error: NoSpace) -> StorageId | None:
    """Give the storage volume whose host refused a write to blocks that it had reserved; None of other errors."""
    return error.facts.get("storage") if error.facts.get("action") == "write" else None


def _tiers(rooms: list[Room], column: StorageId | None) -> Iterator[list[StorageId]]:
    """Give sets of candidates: one is used up, and grown as far as it can, before the next is touched."""
    high = [room.storage.id for room in rooms if not room.is_low]
    if column in high:
        yield [column]
        high.remove(column)
    yield high
    yield [room.storage.id for room in rooms if room.is_low]
