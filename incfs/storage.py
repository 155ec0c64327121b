"""A storage volume: one image file, or the legs of a mirror, and the bitmaps of its blocks.

A block is in one of these states:

    free      may be leased: the host's space is behind it
    unbacked  nobody has it, and the host's space must be asked for before it is free: in ``busy`` and ``unbacked``
    leased    given out, not committed: in ``busy`` only, so a crash makes it free
    live      a committed mapping points to it: in ``busy`` and ``live``
    freed     no mapping points to it, but the tables on disk may: in ``busy`` only, until
              a checkpoint has made the free durable (I3)

Invariants:
    1. ``live`` is a subset of ``busy``; only ``live`` is ever stored.
    2. Bit sets are immutable ints: a frozen one is a reference.
    3. ``unbacked`` is a subset of ``busy`` without ``live``: what is leased has the host's space (I15).
"""

import errno
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from incfs import groups
from incfs.backing import File
from incfs.blocks import bit_mask, clear_runs
from incfs.codec import checksum
from incfs.epoch import NEVER, Stamp
from incfs.errors import ImageMismatch, NoSpace
from incfs.groups import group_start, split_groups
from incfs.image import DATA_OFFSET_BYTES, write_stamp
from incfs.mirror import MirroredFile
from incfs.model import Storage
from incfs.unbacked import Run, Unbacked

_ALLOCATE_BYTES = 4 << 20
"""Reserved on the host at once: nobody writes to the image meanwhile, which a filesystem in memory fills with zeros."""

_PROBE_BYTES = 65536
"""The same where the host is short of space: what has it, and is asked for beside what has none, goes back with it."""


class Host(NamedTuple):
    """What the filesystem of an image, or of one leg, said at the last look."""

    device: int
    directory: Path
    free_bytes: int
    total_bytes: int
    allocated_bytes: int
    """What the image, or the leg, occupies there."""


Reserve = Callable[[Host], int]
"""Says how many bytes must stay free on a host."""


@dataclass(slots=True)
class Backed:
    """What became of unbacked blocks for which host space was asked."""

    ready: list[Run] = field(default_factory=list)
    """They have it."""
    hollow: list[Run] = field(default_factory=list)
    """They have none, and it was not to be had."""
    refusal: NoSpace | None = None
    """Why."""


def _judge(expected: int | None) -> Callable[[bytes], bool]:
    return lambda data: expected is None or checksum(data) == expected


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
        self.unbacked = Unbacked()
        self._limit_blocks: int | None = None
        """The host allows no longer file: found out when it refused one."""
        self._must_prove = False
        """The host refused to write what it had reserved: only what was written once is taken for its space."""
        self.refused_bytes = 0
        """The host had said that it has so much when it refused to give any; 0 when it gave what was asked last."""
        self._written_count = self._synced_count = 0
        self.changed: dict[int, int] = {}
        """Group -> blocks that became live while a leg was away: what it lacks."""
        self.recent: list[dict[int, int]] = [{}, {}]
        """The same, of blocks that the last checkpoint but one did not have: a leg that fails may lack them."""
        self.hosts: Sequence[Host] = ()
        """Of the image, or of each leg that is written, by the last look; a host that does not answer must not keep
        those waiting who only ask how full it is."""
        self._legs_on = Counter[int]()
        """Device -> how many of them are on it."""
        self.allocated_bytes = 0
        """What the image, or all legs, occupied then."""
        self.is_silent = False
        """Whether its host has not answered for some time."""
        self.attached_legs: list[int] = []
        """The legs whose descriptors the data plane has, in that order; some may have been left behind since."""
        self.state = "online"
        """online; or what is wrong with the image: missing, mismatch, truncated."""
        self.measure()

    def measure(self) -> None:
        """Learn from the file's length how far the image has grown."""
        self.grown_blocks = max(0, self.file.length_bytes() - DATA_OFFSET_BYTES) // self._block_bytes
        self.measure_host()

    def measure_host(self) -> None:
        """Learn how full the filesystems of the image are.  Any thread; it may be one that waits for ever."""
        files = [self.file] if self.mirror is None else [leg for _, leg in self.mirror.written_legs()]
        self.hosts = [
            Host(f.host_device(), f.path.parent, f.host_free_bytes(), f.host_total_bytes(), f.allocated_bytes())
            for f in files
        ]
        self._legs_on = Counter(host.device for host in self.hosts)
        self.allocated_bytes = self.file.allocated_bytes()

    @property
    def host_free_bytes(self) -> int:
        """What the host with the least had free at the last look."""
        return min((host.free_bytes for host in self.hosts), default=0)

    def host_room(self, reserve: Reserve, taken: Mapping[int, int] | None = None) -> int:
        """Tell how many bytes each leg can still get, by the last look.

        Args:
            reserve: What must stay free.
            taken: Device -> bytes that others will have taken by then.
        """
        least: int | None = None
        for host in self.hosts:
            others = taken.get(host.device, 0) if taken else 0
            room = max(0, host.free_bytes - reserve(host) - others) // self._legs_on[host.device]
            least = room if least is None else min(least, room)
        return least or 0

    @property
    def most_blocks(self) -> int:
        """Most blocks that the image may have: its limit, or what the host was found to allow."""
        limit = self._limit_blocks
        return self.record.capacity_blocks if limit is None else min(limit, self.record.capacity_blocks)

    @property
    def lost_blocks(self) -> int:
        """Unbacked blocks behind what the host allows: they cannot be had."""
        return 0 if self._limit_blocks is None else self.unbacked.count_from(self._limit_blocks)

    @property
    def given_blocks(self) -> int:
        """Blocks that somebody has, or that wait to be free."""
        return self.busy_blocks - self.unbacked.count

    @property
    def lacking_blocks(self) -> int:
        """Unbacked blocks that have no host space, as far as what the image occupies tells."""
        if not self.unbacked.count:
            return 0
        length_bytes = DATA_OFFSET_BYTES + self.grown_blocks * self._block_bytes
        absent_bytes = max((length_bytes - host.allocated_bytes for host in self.hosts), default=0)
        return min(self.unbacked.count, max(self.unbacked.hollow_count, absent_bytes // self._block_bytes))

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
        legs = mirror.written_legs()
        self.attached_legs = [number for number, _ in legs]
        return tuple(leg.fileno() for _, leg in legs), DATA_OFFSET_BYTES

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
        return self.heal_run(block_index, [expected])

    def heal_run(self, block_index: int, expected: Sequence[int | None]) -> int | None:
        """Do so for blocks that follow each other; None when none has the first of them right.  Any thread."""
        if self.mirror is None:
            return None
        healed = self.mirror.heal(self._offset(block_index), self._block_bytes, [_judge(crc) for crc in expected])
        return None if 0 in healed.lost else healed.rewritten

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
        """Write whole blocks to the page cache; ``sync`` makes them durable once they are committed.

        Raises:
            NoSpace: The host has no room, and says in its facts of which storage volume.
        """
        try:
            self.file.pwrite(self._offset(block_index), data)
        except NoSpace as error:
            error.facts.update(storage=self.record.id)
            raise

    def note_written(self) -> None:
        """Remember that the image needs a sync.  Any thread."""
        self._written_count += 1

    @property
    def needs_sync(self) -> bool:
        """Whether something was written that no sync which has ended made durable."""
        return self._written_count != self._synced_count

    def sync(self) -> None:
        """Make every block written before this call durable."""
        count = self._written_count
        self.file.sync()
        self._synced_count = max(self._synced_count, count)  # not before: who asks meanwhile has to wait, too

    def sync_stamped(self, stamp: Stamp) -> None:
        """Make every block written before this call durable, and with them a stamp, unless it is of no epoch."""
        self.write_stamp(stamp)
        self.sync()
        if self.mirror is not None and stamp.epoch != NEVER:
            self.mirror.note_stamped(stamp)

    def write_stamp(self, stamp: Stamp) -> None:
        """Write a stamp, unless it is there; ``sync_stamped`` makes it durable.  Any thread.

        Raises:
            NoSpace: A host that writes elsewhere each time has no room; nothing is harmed.
        """
        if stamp.epoch == NEVER:
            return  # a pool that is salvaged only reads its images
        if self.mirror is None:
            write_stamp(self.file, stamp)
        else:
            self.mirror.stamp(stamp)

    def load(self, group_index: int, bits: int) -> None:
        """Take over a stored bitmap at open."""
        self.reach((group_index + 1) * groups.GROUP_BLOCKS)
        self.live[group_index] = self.busy[group_index] = bits
        self.live_blocks += bits.bit_count()
        self.busy_blocks += bits.bit_count()

    def reach(self, block_count: int) -> None:
        """Have bitmaps for at least that many blocks."""
        while len(self.live) * groups.GROUP_BLOCKS < block_count:
            self.live.append(0)
            self.busy.append(0)

    def take(self, block_index: int, count: int, most_runs: int) -> list[tuple[int, int]]:
        """Lease up to ``count`` free blocks at or after a block in up to ``most_runs`` pieces: (first, blocks) of each.

        Cost: the bitmap of a group is changed once for all its pieces.
        """
        runs: list[tuple[int, int]] = []
        for group_index in range(block_index // groups.GROUP_BLOCKS, -(-self.grown_blocks // groups.GROUP_BLOCKS)):
            base = group_index * groups.GROUP_BLOCKS
            self.reach(base + groups.GROUP_BLOCKS)
            start = max(0, block_index - base)
            limit = min(groups.GROUP_BLOCKS, self.grown_blocks - base)
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

    def set_busy(self, group_index: int, bits: int, *, busy: bool) -> None:
        """Lease blocks of one group, or make them free."""
        self.busy_blocks += self._change(self.busy, group_index, bits, present=busy)

    def set_live(self, group_index: int, bits: int, *, live: bool) -> None:
        """Commit blocks of one group, or take them out of the committed set."""
        self.reach((group_index + 1) * groups.GROUP_BLOCKS)
        self.live_blocks += self._change(self.live, group_index, bits, present=live)

    @staticmethod
    def _change(bitmaps: list[int], group_index: int, bits: int, *, present: bool) -> int:
        before = bitmaps[group_index] & bits
        assert before == (0 if present else bits), f"blocks of group {group_index} are already in that state"
        bitmaps[group_index] ^= bits
        return bits.bit_count() if present else -bits.bit_count()

    def is_busy(self, block_index: int, count: int) -> bool:
        """Tell whether any of these blocks, at most a group's worth of them, is given out."""
        for block in (block_index, block_index + count - 1):
            group_index = block // groups.GROUP_BLOCKS
            base = group_index * groups.GROUP_BLOCKS
            start, stop = max(block_index, base), min(block_index + count, base + groups.GROUP_BLOCKS)
            if group_index < len(self.busy) and self.busy[group_index] & bit_mask(start - base, stop - start):
                return True
        return False

    def highest_live_block(self) -> int:
        """Give the highest committed block, -1 without any."""
        for group_index in range(len(self.live) - 1, -1, -1):
            if self.live[group_index]:
                return group_index * groups.GROUP_BLOCKS + self.live[group_index].bit_length() - 1
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

    def grow(self, block_count: int, *, reserve: Reserve) -> None:
        """Make the image longer by up to ``block_count`` blocks.  Any thread, one at a time.

        Raises:
            NoSpace: By none: the image is at its capacity limit, the hosts would have less than the reserve left, or
                one of them refuses.
        """
        room = self.most_blocks - self.grown_blocks
        self.measure_host()
        block_count = min(block_count, room, self.host_room(reserve) // self._block_bytes)
        if block_count <= 0:
            raise self._at("its capacity limit") if room <= 0 else self._at_reserve()
        end = self.grown_blocks + block_count
        got, refusal = 0, None
        while self.grown_blocks < end and refusal is None:
            got, refusal = self._get(self.grown_blocks, min(end - self.grown_blocks, self._piece), keep_size=False)
            self.grown_blocks += got
        self.measure_host()
        if refusal is not None and self.grown_blocks == end - block_count:
            raise refusal

    def back(self, runs: Sequence[Run], *, reserve: Reserve) -> Backed:
        """Get host space for unbacked blocks, as far as that leaves the reserve.  Any thread, one at a time.

        Which of them have it already only the host knows: it is asked for them, and gets back what it must keep.
        """
        backed = Backed()
        self.measure_host()
        is_short = self.host_room(reserve) < sum(count for _, count in runs) * self._block_bytes
        most = max(1, _PROBE_BYTES // self._block_bytes) if is_short else self._piece
        for first, count in (piece for run in runs for piece in _pieces(run, most)):
            take = self._fill if self._is_hollow(first) else self._probe
            if not take(first, count, self.host_room(reserve), backed):
                break
            self.measure_host()
        self.measure_host()
        return backed

    @property
    def _piece(self) -> int:
        return max(1, _ALLOCATE_BYTES // self._block_bytes)

    def _fill(self, first: int, count: int, room_bytes: int, backed: Backed) -> bool:
        """Get host space for blocks that have none; False when there is no more."""
        most = min(count, room_bytes // self._block_bytes)
        got, refusal = self._get(first, most, keep_size=True) if most else (0, self._at_reserve())
        if got:
            backed.ready.append((first, got))
        backed.refusal = refusal
        return got == count

    def _probe(self, first: int, count: int, room_bytes: int, backed: Backed) -> bool:
        """Ask for host space of blocks that may have it; True: others may have it, whatever became of these."""
        before = self.hosts
        got, refusal = self._get(first, count, keep_size=True)
        costs = [0]
        if room_bytes < got * self._block_bytes:
            self.measure_host()
            costs = [now.allocated_bytes - old.allocated_bytes for now, old in zip(self.hosts, before, strict=False)]
        if got and max(costs) <= room_bytes:
            backed.ready.append((first, got))
            return True
        if got:
            self.punch(first, got)
            refusal = self._at_reserve()
        backed.hollow.append((first, count))
        backed.refusal = refusal
        return True

    def _is_hollow(self, block_index: int) -> bool:
        return self.unbacked.is_hollow(*divmod(block_index, groups.GROUP_BLOCKS))

    def _get(self, first: int, count: int, *, keep_size: bool) -> tuple[int, NoSpace | None]:
        """Get host space for blocks from ``first`` on; give for how many, and why not for more."""
        wanted, refusal = count, None
        while count:
            try:
                self.file.allocate(self._offset(first), count * self._block_bytes, keep_size=keep_size)
                if self._must_prove:
                    self.file.pwrite(self._offset(first), bytes(count * self._block_bytes))
                break
            except NoSpace as error:
                refusal = error
                count //= 2
        if count == wanted:
            self.refused_bytes = 0
        elif refusal is not None and refusal.facts.get("host_errno") == errno.EFBIG:
            self._limit_blocks = min(first + count, self.most_blocks)
        elif not count:
            self.refused_bytes = self.host_free_bytes
        return count, refusal

    def _at_reserve(self) -> NoSpace:
        return self._at("the reserve of its host filesystem")

    def _at(self, limit: str) -> NoSpace:
        return NoSpace(f"storage volume {self.record.id} ({self.file.path}) is at {limit}", storage=self.record.id)

    # Blocks and the host's space behind them.  Owner thread.

    def _nobodys(self, group_index: int) -> int:
        """Give the blocks of a group that may be leased now."""
        count = max(0, min(groups.GROUP_BLOCKS, self.grown_blocks - group_start(group_index)))
        return bit_mask(0, count) & ~self.busy[group_index]

    def doubt(self) -> None:
        """Give no free block out before the host was asked: nobody knows whether its space is behind them."""
        self.reach(self.grown_blocks)
        for group_index in range(self.group_count):
            if free := self._nobodys(group_index):
                self.set_busy(group_index, free, busy=True)
                self.unbacked.add(group_index, free)

    def note_refused(self) -> None:
        """The host refused to write blocks that it had reserved: from now on only what was written once counts."""
        self._must_prove = True
        self.doubt()

    def note_backed(self, backed: Backed) -> None:
        """Let blocks that have host space be free, and note those that have none."""
        for first, count in backed.ready:
            for group_index, bits in split_groups(first, count):
                self.unbacked.remove(group_index, bits)
                self.set_busy(group_index, bits, busy=False)
        for first, count in backed.hollow:
            for group_index, bits in split_groups(first, count):
                self.unbacked.add(group_index, bits, bits)

    def may_occupy(self, group_index: int) -> int:
        """Give the blocks of a group that nobody has, and that may have host space: a bit set."""
        if group_index >= len(self.busy):
            return 0
        return self._nobodys(group_index) | self.unbacked.doubtful(group_index)

    def leased(self, group_index: int) -> int:
        """Give the blocks of a group that somebody has who has not committed them, or that wait to be free."""
        return self.busy[group_index] & ~self.live[group_index] & ~self.unbacked.bits.get(group_index, 0)

    def hold(self, group_index: int, bits: int) -> None:
        """Let nobody get blocks that nobody has."""
        self.unbacked.remove(group_index, bits)
        self.set_busy(group_index, bits & ~self.busy[group_index], busy=True)

    def end_hold(self, group_index: int, bits: int, *, punched: int) -> None:
        """Let blocks that were held be unbacked: hollow those that were punched."""
        self.unbacked.add(group_index, bits, punched)

    @property
    def group_count(self) -> int:
        """How many groups the image has grown into."""
        return -(-self.grown_blocks // groups.GROUP_BLOCKS)

    def written_blocks(self, group_index: int) -> int:
        """Ask the host which blocks of a group hold data of now or before: a bit set.  Any thread.

        None of a host that cannot tell: it sees no hole behind the header either.
        """
        if (0, DATA_OFFSET_BYTES) in self.file.data_ranges(0, DATA_OFFSET_BYTES):
            return 0
        first, size = group_start(group_index), self._block_bytes
        count = min(groups.GROUP_BLOCKS, self.grown_blocks - first)
        bits = 0
        for offset_bytes, length_bytes in self.file.data_ranges(self._offset(first), count * size):
            start = (offset_bytes - self._offset(first)) // size
            end = -(-(offset_bytes + length_bytes - self._offset(first)) // size)
            bits |= bit_mask(start, min(end, count) - start)
        return bits

    def punch(self, block_index: int, count: int) -> bool:
        """Give the host space of free blocks back; False where the host cannot.  Any thread."""
        return self.file.punch(self._offset(block_index), count * self._block_bytes)

    def _offset(self, block_index: int) -> int:
        return DATA_OFFSET_BYTES + block_index * self._block_bytes


def _pieces(run: Run, most: int) -> Iterator[Run]:
    first, count = run
    for start in range(0, count, most):
        yield first + start, min(most, count - start)
