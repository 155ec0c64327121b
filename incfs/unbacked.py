"""Blocks that nobody has and that may have no host space behind them.  Pure.

Two kinds: *hollow* ones have none, since it was given back; *doubtful* ones may have it, and only the host knows.
A storage volume gives neither out before it has asked the host (I15).
"""

from incfs.blocks import set_runs
from incfs.groups import GROUP_BLOCKS, group_start

Run = tuple[int, int]
"""(first block, blocks)."""


class Unbacked:
    """The unbacked blocks of one storage volume.

    Invariants:
        1. ``hollow`` is a subset of ``bits``; neither has an empty set.
    """

    def __init__(self) -> None:
        self.bits: dict[int, int] = {}
        """Group -> its unbacked blocks as a bit set."""
        self.hollow: dict[int, int] = {}
        """The same of the hollow ones."""
        self.count = self.hollow_count = 0

    def add(self, group_index: int, bits: int, hollow: int = 0) -> None:
        """Have more: those of ``hollow``, which are among the bits, without host space."""
        self.count += _add(self.bits, group_index, bits)
        self.hollow_count += _add(self.hollow, group_index, hollow)

    def remove(self, group_index: int, bits: int) -> None:
        """Have these no more, as far as they are here."""
        self.count -= _remove(self.bits, group_index, bits)
        self.hollow_count -= _remove(self.hollow, group_index, bits)

    def doubtful(self, group_index: int) -> int:
        """Give the blocks of a group that may have host space."""
        return self.bits.get(group_index, 0) & ~self.hollow.get(group_index, 0)

    def is_hollow(self, group_index: int, member: int) -> bool:
        """Tell whether a block has none for sure."""
        return bool(self.hollow.get(group_index, 0) >> member & 1)

    def count_from(self, block_index: int) -> int:
        """Count those from a block on."""
        first, member = divmod(block_index, GROUP_BLOCKS)
        return sum(
            (bits >> member if group_index == first else bits).bit_count()
            for group_index, bits in self.bits.items()
            if group_index >= first
        )

    def runs(self, most_blocks: int, most_runs: int) -> list[Run]:
        """Choose some to ask the host for: doubtful ones as long as there are any."""
        runs: list[Run] = []
        has_doubtful = self.hollow_count < self.count
        for group_index in sorted(self.bits):
            bits = self.doubtful(group_index) if has_doubtful else self.bits[group_index]
            for first, count in set_runs(bits):
                runs.append((group_start(group_index) + first, min(count, most_blocks)))
                most_blocks -= runs[-1][1]
                if not most_blocks or len(runs) == most_runs:
                    return runs
        return runs


def _add(sets: dict[int, int], group_index: int, bits: int) -> int:
    """Put blocks into a group's set; give how many are new."""
    before = sets.get(group_index, 0)
    if bits:
        sets[group_index] = before | bits
    return (bits & ~before).bit_count()


def _remove(sets: dict[int, int], group_index: int, bits: int) -> int:
    """Take blocks out of a group's set; give how many there were."""
    before = sets.get(group_index, 0)
    if rest := before & ~bits:
        sets[group_index] = rest
    else:
        sets.pop(group_index, None)
    return (before & bits).bit_count()
