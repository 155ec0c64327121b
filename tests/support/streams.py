"""Streams for tests: made from contents, applied to byte strings, mutated."""

import random
import uuid as uuids
from collections.abc import Iterable, Iterator

from incfs.errors import StreamError
from incfs.stream.encoder import StreamEncoder
from incfs.stream.frames import HEADER_BYTES, PREAMBLE_BYTES, make_frame
from incfs.stream.ranges import drop_idle_zeros, join_ranges, round_up
from incfs.stream.reader import StreamReader
from incfs.stream.records import Link, Member, Range, Record, Resize, SnapBegin, StreamBegin, Write, Zero

BLOCK = 64
VOLUME = str(uuids.UUID(int=0xA))


def snapshot_uuid(number: int) -> str:
    return str(uuids.UUID(int=0x1000 + number))


def ranges_between(old: bytes, new: bytes, block: int = BLOCK) -> Iterator[Range]:
    """What a sender says of two contents: each block that differs or that a smaller size cut off."""
    for start in range(0, len(new), block):
        data = new[start : start + block]
        if data != old[start : start + block].ljust(len(data), b"\0"):
            yield Write(start, data) if any(data) else Zero(start, len(data))


def make_step(
    contents: list[bytes], first: int, *, level: int = 1, checkpoint_bytes: int = 1 << 30, full: bool = False
) -> bytes:
    """Make a stream of the snapshots ``first + 1`` ... of a volume with these contents; the first is the base."""
    encoder = StreamEncoder(level=level, checkpoint_bytes=checkpoint_bytes)
    count = len(contents) - 1
    bases = [None if full and not i else snapshot_uuid(first + i) for i in range(count)]
    links = [Link(0, bases[i], snapshot_uuid(first + i + 1)) for i in range(count)]
    made = encoder.begin(StreamBegin((Member(VOLUME, "vol"),), tuple((link,) for link in links)))
    for i, link in enumerate(links):
        old, new = contents[i], contents[i + 1]
        snap = SnapBegin(link, f"s{first + i + 1}", len(old), len(new), BLOCK, 1_000_000_000 + first + i)
        made += encoder.begin_snapshot(snap)
        for found in join_ranges(drop_idle_zeros(ranges_between(old, new), round_up(len(old), BLOCK))):
            made += encoder.add(found)
        made += encoder.end_snapshot()
    return made + encoder.end()


def read_all(stream: bytes, step: int = 1 << 20) -> list[Record]:
    """Read a whole stream, fed in pieces."""
    reader = StreamReader()
    found: list[Record] = []
    for start in range(0, len(stream), step):
        found += reader.feed(stream[start : start + step])
    reader.close()
    return found


def apply_to(content: bytes, records: Iterable[Record]) -> bytes:
    """Apply a stream's records to contents, the simplest way."""
    image = bytearray(content)
    for record in records:
        match record:
            case Resize(size):
                image = image[:size].ljust(size, b"\0")
            case Write(offset, data):
                image[offset : offset + len(data)] = data
            case Zero(offset, length):
                image[offset : offset + length] = bytes(length)
    return bytes(image)


def frames_of(stream: bytes) -> list[tuple[int, int, bytes]]:
    """Split a sound stream: (type, flags, body) of each record."""
    found = []
    position = PREAMBLE_BYTES
    while position < len(stream):
        kind = int.from_bytes(stream[position : position + 2], "little")
        flags = int.from_bytes(stream[position + 2 : position + 4], "little")
        length = int.from_bytes(stream[position + 4 : position + 8], "little")
        found.append((kind, flags, stream[position + HEADER_BYTES : position + HEADER_BYTES + length]))
        position += HEADER_BYTES + length
    return found


def join_frames(stream: bytes, frames: Iterable[tuple[int, int, bytes]]) -> bytes:
    """Undo ``frames_of``: every checksum is right whatever the bodies say."""
    made = [make_frame(kind, number, body, flags=flags) for number, (kind, flags, body) in enumerate(frames)]
    return stream[:PREAMBLE_BYTES] + b"".join(made)


def boundaries_of(stream: bytes) -> list[int]:
    """Offsets at which a record ends."""
    ends, position = [PREAMBLE_BYTES], PREAMBLE_BYTES
    for _, _, body in frames_of(stream):
        position += HEADER_BYTES + len(body)
        ends.append(position)
    return ends


def mutate(stream: bytes, chance: random.Random) -> bytes:
    """Spoil a stream: its bytes, or what its records say under right checksums."""
    if chance.random() < 0.3:
        return _mutate_bytes(stream, chance)
    frames = frames_of(stream)
    for _ in range(chance.randint(1, 2)):
        at = chance.randrange(len(frames))
        action = chance.randrange(6)
        kind, flags, body = frames[at]
        if action == 0:
            del frames[at]
        elif action == 1:
            frames.insert(chance.randrange(len(frames) + 1), (kind, flags, body))
        elif action == 2:
            other = chance.randrange(len(frames))
            frames[at], frames[other] = frames[other], frames[at]
        elif action == 3:
            frames[at] = chance.randrange(1, 12), flags | chance.randrange(2), body
        else:
            frames[at] = kind, flags, _mutate_bytes(body, chance)
        frames = frames or [(kind, flags, body)]
    return join_frames(stream, frames)


def _mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    spoiled = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(spoiled) + 1)
        action = chance.randrange(5)
        if action == 0:
            del spoiled[at:]
        elif action == 1:
            spoiled[at : at + 1] = bytes([chance.choice((0, 1, 0x7F, 0x80, 0x90, 0xC4, 0xCF, 0xD9, 0xDD, 0xFF))])
        elif action == 2:
            spoiled[at:at] = chance.randbytes(chance.randint(1, 9))
        elif action == 3:
            del spoiled[at : at + chance.randint(1, 9)]
        else:
            spoiled[at : at + 1] = chance.randbytes(1)
    return bytes(spoiled)


def outcome(stream: bytes) -> type[BaseException] | None:
    """Read a stream; give the class of the error it ends with."""
    try:
        read_all(stream)
    except StreamError as error:
        return type(error)
    return None
