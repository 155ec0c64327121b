"""Heals damaged blocks of snapshots from a stream that carries the same snapshots.

A block is written again in place, and only with data whose checksum is the one that its mapping has
had all along: what was written once is there again, nothing is changed.  So I1 stands: no
reader can see anything but an error before, and the right data after.
"""

from functools import partial

from incfs import ranges
from incfs.blocks import split_address
from incfs.codec import checksum
from incfs.errors import BackingError, BaseMismatch, Damaged
from incfs.extents import page_entries
from incfs.model import HOLE, PAGE_BLOCKS, MapId, Volume
from incfs.receiver import Work
from incfs.store import Store
from incfs.stream.records import Record, SnapBegin, SnapEnd, StreamEnd, Write


class Healer:
    """One run over one volume.

    Args:
        store: The pool.
        volume: Whose snapshots are compared with the stream's, by UUID.
    """

    def __init__(self, store: Store, volume: Volume) -> None:
        store.require_writable()
        self._store = store
        self._volume = volume
        self._table: MapId | None = None
        self.snapshots: list[str] = []
        """Names of the snapshots that were compared."""
        self.healed_blocks = 0
        self.lost_blocks = 0
        """Damaged blocks for which the stream has other data than was here."""

    def accept(self, record: Record) -> Work:
        """Take the next record of a proved stream.

        Raises:
            BaseMismatch: At the end, if the stream carries no snapshot of the volume.
        """
        match record:
            case SnapBegin():
                self._begin(record)
            case Write(offset, data) if self._table is not None:
                if not (yield partial(_is_sound, self._store, self._table, offset, len(data))):
                    yield from self._heal_range(self._table, offset, data)
            case SnapEnd():
                self._table = None
            case StreamEnd() if not self.snapshots:
                raise BaseMismatch(f"the stream carries no snapshot that volume {self._volume.name} has")

    def _begin(self, snap: SnapBegin) -> None:
        for known in self._store.catalog.snapshots(self._volume.id):
            if known.uuid == snap.link.uuid:
                self._table = known.map_id
                self.snapshots.append(known.name)

    def _heal_range(self, table: MapId, offset_bytes: int, data: bytes) -> Work:
        block, end = self._store.block_bytes, offset_bytes + len(data)
        is_last = end == self._store.catalog.size_bytes(table)
        for index in range(-(-offset_bytes // block), -(-end // block) if is_last else end // block):
            start = index * block - offset_bytes
            yield partial(self._heal_block, table, index, data[start : start + block].ljust(block, b"\0"))

    def _heal_block(self, table: MapId, block_index: int, data: bytes, wait: bool) -> None:
        store, block = self._store, self._store.block_bytes
        store.absorb()
        page, slot = divmod(block_index, PAGE_BLOCKS)
        address, expected = page_entries(store, table, page).get(slot, (0, 0))
        if address <= HOLE or _is_sound(store, table, block_index * block, block, wait):
            return
        storage_id, stored_index = split_address(address)
        if checksum(data) != expected:
            self.lost_blocks += 1
            return
        storage = store.pool.volume(storage_id)
        storage.write_blocks(stored_index, data)
        storage.note_written()
        self.healed_blocks += 1


def _is_sound(store: Store, table: MapId, offset_bytes: int, length_bytes: int, wait: bool) -> bool:
    try:
        ranges.read(store, table, offset_bytes, length_bytes, wait=wait)
    except (Damaged, BackingError):
        return False
    return True
