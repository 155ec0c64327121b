"""How a stream's records are framed: a preamble, then header and body of each, both with a CRC32C."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from incfs.codec import checksum
from incfs.errors import StreamCorrupt, StreamTruncated, StreamUnsupported
from incfs.stream.records import MAX_BODY_BYTES

MAGIC: Final = b"INCFSTR\0"
VERSION: Final = 1
OPTIONAL: Final = 1
"""Flag: who does not know the record's type may skip it."""
KNOWN_INCOMPATIBLE: Final = 0
_PREAMBLE: Final = struct.Struct("<8sHHII")
"""Magic, version, 0, incompatible and compatible feature bits."""
_HEADER: Final = struct.Struct("<HHIQI")
"""Type, flags, length of the body, sequence, CRC32C of the body."""
_CRC: Final = struct.Struct("<I")
PREAMBLE_BYTES: Final = _PREAMBLE.size + _CRC.size
HEADER_BYTES: Final = _HEADER.size + _CRC.size


class RecordType(IntEnum):
    """Numbers of the records."""

    STREAM_BEGIN = 1
    SNAP_BEGIN = 2
    WRITE = 3
    ZERO = 4
    RESIZE = 5
    CHECKPOINT = 6
    SNAP_END = 7
    STREAM_END = 8


def make_preamble() -> bytes:
    """Make what a stream starts with."""
    packed = _PREAMBLE.pack(MAGIC, VERSION, 0, KNOWN_INCOMPATIBLE, 0)
    return packed + _CRC.pack(checksum(packed))


def make_frame(kind: int, sequence: int, body: bytes, *, flags: int = 0) -> bytes:
    """Frame one record."""
    header = _HEADER.pack(kind, flags, len(body), sequence, checksum(body))
    return b"".join((header, _CRC.pack(checksum(header)), body))


@dataclass(frozen=True, slots=True)
class Frame:
    """One record as it stands in the stream."""

    kind: RecordType
    body: bytes
    offset_bytes: int
    """Of its header in the stream."""


class FrameReader:
    """Takes bytes as they come and gives whole records, proved.

    Holds at most one record and what was fed last.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._start_bytes = 0
        """Where in the stream the buffer starts."""
        self._sequence = -1
        """Of the last record; -1 before the first."""
        self._has_preamble = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take bytes; yield the records that they complete.

        Raises:
            StreamCorrupt, StreamUnsupported: The bytes are no sound stream of ours.
        """
        self._buffer += data
        position = 0
        try:
            if not self._has_preamble:
                if len(self._buffer) < PREAMBLE_BYTES:
                    return
                self._check_preamble()
                position = PREAMBLE_BYTES
            while (found := self._frame_at(position)) is not None:
                frame, position = found
                if frame is not None:
                    yield frame
        finally:
            del self._buffer[:position]
            self._start_bytes += position

    @property
    def has_rest(self) -> bool:
        """Whether bytes wait for the rest of their record."""
        return bool(self._buffer)

    def close(self) -> None:
        """Note that no more bytes come.

        Raises:
            StreamTruncated: They end inside a record.
        """
        if self._buffer or not self._has_preamble:
            raise StreamTruncated(
                f"the stream ends at byte {self._start_bytes + len(self._buffer)}, inside a record; "
                f"`incfs stream token` tells how to go on"
            )

    def _check_preamble(self) -> None:
        packed = bytes(self._buffer[: _PREAMBLE.size])
        magic, version, _, incompatible, _ = _PREAMBLE.unpack(packed)
        if magic != MAGIC:
            raise StreamCorrupt("this is no incfs stream: it does not start with one's magic")
        if _CRC.unpack_from(self._buffer, _PREAMBLE.size)[0] != checksum(packed):
            raise StreamCorrupt("the stream's preamble is damaged: wrong checksum")
        if version != VERSION or incompatible & ~KNOWN_INCOMPATIBLE:
            raise StreamUnsupported(
                f"the stream has version {version} and features {incompatible:#x}, this incfs knows "
                f"version {VERSION} and {KNOWN_INCOMPATIBLE:#x}; update it"
            )
        self._has_preamble = True

    def _frame_at(self, position: int) -> tuple[Frame | None, int] | None:
        """Give the record at a position of the buffer, None for a skipped one, and where it ends."""
        body_start = position + HEADER_BYTES
        if len(self._buffer) < body_start:
            return None
        kind, flags, length, sequence, body_crc = self._header_at(position)
        if len(self._buffer) < body_start + length:
            return None
        offset = self._start_bytes + position
        with memoryview(self._buffer) as view:
            body = bytes(view[body_start : body_start + length])
        if checksum(body) != body_crc:
            raise StreamCorrupt(f"record {sequence} at byte {offset} is damaged: its body has a wrong checksum")
        self._sequence = sequence
        end = body_start + length
        if kind in _KNOWN:
            return Frame(RecordType(kind), body, offset), end
        if flags & OPTIONAL:
            return None, end
        raise StreamUnsupported(f"record {sequence} at byte {offset} is of unknown type {kind}; update incfs")

    def _header_at(self, position: int) -> tuple[int, int, int, int, int]:
        offset = self._start_bytes + position
        packed = bytes(self._buffer[position : position + _HEADER.size])
        if _CRC.unpack_from(self._buffer, position + _HEADER.size)[0] != checksum(packed):
            raise StreamCorrupt(f"the record at byte {offset} is damaged: its header has a wrong checksum")
        kind, flags, length, sequence, body_crc = _HEADER.unpack(packed)
        if sequence != self._sequence + 1:
            raise StreamCorrupt(f"record {self._sequence + 1} is missing: at byte {offset} follows {sequence}")
        if length > MAX_BODY_BYTES:
            raise StreamCorrupt(f"record {sequence} at byte {offset} claims {length} bytes (limit {MAX_BODY_BYTES})")
        return kind, flags, length, sequence, body_crc


_KNOWN: Final = frozenset(RecordType)
