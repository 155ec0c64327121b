"""Takes a stream apart and proves it: order of records, chain, ranges, counts, digests."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import zstandard

from incfs.errors import StreamCorrupt, StreamTruncated
from incfs.stream.encoder import NONE, ZSTD
from incfs.stream.frames import Frame, FrameReader, RecordType
from incfs.stream.records import (
    MAX_WRITE_BYTES,
    Checkpoint,
    Link,
    Range,
    Record,
    Resize,
    SnapBegin,
    SnapEnd,
    StreamBegin,
    StreamEnd,
    Write,
    decode_checkpoint,
    decode_list,
    decode_resize,
    decode_snap_begin,
    decode_snap_end,
    decode_stream_begin,
    decode_stream_end,
    decode_zero,
    extend_digest,
    extend_stream_digest,
    stream_digest,
)

_FRAME_HEADER_LIMIT: Final = 18
"""Longest header of a zstd frame."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a stream came, and all that is left of it: what a resume token stands for."""

    begin: StreamBegin
    """What is left."""
    offset_bytes: int = 0
    """Where the first snapshot of it goes on."""
    digest: bytes = b""
    """Of its ranges before that."""

    @property
    def link(self) -> Link | None:
        """The snapshot that comes next; None at the end."""
        return self.begin.steps[0][self.begin.done_count] if self.begin.steps else None

    def after_snapshot(self) -> "Position":
        """Give the position behind the snapshot that comes next."""
        begin = self.begin
        if begin.done_count + 1 < len(begin.steps[0]):
            return Position(replace(begin, done_count=begin.done_count + 1))
        return Position(replace(begin, steps=begin.steps[1:], done_count=0))


class StreamReader:
    """Takes bytes as they come and gives records, in the order and with the contents that a stream must have.

    Memory: one record and what was fed last; see ``MAX_BODY_BYTES``.
    """

    def __init__(self) -> None:
        self._frames = FrameReader()
        self._decompressor = zstandard.ZstdDecompressor()
        self.begin: StreamBegin | None = None
        self.snap: SnapBegin | None = None
        """The snapshot under way."""
        self.position: Position | None = None
        """Behind the last CHECKPOINT or SNAP_END; None before STREAM_BEGIN."""
        self.has_ended = False
        self._is_first_snapshot = True
        self._needs_resize = False
        self._next_bytes = 0
        self._counts = SnapEnd(0, 0, 0, 0, b"")
        self._stream_digest = b""
        self._snapshot_count = 0

    def feed(self, data: bytes) -> Iterator[Record]:
        """Take bytes; yield the records that they complete.

        Raises:
            StreamCorrupt, StreamUnsupported: The stream is not sound; nothing more may be made of it.
        """
        if self.has_ended and data:
            raise StreamCorrupt("bytes follow the end of the stream")
        for frame in self._frames.feed(data):
            yield self._accept(frame)
        if self.has_ended and self._frames.has_rest:
            raise StreamCorrupt("bytes follow the end of the stream")

    def close(self) -> None:
        """Note that no more bytes come.

        Raises:
            StreamTruncated: There is no STREAM_END.
        """
        self._frames.close()
        if not self.has_ended:
            raise StreamTruncated(
                "the stream has no end: it was cut off between two records; `incfs stream token` tells how to go on"
            )

    def _accept(self, frame: Frame) -> Record:
        if self.has_ended:
            raise StreamCorrupt("a record follows the end of the stream")
        kind = frame.kind
        if (self.begin is None) != (kind is RecordType.STREAM_BEGIN):
            raise StreamCorrupt(f"{kind.name} at byte {frame.offset_bytes}: a stream has one STREAM_BEGIN, first")
        if kind is RecordType.STREAM_BEGIN:
            return self._accept_begin(frame.body)
        if kind in _IN_SNAPSHOT:
            return self._accept_inside(frame)
        if self.snap is not None:
            raise StreamCorrupt(
                f"{kind.name} at byte {frame.offset_bytes}: snapshot {self.snap.link.uuid} is not ended"
            )
        return self._accept_snapshot(frame.body) if kind is RecordType.SNAP_BEGIN else self._accept_end(frame.body)

    def _accept_begin(self, body: bytes) -> StreamBegin:
        self.begin = decode_stream_begin(body)
        self.position = Position(self.begin)
        self._stream_digest = stream_digest(self.begin)
        return self.begin

    def _accept_snapshot(self, body: bytes) -> SnapBegin:
        snap = decode_snap_begin(body)
        assert self.position is not None
        if snap.link != self.position.link:
            raise StreamCorrupt(f"SNAP_BEGIN: snapshot {snap.link.uuid} is not the next of the chain")
        if snap.start_bytes and not self._is_first_snapshot:
            raise StreamCorrupt(f"SNAP_BEGIN: snapshot {snap.link.uuid} lacks its start, and is not the first")
        self._is_first_snapshot = False
        self.snap = snap
        self.position = replace(self.position, offset_bytes=snap.start_bytes, digest=snap.digest)
        self._needs_resize = snap.size_bytes != snap.base_size_bytes
        self._next_bytes = snap.start_bytes
        self._counts = SnapEnd(0, 0, 0, 0, snap.first_digest())
        return snap

    def _accept_inside(self, frame: Frame) -> Record:
        snap = self.snap
        if snap is None or self._needs_resize != (frame.kind is RecordType.RESIZE):
            raise StreamCorrupt(f"{frame.kind.name} at byte {frame.offset_bytes}: not where it may be")
        match frame.kind:
            case RecordType.RESIZE:
                return self._accept_resize(decode_resize(frame.body), snap)
            case RecordType.WRITE:
                return self._accept_range(self._decode_write(frame.body), snap)
            case RecordType.ZERO:
                return self._accept_range(decode_zero(frame.body), snap)
            case RecordType.CHECKPOINT:
                return self._accept_checkpoint(decode_checkpoint(frame.body))
        return self._accept_snap_end(decode_snap_end(frame.body))

    def _accept_resize(self, resize: Resize, snap: SnapBegin) -> Resize:
        if resize.size_bytes != snap.size_bytes:
            raise StreamCorrupt(f"RESIZE to {resize.size_bytes} bytes, but the snapshot has {snap.size_bytes}")
        self._needs_resize = False
        return resize

    def _accept_range(self, found: Range, snap: SnapBegin) -> Range:
        start, length = found.offset_bytes, found.length_bytes
        end, block = start + length, snap.block_bytes
        if start < self._next_bytes or length <= 0 or end > snap.size_bytes:
            raise StreamCorrupt(f"a range of {length} bytes at {start} overlaps, descends or is outside of the volume")
        if start % block or (end % block and end != snap.size_bytes):
            raise StreamCorrupt(f"a range of {length} bytes at {start} is not aligned to blocks of {block}")
        self._next_bytes = end
        counts, digest = self._counts, extend_digest(self._counts.digest, found)
        if isinstance(found, Write):
            writes, data_bytes = counts.write_count + 1, counts.data_bytes + length
            self._counts = replace(counts, write_count=writes, data_bytes=data_bytes, digest=digest)
        else:
            zeros, zero_bytes = counts.zero_count + 1, counts.zero_bytes + length
            self._counts = replace(counts, zero_count=zeros, zero_bytes=zero_bytes, digest=digest)
        return found

    def _decode_write(self, body: bytes) -> Write:
        match decode_list(body, "WRITE"):
            case [int(offset), int(length), int(codec), bytes(data)]:
                if not 0 < length <= MAX_WRITE_BYTES:
                    raise StreamCorrupt(f"WRITE of {length} bytes (limit {MAX_WRITE_BYTES})")
                return Write(offset, self._decompress(codec, data, length))
        raise StreamCorrupt("WRITE: malformed")

    def _decompress(self, codec: int, data: bytes, length: int) -> bytes:
        """Give the data, which must have the length announced: nothing is made that is longer."""
        if codec == ZSTD:
            try:
                # What a frame claims is what would be allocated for it.
                if zstandard.frame_content_size(data[:_FRAME_HEADER_LIMIT]) != length:
                    raise StreamCorrupt(f"WRITE: its frame does not hold the {length} bytes announced")
                data = self._decompressor.decompress(data, allow_extra_data=False)
            except zstandard.ZstdError as error:
                raise StreamCorrupt(f"WRITE: {error}") from error
        elif codec != NONE:
            raise StreamCorrupt(f"WRITE: unknown codec {codec}")
        if len(data) != length:
            raise StreamCorrupt(f"WRITE: {len(data)} bytes, but {length} were announced")
        return data

    def _accept_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        if checkpoint != Checkpoint(self._next_bytes, self._counts.digest):
            raise StreamCorrupt(f"CHECKPOINT at {checkpoint.offset_bytes} does not match the ranges before it")
        assert self.position is not None
        self.position = replace(self.position, offset_bytes=checkpoint.offset_bytes, digest=checkpoint.digest)
        return checkpoint

    def _accept_snap_end(self, end: SnapEnd) -> SnapEnd:
        assert self.snap is not None
        assert self.position is not None
        if end != self._counts:
            raise StreamCorrupt(f"SNAP_END of {self.snap.link.uuid}: counts or digest do not match its ranges")
        self.snap = None
        self._snapshot_count += 1
        self._stream_digest = extend_stream_digest(self._stream_digest, end.digest)
        self.position = self.position.after_snapshot()
        return end

    def _accept_end(self, body: bytes) -> StreamEnd:
        end = decode_stream_end(body)
        assert self.position is not None
        if self.position.link is not None:
            raise StreamCorrupt(f"STREAM_END: snapshot {self.position.link.uuid} is missing")
        if end != StreamEnd(self._snapshot_count, self._stream_digest):
            raise StreamCorrupt("STREAM_END: the digest does not match the snapshots")
        self.has_ended = True
        return end


_IN_SNAPSHOT: Final = frozenset(
    {RecordType.WRITE, RecordType.ZERO, RecordType.RESIZE, RecordType.CHECKPOINT, RecordType.SNAP_END}
)
