"""Freed blocks on their way to being free: held while somebody verifies, given back to the host first."""

import logging
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from incfs import groups
from incfs.blocks import bit_mask, set_runs
from incfs.errors import IncfsError
from incfs.groups import by_group, group_start
from incfs.model import StorageId
from incfs.storage import StorageVolume

logger = logging.getLogger(__name__)

PUNCH_BYTES = 65536
"""A checkpoint gives host space back in whole chunks of this size; what is freed in smaller pieces is
punched in the background, for it costs about 0.1 ms a piece."""
HOST_BLOCK_BYTES = 4096


Held = tuple[StorageId, int, int]
"""(storage volume, group, blocks of it as a bit set)."""


@dataclass(frozen=True, slots=True)
class PunchPlan:
    """Freed blocks whose host space is given back before they become free."""

    held: tuple[Held, ...]

    @property
    def runs(self) -> list[tuple[StorageId, int, int]]:
        """(storage volume, first block, blocks) of each piece."""
        return [
            (storage_id, group_start(group_index) + first, count)
            for storage_id, group_index, bits in self.held
            for first, count in set_runs(bits)
        ]


class Reuse:
    """What becomes of a pool's freed blocks.  Owner thread, unless a method says otherwise.

    Args:
        volumes: The pool's storage volumes.
        block_bytes: Size of a block.
    """

    def __init__(self, volumes: Mapping[StorageId, StorageVolume], block_bytes: int) -> None:
        self._volumes = volumes
        self._block_bytes = block_bytes
        self.held = 0
        """While positive, freed blocks stay unused: somebody verifies a checkpoint's data."""
        self.quarantine = array("Q")
        """Freed blocks that wait for that."""
        self._leftovers: dict[tuple[StorageId, int], int] = {}
        """Group -> freed blocks whose host space was not given back with a whole chunk, or before a crash."""
        self._fresh_leftovers: dict[tuple[StorageId, int], int] = {}
        """The same since ``settle``: most of what a busy volume frees is in use again before it would be punched."""

    def plan(self, freed: "array[int]") -> PunchPlan:
        """End a checkpoint: make its freed blocks free, but for whole chunks to punch first.

        The chunks stay busy until ``punched``, so that nothing is written into them meanwhile.
        """
        freed, self.quarantine = self.quarantine + freed, array("Q")
        if self.held:
            self.quarantine = freed
            return PunchPlan(())
        held: list[Held] = []
        for storage_id, group_index, bits in by_group(freed):
            self._volumes[storage_id].set_busy(group_index, bits, busy=False)
            if self._block_bytes >= HOST_BLOCK_BYTES:  # smaller than the host's, nothing is won by single ones
                fresh = self._fresh_leftovers.get((storage_id, group_index), 0)
                self._fresh_leftovers[storage_id, group_index] = fresh | bits
            if chunks := self._free_chunks(storage_id, group_index, bits):
                held.append((storage_id, group_index, chunks))
        return self._hold(held)

    def _hold(self, held: list[Held]) -> PunchPlan:
        """Let nothing be written to free blocks until they are punched."""
        for storage_id, group_index, bits in held:
            self._volumes[storage_id].set_busy(group_index, bits, busy=True)
            for leftovers in (self._leftovers, self._fresh_leftovers):
                if (storage_id, group_index) in leftovers:
                    leftovers[storage_id, group_index] &= ~bits
        return PunchPlan(tuple(held))

    def note_written(self, storage_id: StorageId, group_index: int, bits: int) -> bool:
        """Remember free blocks that the host still keeps data of: whoever freed them was cut off; False for none.

        Args:
            storage_id: Where.
            group_index: The group.
            bits: Its blocks that the host has data of, by a look a moment ago.
        """
        volume = self._volumes.get(storage_id)
        free = bits & ~volume.busy[group_index] if volume is not None and group_index < len(volume.busy) else 0
        if free and self._block_bytes < HOST_BLOCK_BYTES:  # by less than a block of the host's nothing is won
            free = self._free_chunks(storage_id, group_index, free)
        if free:
            self._leftovers[storage_id, group_index] = self._leftovers.get((storage_id, group_index), 0) | free
        return bool(free)

    def settle(self) -> None:
        """Let what was freed one by one until now be punched, unless it is in use again; now and then."""
        for key, bits in self._fresh_leftovers.items():
            self._leftovers[key] = self._leftovers.get(key, 0) | bits
        self._fresh_leftovers = {}

    def plan_leftovers(self, limit: int) -> PunchPlan:
        """Choose up to ``limit`` runs of blocks that were freed one by one before ``settle`` and are still free."""
        held: list[Held] = []
        for (storage_id, group_index), bits in list(self._leftovers.items()):
            volume = self._volumes.get(storage_id)
            free = bits & ~volume.busy[group_index] if volume is not None else 0
            self._leftovers[storage_id, group_index] = free
            if not free:
                del self._leftovers[storage_id, group_index]
                continue
            runs = list(islice(set_runs(free), limit))
            held.append((storage_id, group_index, free & bit_mask(0, sum(runs[-1]))))
            limit -= len(runs)
            if not limit:
                break
        return self._hold(held)

    def _free_chunks(self, storage_id: StorageId, group_index: int, bits: int) -> int:
        """Find the chunks around blocks of a group that are free as a whole.

        Cost: a few operations on the group's set, however many chunks there are.
        """
        volume = self._volumes[storage_id]
        chunk, everything = max(1, PUNCH_BYTES // self._block_bytes), bit_mask(0, groups.GROUP_BLOCKS)
        free, near = everything & ~volume.busy[group_index], bits
        length = 1
        while length < chunk:  # a member stays where all, or comes where any, of those before its chunk's end are
            free &= free >> length
            near |= near >> length
            length *= 2
        starts = free & near & everything // bit_mask(0, chunk)
        return starts * bit_mask(0, chunk) & bit_mask(0, volume.grown_blocks - group_start(group_index))

    def punch(self, plan: PunchPlan) -> None:
        """Give host space back, where the host lets us: the blocks are free in any case.  Any thread."""
        for storage_id, block_index, count in plan.runs:
            try:
                self._volumes[storage_id].punch(block_index, count)
            except IncfsError as error:
                logger.warning("freed space is not given back to the host: %s", error)

    def punched(self, plan: PunchPlan) -> None:
        """Make punched blocks free."""
        for storage_id, group_index, bits in plan.held:
            self._volumes[storage_id].set_busy(group_index, bits, busy=False)
