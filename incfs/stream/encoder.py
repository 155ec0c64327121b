"""Makes a stream: takes snapshots and ranges, gives bytes."""

from dataclasses import replace
from typing import Final

import zstandard

from incfs.codec import pack
from incfs.errors import LimitExceeded
from incfs.stream.frames import RecordType, make_frame, make_preamble
from incfs.stream.records import (
    MAX_BODY_BYTES,
    MAX_WRITE_BYTES,
    Checkpoint,
    Range,
    Resize,
    SnapBegin,
    SnapEnd,
    StreamBegin,
    StreamEnd,
    Write,
    encode_plain,
    encode_snap_begin,
    encode_stream_begin,
    extend_digest,
    extend_stream_digest,
    stream_digest,
)

DEFAULT_LEVEL: Final = 1
CHECKPOINT_BYTES: Final = 32 << 20
"""Ranges between two CHECKPOINTs, each counted as its data and ``_RANGE_WEIGHT`` more."""
_RANGE_WEIGHT: Final = 4096
NONE: Final = 0
ZSTD: Final = 1
"""Codecs of a WRITE."""


class StreamEncoder:
    """Makes one stream; what it makes depends on nothing but what it is given.

    Args:
        level: Of zstd; 0 leaves data as it is.
        checkpoint_bytes: Between two CHECKPOINTs.

    Concurrency: any thread, one call at a time.
    """

    def __init__(self, *, level: int = DEFAULT_LEVEL, checkpoint_bytes: int = CHECKPOINT_BYTES) -> None:
        self._compressor = zstandard.ZstdCompressor(level=level) if level else None
        self._checkpoint_bytes = checkpoint_bytes
        self._sequence = 0
        self._stream_digest = b""
        self._snapshot_count = 0
        self._counts = SnapEnd(0, 0, 0, 0, b"")
        self._since_checkpoint = 0

    def begin(self, begin: StreamBegin) -> bytes:
        """Start the stream.

        Raises:
            LimitExceeded: The chain is too long for one stream.
        """
        self._stream_digest = stream_digest(begin)
        body = encode_stream_begin(begin)
        if len(body) > MAX_BODY_BYTES:
            raise LimitExceeded(f"a chain of {len(begin.steps)} steps is too long for one stream; send it in parts")
        return make_preamble() + self._frame(RecordType.STREAM_BEGIN, body)

    def begin_snapshot(self, snap: SnapBegin) -> bytes:
        """Start the next snapshot."""
        self._counts = SnapEnd(0, 0, 0, 0, snap.first_digest())
        self._since_checkpoint = 0
        made = self._frame(RecordType.SNAP_BEGIN, encode_snap_begin(snap))
        if snap.size_bytes != snap.base_size_bytes:
            made += self._frame(RecordType.RESIZE, encode_plain(Resize(snap.size_bytes)))
        return made

    def add(self, found: Range) -> bytes:
        """Add a range, and a CHECKPOINT when one is due."""
        counts, length = self._counts, found.length_bytes
        digest = extend_digest(counts.digest, found)
        if isinstance(found, Write):
            assert 0 < length <= MAX_WRITE_BYTES
            self._counts = replace(
                counts, write_count=counts.write_count + 1, data_bytes=counts.data_bytes + length, digest=digest
            )
            self._since_checkpoint += length
            made = self._frame(RecordType.WRITE, self._write_body(found))
        else:
            self._counts = replace(
                counts, zero_count=counts.zero_count + 1, zero_bytes=counts.zero_bytes + length, digest=digest
            )
            made = self._frame(RecordType.ZERO, encode_plain(found))
        self._since_checkpoint += _RANGE_WEIGHT
        if self._since_checkpoint >= self._checkpoint_bytes:
            made += self._checkpoint(found.offset_bytes + length)
        return made

    def _write_body(self, found: Write) -> bytes:
        if self._compressor is not None:
            packed = self._compressor.compress(found.data)
            if len(packed) < found.length_bytes:
                return pack([found.offset_bytes, found.length_bytes, ZSTD, packed])
        return pack([found.offset_bytes, found.length_bytes, NONE, found.data])

    def _checkpoint(self, offset_bytes: int) -> bytes:
        self._since_checkpoint = 0
        return self._frame(RecordType.CHECKPOINT, encode_plain(Checkpoint(offset_bytes, self._counts.digest)))

    def end_snapshot(self) -> bytes:
        """End the snapshot."""
        self._stream_digest = extend_stream_digest(self._stream_digest, self._counts.digest)
        self._snapshot_count += 1
        return self._frame(RecordType.SNAP_END, encode_plain(self._counts))

    def end(self) -> bytes:
        """End the stream."""
        return self._frame(RecordType.STREAM_END, encode_plain(StreamEnd(self._snapshot_count, self._stream_digest)))

    def _frame(self, kind: RecordType, body: bytes) -> bytes:
        made = make_frame(kind, self._sequence, body)
        self._sequence += 1
        return made
