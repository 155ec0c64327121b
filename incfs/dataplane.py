"""The data plane: resident map pages, and whole blocks read and written through them.

Owns the *current* contents of open tables, writes that are not sealed yet included, and the
leases that new blocks come from.  It never decides: what it cannot serve whole it refuses
untouched, and the control plane (the store) loads a page, grants a lease and asks again.
This Python implementation is the specification.

Invariants:
    1. A block is written before a mapping names it, and never while one does (I1).  What replaces a *fresh* block,
       written since the last seal, takes another; the fresh one goes back to the lease that it came from.
    2. A mapping changes only after the data it names was written; those of one write change together.
    3. Every block that is returned matched its checksum (I4).
"""

from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from incfs.blocks import split_address, split_pages
from incfs.codec import Entries, checksum
from incfs.errors import BackingError, ChecksumMismatch, IncfsError, NoSpace
from incfs.model import HOLE, INHERIT, PAGE_BLOCKS, Facts, MapId, StorageId
from incfs.sealed import Sealed, runs_of, seal_pages


class BlockFile(Protocol):
    """What the data plane needs of a storage volume."""

    def read_blocks(self, block_index: int, block_count: int) -> bytes:
        """Read, waiting for the disk."""

    def read_blocks_cached(self, block_index: int, block_count: int) -> bytes | None:
        """Read if nothing must be waited for."""

    def write_blocks(self, block_index: int, data: bytes | memoryview) -> None:
        """Write to the page cache."""


class Refused(Exception):
    """The request was not begun; the control plane must act first."""


class NotResident(Refused):
    """A map page is missing: load it and ask again."""

    def __init__(self, map_id: MapId, page_index: int) -> None:
        self.map_id = map_id
        self.page_index = page_index


class LeaseExhausted(Refused):
    """Too few leased blocks: the table, or its column, needs ``block_count`` of them in all; grant and ask again."""

    def __init__(self, map_id: MapId, block_count: int) -> None:
        self.map_id = map_id
        self.block_count = block_count
        self.is_urgent = False
        """Whether it may use the blocks that are kept back for a full pool."""


class ReadWouldWait(Refused):
    """The disk must be read: call ``warm`` in a worker thread and ask again."""

    def __init__(self, file: BlockFile, block_index: int, block_count: int) -> None:
        self._extent = block_index, block_count
        self.file = file

    def warm(self) -> None:
        """Bring the blocks into the page cache."""
        self.file.read_blocks(*self._extent)


class LegFailed(Refused):
    """A leg of a mirror could not be written: leave it behind, and ask again."""

    def __init__(self, storage_id: StorageId, position: int, host_errno: int) -> None:
        self.storage_id = storage_id
        self.position = position
        """Which of the descriptors that the plane was given."""
        self.host_errno = host_errno


@dataclass(slots=True)
class Page:
    """One resident map page."""

    addresses: "array[int]"
    checksums: "array[int]"
    hole: int
    """What a discarded block becomes: INHERIT where there is no origin, else HOLE."""
    fresh: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Indexes changed since the last seal -> the (address, checksum) that was replaced."""
    used: bool = True


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything appended between two seals, ordered by table."""

    tables: list[Sealed]
    dropped: list[int]
    """Addresses taken from a lease and given up: no sealed mapping ever named them."""
    written: list[tuple[MapId, int]] = field(default_factory=list)
    """(table, time in nanoseconds) of writes by other threads to these tables."""
    committed: list[tuple[int, "Batch"]] = field(default_factory=list)
    """(sequence, batch) of what other threads sealed and committed before."""


@dataclass(frozen=True, slots=True)
class PlaneState:
    """What is inside a data plane, for tests."""

    pages: dict[tuple[MapId, int], tuple[Entries, Entries]]
    """(table, page) -> (current mappings of all blocks, what the unsealed ones replaced)."""
    leases: list[tuple[MapId, int, int]]
    """(table, first address, blocks), in order."""
    dropped: list[int]


class _Placement(NamedTuple):
    """One block of a write: where it goes."""

    page: Page
    block: bytes | None
    """None for a hole."""
    address: int


class DataPlane:
    """Block input and output through resident pages.  Owner thread."""

    def __init__(self, block_bytes: int, files: Mapping[StorageId, BlockFile]) -> None:
        self._block_bytes = block_bytes
        self._files = files
        self._zeros = bytes(block_bytes)
        self._pages: dict[tuple[MapId, int], Page] = {}
        self._dirty: dict[tuple[MapId, int], Page] = {}
        self._leases: dict[MapId, deque[tuple[int, int]]] = {}
        self._stripes: dict[MapId, tuple[int, int]] = {}
        self._dropped: list[int] = []
        self._leases_were_taken = False
        """Since the last seal: fresh blocks may be of leases that are no more."""
        self._mapped_delta: dict[MapId, int] = {}
        self.fresh_count = 0
        """Mappings appended since the last seal."""
        self.seal_count = 0
        """Seals so far."""
        self.durable_sequence = 0
        """The last commit that others than the owner thread made durable: there are none."""

    # Resident pages

    def load(self, map_id: MapId, page_index: int, entries: Entries, *, hole: int = INHERIT) -> None:
        """Make a page resident."""
        assert (map_id, page_index) not in self._pages
        addresses = array("Q", bytes(8 * PAGE_BLOCKS))
        checksums = array("I", bytes(4 * PAGE_BLOCKS))
        for index, (address, crc) in entries.items():
            addresses[index] = address
            checksums[index] = crc
        self._pages[map_id, page_index] = Page(addresses, checksums, hole)

    def evict(self, map_id: MapId) -> None:
        """Forget every page and lease of a table; nothing of it may be unsealed."""
        for key in [key for key in self._pages if key[0] == map_id]:
            assert key not in self._dirty
            del self._pages[key]

    def shrink(self, page_count: int) -> list[tuple[MapId, int]]:
        """Evict pages that were not used lately until at most ``page_count`` are left.

        Pages with unsealed mappings stay.  Returns the evicted ones.
        """
        evicted = []
        for key in list(self._pages) if len(self._pages) > page_count else ():
            page = self._pages.pop(key)
            if page.used or page.fresh:
                page.used = False
                self._pages[key] = page
                continue
            evicted.append(key)
            if len(self._pages) <= page_count:
                break
        return evicted

    @property
    def page_count(self) -> int:
        """Resident pages."""
        return len(self._pages)

    def is_resident(self, map_id: MapId, page_index: int) -> bool:
        """Tell whether a page is resident."""
        return (map_id, page_index) in self._pages

    def _page(self, map_id: MapId, page_index: int) -> Page:
        page = self._pages.get((map_id, page_index))
        if page is None:
            raise NotResident(map_id, page_index)
        page.used = True
        return page

    # Leases

    def attach(self, storage_id: StorageId) -> None:
        """Take over what a storage volume's file has become; here it is asked each time."""

    def stripe(self, map_id: MapId, unit_blocks: int, columns: int) -> None:
        """Let new blocks of a table come from several leases in turn.

        Virtual block b takes from the lease ``map_id | b // unit_blocks % columns``: the lower half of a
        live table's id is 0.
        """
        assert unit_blocks > 0
        assert columns > 0
        self._leases_were_taken = True
        self._stripes.pop(map_id, None)
        if columns > 1:
            self._stripes[map_id] = unit_blocks, columns

    def grant(self, map_id: MapId, address: int, block_count: int) -> None:
        """Give a table, or one of its columns, free blocks to write into."""
        self._leases.setdefault(map_id, deque()).append((address, block_count))

    def leased_blocks(self, map_id: MapId) -> int:
        """Unused leased blocks of a table."""
        return sum(count for _, count in self._leases.get(map_id, ()))

    def revoke(self, map_id: MapId | None = None) -> list[int]:
        """Take back the unused leased blocks of one table, or of all."""
        self._leases_were_taken = True
        tables = list(self._leases) if map_id is None else [map_id]
        runs = [run for table in tables for run in self._leases.pop(table, ())]
        return [address + i for address, count in runs for i in range(count)]

    def _take(self, map_id: MapId, virtual_blocks: list[int]) -> Iterator[int]:
        """Yield an address for each block, from its column's lease; all of them or none are taken."""
        unit, columns = self._stripes.get(map_id, (1, 1))
        leases = [MapId(map_id | block // unit % columns) for block in virtual_blocks]
        needed = Counter(leases)
        for lease in sorted(needed):
            if self.leased_blocks(lease) < needed[lease]:
                raise LeaseExhausted(lease, needed[lease])
        taken = {lease: iter(self._take_from(lease, count)) for lease, count in needed.items()}
        return (next(taken[lease]) for lease in leases)

    def _give_back(self, map_id: MapId, virtual_block: int, address: int) -> None:
        """Let a fresh block that is not needed any more be the next that its lease is asked for."""
        unit, columns = self._stripes.get(map_id, (1, 1))
        lease = self._leases.get(MapId(map_id | virtual_block // unit % columns))
        if self._leases_were_taken or lease is None:
            self._dropped.append(address)
            return
        first, count = lease[0] if lease else (0, 0)
        if lease and first + count == address:
            lease[0] = first, count + 1
        elif lease and first == address + 1:
            lease[0] = address, count + 1
        else:
            lease.appendleft((address, 1))

    def _take_from(self, map_id: MapId, block_count: int) -> list[int]:
        lease = self._leases[map_id]
        taken: list[int] = []
        while len(taken) < block_count:
            address, count = lease.popleft()
            step = min(count, block_count - len(taken))
            taken += range(address, address + step)
            if step < count:
                lease.appendleft((address + step, count - step))
        return taken

    def move(self, map_ids: Sequence[MapId], page_index: int, moves: Sequence[tuple[int, int, int]]) -> None:
        """Let mappings of resident pages name other blocks with the same data.

        Args:
            map_ids: Tables in which the blocks can be seen.
            page_index: The page, in each.
            moves: (index in the page, old address, new address); a mapping that is not the old one stays.
        """
        for map_id in map_ids:
            page = self._pages.get((map_id, page_index))
            for slot, old, new in moves if page is not None else ():
                assert page is not None
                if page.addresses[slot] == old:
                    page.addresses[slot] = new
                elif slot in page.fresh and page.fresh[slot][0] == old:
                    page.fresh[slot] = new, page.fresh[slot][1]

    # Other threads: the native plane serves requests by itself; this one has no other threads.

    def serve(
        self,
        map_id: MapId,
        size_bytes: int,
        facts: Facts,
        *,
        is_writable: bool,
        keep_zeros: bool = False,
        verify: bool = True,
    ) -> None:
        """Let other threads read a table up to a size, and perhaps write it, by the rules of ``read`` and ``write``."""

    def unserve(self, map_id: MapId) -> None:
        """Let other threads no longer read or write a table."""

    def freeze(self) -> None:
        """Let other threads no longer write anything."""

    def written(self) -> list[tuple[MapId, int]]:
        """Take (table, time in nanoseconds) of writes by other threads."""
        return []

    def take_committed(self) -> list[tuple[int, Batch]]:
        """Take (sequence, batch) of what other threads sealed and committed, in order."""
        return []

    def close_journal(self) -> None:
        """Let other threads commit nothing until the journal is lent again."""

    def set_folded(self, sequence: int) -> None:
        """Say which commit the tables contain; before any block that it freed is used again."""

    # Blocks

    def read(
        self, map_id: MapId, first_block: int, block_count: int, *, wait: bool = False, verify: bool = True
    ) -> bytes:
        """Read whole blocks; holes and inherited blocks without an origin read as zeros.

        Args:
            map_id: The table.
            first_block: First virtual block.
            block_count: At least 1.
            wait: Read the disk here rather than refuse.
            verify: Compare checksums.  Without it what is read goes to whoever asked for that, and nowhere else.

        Raises:
            NotResident: A page must be loaded first.
            ReadWouldWait: The disk must be read first.
            ChecksumMismatch: A block is not what was written.
            BackingError: The host failed.
        """
        pieces = []
        for page_index, start, count in split_pages(first_block, block_count):
            page = self._page(map_id, page_index)
            for index, address, run in _runs(page.addresses, start, count):
                if address <= HOLE:
                    pieces.append(self._zeros if run == 1 else bytes(run * self._block_bytes))
                    continue
                data = self._read_run(address, run, wait=wait)
                if verify:
                    self._verify(
                        map_id, page_index * PAGE_BLOCKS + index, address, data, page.checksums[index : index + run]
                    )
                pieces.append(data)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_run(self, address: int, count: int, *, wait: bool) -> bytes:
        storage_id, block_index = split_address(address)
        file = self._files[storage_id]
        try:
            data = file.read_blocks(block_index, count) if wait else file.read_blocks_cached(block_index, count)
        except BackingError as error:
            error.facts.update(storage=storage_id, block=block_index)
            raise
        if data is None:
            raise ReadWouldWait(file, block_index, count)
        return data

    def _verify(self, map_id: MapId, virtual_block: int, address: int, data: bytes, expected: "array[int]") -> None:
        size = self._block_bytes
        for i, crc in enumerate(expected):
            found = checksum(data if len(expected) == 1 else data[i * size : (i + 1) * size])
            if found != crc:
                raise mismatch(map_id, virtual_block + i, address + i, found=found, expected=crc)

    def write(
        self, map_id: MapId, offset_bytes: int, data: bytes, *, wait: bool = False, keep_zeros: bool = False
    ) -> None:
        """Write a range: to leased blocks, zeros as holes unless they are kept.

        What the range lacks of its first and last block is read, verified and kept.

        Atomicity: if it raises ``Refused`` nothing changed.  After another error a prefix of
        the range may be written, as with write(2).

        Raises:
            NotResident: A page must be loaded first.
            LeaseExhausted: More blocks must be granted first.
            ReadWouldWait: The disk must be read first.
            ChecksumMismatch: A block of which a part is kept is not what was written.
            NoSpace: The host has no room; nothing else is harmed.
            BackingError: The host failed.
        """
        data, first_block = self._complete(map_id, offset_bytes, data, wait=wait)
        placements = self._place(map_id, first_block, data, keep_zeros=keep_zeros)
        done = 0
        try:
            while done < len(placements):
                run = _contiguous(placements, done)
                if placements[done].block is not None:
                    self._write_run(placements, done, run)
                done += run
        finally:
            for virtual_block, (page, block, address) in enumerate(placements[:done], first_block):
                new = (page.hole, 0) if block is None else (address, checksum(block))
                self._set(map_id, page, virtual_block, *new)
            self._mark_dirty(map_id, first_block, len(placements))

    def _complete(self, map_id: MapId, offset_bytes: int, data: bytes, *, wait: bool) -> tuple[bytes, int]:
        """Extend a write to whole blocks with what is there; give (data, first block)."""
        block = self._block_bytes
        first, head = divmod(offset_bytes, block)
        tail = -(offset_bytes + len(data)) % block
        if not head and not tail:
            return data, first
        last = (offset_bytes + len(data) - 1) // block
        for page_index, _, _ in split_pages(first, last + 1 - first):
            self._page(map_id, page_index)
        before = self.read(map_id, first, 1, wait=wait)[:head] if head else b""
        after = self.read(map_id, last, 1, wait=wait)[block - tail :] if tail else b""
        return before + data + after, first

    def _place(self, map_id: MapId, first_block: int, data: bytes, *, keep_zeros: bool) -> list[_Placement]:
        size, zeros = self._block_bytes, self._zeros
        placements: list[_Placement] = []
        new_blocks: list[int] = []
        for page_index, start, count in split_pages(first_block, len(data) // size):
            page = self._page(map_id, page_index)
            for index in range(start, start + count):
                block = data[len(placements) * size : (len(placements) + 1) * size]
                if block == zeros and not keep_zeros:
                    placements.append(_Placement(page, None, 0))
                    continue
                new_blocks.append(page_index * PAGE_BLOCKS + index)
                placements.append(_Placement(page, block, 0))
        addresses = self._take(map_id, new_blocks)
        return [p if p.block is None else p._replace(address=next(addresses)) for p in placements]

    def _write_run(self, placements: list[_Placement], position: int, run: int) -> None:
        members = placements[position : position + run]
        storage_id, block_index = split_address(members[0].address)
        data = members[0].block if run == 1 else b"".join(p.block or b"" for p in members)
        assert data is not None
        try:
            self._files[storage_id].write_blocks(block_index, data)
        except IncfsError as error:
            if isinstance(error, NoSpace):
                error.facts.update(storage=storage_id, block=block_index)
            self._dropped += [p.address for p in placements[position:] if p.block is not None]
            raise

    def discard(self, map_id: MapId, first_block: int, block_count: int) -> None:
        """Let whole blocks read as zeros.

        Raises:
            NotResident: A page must be loaded first.
        """
        spans = [
            (self._page(map_id, index), index * PAGE_BLOCKS + start, count)
            for index, start, count in split_pages(first_block, block_count)
        ]
        for page, first, count in spans:
            for virtual_block in range(first, first + count):
                self._set(map_id, page, virtual_block, page.hole, 0)
        self._mark_dirty(map_id, first_block, block_count)

    def _set(self, map_id: MapId, page: Page, virtual_block: int, address: int, crc: int) -> None:
        index = virtual_block % PAGE_BLOCKS
        old = page.addresses[index]
        if old == address:
            return  # zeros over zeros
        if index not in page.fresh:
            page.fresh[index] = old, page.checksums[index]
            self.fresh_count += 1
        elif old > HOLE:
            self._give_back(map_id, virtual_block, old)
        page.addresses[index] = address
        page.checksums[index] = crc
        delta = (address > HOLE) - (old > HOLE)
        if delta:
            self._mapped_delta[map_id] = self._mapped_delta.get(map_id, 0) + delta

    def _mark_dirty(self, map_id: MapId, first_block: int, block_count: int) -> None:
        for page_index, _, _ in split_pages(first_block, block_count):
            page = self._pages[map_id, page_index]
            if page.fresh:
                self._dirty[map_id, page_index] = page

    def mapped_delta(self, map_id: MapId) -> int:
        """Blocks that the table gained or lost since the last seal."""
        return self._mapped_delta.get(map_id, 0)

    def seal(self) -> Batch:
        """Hand over the mappings appended since the last seal; their blocks become immutable.

        Atomicity: one point in time over all tables.
        """
        changed: dict[MapId, list[tuple[int, Entries, Entries]]] = {}
        for (map_id, page_index), page in sorted(self._dirty.items()):
            old = {slot: entry for slot, entry in page.fresh.items() if page.addresses[slot] != entry[0]}
            new = {slot: (page.addresses[slot], page.checksums[slot]) for slot in old}
            page.fresh = {}
            if new:
                changed.setdefault(map_id, []).append((page_index, new, old))
        sealed = [seal_pages(map_id, pages) for map_id, pages in changed.items()]
        dropped, self._dropped = self._dropped, []
        self._leases_were_taken = False
        self._dirty = {}
        self._mapped_delta = {}
        self.fresh_count = 0
        self.seal_count += 1
        return Batch([table._replace(runs=runs_of(table)) for table in sealed], dropped)

    def inspect(self) -> PlaneState:
        """Copy everything inside, for tests."""
        pages = {
            key: (dict(enumerate(zip(page.addresses, page.checksums, strict=True))), dict(page.fresh))
            for key, page in self._pages.items()
        }
        leases = sorted((table, *run) for table, runs in self._leases.items() for run in runs)
        return PlaneState(pages, leases, list(self._dropped))


def mismatch(map_id: MapId, virtual_block: int, address: int, *, found: int, expected: int) -> ChecksumMismatch:
    """Make the error that says which block is not what was written."""
    storage_id, block_index = split_address(address)
    return ChecksumMismatch(
        f"virtual block {virtual_block} of table {map_id >> 32}.{map_id & 0xFFFFFFFF}: block "
        f"{block_index} of storage volume {storage_id} has CRC32C {found:08x}, expected {expected:08x}; "
        f"restore the range from a snapshot or a replica",
        map_id=map_id,
        virtual_block=virtual_block,
        storage=storage_id,
        block=block_index,
        expected=expected,
    )


def _runs(addresses: "array[int]", start: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Yield (index, address, blocks) of each stretch that is one extent, or one kind of zeros."""
    end = start + count
    while start < end:
        address = addresses[start]
        step = address > HOLE
        stop, expected = start + 1, address + step
        while stop < end and addresses[stop] == expected:
            stop += 1
            expected += step
        yield start, address, stop - start
        start = stop


def _contiguous(placements: list[_Placement], position: int) -> int:
    """Count the placements from ``position`` on that one host write, or one discard, covers."""
    first = placements[position]
    end = position + 1
    while end < len(placements):
        follower = placements[end]
        if (follower.block is None) != (first.block is None):
            break
        if first.block is not None and follower.address != first.address + end - position:
            break
        end += 1
    return end - position
