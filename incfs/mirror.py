"""A mirrored image: several files that hold the same, behind the interface of one.

Every leg is written and synced; reads use the first sound one.  A leg that fails is left behind
(``failed``) as long as another is sound; who owns the record sees to it that it is not trusted again
before it was brought up to date.  Full disks are no failure: the write fails as a whole.

Concurrency: reads, writes and syncs may run in any thread; which legs there are changes on the
owner thread.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from incfs.backing import File, begun
from incfs.epoch import Stamp
from incfs.errors import BackingError, IncfsError, NoSpace
from incfs.image import write_stamp

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Healed:
    """What healing some blocks came to."""

    rewritten: int
    """Blocks of legs; 0 when somebody else was faster."""
    lost: frozenset[int]
    """Numbers of the blocks that no leg has right."""


def _read_blocks(leg: File, offset_bytes: int, block_bytes: int, count: int) -> list[bytes | None]:
    """Read blocks of a leg, None for each that cannot be read."""
    try:
        data = leg.pread(offset_bytes, count * block_bytes)
    except BackingError:
        if count == 1:
            return [None]
        half = count // 2
        rest = _read_blocks(leg, offset_bytes + half * block_bytes, block_bytes, count - half)
        return _read_blocks(leg, offset_bytes, block_bytes, half) + rest
    return [data[i * block_bytes : (i + 1) * block_bytes] for i in range(count)]


def _stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of numbers that follow each other; they ascend."""
    first = count = 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count


class MirroredFile(File):
    """Up to four files as one.

    Args:
        legs: The files; None where one is missing.
        path: What messages call it.
        stale: Legs that lack something: neither read nor written.
    """

    def __init__(self, path: Path, legs: Sequence[File | None], stale: Sequence[int]) -> None:
        sound = next(leg for i, leg in enumerate(legs) if leg is not None and i not in stale)
        super().__init__(path, sound.fileno())
        self.legs: list[File | None] = list(legs)
        self.stale = set(stale) | {i for i, leg in enumerate(legs) if leg is None}
        """Not read."""
        self.healed_count = 0
        """Blocks that were rewritten."""
        self._healing = threading.Lock()
        """Several reads may find the same block wrong: it is healed, and counted, once."""
        self.rebuilding: set[int] = set()
        """Stale ones that are being brought up to date: written, not read."""
        self.failed: dict[int, str] = {i: "missing" for i, leg in enumerate(legs) if leg is None and i not in stale}
        """Newly stale ones and why, until that is recorded."""
        self.stamps: dict[int, Stamp] = {}
        """The last stamp that each leg surely has; none of those whose contents are not known."""
        self.unknown: set[int] = set()
        """Stale ones that were opened and are not as they were left behind: they lack everything."""

    def sound_legs(self) -> list[tuple[int, File]]:
        """List the legs that may be read."""
        return [(i, leg) for i, leg in enumerate(self.legs) if leg is not None and i not in self.stale]

    def written_legs(self) -> list[tuple[int, File]]:
        """List the legs that are written: the sound ones first."""
        return self.sound_legs() + [(i, leg) for i in sorted(self.rebuilding) if (leg := self.legs[i]) is not None]

    def leave(self, number: int, reason: str) -> bool:
        """Stop using a leg that failed; False when no sound one would be left."""
        if number in self.stale and number not in self.rebuilding:
            return True
        if number not in self.rebuilding and len(self.sound_legs()) == 1:
            return False
        self.rebuilding.discard(number)
        self.stale.add(number)
        self.failed[number] = reason
        return True

    def fileno(self) -> int:
        """Give the descriptor of the leg that is read."""
        return self.sound_legs()[0][1].fileno()

    def _read(self, read: Callable[[File], Result]) -> Result:
        error: IncfsError | None = None
        for number, leg in self.sound_legs():
            try:
                return read(leg)
            except BackingError as failure:
                logger.warning("leg %d of %s: %s", number, self.path, failure)
                error = failure
        assert error is not None
        raise error

    def _write(self, write: Callable[[File], Result], legs: Sequence[tuple[int, File]] | None = None) -> list[Result]:
        """Do it on every leg, or on these; those that fail are left behind while another is sound."""
        results = []
        for number, leg in self.written_legs() if legs is None else legs:
            try:
                results.append(write(leg))
            except NoSpace:
                raise
            except BackingError as failure:
                if not self.leave(number, str(failure)):
                    raise
                logger.warning("leg %d is left behind: %s", number, failure)
        return results

    def pread(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Read from the first leg that can."""
        return self._read(lambda leg: leg.pread(offset_bytes, length_bytes))

    def pread_cached(self, offset_bytes: int, length_bytes: int) -> bytes | None:
        """Read from the first leg that can, if its page cache has the range."""
        return self._read(lambda leg: leg.pread_cached(offset_bytes, length_bytes))

    def pwrite(self, offset_bytes: int, data: bytes | memoryview) -> None:
        """Write to every leg."""
        self._write(lambda leg: leg.pwrite(offset_bytes, data))

    def stamp(self, stamp: Stamp) -> None:
        """Stamp the sound legs; ``note_stamped`` follows the sync.  One that is being filled is stamped when it is."""
        self._write(lambda leg: write_stamp(leg, stamp), self.sound_legs())

    def note_stamped(self, stamp: Stamp) -> None:
        """Note that the sound legs have a stamp, durably."""
        self.stamps |= {number: stamp for number, _ in self.sound_legs()}

    @property
    def waits(self) -> bool:
        """Whether any leg's sync does."""
        return any(leg.waits for _, leg in self.written_legs())

    def sync(self) -> None:
        """Sync every leg, side by side."""
        legs = [leg for _, leg in self.written_legs()]
        with begun([leg.sync for leg in legs], side_by_side=self.waits) as ends:
            end_of = dict(zip(legs, ends, strict=True))
            self._write(lambda leg: end_of[leg]())

    def truncate(self, length_bytes: int) -> None:
        """Set the length of every leg."""
        self._write(lambda leg: leg.truncate(length_bytes))

    def allocate(self, offset_bytes: int, length_bytes: int, *, keep_size: bool = False) -> None:
        """Grow every leg."""
        self._write(lambda leg: leg.allocate(offset_bytes, length_bytes, keep_size=keep_size))

    def punch(self, offset_bytes: int, length_bytes: int) -> bool:
        """Give a range of every leg back to its host."""
        return all(self._write(lambda leg: leg.punch(offset_bytes, length_bytes)))

    def data_ranges(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
        """List what is data on any leg; ranges may overlap."""
        return [found for _, leg in self.written_legs() for found in leg.data_ranges(offset_bytes, length_bytes)]

    def length_bytes(self) -> int:
        """Tell the length of the shortest sound leg."""
        return min(leg.length_bytes() for _, leg in self.sound_legs())

    def allocated_bytes(self) -> int:
        """Tell how much host space all legs occupy."""
        return sum(leg.allocated_bytes() for leg in self.legs if leg is not None)

    def lock(self) -> None:
        """Have every leg alone."""
        for leg in self.legs:
            if leg is not None:
                leg.lock()

    def close(self) -> None:
        """Close every leg."""
        for leg in self.legs:
            if leg is not None:
                leg.close()

    def heal(self, offset_bytes: int, block_bytes: int, are_right: Sequence[Callable[[bytes], bool]]) -> Healed:
        """Rewrite blocks that follow each other on the legs that have them wrong, each from one that has it right.

        Args:
            offset_bytes: Of the first.
            block_bytes: Of each.
            are_right: One judge for each block.

        Cost: a read of all of it from each leg, and a write for each stretch that is wrong.
        """
        with self._healing:
            return self._heal(offset_bytes, block_bytes, are_right)

    def _heal(self, offset_bytes: int, block_bytes: int, are_right: Sequence[Callable[[bytes], bool]]) -> Healed:
        found = {n: _read_blocks(leg, offset_bytes, block_bytes, len(are_right)) for n, leg in self.sound_legs()}
        right: list[bytes | None] = []
        for i, is_right in enumerate(are_right):
            copies = [blocks[i] for blocks in found.values()]
            right.append(next((data for data in copies if data is not None and is_right(data)), None))
        healed = 0
        for number, blocks in found.items():
            wrong = [i for i, data in enumerate(right) if data is not None and blocks[i] != data]
            healed += self._rewrite_all(number, offset_bytes, right, wrong)
        self.healed_count += healed
        return Healed(healed, frozenset(i for i, data in enumerate(right) if data is None))

    def _rewrite_all(self, number: int, offset_bytes: int, right: Sequence[bytes | None], wrong: Sequence[int]) -> int:
        """Rewrite blocks of a leg, those next to each other at once, until it fails; give how many."""
        healed = 0
        for first, count in _stretches(wrong):
            data = [block for block in right[first : first + count] if block is not None]
            if not self._rewrite(number, offset_bytes + first * len(data[0]), b"".join(data)):
                break
            healed += count
        return healed

    def _rewrite(self, number: int, offset_bytes: int, data: bytes) -> bool:
        leg = self.legs[number]
        assert leg is not None
        try:
            leg.pwrite(offset_bytes, data)
            leg.pread(offset_bytes, len(data))  # one that still cannot be read is no help to whoever asks again
        except IncfsError as error:
            self.leave(number, str(error))
            return False
        return True
