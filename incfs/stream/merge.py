"""One stream of two that follow each other: the ranges of both, the later ones on top.

One pass over both, and associative: the result depends only on what the streams say, not on
the order in which several are merged.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from incfs.errors import BaseMismatch, StreamTruncated, UsageError
from incfs.stream.encoder import StreamEncoder
from incfs.stream.ranges import drop_idle_zeros, end_of, join_ranges, overlay_ranges, round_up, split_at
from incfs.stream.reader import StreamReader
from incfs.stream.records import Link, Range, Record, SnapBegin, SnapEnd, StreamBegin, Write, Zero


def read_records(read: Callable[[], bytes]) -> Iterator[Record]:
    """Yield a whole stream's records.

    Args:
        read: Gives the next bytes; none at the end.

    Raises:
        StreamCorrupt, StreamUnsupported: As ``StreamReader``.
    """
    reader = StreamReader()
    while data := read():
        yield from reader.feed(data)
    reader.close()


@dataclass(slots=True)
class _Input:
    """A stream of one step, snapshot by snapshot."""

    records: Iterator[Record]
    begin: StreamBegin

    def next_snapshot(self) -> SnapBegin:
        found = next(record for record in self.records if isinstance(record, SnapBegin))
        if found.start_bytes:
            raise UsageError(f"the stream of snapshot {found.name} was resumed: it lacks the start; merge whole ones")
        return found

    def ranges(self) -> Iterator[Range]:
        """Yield the ranges of the snapshot under way, to its end."""
        for record in self.records:
            if isinstance(record, Write | Zero):
                yield record
            elif isinstance(record, SnapEnd):
                return

    def finish(self) -> None:
        for _ in self.records:
            pass


def merge(first: Iterator[Record], second: Iterator[Record], encoder: StreamEncoder) -> Iterator[bytes]:
    """Yield the merged stream.

    Raises:
        UsageError: A stream has several steps, or was resumed.
        BaseMismatch: The second does not begin where the first ends, or is of other volumes.
        StreamCorrupt: One is not sound; what was yielded before is of no use.
    """
    older, newer = _open(first), _open(second)
    begin = _join(older.begin, newer.begin)
    yield encoder.begin(begin)
    for link in begin.steps[0]:
        snap, ranges = _merge_snapshot(older, newer, link)
        yield encoder.begin_snapshot(snap)
        for found in join_ranges(ranges):
            yield encoder.add(found)
        yield encoder.end_snapshot()
    older.finish()
    newer.finish()
    yield encoder.end()


def _open(records: Iterator[Record]) -> _Input:
    begin = next(records, None)
    if begin is None:
        raise StreamTruncated("the stream is empty")
    assert isinstance(begin, StreamBegin)
    if len(begin.steps) != 1 or begin.done_count:
        raise UsageError("only streams of one step are merged, from their start; send each with -i")
    return _Input(records, begin)


def _join(older: StreamBegin, newer: StreamBegin) -> StreamBegin:
    if [member.uuid for member in older.members] != [member.uuid for member in newer.members]:
        raise BaseMismatch("the streams are of different volumes")
    pairs = list(zip(older.steps[0], newer.steps[0], strict=True))
    for before, after in pairs:
        if before.member != after.member or after.base != before.uuid:
            raise BaseMismatch(f"the second stream starts from snapshot {after.base}, the first ends at {before.uuid}")
    links = tuple(Link(after.member, before.base, after.uuid) for before, after in pairs)
    return StreamBegin(newer.members, (links,))


def _merge_snapshot(older: _Input, newer: _Input, link: Link) -> tuple[SnapBegin, Iterable[Range]]:
    before, after = older.next_snapshot(), newer.next_snapshot()
    block = min(before.block_bytes, after.block_bytes)
    snap = replace(after, link=link, base_size_bytes=before.base_size_bytes, block_bytes=block)
    ranges = overlay_ranges(_as_base(older.ranges(), before, after), newer.ranges())
    return snap, drop_idle_zeros(ranges, round_up(snap.base_size_bytes, block))


def _as_base(ranges: Iterator[Range], before: SnapBegin, after: SnapBegin) -> Iterator[Range]:
    """Yield the older ranges as they stand in a volume that then got the newer size.

    What a smaller one cut off must read as zeros if the volume grew again.
    """
    for found in ranges:
        if found.offset_bytes < after.size_bytes:
            yield _fitted(found, before, after)
    start = round_up(before.size_bytes, before.block_bytes)
    end = min(round_up(before.base_size_bytes, before.block_bytes), after.size_bytes)
    if start < end:
        yield Zero(start, end - start)


def _fitted(found: Range, before: SnapBegin, after: SnapBegin) -> Range:
    end = end_of(found)
    if end > after.size_bytes:
        return split_at(found, after.size_bytes)[0]
    wanted = min(round_up(end, before.block_bytes), after.size_bytes)
    if end == wanted:
        return found
    if isinstance(found, Write):
        return Write(found.offset_bytes, found.data + bytes(wanted - end))
    return Zero(found.offset_bytes, wanted - found.offset_bytes)
