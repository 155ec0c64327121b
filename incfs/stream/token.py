"""Resume tokens: a position in a stream, as text that fits on a command line."""

import base64
import binascii
from typing import Final

from incfs.codec import checksum, pack
from incfs.errors import StreamCorrupt, TokenStale
from incfs.stream.reader import Position
from incfs.stream.records import (
    DIGEST_BYTES,
    MAX_BODY_BYTES,
    decode_list,
    decode_stream_begin,
    encode_stream_begin,
)

_PREFIX: Final = "incfs1-"
_CRC_BYTES: Final = 4


def encode_position(position: Position) -> bytes:
    """Pack a position: what a pool keeps of an unfinished receive, too."""
    return pack([encode_stream_begin(position.begin), position.offset_bytes, position.digest])


def decode_position(data: bytes) -> Position:
    """Undo ``encode_position``.

    Raises:
        StreamCorrupt: It is none.
    """
    match decode_list(data, "position"):
        case [bytes(begin), int(offset), bytes(digest)] if offset >= 0 and len(digest) in (0, DIGEST_BYTES):
            if bool(offset) <= bool(digest):
                return Position(decode_stream_begin(begin), offset, digest)
    raise StreamCorrupt("not a position in a stream")


def encode_token(position: Position) -> str:
    """Make the token of a position with something left."""
    packed = encode_position(position)
    return _PREFIX + base64.urlsafe_b64encode(packed + checksum(packed).to_bytes(_CRC_BYTES, "little")).decode()


def decode_token(text: str) -> Position:
    """Undo ``encode_token``.

    Raises:
        TokenStale: It is damaged, or no token.
    """
    text = text.strip()
    try:
        if not text.startswith(_PREFIX) or len(text) > 2 * MAX_BODY_BYTES:
            raise ValueError("it does not begin as one")
        data = base64.urlsafe_b64decode(text.removeprefix(_PREFIX))
        packed, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
        if checksum(packed).to_bytes(_CRC_BYTES, "little") != crc:
            raise ValueError("wrong checksum")
        return decode_position(packed)
    except (ValueError, binascii.Error, StreamCorrupt) as error:
        raise TokenStale(f"this is no resume token: {error}; copy it whole") from error
