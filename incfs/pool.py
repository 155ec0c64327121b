"""The storage volumes of a pool: which blocks are given out, and to whom they come back.

Knows nothing of virtual volumes: it is asked for blocks near a cursor, and told which became
committed or free.
"""

import os
from array import array
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from uuid import UUID

from incfs.backing import Backing, File, begun
from incfs.blocks import address_runs, pack_address, split_address
from incfs.epoch import Stamp
from incfs.errors import FormatError, IncfsError, StorageNotFound
from incfs.groups import by_group, split_groups
from incfs.image import AbsentImage
from incfs.images import Images
from incfs.model import STALE_GROUPS, Address, Storage, StorageId
from incfs.parts import Part
from incfs.reuse import Reuse
from incfs.storage import StorageVolume

DEFAULT_EXTEND_BYTES = 64 << 20


class Pool:
    """Every storage volume of one pool.

    Concurrency: the owner thread, unless a method says otherwise.
    """

    def __init__(self, directory: Path, uuid: UUID, block_bytes: int, backing: Backing) -> None:
        self._block_bytes = block_bytes
        self.images = Images(directory, uuid, block_bytes, backing)
        self.volumes: dict[StorageId, StorageVolume] = {}
        self.retired: dict[StorageId, StorageVolume] = {}
        """Removed since the pool was opened."""
        self.reuse = Reuse(self.volumes, block_bytes)
        """What becomes of freed blocks."""
        self._cursors: dict[int, tuple[StorageId, int]] = {}
        self._freed = array("Q")
        self._dirty_groups: set[tuple[StorageId, int]] = set()
        self._dirty_stale: set[tuple[StorageId, int]] = set()
        self._has_mirrors = False

    def attach(self, record: Storage) -> None:
        """Open the image, or the legs of a mirror, and prove that it is the one.

        A leg that is missing or another's is left behind, as long as a sound one is there.

        Raises:
            ImageMismatch: Missing, truncated, damaged, or of another storage volume.
        """
        self.add(self.open(record))

    def open(self, record: Storage) -> StorageVolume:
        """Do what of ``attach`` waits for the host.  Any thread; ``add`` is what is left.

        Raises:
            ImageMismatch: As ``attach``.
        """
        return StorageVolume(record, self.images.open(record), self._block_bytes)

    def add(self, volume: StorageVolume) -> None:
        """Have a storage volume that was opened."""
        self._has_mirrors |= volume.mirror is not None
        self.volumes[volume.record.id] = volume

    def _add(self, record: Storage, file: File) -> StorageVolume:
        volume = StorageVolume(record, file, self._block_bytes)
        self.add(volume)
        return volume

    def attach_unproved(self, record: Storage) -> None:
        """Open an image whatever its header says: checksums tell what in it is sound.

        Raises:
            BackingError: It cannot be opened.
        """
        self._add(record, self.images.open_unproved(record))

    def attach_absent(self, record: Storage, reason: IncfsError) -> None:
        """Have the storage volume without its image: its blocks cannot be read."""
        path = self.images.path(record)
        self._add(record, AbsentImage(path, reason)).state = "mismatch" if os.path.exists(path) else "missing"

    def renew_replayed(self, record: Storage) -> None:
        """Let a record that the journal has rule an attached storage volume: its legs may be others, or stale.

        Raises:
            ImageMismatch: As ``attach``.
        """
        volume = self.volumes[record.id]
        is_changed = (volume.record.leg_paths, volume.record.stale_legs) != (record.leg_paths, record.stale_legs)
        self.renew(record)
        if is_changed and volume.mirror is not None:
            volume.file.close()
            volume.file = self.images.open(record)

    def verify_lengths(self) -> None:
        """Refuse images that end before their last live block.

        Raises:
            ImageMismatch: One was truncated; its state says so.
        """
        for volume in self.volumes.values():
            volume.measure()
            if volume.state == "online" and volume.highest_live_block() >= volume.grown_blocks:
                volume.state = "truncated"
        for volume in self.volumes.values():
            if volume.state == "truncated":
                raise volume.truncated(volume.highest_live_block())

    def retire(self, storage_id: StorageId) -> None:
        """Have a storage volume no more; reads that are under way still find its file."""
        volume = self.volumes.pop(storage_id, None)
        if volume is not None:
            self.retired[storage_id] = volume

    def delete_image(self, storage_id: StorageId) -> None:
        """Delete the image of a retired storage volume.  Any thread.

        Durability: its name is gone on return.
        """
        volume = self.retired[storage_id]
        self.images.delete(volume.record)
        volume.file.truncate(0)  # its space comes back although it stays open

    def volume(self, storage_id: StorageId) -> StorageVolume:
        """Look up a storage volume.

        Raises:
            StorageNotFound: No such id.
        """
        found = self.volumes.get(storage_id)
        if found is None:
            raise StorageNotFound(f"there is no storage volume {storage_id}", storage=storage_id)
        return found

    def allocate(
        self, cursor_key: int, count: int, storage_ids: Sequence[StorageId] | None = None, *, most_runs: int = 1
    ) -> list[tuple[Address, int]]:
        """Lease free blocks of one storage volume, as contiguous as possible, behind the last lease of the same key.

        Args:
            cursor_key: Whose lease it is.
            count: At most so many.
            storage_ids: Where they may come from, the first to take first; all by default.
            most_runs: How many pieces they may be in.

        Returns:
            (first address, number of blocks) of each piece; nothing when nothing is free.
        """
        storage_id, position = self._cursors.get(cursor_key, (StorageId(0), 0))
        allowed = sorted(self.volumes) if storage_ids is None else storage_ids
        candidates = [(storage_id, position)] if storage_id in allowed else []
        candidates += [(other, 0) for other in allowed]
        for candidate, start in candidates:
            volume = self.volumes[candidate]
            runs = volume.take(start, count, most_runs) if volume.busy_blocks < volume.grown_blocks else []
            if runs:
                self._cursors[cursor_key] = candidate, runs[-1][0] + runs[-1][1]
                return [(pack_address(candidate, first), found) for first, found in runs]
        return []

    def doubt(self) -> None:
        """Give no free block out before its host was asked: what was given back to it is not recorded (I15)."""
        for volume in self.volumes.values():
            if volume.state == "online":
                volume.doubt()

    def forget(self, cursor_key: int) -> None:
        """Drop what ``allocate`` remembers of a key that will not ask again."""
        self._cursors.pop(cursor_key, None)

    def release(self, addresses: Iterable[int]) -> None:
        """Take back leased blocks that no commit mentions: they are free at once."""
        for storage_id, group_index, bits in by_group(addresses):
            self.volumes[storage_id].set_busy(group_index, bits, busy=False)

    def commit(self, addresses: Iterable[int]) -> None:
        """Mark leased blocks as live: a mapping of the current batch points to them.

        Their images need a sync from now on, whoever wrote them.
        """
        addresses = array("Q", addresses)
        for storage_id in self._set_live(addresses, live=True):
            self.volumes[storage_id].note_written()
        for storage_id, group_index, bits in by_group(addresses) if self._has_mirrors else ():
            self.volumes[storage_id].note_live(group_index, bits)
            if self.volumes[storage_id].record.stale_legs:
                self._dirty_stale.add((storage_id, group_index))

    def free(self, addresses: Iterable[int]) -> None:
        """Mark live blocks as freed; the next checkpoint makes them free."""
        addresses = array("Q", addresses)
        self._set_live(addresses, live=False)
        self._freed += addresses

    def _set_live(self, addresses: Iterable[int], *, live: bool) -> set[StorageId]:
        changed = set()
        for storage_id, group_index, bits in by_group(addresses):
            self.volumes[storage_id].set_live(group_index, bits, live=live)
            self._dirty_groups.add((storage_id, group_index))
            changed.add(storage_id)
        return changed

    def adopt(self, addresses: Iterable[int]) -> None:
        """Mark blocks as leased that a replayed journal record mentions."""
        for first, count in address_runs(addresses):
            storage_id, block_index = split_address(first)
            volume = self.volume(storage_id)
            if block_index + count > volume.record.capacity_blocks or volume.is_busy(block_index, count):
                raise FormatError(
                    f"the journal gives out blocks {block_index}+{count} of storage volume {storage_id}, "
                    f"which are in use or do not exist",
                    storage=storage_id,
                )
            volume.reach(block_index + count)
            for group_index, bits in split_groups(block_index, count):
                volume.set_busy(group_index, bits, busy=True)

    @property
    def dirty_group_count(self) -> int:
        """How many bitmaps the next checkpoint stores."""
        return len(self._dirty_groups) + len(self._dirty_stale)

    @property
    def freed_blocks(self) -> int:
        """Blocks that wait for a checkpoint to become free."""
        return len(self._freed)

    def freeze(self) -> tuple[dict[tuple[StorageId, int], int], "array[int]"]:
        """Start a checkpoint: the changed bitmaps to store, and the blocks it will make free."""
        groups = {key: self.volumes[key[0]].live[key[1]] if key[0] in self.volumes else 0 for key in self._dirty_groups}
        for storage_id, group_index in self._dirty_stale:
            volume = self.volumes.get(storage_id)
            groups[storage_id, STALE_GROUPS + group_index] = (
                volume.changed.get(group_index, 0) if volume is not None else 0
            )
        for volume in self.volumes.values():
            volume.recent = [{}, volume.recent[0]]
        freed, self._freed, self._dirty_groups, self._dirty_stale = self._freed, array("Q"), set(), set()
        return groups, freed

    def load_stale(self, storage_id: StorageId, group_index: int, bits: int) -> None:
        """Take over what was stored of the blocks that a leg lacks."""
        self.volumes[storage_id].changed[group_index] = bits

    def renew(self, record: Storage) -> None:
        """Let a storage volume's record be this; when no leg is stale any more, nothing is lacking."""
        volume = self.volumes[record.id]
        had_stale, volume.record = bool(volume.record.stale_legs), record
        if record.stale_legs and not had_stale:
            self._dirty_stale |= {(record.id, group_index) for group_index in volume.lack_recent()}
        if had_stale and not record.stale_legs:
            self._dirty_stale |= {(record.id, group_index) for group_index in volume.changed}
            volume.changed = {}

    def lack_everything(self, storage_id: StorageId) -> None:
        """A leg is new and empty: it lacks every live block."""
        volume = self.volumes[storage_id]
        volume.changed = {group_index: bits for group_index, bits in enumerate(volume.live) if bits}
        self._dirty_stale |= {(storage_id, group_index) for group_index in volume.changed}

    def sync(self) -> None:
        """Make every block written before this call durable, on all images side by side.  Any thread."""
        volumes = [volume for volume in list(self.volumes.values()) if volume.needs_sync]
        with begun([volume.sync for volume in volumes], side_by_side=all(v.file.waits for v in volumes)) as ends:
            for end in ends:
                end()

    def sync_stamped(self, stamp: Stamp) -> None:
        """Make every block written before this call durable, and a stamp on every image and sound leg.  Any thread."""
        volumes = [volume for volume in list(self.volumes.values()) if volume.state == "online"]
        works = [partial(volume.sync_stamped, stamp) for volume in volumes]
        with begun(works, side_by_side=all(v.file.waits for v in volumes)) as ends:
            for end in ends:
                end()

    def write_stamps(self, stamp: Stamp) -> None:
        """Write what ``sync_stamped`` will make durable.  Any thread.

        Raises:
            NoSpace: A host has no room; it may be tried again.
        """
        for volume in list(self.volumes.values()):
            if volume.state == "online":
                volume.write_stamp(stamp)

    def parts(self) -> list[Part]:
        """List the images and the sound legs."""
        found = []
        for storage_id, volume in list(self.volumes.items()):
            legs = [(0, volume.file)] if volume.mirror is None else volume.mirror.sound_legs()
            found += [Part(storage_id, number, file) for number, file in legs]
        return found

    def used_blocks(self) -> int:
        """Live blocks of all storage volumes."""
        return sum(volume.live_blocks for volume in self.volumes.values())

    def close(self) -> None:
        """Close every image."""
        self.images.close_kept()
        for volume in (*self.volumes.values(), *self.retired.values()):
            volume.file.close()
        self.volumes.clear()
        self.retired.clear()
