"""Data that moves to other storage volumes: which blocks, where to, and copied how.

A page is moved in three steps: ``plan`` (owner) says which of its blocks should lie elsewhere,
``Relocation.copy`` (any thread) copies and verifies them, ``finish`` (owner) lets the mappings
name the new places, where they still name the old ones.  The rest is an ordinary commit: the
copies are durable before the record (I2), and the old blocks are free after the next
checkpoint (I3).  So it may be cut off anywhere, and be begun again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from incfs.blocks import split_address
from incfs.codec import checksum
from incfs.errors import IncfsError
from incfs.memory import one_step
from incfs.model import HOLE, PAGE_BLOCKS, MapId, StorageId, StripeRow, Volume, VolumeId, map_id
from incfs.overlay import TableKey
from incfs.space import MOVER
from incfs.store import Store

Wish = Callable[[Volume, int, StorageId], int | None]
"""(volume, virtual block, where it lies) -> the column that it should move to; None: it stays."""


@dataclass(slots=True)
class Relocation:
    """Blocks of one page on their way."""

    table: TableKey
    page_index: int
    slots: dict[MapId, list[int]]
    """Lease that the new blocks come from -> indexes in the page."""
    entries: dict[int, tuple[int, int]]
    """What they are mapped to now."""
    targets: dict[int, int] = field(default_factory=dict)
    """Index -> new address."""
    unreadable: dict[int, IncfsError] = field(default_factory=dict)

    @property
    def block_count(self) -> int:
        """Blocks that should move."""
        return len(self.entries)

    def copy(self, store: Store) -> None:
        """Copy the blocks, each verified.  Any thread.

        Raises:
            NoSpace: The host has no room.
            BackingError: A write failed: the pool must become read-only (I10).
        """
        for slots in _runs(self.entries, self.targets):
            data = self._read(store, slots)
            for run in _split(slots, self.unreadable):
                storage_id, block_index = split_address(self.targets[run[0]])
                start = run[0] - slots[0]
                piece = data[start * store.block_bytes : (start + len(run)) * store.block_bytes]
                store.pool.volumes[storage_id].write_blocks(block_index, piece)

    def _read(self, store: Store, slots: list[int]) -> bytes:
        """Read blocks that lie together; those that are not what they should be become unreadable."""
        size = store.block_bytes
        storage_id, block_index = split_address(self.entries[slots[0]][0])
        try:
            volume = store.pool.volumes[storage_id]
            data = volume.read_blocks(block_index, len(slots))
        except IncfsError as error:
            self.unreadable.update(dict.fromkeys(slots, error))
            return bytes(size * len(slots))
        for i, slot in enumerate(slots):
            crc = self.entries[slot][1]
            if checksum(data[i * size : (i + 1) * size]) != crc and volume.heal(block_index + i, crc) is not None:
                data = volume.read_blocks(block_index, len(slots))
            if checksum(data[i * size : (i + 1) * size]) != crc:
                where = f"block {block_index + i} of storage volume {storage_id}"
                self.unreadable[slot] = IncfsError(f"{where} is damaged, or was replaced meanwhile")
        return data


def _runs(entries: dict[int, tuple[int, int]], targets: dict[int, int]) -> Iterator[list[int]]:
    """Yield indexes whose blocks follow each other, where they are and where they go."""
    slots = sorted(targets)
    run = slots[:1]
    for before, slot in pairwise(slots):
        step = slot - before
        if step != 1 or entries[slot][0] != entries[before][0] + 1 or targets[slot] != targets[before] + 1:
            yield run
            run = []
        run.append(slot)
    if run:
        yield run


def _split(slots: list[int], without: dict[int, IncfsError]) -> Iterator[list[int]]:
    run: list[int] = []
    for slot in slots:
        if slot not in without:
            run.append(slot)
        elif run:
            yield run
            run = []
    if run:
        yield run


def plan(store: Store, table: TableKey, page_index: int, wish: Wish) -> Relocation | None:
    """Say what of a page should move; None for nothing."""
    volume = store.catalog.volumes.get(VolumeId(table.volume_id))
    if volume is None:
        return None
    slots: dict[MapId, list[int]] = {}
    entries: dict[int, tuple[int, int]] = {}
    for slot, entry in sorted(store.log.entries(table, page_index).items()):
        if entry[0] <= HOLE:
            continue
        column = wish(volume, page_index * PAGE_BLOCKS + slot, split_address(entry[0])[0])
        if column is not None:
            slots.setdefault(mover_lease(volume.id, column), []).append(slot)
            entries[slot] = entry
    return Relocation(table, page_index, slots, entries) if entries else None


def take_targets(store: Store, relocation: Relocation, lease: MapId) -> None:
    """Use what was leased for the blocks of one lease; the rest is given back."""
    slots = [slot for slot in relocation.slots[lease] if slot not in relocation.targets]
    addresses = store.plane.revoke(lease)
    relocation.targets.update(zip(slots, addresses, strict=False))
    store.pool.release(addresses[len(slots) :])


@one_step
def finish(store: Store, relocation: Relocation) -> int:
    """Let mappings that are still as planned name the copies; give how many.

    Atomicity: one change; durable with the next commit.
    """
    table = relocation.table
    copied = {slot: new for slot, new in relocation.targets.items() if slot not in relocation.unreadable}
    now = store.log.entries(table, relocation.page_index)
    moved = {
        slot: (relocation.entries[slot][0], new)
        for slot, new in copied.items()
        if now.get(slot, (0, 0)) == relocation.entries[slot]
    }
    store.pool.release(new for slot, new in relocation.targets.items() if slot not in moved)
    # Also of a block that was replaced meanwhile, and whose place is free, its damage is no news.
    relocation.unreadable = {
        slot: error for slot, error in relocation.unreadable.items() if now.get(slot) == relocation.entries[slot]
    }
    if moved:
        store.relocate(table, relocation.page_index, moved)
    return len(moved)


def abandon(store: Store, relocation: Relocation) -> None:
    """Give the new blocks back: nothing was moved."""
    store.pool.release(relocation.targets.values())
    relocation.targets.clear()


def mover_lease(volume_id: VolumeId, column: int) -> MapId:
    """Name the lease that moved blocks of a column come from."""
    return MapId(map_id(volume_id) | MOVER | column)


def tables(store: Store) -> list[TableKey]:
    """List every table, also those of what is being removed."""
    found = []
    for volume_id in store.catalog.volumes:
        found.append(TableKey(volume_id))
        found += [TableKey(volume_id, s.generation) for s in store.catalog.snapshots(volume_id, removed=True)]
    return found


# Wishes


def leave(source: StorageId) -> Wish:
    """Everything on a storage volume moves off it."""

    def wish(volume: Volume, virtual_block: int, storage_id: StorageId) -> int | None:
        return _column(volume.stripe_row, virtual_block) if storage_id == source else None

    return wish


def follow_stripes(volume_id: VolumeId, planned: StripeRow | None = None) -> Wish:
    """A volume's blocks go where its newest stripe row says, or one that is only planned."""

    def wish(volume: Volume, virtual_block: int, storage_id: StorageId) -> int | None:
        row = planned or volume.stripe_row
        if volume.id != volume_id or row is None:
            return None
        column = _column(row, virtual_block)
        return column if row.columns[column] != storage_id else None

    return wish


def follow_rules(store: Store, volume_id: VolumeId) -> Wish:
    """A volume's blocks leave storage volumes that its placement rules do not allow."""
    allowed = {room.storage.id for room in store.space.candidates(map_id(volume_id))}

    def wish(volume: Volume, virtual_block: int, storage_id: StorageId) -> int | None:
        moves = volume.id == volume_id and storage_id not in allowed
        return _column(volume.stripe_row, virtual_block) if moves else None

    return wish


def _column(row: StripeRow | None, virtual_block: int) -> int:
    return virtual_block // row.unit_blocks % len(row.columns) if row is not None else 0
