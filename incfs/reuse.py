"""Freed blocks on their way to being free: held while somebody verifies, given back to the host first."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from incfs.blocks import address_runs, set_runs, split_address
from incfs.errors import IncfsError
from incfs.groups import by_group, group_start, member_bits, split_groups
from incfs.model import StorageId
from incfs.storage import StorageVolume

logger = logging.getLogger(__name__)

PUNCH_BYTES = 65536
"""A checkpoint gives host space back in whole chunks of this size; what is freed in smaller pieces is
punched in the background, for it costs about 0.1 ms a piece."""
HOST_BLOCK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class PunchPlan:
    """Freed runs whose host space is given back before they become free."""

    runs: tuple[tuple[StorageId, int, int], ...]


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
        self.quarantine: list[int] = []
        """Freed blocks that wait for that."""
        self._leftovers: dict[tuple[StorageId, int], int] = {}
        """Group -> freed blocks whose host space was not given back with a whole chunk."""

    def plan(self, freed: list[int]) -> PunchPlan:
        """End a checkpoint: make its freed blocks free, but for whole chunks to punch first.

        The chunks stay busy until ``punched``, so that nothing is written into them meanwhile.
        """
        freed, self.quarantine = self.quarantine + freed, []
        if self.held:
            self.quarantine = freed
            return PunchPlan(())
        for storage_id, group_index, members in by_group(freed):
            self._volumes[storage_id].release(group_index, members)
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
            self._volumes[storage_id].set_busy(block_index, count, busy=True)
            for group_index, mask in split_groups(block_index, count):
                self._leftovers[storage_id, group_index] = self._leftovers.get((storage_id, group_index), 0) & ~mask
        return PunchPlan(tuple(runs))

    def _note_leftovers(self, freed: list[int]) -> None:
        """Remember freed blocks beside others that are in use; smaller than the host's, nothing is won by them."""
        if self._block_bytes >= HOST_BLOCK_BYTES:
            for storage_id, group_index, members in by_group(freed):
                before = self._leftovers.get((storage_id, group_index), 0)
                self._leftovers[storage_id, group_index] = before | member_bits(members)

    def plan_leftovers(self, limit: int) -> PunchPlan:
        """Choose up to ``limit`` runs of blocks that were freed one by one and are still free, to be punched too."""
        runs: list[tuple[StorageId, int, int]] = []
        for (storage_id, group_index), bits in list(self._leftovers.items()):
            volume = self._volumes.get(storage_id)
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
        volume = self._volumes[storage_id]
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
                self._volumes[storage_id].punch(block_index, count)
            except IncfsError as error:
                logger.warning("freed space is not given back to the host: %s", error)

    def punched(self, plan: PunchPlan) -> None:
        """Make punched blocks free."""
        for storage_id, block_index, count in plan.runs:
            self._volumes[storage_id].set_busy(block_index, count, busy=False)
