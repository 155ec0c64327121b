"""What a pool keeps of an unfinished receive, and what a volume refuses meanwhile.

The state of a receive is in the record of one of its volumes, the lead; the others point to it.
So it is in the same commit as the data that it speaks of.
"""

import base64
import binascii
from dataclasses import dataclass

from incfs.codec import pack
from incfs.errors import Busy, FormatError, ReplicaReadOnly, StreamCorrupt
from incfs.model import Volume, VolumeId
from incfs.store import Store
from incfs.stream.reader import Position
from incfs.stream.records import SnapBegin, decode_list, decode_snap_begin, encode_snap_begin
from incfs.stream.token import decode_position, encode_position


@dataclass(frozen=True, slots=True)
class Receiving:
    """An unfinished receive."""

    position: Position
    """How far it came, and what is left."""
    targets: tuple[VolumeId, ...]
    """The volumes, in the order of the stream's members."""
    waiting: tuple[SnapBegin, ...] = ()
    """Snapshots that are complete and wait for the others of their step."""


def encode_receiving(state: Receiving) -> str:
    """Pack a state as text."""
    waiting = [encode_snap_begin(snap) for snap in state.waiting]
    return base64.b64encode(pack([encode_position(state.position), list(state.targets), waiting])).decode()


def decode_receiving(text: str) -> Receiving:
    """Undo ``encode_receiving``.

    Raises:
        FormatError: It is none.
    """
    try:
        match decode_list(base64.b64decode(text, validate=True), "state of a receive"):
            case [bytes(position), [*targets], [*waiting]]:
                snaps = tuple(decode_snap_begin(snap) for snap in waiting)
                return Receiving(decode_position(position), tuple(VolumeId(int(t)) for t in targets), snaps)
    except (StreamCorrupt, TypeError, ValueError, binascii.Error) as error:
        raise FormatError(f"the state of a receive is damaged: {error}") from error
    raise FormatError("the state of a receive is malformed")


def receiving(store: Store, volume: Volume) -> Receiving | None:
    """Give the receive that a volume is part of."""
    if not volume.receive_lead:
        return None
    return decode_receiving(store.catalog.volume(volume.receive_lead).receive_state)


def put_state(store: Store, state: Receiving) -> None:
    """Note how far a receive came; durable with the next commit, as is the data written before."""
    lead = store.catalog.volume(state.targets[0])
    store.touch(lead, receive_state=encode_receiving(state))


def require_not_receiving(volume: Volume, action: str) -> None:
    """Refuse while a volume receives a stream.

    Raises:
        Busy: It does.
    """
    if volume.receive_lead:
        raise Busy(
            f"volume {volume.name} cannot {action}: it receives a stream; let that end, "
            f"go on with `incfs receive --token {volume.name}`, or end it with `incfs receive --abort {volume.name}`",
            volume=volume.name,
        )


def require_ordinary(volume: Volume, action: str) -> None:
    """Refuse what changes a volume that changes by streams only.

    Raises:
        Busy: It receives one now.
        ReplicaReadOnly: It is a replica.
    """
    require_not_receiving(volume, action)
    if volume.is_replica:
        raise ReplicaReadOnly(
            f"volume {volume.name} cannot {action}: it is a replica; `incfs replica promote {volume.name}` "
            f"makes it an ordinary volume",
            volume=volume.name,
        )
