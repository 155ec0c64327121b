"""Groups: the pieces in which a storage volume's bitmaps are kept, stored and searched.  Pure."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from incfs.blocks import bit_mask, pack_address, sorted_bit_set, split_address
from incfs.model import StorageId

GROUP_BLOCKS = 32768
"""Blocks of one bitmap, 4 KiB of it."""


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


def by_group(addresses: Iterable[int]) -> Iterator[tuple[StorageId, int, int]]:
    """Sort addresses into groups: a group's bit set is long, so it is changed once for all its members.

    Yields:
        (storage volume, group, its members as a bit set).
    """
    rest = sorted(addresses)
    start = 0
    while start < len(rest):
        storage_id, block_index = split_address(rest[start])
        group_index = block_index // GROUP_BLOCKS
        base = pack_address(storage_id, group_start(group_index))
        end = bisect_left(rest, base + GROUP_BLOCKS, start)
        bits = sorted_bit_set([address - base for address in rest[start:end]], GROUP_BLOCKS)
        assert bits.bit_count() == end - start, f"a block of group {group_index} was given twice"
        yield storage_id, group_index, bits
        start = end
