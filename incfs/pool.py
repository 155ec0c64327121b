"""Storage volumes: image files, their free space, and which blocks are given out.

Owns the image files and the bitmaps of free blocks.  Knows nothing of virtual volumes: it
is asked for blocks near a cursor, and told which became committed or free.

A block is in one of these states:

    free      may be leased
    leased    given out, not committed: in ``busy`` only, so a crash makes it free
    live      a committed mapping points to it: in ``busy`` and ``live``
    freed     no mapping points to it, but the tables on disk may: in ``busy`` only, until
              a checkpoint has made the free durable (I3)

Invariants:
    1. ``live`` is a subset of ``busy``; only ``live`` is ever stored.
    2. Bit sets are immutable ints: a frozen one is a reference.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from incfs.backing import Backing, File
from incfs.blocks import address_runs, bit_mask, bit_set, find_clear_run, pack_address, split_address
from incfs.errors import FormatError, ImageMismatch, IncfsError, NoSpace, StorageNotFound
from incfs.image import DATA_OFFSET_BYTES, AbsentImage, ImageHeader, read_header, write_header
from incfs.model import Address, Storage, StorageId

logger = logging.getLogger(__name__)

GROUP_BLOCKS = 32768
"""Blocks of one bitmap, 4 KiB of it."""
DEFAULT_EXTEND_BYTES = 64 << 20
PUNCH_BYTES = 65536
"""Host space is given back in whole chunks of this size, so that images do not fragment."""


def group_start(group_index: int) -> int:
    """Give the first block of a group."""
    return group_index * GROUP_BLOCKS


def split_groups(block_index: int, count: int) -> Iterator[tuple[int, int]]:
    """Cut a run of blocks at group borders; yield (group index, its members as a bit set)."""
    while count:
        group_index, start = divmod(block_index, GROUP_BLOCKS)
        step = min(count, GROUP_BLOCKS - start)
        yield group_index, bit_mask(start, step)
        block_index += step
        count -= step


class StorageVolume:
    """One image file and its bitmaps.

    Concurrency: bitmaps belong to the owner thread; block reads, writes and syncs may run
    in any thread.
    """

    def __init__(self, record: Storage, file: File, block_bytes: int) -> None:
        self.record = record
        self.file = file
        self._block_bytes = block_bytes
        self.grown_blocks = 0
        self.live: list[int] = []
        self.busy: list[int] = []
        self.live_blocks = 0
        self.busy_blocks = 0
        self.needs_sync = False
        self.state = "online"
        """online; or what is wrong with the image: missing, mismatch, truncated."""
        self.measure()

    def measure(self) -> None:
        """Learn from the file's length how far the image has grown."""
        self.grown_blocks = max(0, self.file.length_bytes() - DATA_OFFSET_BYTES) // self._block_bytes

    @property
    def path(self) -> Path:
        """Where the image is."""
        return self.file.path

    def descriptor(self) -> tuple[int, int]:
        """Give the image's file descriptor, and the offset of the first block's data."""
        return self.file.fileno(), DATA_OFFSET_BYTES

    def read_blocks(self, block_index: int, block_count: int) -> bytes:
        """Read whole blocks, waiting for the disk."""
        return self.file.pread(self._offset(block_index), block_count * self._block_bytes)

    def read_blocks_cached(self, block_index: int, block_count: int) -> bytes | None:
        """Read whole blocks if the page cache has them, else None."""
        return self.file.pread_cached(self._offset(block_index), block_count * self._block_bytes)

    def write_blocks(self, block_index: int, data: bytes | memoryview) -> None:
        """Write whole blocks to the page cache; ``sync`` makes them durable once they are committed."""
        self.file.pwrite(self._offset(block_index), data)

    def sync(self) -> None:
        """Make every block written before this call durable."""
        self.needs_sync = False
        self.file.sync()

    def load(self, group_index: int, bits: int) -> None:
        """Take over a stored bitmap at open."""
        self.reach((group_index + 1) * GROUP_BLOCKS)
        self.live[group_index] = self.busy[group_index] = bits
        self.live_blocks += bits.bit_count()
        self.busy_blocks += bits.bit_count()

    def reach(self, block_count: int) -> None:
        """Have bitmaps for at least that many blocks."""
        while len(self.live) * GROUP_BLOCKS < block_count:
            self.live.append(0)
            self.busy.append(0)

    def find_free(self, block_index: int, count: int) -> tuple[int, int]:
        """Find the first free run at or after a block: (first, at most ``count``); 0 if none."""
        for group_index in range(block_index // GROUP_BLOCKS, -(-self.grown_blocks // GROUP_BLOCKS)):
            base = group_index * GROUP_BLOCKS
            self.reach(base + GROUP_BLOCKS)
            start = max(0, block_index - base)
            limit = min(GROUP_BLOCKS, self.grown_blocks - base)
            first, found = find_clear_run(self.busy[group_index], start, limit)
            if found:
                return base + first, min(found, count)
        return 0, 0

    def set_busy(self, block_index: int, count: int, *, busy: bool) -> None:
        """Lease blocks, or make them free."""
        self.busy_blocks += self._change(self.busy, block_index, count, present=busy)

    def set_live(self, group_index: int, members: list[int], *, live: bool) -> None:
        """Commit blocks of one group, or take them out of the committed set."""
        self.reach((group_index + 1) * GROUP_BLOCKS)
        self.live_blocks += self._change_members(self.live, group_index, members, present=live)

    def release(self, group_index: int, members: list[int]) -> None:
        """Make blocks of one group free."""
        self.busy_blocks += self._change_members(self.busy, group_index, members, present=False)

    @staticmethod
    def _change_members(groups: list[int], group_index: int, members: list[int], *, present: bool) -> int:
        mask = bit_set(members, GROUP_BLOCKS)
        assert mask.bit_count() == len(members), f"a block of group {group_index} was given twice"
        before = groups[group_index] & mask
        assert before == (0 if present else mask), f"blocks of group {group_index} are already in that state"
        groups[group_index] ^= mask
        return len(members) if present else -len(members)

    @staticmethod
    def _change(groups: list[int], block_index: int, count: int, *, present: bool) -> int:
        for group_index, mask in split_groups(block_index, count):
            before = groups[group_index] & mask
            assert before == (0 if present else mask), f"blocks at {block_index} are already in that state"
            groups[group_index] ^= mask
        return count if present else -count

    def is_busy(self, block_index: int, count: int) -> bool:
        """Tell whether any of these blocks, at most a group's worth of them, is given out."""
        for block in (block_index, block_index + count - 1):
            group_index = block // GROUP_BLOCKS
            base = group_index * GROUP_BLOCKS
            start, stop = max(block_index, base), min(block_index + count, base + GROUP_BLOCKS)
            if group_index < len(self.busy) and self.busy[group_index] & bit_mask(start - base, stop - start):
                return True
        return False

    def highest_live_block(self) -> int:
        """Give the highest committed block, -1 without any."""
        for group_index in range(len(self.live) - 1, -1, -1):
            if self.live[group_index]:
                return group_index * GROUP_BLOCKS + self.live[group_index].bit_length() - 1
        return -1

    def require_grown(self, group_index: int, bits: int) -> None:
        """Refuse a bitmap that has blocks behind the image's end.

        Raises:
            ImageMismatch: It has.
        """
        highest = group_start(group_index) + bits.bit_length() - 1
        if highest >= self.grown_blocks:
            raise self.truncated(highest)

    def truncated(self, block_index: int) -> ImageMismatch:
        """Say that the image ends before a block that is in use."""
        return ImageMismatch(
            f"storage volume {self.record.id}: {self.file.path} is truncated to "
            f"{self.file.length_bytes()} bytes, but block {block_index} is in use",
            storage=self.record.id,
        )

    def grow(self, block_count: int, *, reserve_bytes: int) -> None:
        """Make the image longer by up to ``block_count`` blocks.  Any thread.

        Raises:
            NoSpace: At the capacity limit, or the host would have less than ``reserve_bytes`` left.
        """
        room = self.record.capacity_blocks - self.grown_blocks
        host_room = (self.file.host_free_bytes() - reserve_bytes) // self._block_bytes
        block_count = min(block_count, room, host_room)
        if block_count <= 0:
            limit = "its capacity limit" if room <= 0 else "the reserve of its host filesystem"
            raise NoSpace(f"storage volume {self.record.id} ({self.file.path}) is at {limit}", storage=self.record.id)
        self.file.allocate(self._offset(self.grown_blocks), block_count * self._block_bytes)
        self.grown_blocks += block_count

    def punch(self, block_index: int, count: int) -> None:
        """Give the host space of free blocks back.  Any thread."""
        self.file.punch(self._offset(block_index), count * self._block_bytes)

    def _offset(self, block_index: int) -> int:
        return DATA_OFFSET_BYTES + block_index * self._block_bytes


@dataclass(frozen=True, slots=True)
class PunchPlan:
    """Freed runs whose host space is given back before they become free."""

    runs: tuple[tuple[StorageId, int, int], ...]


class Pool:
    """Every storage volume of one pool.

    Concurrency: the owner thread, unless a method says otherwise.
    """

    def __init__(self, directory: Path, uuid: UUID, block_bytes: int, backing: Backing) -> None:
        self._directory = directory
        self._uuid = uuid
        self._block_bytes = block_bytes
        self._backing = backing
        self.volumes: dict[StorageId, StorageVolume] = {}
        self._cursors: dict[int, tuple[StorageId, int]] = {}
        self._freed: list[int] = []
        self._dirty_groups: set[tuple[StorageId, int]] = set()
        self.image_paths: Mapping[StorageId, Path] = {}
        """Images that are not where their records say."""
        self.frees_held = 0
        """While positive, freed blocks stay unused: somebody verifies a checkpoint's data."""
        self._quarantine: list[int] = []

    def image_path(self, record: Storage) -> Path:
        """Resolve a storage volume's path."""
        return self.image_paths.get(record.id, self._directory / record.path)

    def create_image(self, record: Storage) -> None:
        """Make an image file with its header.

        Durability: file, header and name are durable on return.
        """
        path = self.image_path(record)
        file = self._backing.create(path)
        try:
            write_header(file, ImageHeader(self._uuid, UUID(record.uuid), record.id, self._block_bytes))
        finally:
            file.close()
        self._backing.sync_directory(path.parent)

    def attach(self, record: Storage) -> None:
        """Open an image and prove that it is the one.

        Raises:
            ImageMismatch: Missing, truncated, damaged, or of another storage volume.
        """
        path = self.image_path(record)
        if os.path.lexists(path) and not os.path.isfile(path):  # opening a device may do harm, a pipe may hang
            raise ImageMismatch(f"storage volume {record.id}: {path} is not an ordinary file", storage=record.id)
        if not os.path.exists(path):
            raise ImageMismatch(
                f"storage volume {record.id}: image {path} is missing; mount its disk or restore it; "
                f"to read what is on the others, mount with -o degraded",
                storage=record.id,
            )
        file = self._backing.open(path)
        try:
            header = read_header(file)
            expected = ImageHeader(self._uuid, UUID(record.uuid), record.id, self._block_bytes)
            if header != expected:
                raise ImageMismatch(
                    f"storage volume {record.id}: {path} is the image of {header}, expected {expected}",
                    storage=record.id,
                )
            file.lock()  # a pool restored elsewhere over the same images would write into them, too
            self.volumes[record.id] = StorageVolume(record, file, self._block_bytes)
        except BaseException:
            file.close()
            raise

    def attach_unproved(self, record: Storage) -> None:
        """Open an image whatever its header says: checksums tell what in it is sound.

        Raises:
            BackingError: It cannot be opened.
        """
        self.volumes[record.id] = StorageVolume(record, self._backing.open(self.image_path(record)), self._block_bytes)

    def attach_absent(self, record: Storage, reason: IncfsError) -> None:
        """Have the storage volume without its image: its blocks cannot be read."""
        path = self.image_path(record)
        volume = StorageVolume(record, AbsentImage(path, reason), self._block_bytes)
        volume.state = "mismatch" if os.path.exists(path) else "missing"
        self.volumes[record.id] = volume

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

    def volume(self, storage_id: StorageId) -> StorageVolume:
        """Look up a storage volume.

        Raises:
            StorageNotFound: No such id.
        """
        found = self.volumes.get(storage_id)
        if found is None:
            raise StorageNotFound(f"there is no storage volume {storage_id}", storage=storage_id)
        return found

    def allocate(self, cursor_key: int, count: int) -> tuple[Address, int] | None:
        """Lease free blocks, as contiguous as possible, behind the last lease of the same key.

        Returns:
            (first address, number of blocks), or None when nothing is free.
        """
        storage_id, position = self._cursors.get(cursor_key, (StorageId(0), 0))
        candidates = [(storage_id, position)] if storage_id in self.volumes else []
        candidates += [(other, 0) for other in sorted(self.volumes)]
        for candidate, start in candidates:
            volume = self.volumes[candidate]
            if volume.busy_blocks >= volume.grown_blocks:
                continue
            first, found = volume.find_free(start, count)
            if found:
                volume.set_busy(first, found, busy=True)
                self._cursors[cursor_key] = candidate, first + found
                return pack_address(candidate, first), found
        return None

    def forget(self, cursor_key: int) -> None:
        """Drop what ``allocate`` remembers of a key that will not ask again."""
        self._cursors.pop(cursor_key, None)

    def release(self, addresses: Iterable[int]) -> None:
        """Take back leased blocks that no commit mentions: they are free at once."""
        for storage_id, group_index, members in _by_group(addresses):
            self.volumes[storage_id].release(group_index, members)

    def commit(self, addresses: Iterable[int]) -> None:
        """Mark leased blocks as live: a mapping of the current batch points to them.

        Their images need a sync from now on, whoever wrote them.
        """
        for storage_id in self._set_live(addresses, live=True):
            self.volumes[storage_id].needs_sync = True

    def free(self, addresses: Iterable[int]) -> None:
        """Mark live blocks as freed; the next checkpoint makes them free."""
        addresses = list(addresses)
        self._set_live(addresses, live=False)
        self._freed += addresses

    def _set_live(self, addresses: Iterable[int], *, live: bool) -> set[StorageId]:
        changed = set()
        for storage_id, group_index, members in _by_group(addresses):
            self.volumes[storage_id].set_live(group_index, members, live=live)
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
            volume.set_busy(block_index, count, busy=True)

    @property
    def freed_blocks(self) -> int:
        """Blocks that wait for a checkpoint to become free."""
        return len(self._freed)

    def freeze(self) -> tuple[dict[tuple[StorageId, int], int], list[int]]:
        """Start a checkpoint: the changed bitmaps to store, and the blocks it will make free."""
        groups = {key: self.volumes[key[0]].live[key[1]] for key in self._dirty_groups}
        freed, self._freed, self._dirty_groups = self._freed, [], set()
        return groups, freed

    def plan_reuse(self, freed: list[int]) -> PunchPlan:
        """End a checkpoint: make its freed blocks free, but for whole chunks to punch first.

        The chunks stay busy until ``punched``, so that nothing is written into them meanwhile.
        """
        freed, self._quarantine = self._quarantine + freed, []
        if self.frees_held:
            self._quarantine = freed
            return PunchPlan(())
        self.release(freed)
        chunk = max(1, PUNCH_BYTES // self._block_bytes)
        runs = []
        for first, count in address_runs({address // chunk for address in freed}):
            storage_id, block_index = split_address(first * chunk)
            runs += self._free_chunks(storage_id, block_index, count * chunk, chunk)
        for storage_id, block_index, count in runs:
            self.volumes[storage_id].set_busy(block_index, count, busy=True)
        return PunchPlan(tuple(runs))

    def _free_chunks(
        self, storage_id: StorageId, block_index: int, count: int, chunk: int
    ) -> list[tuple[StorageId, int, int]]:
        volume = self.volumes[storage_id]
        end = min(block_index + count, volume.grown_blocks)
        runs: list[tuple[StorageId, int, int]] = []
        for start in range(block_index, end, chunk):
            length = min(chunk, end - start)
            if volume.find_free(start, length) != (start, length):
                continue
            if runs and runs[-1][1] + runs[-1][2] == start:
                runs[-1] = (storage_id, runs[-1][1], runs[-1][2] + length)
            else:
                runs.append((storage_id, start, length))
        return runs

    def punch(self, plan: PunchPlan) -> None:
        """Give host space back, where the host lets us: the blocks are free in any case.  Any thread."""
        for storage_id, block_index, count in plan.runs:
            try:
                self.volumes[storage_id].punch(block_index, count)
            except IncfsError as error:
                logger.warning("freed space is not given back to the host: %s", error)

    def punched(self, plan: PunchPlan) -> None:
        """Make punched blocks free."""
        for storage_id, block_index, count in plan.runs:
            self.volumes[storage_id].set_busy(block_index, count, busy=False)

    def sync(self) -> None:
        """Make every block written before this call durable.  Any thread."""
        for volume in list(self.volumes.values()):
            if volume.needs_sync:
                volume.sync()

    def used_blocks(self) -> int:
        """Live blocks of all storage volumes."""
        return sum(volume.live_blocks for volume in self.volumes.values())

    def close(self) -> None:
        """Close every image."""
        for volume in self.volumes.values():
            volume.file.close()
        self.volumes.clear()


def _by_group(addresses: Iterable[int]) -> Iterator[tuple[StorageId, int, list[int]]]:
    """Sort addresses into groups: a group's bit set is long, so it is changed once for all its members.

    Yields:
        (storage volume, group, indexes in the group).
    """
    groups: dict[tuple[StorageId, int], list[int]] = {}
    for address in addresses:
        storage_id, block_index = split_address(address)
        group_index, member = divmod(block_index, GROUP_BLOCKS)
        groups.setdefault((storage_id, group_index), []).append(member)
    for (storage_id, group_index), members in groups.items():
        yield storage_id, group_index, members
