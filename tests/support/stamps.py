"""Stamped writes: what is on disk after a crash says which writes it holds, and whether those are a prefix.

Each sector of 512 bytes carries its volume, its index and the sequence of the write that made it.  A ``Model``
records, in order, every change before it is asked for, and what was acknowledged.  After a crash
``Model.recover_exactly`` looks for the one moment that explains everything found: sectors, sizes and snapshots of
all volumes together.
"""

import random
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

SECTOR = 512
MAGIC = b"incfs-st"
_FIELDS = struct.Struct("<8sIIQ")
_CRC = struct.Struct("<I")
_REPEATS = SECTOR // (_FIELDS.size + _CRC.size + 4)

Cell = tuple[Any, ...]
"""("sector", volume, index) -> sequence; ("size", volume) -> bytes; ("snapshot", volume, name) -> 1 or 0."""


def stamp(volume: int, sector: int, sequence: int) -> bytes:
    """Return the content of a sector; sequence 0 is zeros."""
    if not sequence:
        return bytes(SECTOR)
    fields = _FIELDS.pack(MAGIC, volume, sector, sequence)
    return (fields + _CRC.pack(zlib.crc32(fields)) + b"....") * _REPEATS


def stamps(volume: int, first_sector: int, sector_count: int, sequence: int) -> bytes:
    """Return the content of a range that one write makes."""
    return b"".join(stamp(volume, first_sector + i, sequence) for i in range(sector_count))


def read_stamp(volume: int, sector: int, data: bytes) -> int:
    """Return the sequence of a sector; anything but zeros or a whole stamp of this very place is an error."""
    if not any(data):
        return 0
    magic, *_, sequence = _FIELDS.unpack_from(data)
    assert magic == MAGIC, f"garbage in sector {sector} of volume {volume}: {data[:64]!r}"
    assert data == stamp(volume, sector, sequence), f"sector {sector} of volume {volume} is torn: {data!r}"
    return int(sequence)


def read_sequences(volume: int, data: bytes) -> list[int]:
    """Return the sequence of each sector of a volume's content."""
    assert len(data) % SECTOR == 0, len(data)
    zeros = bytes(SECTOR)
    pieces = (data[i : i + SECTOR] for i in range(0, len(data), SECTOR))
    return [0 if piece == zeros else read_stamp(volume, i, piece) for i, piece in enumerate(pieces)]


@dataclass
class Step:
    """A change that happens at once or not at all."""

    sequence: int
    cells: dict[Cell, int]


@dataclass
class Frozen:
    """What a snapshot must hold."""

    size_bytes: int
    sequences: list[int]


@dataclass
class Model:
    """What was asked for, in order, by one writer on some volumes.

    Args:
        sector_counts: Sectors of each volume; its number is its index here.
    """

    sector_counts: list[int]
    state: dict[Cell, int] = field(init=False)
    """As after the last step."""
    sequence: int = 0
    frozen: dict[tuple[int, str], Frozen] = field(default_factory=dict)
    """Content of every snapshot that was ever asked for."""
    steps: list[Step] = field(default_factory=list)
    """Asked for since the last recovery."""
    acknowledged: int = 0
    """Steps that an fsync covered."""

    def __post_init__(self) -> None:
        self.state = {("size", v): count * SECTOR for v, count in enumerate(self.sector_counts)}
        self.state |= {("sector", v, i): 0 for v, count in enumerate(self.sector_counts) for i in range(count)}
        self._base = dict(self.state)
        self._acknowledged_of = [0] * len(self.sector_counts)

    # What the writer asks for

    def _step(self, cells: dict[Cell, int]) -> None:
        self.steps.append(Step(self.sequence, cells))
        self.state |= cells

    def write(self, volume: int, first_sector: int, sector_count: int) -> bytes:
        """Record a write and return its data."""
        self.sequence += 1
        end = (first_sector + sector_count) * SECTOR
        grown = {("size", volume): end} if end > self.state["size", volume] else {}
        sectors = range(first_sector, first_sector + sector_count)
        self._step(dict.fromkeys((("sector", volume, i) for i in sectors), self.sequence) | grown)
        return stamps(volume, first_sector, sector_count, self.sequence)

    def discard(self, volume: int, pieces: Iterable[range]) -> None:
        """Record a discard, which happens piece by piece."""
        self.sequence += 1
        for piece in pieces:
            self._step(dict.fromkeys((("sector", volume, i) for i in piece), 0))

    def resize(self, volume: int, size_bytes: int) -> None:
        """Record a truncate."""
        self.sequence += 1
        lost = range(size_bytes // SECTOR, self.sector_counts[volume])
        self._step({("size", volume): size_bytes} | dict.fromkeys((("sector", volume, i) for i in lost), 0))

    def take_snapshots(self, volumes: Iterable[int], name: str) -> None:
        """Record snapshots taken at one point in time."""
        self.sequence += 1
        taken = list(volumes)
        for volume in taken:
            self.frozen[volume, name] = Frozen(self.state["size", volume], self._sequences(volume))
        self._step({("snapshot", volume, name): 1 for volume in taken})

    def remove_snapshot(self, volume: int, name: str) -> None:
        """Record the removal of a snapshot."""
        self.sequence += 1
        self._step({("snapshot", volume, name): 0})

    def snapshots(self, volume: int) -> list[str]:
        """Return the names of a volume's snapshots, oldest first."""
        return [key[2] for key, value in self.state.items() if value and key[:2] == ("snapshot", volume)]

    def _sequences(self, volume: int) -> list[int]:
        return [self.state.get(("sector", volume, i), 0) for i in range(self.state["size", volume] // SECTOR)]

    # What was acknowledged

    def acknowledge(self, volumes: Iterable[int] = ()) -> None:
        """Record that everything so far is durable; ``volumes`` also what the kernel had cached of them."""
        self.acknowledged = len(self.steps)
        for volume in volumes:
            self._acknowledged_of[volume] = len(self.steps)

    # After a crash

    def recover_exactly(self, found: dict[Cell, int]) -> int:
        """Explain what was found by exactly one moment, no older than what was acknowledged.

        Returns:
            How many steps after the acknowledged ones were found.
        """
        expected = self._base
        wrong = {key for key in found.keys() | expected.keys() if found.get(key, 0) != expected.get(key, 0)}
        last_fit = None if wrong else 0
        for count, step in enumerate(self.steps, 1):
            for key, value in step.cells.items():
                expected[key] = value
                (wrong.discard if found.get(key, 0) == value else wrong.add)(key)
            if not wrong:
                last_fit = count
        if last_fit is None or last_fit < self.acknowledged:
            raise AssertionError(self._explain(found))
        unacknowledged = last_fit - self.acknowledged
        self._restart(found)
        return unacknowledged

    def recover_loosely(self, found: dict[Cell, int]) -> None:
        """Explain what was found cell by cell: each holds its acknowledged value or a later one."""
        allowed = {key: {value} for key, value in self._base.items()}
        for count, step in enumerate(self.steps, 1):
            for key, value in step.cells.items():
                until = self.acknowledged if key[0] == "snapshot" else self._acknowledged_of[key[1]]
                allowed[key] = {value} if count <= until else {*allowed.get(key, {0}), value}
        for key in found.keys() | allowed.keys():
            value, candidates = found.get(key, 0), allowed.get(key, {0})
            assert value in candidates, f"{key} is {value}, allowed are {sorted(candidates)}\n{self._explain(found)}"
        self._restart(found)

    def _restart(self, found: dict[Cell, int]) -> None:
        self.state = {key: value for key, value in found.items() if value or key[0] != "snapshot"}
        self._base = dict(self.state)
        self.steps.clear()
        self.acknowledged = 0
        self._acknowledged_of = [0] * len(self.sector_counts)

    def _explain(self, found: dict[Cell, int]) -> str:
        newest = max((value for key, value in found.items() if key[0] == "sector"), default=0)
        lines = [f"no moment explains it; newest write found {newest}, {self.acknowledged} of {len(self.steps)} acked"]
        acked = self.steps[self.acknowledged - 1].sequence if self.acknowledged else 0
        lines.append(f"acknowledged up to sequence {acked}, asked for up to {self.sequence}")
        moment: dict[Cell, int] = {}
        for step in self.steps:
            if step.sequence <= max(newest, acked):
                moment |= step.cells
        differing = [key for key, value in moment.items() if found.get(key, 0) != value]
        lines += [f"{key}: found {found.get(key, 0)}, expected {moment[key]}" for key in differing[:20]]
        return "\n".join([*lines, f"{len(differing)} cells differ", *map(_describe, self.steps[-30:])])


def _describe(step: Step) -> str:
    keys = list(step.cells)
    return f"  step {step.sequence}: {len(keys)} cells {keys[:1]}..{keys[-1:]} -> {sorted({*step.cells.values()})[:4]}"


def random_range(rng: random.Random, sector_count: int, longest: int) -> tuple[int, int]:
    """Return (first, count) of a range; half of them on page boundaries."""
    count = min(rng.randint(1, longest), sector_count)
    first = rng.randrange(sector_count - count + 1)
    if rng.random() < 0.5:
        count = max(8, count // 8 * 8)
        first = min(first // 8 * 8, sector_count - count)
    return first, count


def split_discard(first: int, count: int, *, block_sectors: int, page_blocks: int = 512) -> Iterator[range]:
    """Yield the pieces in which a discard happens: a partial block, whole blocks of a map page, a partial block."""
    end = first + count
    while first < end:
        in_block = first % block_sectors
        if in_block or end - first < block_sectors:
            stop = min(end, first - in_block + block_sectors)
        else:
            page = page_blocks * block_sectors
            stop = min(end // block_sectors * block_sectors, (first // page + 1) * page)
        yield range(first, stop)
        first = stop
