"""Ranges in their canonical form: joined where they touch, cut at multiples of a chunk.

The form depends only on what a snapshot holds, not on where its ranges were cut before.  So the
same ranges always make the same stream, and the order in which streams are merged does not show.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from incfs.stream.records import Range, Write, Zero

CHUNK_BYTES: Final = 1 << 18
"""A WRITE ends at multiples of this: compressed well, and cheap to hold."""


def end_of(found: Range) -> int:
    """Tell where a range ends."""
    return found.offset_bytes + found.length_bytes


def split_at(found: Range, at_bytes: int) -> tuple[Range, Range]:
    """Cut a range in two, at an offset inside it."""
    head = at_bytes - found.offset_bytes
    assert 0 < head < found.length_bytes
    if isinstance(found, Write):
        return Write(found.offset_bytes, found.data[:head]), Write(at_bytes, found.data[head:])
    return Zero(found.offset_bytes, head), Zero(at_bytes, found.length_bytes - head)


def round_up(value: int, block_bytes: int) -> int:
    """Give the next multiple of a block."""
    return -(-value // block_bytes) * block_bytes


class RangeJoiner:
    """Puts ascending ranges into canonical form; holds less than a chunk."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._start_bytes = 0
        self._end_bytes = 0
        self._is_write = False

    def push(self, found: Range) -> Iterator[Range]:
        """Take the next range; yield those that are complete."""
        is_write = isinstance(found, Write)
        if found.offset_bytes != self._end_bytes or is_write != self._is_write:
            yield from self.flush()
            self._start_bytes = self._end_bytes = found.offset_bytes
            self._is_write = is_write
        if isinstance(found, Zero):
            self._end_bytes += found.length_bytes
            return
        data = memoryview(found.data)
        while data:
            room = CHUNK_BYTES - self._end_bytes % CHUNK_BYTES
            self._parts.append(bytes(data[:room]))
            self._end_bytes += len(self._parts[-1])
            data = data[room:]
            if not self._end_bytes % CHUNK_BYTES:
                yield from self.flush()

    def flush(self) -> Iterator[Range]:
        """Yield what is left."""
        start, self._start_bytes = self._start_bytes, self._end_bytes
        if start == self._end_bytes:
            return
        if self._is_write:
            parts, self._parts = self._parts, []
            yield Write(start, b"".join(parts))
        else:
            yield Zero(start, self._end_bytes - start)


def drop_idle_zeros(ranges: Iterable[Range], base_end_bytes: int) -> Iterator[Range]:
    """Leave out zeros behind the end of the base, where everything new reads as zeros anyway."""
    for found in ranges:
        if isinstance(found, Write) or end_of(found) <= base_end_bytes:
            yield found
        elif found.offset_bytes < base_end_bytes:
            yield split_at(found, base_end_bytes)[0]


def join_ranges(ranges: Iterable[Range]) -> Iterator[Range]:
    """Put ascending ranges into canonical form."""
    joiner = RangeJoiner()
    for found in ranges:
        yield from joiner.push(found)
    yield from joiner.flush()


def overlay_ranges(below: Iterable[Range], above: Iterable[Range]) -> Iterator[Range]:
    """Lay ranges over others: where both have something, ``above`` counts.  One pass."""
    lower, upper = iter(below), iter(above)
    low, high = next(lower, None), next(upper, None)
    while low is not None or high is not None:
        if high is None or (low is not None and end_of(low) <= high.offset_bytes):
            assert low is not None
            yield low
            low = next(lower, None)
        elif low is None or end_of(high) <= low.offset_bytes:
            yield high
            high = next(upper, None)
        elif low.offset_bytes < high.offset_bytes:
            head, low = split_at(low, high.offset_bytes)
            yield head
        elif end_of(low) <= end_of(high):
            low = next(lower, None)
        else:
            low = split_at(low, end_of(high))[1]
