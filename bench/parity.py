"""What a parity storage volume would write: the simulation behind docs/adr/0010.

usage: python -m bench.parity

Single blocks are overwritten at random, redirect-on-write.  A stripe of k data blocks and one of parity is written
whole, so a commit pads its last one; a stripe is used again when none of its blocks is live, and the collector empties
the one with the fewest.
"""

import random
from typing import Final

STRIPE_BLOCKS: Final = 8192
"""Data blocks of the simulated storage volume."""
SPARE_STRIPES: Final = 4
ROUNDS: Final = 5
"""Times that all live blocks are overwritten; the second half is counted."""


class ParityVolume:
    """Which blocks lie in which stripe."""

    def __init__(self, columns: int, live_blocks: int) -> None:
        count = STRIPE_BLOCKS // columns
        self._columns = columns
        self._where: list[int | None] = [None] * live_blocks
        self._members: list[set[int]] = [set() for _ in range(count)]
        self._by_size: list[set[int]] = [set() for _ in range(columns + 1)]
        self._free = list(range(count))
        self._pending: set[int] = set()
        self.written = 0
        """Blocks written, padding and parity included."""
        self.moved = 0

    def write(self, block: int) -> None:
        """Overwrite a block; collect until there are free stripes."""
        self._put(block)
        while len(self._free) < SPARE_STRIPES:
            victim = next(next(iter(stripes)) for stripes in self._by_size[1:] if stripes)
            for member in list(self._members[victim]):
                self.moved += 1
                self._put(member)

    def commit(self) -> None:
        """Write what waits for a whole stripe."""
        if self._pending:
            stripe = self._free.pop()
            for block in self._pending:
                self._where[block] = stripe
            self._members[stripe], self._pending = self._pending, set()
            self._by_size[len(self._members[stripe])].add(stripe)
            self.written += self._columns + 1

    def _put(self, block: int) -> None:
        stripe = self._where[block]
        if stripe is not None:
            self._leave(block, stripe)
        self._pending.add(block)
        if len(self._pending) == self._columns:
            self.commit()

    def _leave(self, block: int, stripe: int) -> None:
        self._where[block] = None
        self._by_size[len(self._members[stripe])].discard(stripe)
        self._members[stripe].discard(block)
        if self._members[stripe]:
            self._by_size[len(self._members[stripe])].add(stripe)
        else:
            self._free.append(stripe)


def simulate(columns: int, used: float, commit_blocks: int | None) -> tuple[float, float]:
    """Give (written, moved) blocks for each block that the user writes, in a steady state."""
    rng = random.Random(1)
    live_blocks = int(STRIPE_BLOCKS * used)
    volume = ParityVolume(columns, live_blocks)
    for block in rng.sample(range(live_blocks), live_blocks):
        volume.write(block)
    volume.commit()
    total = ROUNDS * live_blocks
    for number in range(total):
        if number == total // 2:
            volume.written = volume.moved = 0
        volume.write(rng.randrange(live_blocks))
        if commit_blocks is not None and not (number + 1) % commit_blocks:
            volume.commit()
    return volume.written / (total - total // 2), volume.moved / (total - total // 2)


def main() -> None:
    """Print the table."""
    for commit_blocks in (None, 16, 4, 1):
        for columns in (2, 4, 8):
            cells = []
            for used in (0.5, 0.7, 0.8, 0.9):
                if commit_blocks != 1 or used < 0.9:
                    written, moved = simulate(columns, used, commit_blocks)
                    cells.append(f"{used:.0%} used: {written:.1f} written, {moved:.1f} moved")
            print(f"{columns}+1, a commit after {commit_blocks or 'many'} blocks: {'; '.join(cells)}")


if __name__ == "__main__":
    main()
