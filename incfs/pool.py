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
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from uuid import UUID

from incfs.backing import Backing, File
from incfs.blocks import (
    address_runs,
    bit_mask,
    bit_set,
    clear_runs,
    find_clear_run,
    pack_address,
    set_runs,
    split_address,
)
from incfs.codec import checksum
from incfs.errors import BackingError, FormatError, ImageMismatch, IncfsError, NoSpace, StorageNotFound
from incfs.image import DATA_OFFSET_BYTES, AbsentImage, ImageHeader, read_header, write_header
from incfs.mirror import MirroredFile
from incfs.model import STALE_GROUPS, Address, Storage, StorageId

logger = logging.getLogger(__name__)

GROUP_BLOCKS = 32768
"""Blocks of one bitmap, 4 KiB of it."""
DEFAULT_EXTEND_BYTES = 64 << 20
PUNCH_BYTES = 65536
"""A checkpoint gives host space back in whole chunks of this size; what is freed in smaller pieces is
punched in the background, for it costs about 0.1 ms a piece."""
HOST_BLOCK_BYTES = 4096


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
        self.changed: dict[int, int] = {}
        """Group -> blocks that became live while a leg was away: what it lacks."""
        self.recent: list[dict[int, int]] = [{}, {}]
        """The same, of blocks that the last checkpoint but one did not have: a leg that fails may lack them."""
        self.host_device = self.host_free_bytes = self.host_total_bytes = 0
        self.state = "online"
        """online; or what is wrong with the image: missing, mismatch, truncated."""
        self.measure()

    def measure(self) -> None:
        """Learn from the file's length how far the image has grown."""
        self.grown_blocks = max(0, self.file.length_bytes() - DATA_OFFSET_BYTES) // self._block_bytes
        self.measure_host()

    def measure_host(self) -> None:
        """Learn how full the image's filesystem is.  Any thread."""
        self.host_device = self.file.host_device()
        self.host_free_bytes = self.file.host_free_bytes()
        self.host_total_bytes = self.file.host_total_bytes()

    @property
    def is_usable(self) -> bool:
        """Whether new blocks may come from it."""
        return self.state == "online" and not self.record.is_evacuating

    @property
    def path(self) -> Path:
        """Where the image is."""
        return self.file.path

    @property
    def mirror(self) -> MirroredFile | None:
        """Its legs, if it is mirrored."""
        return self.file if isinstance(self.file, MirroredFile) else None

    def descriptor(self) -> tuple[int | tuple[int, ...], int]:
        """Give the file descriptors of the image or its legs, and the offset of the first block's data."""
        mirror = self.mirror
        if mirror is None:
            return self.file.fileno(), DATA_OFFSET_BYTES
        return tuple(leg.fileno() for _, leg in mirror.written_legs()), DATA_OFFSET_BYTES

    def note_live(self, group_index: int, bits: int) -> None:
        """Remember new blocks for legs that are, or turn out to be, away."""
        if self.mirror is not None:
            self.recent[0][group_index] = self.recent[0].get(group_index, 0) | bits
            if self.mirror.stale:
                self.changed[group_index] = self.changed.get(group_index, 0) | bits

    def lack_recent(self) -> set[int]:
        """A leg failed: it may lack all that is recent.  Give the groups."""
        for recent in self.recent:
            for group_index, bits in recent.items():
                self.changed[group_index] = self.changed.get(group_index, 0) | bits
        return set(self.changed)

    def heal(self, block_index: int, expected: int | None) -> int | None:
        """Rewrite a block on legs that have it wrong; give how many, None when none has it right.  Any thread.

        Args:
            block_index: The block.
            expected: Its checksum; None when it is not known: then any leg that can be read is right.
        """
        if self.mirror is None:
            return None
        return self.mirror.heal(
            self._offset(block_index), self._block_bytes, lambda data: expected is None or checksum(data) == expected
        )

    @property
    def healed_blocks(self) -> int:
        """Blocks of legs that were rewritten since the pool was opened."""
        return 0 if self.mirror is None else self.mirror.healed_count

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

    def take(self, block_index: int, count: int, most_runs: int) -> list[tuple[int, int]]:
        """Lease up to ``count`` free blocks at or after a block in up to ``most_runs`` pieces: (first, blocks) of each.

        Cost: the bitmap of a group is changed once for all its pieces.
        """
        runs: list[tuple[int, int]] = []
        for group_index in range(block_index // GROUP_BLOCKS, -(-self.grown_blocks // GROUP_BLOCKS)):
            base = group_index * GROUP_BLOCKS
            self.reach(base + GROUP_BLOCKS)
            start = max(0, block_index - base)
            limit = min(GROUP_BLOCKS, self.grown_blocks - base)
            end = start
            for first, length in clear_runs(self.busy[group_index], start, limit):
                found = min(length, count)
                runs.append((base + first, found))
                end = first + found
                count -= found
                if not count or len(runs) == most_runs:
                    break
            taken = ~self.busy[group_index] & bit_mask(start, end - start)
            self.busy[group_index] |= taken
            self.busy_blocks += taken.bit_count()
            if not count or len(runs) == most_runs:
                break
        return runs

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
        self.measure_host()
        host_room = (self.host_free_bytes - reserve_bytes) // self._block_bytes
        block_count = min(block_count, room, host_room)
        if block_count <= 0:
            limit = "its capacity limit" if room <= 0 else "the reserve of its host filesystem"
            raise NoSpace(f"storage volume {self.record.id} ({self.file.path}) is at {limit}", storage=self.record.id)
        self.file.allocate(self._offset(self.grown_blocks), block_count * self._block_bytes)
        self.grown_blocks += block_count
        self.measure_host()

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
        self.retired: dict[StorageId, StorageVolume] = {}
        """Removed since the pool was opened."""
        self._cursors: dict[int, tuple[StorageId, int]] = {}
        self._freed: list[int] = []
        self._dirty_groups: set[tuple[StorageId, int]] = set()
        self._dirty_stale: set[tuple[StorageId, int]] = set()
        self._has_mirrors = False
        self.image_paths: Mapping[StorageId, Path] = {}
        """Images that are not where their records say."""
        self.frees_held = 0
        """While positive, freed blocks stay unused: somebody verifies a checkpoint's data."""
        self._quarantine: list[int] = []
        self._leftovers: dict[tuple[StorageId, int], int] = {}
        """Group -> freed blocks whose host space was not given back with a whole chunk."""

    def image_path(self, record: Storage) -> Path:
        """Resolve a storage volume's path."""
        return self.image_paths.get(record.id, self._directory / record.path)

    def leg_paths(self, record: Storage) -> list[Path]:
        """Resolve the paths of a storage volume's legs."""
        return [self.image_path(record), *(self._directory / path for path in record.mirrors)]

    def create_image(self, record: Storage) -> None:
        """Make the image files of a storage volume, with their headers.

        Durability: files, headers and names are durable on return.
        """
        for path in self.leg_paths(record):
            self.create_leg(record, path)

    def create_leg(self, record: Storage, path: Path) -> None:
        """Make one image file with its header.

        Durability: as ``create_image``.
        """
        file = self._backing.create(path)
        try:
            write_header(file, self._header(record))
        finally:
            file.close()
        self._backing.sync_directory(path.parent)

    def _header(self, record: Storage) -> ImageHeader:
        return ImageHeader(self._uuid, UUID(record.uuid), record.id, self._block_bytes)

    def attach(self, record: Storage) -> None:
        """Open the image, or the legs of a mirror, and prove that it is the one.

        A leg that is missing or another's is left behind, as long as a sound one is there.

        Raises:
            ImageMismatch: Missing, truncated, damaged, or of another storage volume.
        """
        self.volumes[record.id] = StorageVolume(record, self._open_image(record), self._block_bytes)

    def _open_image(self, record: Storage) -> File:
        paths = self.leg_paths(record)
        if len(paths) == 1:
            return self.open_leg(record, paths[0])
        legs, reasons = self._open_legs(record, paths)
        if all(leg is None or number in record.stale_legs for number, leg in enumerate(legs)):
            for leg in legs:
                if leg is not None:
                    leg.close()
            why = "; ".join(str(reason) for reason in reasons.values()) or "all are stale"
            raise ImageMismatch(f"storage volume {record.id}: no sound leg is there: {why}", storage=record.id)
        mirror = MirroredFile(paths[0], legs, record.stale_legs)
        mirror.failed.update({number: str(why) for number, why in reasons.items() if number in mirror.failed})
        self._has_mirrors = True
        return mirror

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
            volume.file = self._open_image(record)

    def _open_legs(self, record: Storage, paths: Sequence[Path]) -> tuple[list[File | None], dict[int, IncfsError]]:
        legs: list[File | None] = []
        reasons: dict[int, IncfsError] = {}
        for number, path in enumerate(paths):
            try:
                legs.append(self.open_leg(record, path))
            except (ImageMismatch, BackingError) as error:
                legs.append(None)
                reasons[number] = error
        return legs, reasons

    def open_leg(self, record: Storage, path: Path) -> File:
        """Open an image file and prove that it is of a storage volume.

        Raises:
            ImageMismatch: Missing, truncated, damaged, or of another storage volume.
        """
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
            header, expected = read_header(file), self._header(record)
            if header != expected:
                raise ImageMismatch(
                    f"storage volume {record.id}: {path} is the image of {header}, expected {expected}",
                    storage=record.id,
                )
            file.lock()  # a pool restored elsewhere over the same images would write into them, too
        except BaseException:
            file.close()
            raise
        return file

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
        for path in self.leg_paths(volume.record):
            self._backing.remove(path)
            self._backing.sync_directory(path.parent)
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
        addresses = list(addresses)
        for storage_id in self._set_live(addresses, live=True):
            self.volumes[storage_id].needs_sync = True
        for storage_id, group_index, members in _by_group(addresses) if self._has_mirrors else ():
            self.volumes[storage_id].note_live(group_index, bit_set(members, GROUP_BLOCKS))
            if self.volumes[storage_id].record.stale_legs:
                self._dirty_stale.add((storage_id, group_index))

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
        groups = {key: self.volumes[key[0]].live[key[1]] if key[0] in self.volumes else 0 for key in self._dirty_groups}
        for storage_id, group_index in self._dirty_stale:
            volume = self.volumes.get(storage_id)
            groups[storage_id, STALE_GROUPS + group_index] = (
                volume.changed.get(group_index, 0) if volume is not None else 0
            )
        for volume in self.volumes.values():
            volume.recent = [{}, volume.recent[0]]
        freed, self._freed, self._dirty_groups, self._dirty_stale = self._freed, [], set(), set()
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
        self._note_leftovers(freed)
        return self._hold(runs)

    def _hold(self, runs: list[tuple[StorageId, int, int]]) -> PunchPlan:
        """Let nothing be written to free runs until they are punched."""
        for storage_id, block_index, count in runs:
            self.volumes[storage_id].set_busy(block_index, count, busy=True)
            for group_index, mask in split_groups(block_index, count):
                self._leftovers[storage_id, group_index] = self._leftovers.get((storage_id, group_index), 0) & ~mask
        return PunchPlan(tuple(runs))

    def _note_leftovers(self, freed: list[int]) -> None:
        """Remember freed blocks beside others that are in use; smaller than the host's, nothing is won by them."""
        if self._block_bytes >= HOST_BLOCK_BYTES:
            for storage_id, group_index, members in _by_group(freed):
                before = self._leftovers.get((storage_id, group_index), 0)
                self._leftovers[storage_id, group_index] = before | bit_set(members, GROUP_BLOCKS)

    def plan_leftovers(self, limit: int) -> PunchPlan:
        """Choose up to ``limit`` runs of blocks that were freed one by one and are still free, to be punched too."""
        runs: list[tuple[StorageId, int, int]] = []
        for (storage_id, group_index), bits in list(self._leftovers.items()):
            volume = self.volumes.get(storage_id)
            free = bits & ~volume.busy[group_index] if volume is not None else 0
            self._leftovers[storage_id, group_index] = free
            for first, count in islice(set_runs(free), limit - len(runs)):
                runs.append((storage_id, group_start(group_index) + first, count))
            if not free:
                del self._leftovers[storage_id, group_index]
            if len(runs) >= limit:
                break
        return self._hold(runs)

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

    def measure_hosts(self) -> None:
        """Learn how full the images' filesystems are.  Any thread."""
        for volume in list(self.volumes.values()):
            if volume.state == "online":
                volume.measure_host()

    def used_blocks(self) -> int:
        """Live blocks of all storage volumes."""
        return sum(volume.live_blocks for volume in self.volumes.values())

    def close(self) -> None:
        """Close every image."""
        for volume in (*self.volumes.values(), *self.retired.values()):
            volume.file.close()
        self.volumes.clear()
        self.retired.clear()


def _by_group(addresses: Iterable[int]) -> Iterator[tuple[StorageId, int, list[int]]]:
    """Sort addresses into groups: a group's bit set is long, so it is changed once for all its members.

    Yields:
        (storage volume, group, indexes in the group).
    """
    rest = sorted(addresses)
    start = 0
    while start < len(rest):
        storage_id, block_index = split_address(rest[start])
        group_index = block_index // GROUP_BLOCKS
        base = pack_address(storage_id, group_index * GROUP_BLOCKS)
        end = bisect_left(rest, base + GROUP_BLOCKS, start)
        yield storage_id, group_index, [address - base for address in rest[start:end]]
        start = end
