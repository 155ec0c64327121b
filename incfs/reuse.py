"""Freed blocks on their way back: held while somebody verifies, then free, later given back to the host.

A block is free as soon as its checkpoint has ended.  Its host space stays until it has been free for a while:
a busy volume that overwrites itself uses its blocks again, and the host need not allocate them anew each time.
Punched, it is nobody's and not free either: it is leased again once the host has given its space anew (I15).
"""

import logging
import math
import time
from array import array
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from incfs import groups
from incfs.blocks import bit_mask, set_runs
from incfs.errors import IncfsError
from incfs.groups import by_group, group_start, split_groups
from incfs.model import StorageId
from incfs.storage import StorageVolume

logger = logging.getLogger(__name__)

CHUNK_BYTES = 65536
"""Free space of this size, and aligned to it, is worth giving back at once where the host is short of space; and
of smaller blocks than the host's at all."""
HOST_BLOCK_BYTES = 4096


Held = tuple[StorageId, int, int]
"""(storage volume, group, blocks of it as a bit set)."""
_Sets = dict[tuple[StorageId, int], int]
"""(Storage volume, group) -> blocks of it as a bit set."""


@dataclass(frozen=True, slots=True)
class PunchPlan:
    """Free blocks that nobody gets until their host space is given back."""

    held: tuple[Held, ...]
    punched: "_Sets" = field(default_factory=dict)
    """Those whose space the host has taken back."""
    left: "_Sets" = field(default_factory=dict)
    """Those for which there was no time."""

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
        self.is_withheld = True
        """Nothing goes back to the host: the tables were not proved to be the newest (I14)."""
        self.quarantine = array("Q")
        """Freed blocks that wait for that."""
        self._fresh: _Sets = {}
        """Blocks that became free since ``settle``; most of a busy volume's are in use again soon."""
        self._settled: _Sets = {}
        """Those before, and what a crash left: given back if they still are."""

    @contextmanager
    def withholding(self) -> Iterator[None]:
        """Let no freed block be used again meanwhile: somebody reads or rewrites what he knows by its address."""
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    def make_free(self, freed: "array[int]") -> None:
        """End a checkpoint: its freed blocks are free, unless somebody verifies."""
        freed, self.quarantine = self.quarantine + freed, array("Q")
        if self.held:
            self.quarantine = freed
            return
        for storage_id, group_index, bits in by_group(freed):
            self._volumes[storage_id].set_busy(group_index, bits, busy=False)
            _add(self._fresh, (storage_id, group_index), bits)

    def note_written(self, storage_id: StorageId, group_index: int, bits: int) -> bool:
        """Remember free blocks that the host still keeps data of: whoever freed them was cut off; False for none.

        Args:
            storage_id: Where.
            group_index: The group.
            bits: Its blocks that the host has data of, by a look a moment ago.
        """
        volume = self._volumes.get(storage_id)
        free = bits & volume.may_occupy(group_index) if volume is not None else 0
        if free:
            _add(self._settled, (storage_id, group_index), free)
        return bool(free)

    def note_unused(self, storage_id: StorageId) -> None:
        """Let all that an image has and nobody uses be given back, also what it grew by in advance: it is empty."""
        volume = self._volumes[storage_id]
        for group_index in range(volume.group_count):
            if free := volume.may_occupy(group_index):
                _add(self._settled, (storage_id, group_index), free)

    def settle(self) -> None:
        """Let what became free until now be given back, unless it is in use again by then; now and then."""
        for key, bits in self._fresh.items():
            _add(self._settled, key, bits)
        self._fresh = {}

    def hurry(self, storage_ids: Collection[StorageId]) -> None:
        """Let the whole chunks of some storage volumes be given back without waiting: the host is short of space."""
        for (storage_id, group_index), bits in self._fresh.items():
            if storage_id in storage_ids and (chunks := self._free_chunks(storage_id, group_index, bits)):
                _add(self._settled, (storage_id, group_index), chunks)

    def plan(self, most_runs: int, most_blocks: int) -> PunchPlan:
        """Choose settled blocks to give back, and let nothing be written to them until they are ``punched``.

        Args:
            most_runs: In up to so many pieces.
            most_blocks: Up to so many altogether.
        """
        held: list[Held] = []
        while not self.is_withheld and self._settled and most_runs and most_blocks:
            (storage_id, group_index), bits = self._settled.popitem()
            free = self._look_again(storage_id, group_index, bits)
            end = 0
            for first, count in set_runs(free):
                end = first + min(count, most_blocks)
                most_runs, most_blocks = most_runs - 1, most_blocks - (end - first)
                if not (most_runs and most_blocks):
                    break
            if rest := free >> end << end:
                self._settled[storage_id, group_index] = rest
            if chosen := free & bit_mask(0, end):
                self._hold(storage_id, group_index, chosen)
                held.append((storage_id, group_index, chosen))
        return PunchPlan(tuple(held))

    def _look_again(self, storage_id: StorageId, group_index: int, bits: int) -> int:
        """Leave out what is in use again, and what gives the host nothing back."""
        volume = self._volumes.get(storage_id)
        if volume is None:
            return 0
        if leased := bits & volume.leased(group_index):  # may come back unused
            _add(self._fresh, (storage_id, group_index), leased)
        if self._block_bytes < HOST_BLOCK_BYTES:  # by less than a block of the host's nothing is won
            return self._free_chunks(storage_id, group_index, bits)
        return bits & volume.may_occupy(group_index)

    def _hold(self, storage_id: StorageId, group_index: int, bits: int) -> None:
        self._volumes[storage_id].hold(group_index, bits)
        if (storage_id, group_index) in self._fresh:
            self._fresh[storage_id, group_index] &= ~bits

    def _free_chunks(self, storage_id: StorageId, group_index: int, bits: int) -> int:
        """Find the chunks around blocks of a group that are free as a whole.

        Cost: a few operations on the group's set, however many chunks there are.
        """
        volume = self._volumes[storage_id]
        chunk, everything = max(1, CHUNK_BYTES // self._block_bytes), bit_mask(0, groups.GROUP_BLOCKS)
        free, near = volume.may_occupy(group_index), bits
        length = 1
        while length < chunk:  # a member stays where all, or comes where any, of those before its chunk's end are
            free &= free >> length
            near |= near >> length
            length *= 2
        starts = free & near & everything // bit_mask(0, chunk)
        return starts * bit_mask(0, chunk)

    def punch(self, plan: PunchPlan, limit_s: float = math.inf) -> float:
        """Give host space back, where the host lets us: the blocks are nobody's in any case.  Any thread.

        No piece is begun after ``limit_s``, but for the first.

        Returns:
            How long the slowest piece took: nobody could write to its image meanwhile.
        """
        began = ended = time.monotonic()
        slowest_s = 0.0
        for number, (storage_id, block_index, count) in enumerate(plan.runs):
            if number and ended - began >= limit_s:
                for group_index, bits in split_groups(block_index, count):
                    _add(plan.left, (storage_id, group_index), bits)
                continue
            self._punch_run(plan, storage_id, block_index, count)
            before, ended = ended, time.monotonic()
            slowest_s = max(slowest_s, ended - before)
        return slowest_s

    def _punch_run(self, plan: PunchPlan, storage_id: StorageId, block_index: int, count: int) -> None:
        try:
            is_punched = self._volumes[storage_id].punch(block_index, count)
        except IncfsError as error:
            logger.warning("freed space is not given back to the host: %s", error)
            return
        for group_index, bits in split_groups(block_index, count) if is_punched else ():
            _add(plan.punched, (storage_id, group_index), bits)

    def punched(self, plan: PunchPlan) -> None:
        """Let what was held be free once the host has been asked for its space again; what was left waits again."""
        for key, bits in plan.left.items():
            _add(self._settled, key, bits)
        for storage_id, group_index, bits in plan.held:
            self._volumes[storage_id].end_hold(
                group_index, bits, punched=bits & plan.punched.get((storage_id, group_index), 0)
            )


def _add(sets: _Sets, key: tuple[StorageId, int], bits: int) -> None:
    sets[key] = sets.get(key, 0) | bits
