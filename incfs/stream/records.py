"""What a send stream says: its records as values, and their bodies.

Bodies are msgpack lists.  Decoding any bytes gives a value or ``StreamCorrupt``; what one
record can say by itself is checked here, what follows from those before it in ``reader``.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from incfs.codec import pack, unpack
from incfs.errors import FormatError, InvalidName, StreamCorrupt
from incfs.model import MAX_BLOCK_BYTES, MAX_VOLUME_BYTES, MIN_BLOCK_BYTES, validate_name

MAX_WRITE_BYTES: Final = 1 << 20
"""Most data of one WRITE, decompressed."""
MAX_BODY_BYTES: Final = MAX_WRITE_BYTES + 65536
"""Longest body of any record: what bounds a reader's memory."""
MAX_TAG_CHARACTERS: Final = 1024
DIGEST_BYTES: Final = 32
_MAX_COUNT: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class Member:
    """A volume whose snapshots a stream carries."""

    uuid: str
    """Of the volume at the sender."""
    name: str


@dataclass(frozen=True, slots=True)
class Link:
    """One snapshot that a stream carries."""

    member: int
    """Index of the volume among the stream's members."""
    base: str | None
    """UUID of the snapshot that the ranges are relative to; None: relative to nothing."""
    uuid: str
    """Of the snapshot."""


Step = tuple[Link, ...]
"""Snapshots that are published together, of different volumes."""


@dataclass(frozen=True, slots=True)
class StreamBegin:
    """STREAM_BEGIN: everything that follows, by UUID."""

    members: tuple[Member, ...]
    steps: tuple[Step, ...]
    done_count: int = 0
    """Snapshots of the first step that the receiver has already: the stream leaves them out."""


@dataclass(frozen=True, slots=True)
class SnapBegin:
    """SNAP_BEGIN: one snapshot's facts; its ranges follow."""

    link: Link
    name: str
    base_size_bytes: int
    """Size of the base; 0 without one."""
    size_bytes: int
    block_bytes: int
    """What its ranges are aligned to."""
    created_ns: int
    tag: str = ""
    start_bytes: int = 0
    """Where a resumed snapshot goes on: ranges before it are left out."""
    digest: bytes = b""
    """The digest of the ranges left out; empty when there are none."""

    def first_digest(self) -> bytes:
        """Give what the digest of the ranges begins with."""
        if self.digest:
            return self.digest
        facts = [
            *(_raw(self.link.base), _raw(self.link.uuid), self.name, self.base_size_bytes),
            *(self.size_bytes, self.block_bytes, self.created_ns, self.tag),
        ]
        return hashlib.sha256(pack(facts)).digest()


@dataclass(frozen=True, slots=True)
class Write:
    """WRITE: a range and its data, decompressed."""

    offset_bytes: int
    data: bytes

    @property
    def length_bytes(self) -> int:
        """Length of the range."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Zero:
    """ZERO: a range that reads as zeros."""

    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Resize:
    """RESIZE: the volume's size from here on; the first record of a snapshot whose size is not its base's."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """CHECKPOINT: all ranges before an offset have been sent; a receiver makes them durable."""

    offset_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class SnapEnd:
    """SNAP_END: the counts of this stream's ranges of the snapshot, and the digest of all its ranges."""

    write_count: int
    zero_count: int
    data_bytes: int
    zero_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """STREAM_END: how many snapshots, and the digest of their digests."""

    snapshot_count: int
    digest: bytes


Record = StreamBegin | SnapBegin | Write | Zero | Resize | Checkpoint | SnapEnd | StreamEnd
Range = Write | Zero


def extend_digest(digest: bytes, found: Range) -> bytes:
    """Give the digest of the ranges so far and one more.

    Each is the SHA-256 of the one before and the range: 32 bytes are all there is to keep of
    everything before a point, so that a resumed stream goes on with the same proof.
    """
    is_write = isinstance(found, Write)
    hashed = hashlib.sha256(digest + pack([is_write, found.offset_bytes, found.length_bytes]))
    if isinstance(found, Write):
        hashed.update(found.data)
    return hashed.digest()


def extend_stream_digest(digest: bytes, snapshot_digest: bytes) -> bytes:
    """Give the digest of the snapshots so far and one more."""
    return hashlib.sha256(digest + snapshot_digest).digest()


def stream_digest(begin: StreamBegin) -> bytes:
    """Give what the digest of a stream begins with."""
    return hashlib.sha256(encode_stream_begin(begin)).digest()


# Bodies


def encode_stream_begin(begin: StreamBegin) -> bytes:
    """Make the body of STREAM_BEGIN."""
    members = [[_raw(member.uuid), member.name] for member in begin.members]
    steps = [[[link.member, _raw(link.base), _raw(link.uuid)] for link in step] for step in begin.steps]
    return pack([members, steps, begin.done_count])


def encode_snap_begin(snap: SnapBegin) -> bytes:
    """Make the body of SNAP_BEGIN."""
    link = snap.link
    return pack(
        [
            *(link.member, _raw(link.base), _raw(link.uuid), snap.name, snap.base_size_bytes, snap.size_bytes),
            *(snap.block_bytes, snap.created_ns, snap.tag, snap.start_bytes, snap.digest),
        ]
    )


def decode_list(body: bytes, what: str) -> list[Any]:
    """Decode a body.

    Raises:
        StreamCorrupt: It is no msgpack list.
    """
    try:
        value = unpack(body)
    except FormatError as error:
        raise StreamCorrupt(f"{what}: {error}") from error
    if not isinstance(value, list):
        raise StreamCorrupt(f"{what}: its body is not a list")
    return value


def decode_stream_begin(body: bytes) -> StreamBegin:
    """Undo ``encode_stream_begin``; the chain must hold together.

    Raises:
        StreamCorrupt: It does not.
    """
    match decode_list(body, "STREAM_BEGIN"):
        case [[*members], [[*first], *steps], int(done)]:
            begin = StreamBegin(
                tuple(_member(member) for member in members),
                tuple(_step(step, len(members)) for step in (first, *steps)),
                done,
            )
        case _:
            raise StreamCorrupt("STREAM_BEGIN: malformed")
    if not 0 <= done < len(first):
        raise StreamCorrupt(f"STREAM_BEGIN: leaves out {done} of {len(first)} snapshots")
    _require_chain(begin)
    return begin


def _member(value: Any) -> Member:
    match value:
        case [bytes(uuid), str(name)]:
            return Member(_text(uuid), _name(name, "volume"))
    raise StreamCorrupt("STREAM_BEGIN: malformed volume")


def _step(value: Any, member_count: int) -> Step:
    match value:
        case [_, *_]:
            step = tuple(_link(link, member_count) for link in value)
            if len({link.member for link in step}) == len(step):
                return step
    raise StreamCorrupt("STREAM_BEGIN: malformed step")


def _link(value: Any, member_count: int) -> Link:
    match value:
        case [int(member), bytes() | None as base, bytes(uuid)] if 0 <= member < member_count:
            return Link(member, None if base is None else _text(base), _text(uuid))
    raise StreamCorrupt("STREAM_BEGIN: malformed link")


def _require_chain(begin: StreamBegin) -> None:
    newest: dict[int, str] = {}
    seen: set[str] = set()
    for link in (link for step in begin.steps for link in step):
        if link.uuid in seen or link.uuid == link.base or newest.get(link.member, link.base) != link.base:
            raise StreamCorrupt(f"STREAM_BEGIN: snapshot {link.uuid} breaks the chain")
        seen.add(link.uuid)
        newest[link.member] = link.uuid
    if len(newest) != len(begin.members) or len({member.uuid for member in begin.members}) != len(begin.members):
        raise StreamCorrupt("STREAM_BEGIN: a volume is named twice, or for nothing")


def decode_snap_begin(body: bytes) -> SnapBegin:
    """Undo ``encode_snap_begin``.

    Raises:
        StreamCorrupt: Malformed, or out of range.
    """
    match decode_list(body, "SNAP_BEGIN"):
        case [member, base, uuid, str(name), int(base_size), int(size), int(block), int(created), str(tag), int(start),
              bytes(digest)]:  # fmt: skip
            link = _link([member, base, uuid], 1 << 32)
            snap = SnapBegin(link, name, base_size, size, block, created, tag, start, digest)
        case _:
            raise StreamCorrupt("SNAP_BEGIN: malformed")
    _name(name, "snapshot")
    sound = (
        MIN_BLOCK_BYTES <= block <= MAX_BLOCK_BYTES and not block & block - 1
        and 0 <= size <= MAX_VOLUME_BYTES and 0 <= base_size <= (0 if link.base is None else MAX_VOLUME_BYTES)
        and 0 <= created < _MAX_COUNT and len(tag) <= MAX_TAG_CHARACTERS
        and 0 <= start <= size and (not start % block or start == size)
        and len(digest) in (0, DIGEST_BYTES) and (bool(digest) or not start)
    )  # fmt: skip
    if not sound:
        raise StreamCorrupt(f"SNAP_BEGIN: a value of snapshot {link.uuid} is out of range")
    return snap


def decode_zero(body: bytes) -> Zero:
    """Decode the body of ZERO."""
    match decode_list(body, "ZERO"):
        case [int(offset), int(length)]:
            return Zero(offset, length)
    raise StreamCorrupt("ZERO: malformed")


def decode_resize(body: bytes) -> Resize:
    """Decode the body of RESIZE."""
    match decode_list(body, "RESIZE"):
        case [int(size)]:
            return Resize(size)
    raise StreamCorrupt("RESIZE: malformed")


def decode_checkpoint(body: bytes) -> Checkpoint:
    """Decode the body of CHECKPOINT."""
    match decode_list(body, "CHECKPOINT"):
        case [int(offset), bytes(digest)]:
            return Checkpoint(offset, digest)
    raise StreamCorrupt("CHECKPOINT: malformed")


def decode_snap_end(body: bytes) -> SnapEnd:
    """Decode the body of SNAP_END."""
    match decode_list(body, "SNAP_END"):
        case [int(writes), int(zeros), int(data_bytes), int(zero_bytes), bytes(digest)]:
            return SnapEnd(writes, zeros, data_bytes, zero_bytes, digest)
    raise StreamCorrupt("SNAP_END: malformed")


def decode_stream_end(body: bytes) -> StreamEnd:
    """Decode the body of STREAM_END."""
    match decode_list(body, "STREAM_END"):
        case [int(count), bytes(digest)]:
            return StreamEnd(count, digest)
    raise StreamCorrupt("STREAM_END: malformed")


def encode_plain(record: Zero | Resize | Checkpoint | SnapEnd | StreamEnd) -> bytes:
    """Make the body of a record that is the list of its fields."""
    return pack([getattr(record, name) for name in type(record).__slots__])


def _raw(uuid: str | None) -> bytes | None:
    return None if uuid is None else UUID(uuid).bytes


def _text(raw: bytes) -> str:
    if len(raw) != 16:
        raise StreamCorrupt(f"a UUID of {len(raw)} bytes")
    return str(UUID(bytes=raw))


def _name(name: str, what: str) -> str:
    try:
        return validate_name(name, what=what)
    except (InvalidName, UnicodeError) as error:
        raise StreamCorrupt(f"a {what} has a name that none may have: {error}") from error
