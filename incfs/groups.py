"""Groups: the pieces in which a storage volume's bitmaps are kept, stored and searched.  Pure."""

from array import array
from collections.abc import Iterable, Iterator

from incfs import _mappings
from incfs.blocks import bit_mask
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
        (storage volume, group, its members as a bit set), ascending.
    """
    for storage_id, group_index, bits in _mappings.groups(array("Q", addresses), GROUP_BLOCKS):
        yield StorageId(storage_id), group_index, int.from_bytes(bits, "little")
