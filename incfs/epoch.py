"""Epochs: which parts of a pool belong together (I14).  Pure.

A pool lives in one *epoch* after another: a counter and a random nonce.  Its directory, its images and the legs of
its mirrors each say in which one they were last: the directory in its *standing*, an image or a leg in its *stamp*.
``parts`` reads, writes and raises them; ``docs/FORMAT.md`` draws the bytes.

Invariants:
    1. Nothing is written to a part in an epoch before every part is stamped with it and the directory has settled.
    2. A directory says that it raises its epoch before any part is stamped with the next one.  Until it has settled,
       parts at either fit.
    3. A stamp's point is durable in the directory before the stamp is written, and no checkpoint's tables before every
       part has a stamp of its point.
"""

import struct
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple
from uuid import UUID

from incfs.codec import checksum
from incfs.errors import FormatError

EPOCH_NAME: Final = "epoch"
SLOT_BYTES: Final = 512
"""A sector, which is written whole or not at all."""
SLOT_STEP_BYTES: Final = 4096
"""From one of two slots to the other: a block of the host's is written for one of them only."""

_VERSION: Final = 1
_CRC = struct.Struct("<I")
_STANDING = struct.Struct("<8sHHI16sQQQQQ")
_STANDING_MAGIC: Final = b"INCFSEP\0"
_STAMP = struct.Struct("<8sHHIQQQQQ")
_STAMP_MAGIC: Final = b"INCFSST\0"
_IS_RAISING: Final = 1
_IS_ADOPTING: Final = 2
_IS_UNPROVED: Final = 4


@dataclass(frozen=True, slots=True)
class Epoch:
    """A stretch of a pool's life, from one raise to the next."""

    counter: int
    """Rises by one or more each time."""
    nonce: int
    """Random, 64 bits: two forks of a pool have another one each."""

    def __str__(self) -> str:
        return f"{self.counter}-{self.nonce:016x}"


NEVER: Final = Epoch(0, 0)
"""Of what never belonged to a pool: a leg that nobody has filled yet."""


class Point(NamedTuple):
    """How far a directory is: both numbers only rise.  A checkpoint raises the first even if nothing was committed."""

    segment: int
    """Of the journal."""
    sequence: int
    """Of a commit."""


START: Final = Point(0, 0)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What an image or a leg says of itself."""

    epoch: Epoch
    point: Point
    """What the pool's directory had, durably, when this was written: the last checkpoint's, or a later one."""


UNSTAMPED: Final = Stamp(NEVER, START)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a pool's directory says of itself."""

    settled: Epoch
    """That of all parts; while it is raised, of those that are not stamped with the next one yet."""
    raising: Epoch | None = None
    """What it is raised to."""
    is_adopting: bool = False
    """The parts may be of any epoch: somebody insisted, or restored the directory from a dump."""
    is_unproved: bool = False
    """That was so, and no check of all data has shown since that it was right: nothing goes back to the host."""

    @property
    def newest(self) -> Epoch:
        """The one that the parts are at, or on their way to."""
        return self.raising or self.settled

    @property
    def epochs(self) -> tuple[Epoch, ...]:
        """Those that its parts may be at."""
        return (self.settled,) if self.raising is None else (self.settled, self.raising)


class Fit(Enum):
    """How a part stands to a directory; the value is for messages."""

    FITS = "fits"
    OLDER = "older"
    NEWER = "newer"
    FORKED = "of another fork of the pool"
    UNKNOWN = "of an unknown epoch"
    SHORT = "cut off"


def compare(standing: Standing, stamp: Stamp | None, *, folded: Point, reached: Point) -> Fit:
    """Tell how a part stands to a directory.

    Args:
        standing: The directory's.
        stamp: The part's; None: it has none that is sound.
        folded: The checkpoint that its tables are of.  What they name, the part had before they named it.
        reached: How far the directory is, its journal included.
    """
    if stamp is None:
        return Fit.UNKNOWN
    if stamp.epoch in standing.epochs:
        if is_behind(reached, stamp.point):
            return Fit.NEWER
        return Fit.OLDER if is_behind(stamp.point, folded) else Fit.FITS
    if stamp.epoch.counter > standing.newest.counter:
        return Fit.NEWER
    counters = {epoch.counter for epoch in standing.epochs}
    return Fit.FORKED if stamp.epoch.counter in counters else Fit.OLDER


def is_behind(point: Point, other: Point) -> bool:
    """Tell whether a point lacks something that another has."""
    return point.segment < other.segment or point.sequence < other.sequence


def is_within(epoch: Epoch, standing: Standing) -> bool:
    """Tell whether something was written in an epoch that the directory is at, or was at before."""
    return epoch in standing.epochs or epoch.counter < standing.settled.counter


def next_counter(*epochs: Epoch) -> int:
    """Choose the counter of an epoch above all these."""
    return max(epoch.counter for epoch in epochs) + 1


def encode_standing(pool: UUID, standing: Standing, serial: int) -> bytes:
    """Make a slot of a directory's epoch file."""
    flags = (
        (_IS_RAISING if standing.raising is not None else 0)
        | (_IS_ADOPTING if standing.is_adopting else 0)
        | (_IS_UNPROVED if standing.is_unproved else 0)
    )
    settled, raising = standing.settled, standing.raising or NEVER
    numbers = settled.counter, settled.nonce, raising.counter, raising.nonce
    head = _STANDING.pack(_STANDING_MAGIC, _VERSION, flags, 0, pool.bytes, serial, *numbers)
    return _sealed(head)


def decode_standing(pool: UUID, slot: bytes) -> tuple[int, Standing] | None:
    """Undo ``encode_standing``: (serial, standing), or None for a slot that is damaged or was never written.

    Raises:
        FormatError: A sound slot, but of another pool or a newer version.
    """
    if not _is_sealed(slot, _STANDING, _STANDING_MAGIC):
        return None
    _, version, flags, _, owner, serial, *numbers = _STANDING.unpack_from(slot)
    if version != _VERSION:
        raise FormatError(f"an epoch file of version {version} is not supported")
    if owner != pool.bytes:
        raise FormatError(f"the epoch file belongs to pool {UUID(bytes=owner)}, not to {pool}")
    raising = Epoch(*numbers[2:]) if flags & _IS_RAISING else None
    adopting, unproved = bool(flags & _IS_ADOPTING), bool(flags & _IS_UNPROVED)
    return serial, Standing(Epoch(*numbers[:2]), raising, is_adopting=adopting, is_unproved=unproved)


def encode_stamp(stamp: Stamp, serial: int) -> bytes:
    """Make a slot of an image's or a leg's stamps."""
    numbers = stamp.epoch.counter, stamp.epoch.nonce, *stamp.point
    return _sealed(_STAMP.pack(_STAMP_MAGIC, _VERSION, 0, 0, serial, *numbers))


def decode_stamp(slot: bytes) -> tuple[int, Stamp] | None:
    """Undo ``encode_stamp``: (serial, stamp), or None for a slot that is damaged or was never written.

    Raises:
        FormatError: A sound slot of a newer version.
    """
    if not _is_sealed(slot, _STAMP, _STAMP_MAGIC):
        return None
    _, version, _, _, serial, counter, nonce, *point = _STAMP.unpack_from(slot)
    if version != _VERSION:
        raise FormatError(f"a stamp of version {version} is not supported")
    return serial, Stamp(Epoch(counter, nonce), Point(*point))


def _sealed(head: bytes) -> bytes:
    return (head + _CRC.pack(checksum(head))).ljust(SLOT_BYTES, b"\0")


def _is_sealed(slot: bytes, layout: struct.Struct, magic: bytes) -> bool:
    if len(slot) < layout.size + _CRC.size or not slot.startswith(magic):
        return False
    return bool(_CRC.unpack_from(slot, layout.size)[0] == checksum(slot[: layout.size]))
