"""Records that nobody vouches for: values that no pool has are refused (I11).

``codec.decode_record`` has seen to the types of the fields; here is what they may hold.
"""

from collections.abc import Mapping
from types import NoneType
from uuid import UUID

from incfs.baseline import BaselineFacts
from incfs.catalog import Record
from incfs.codec import encode_record
from incfs.errors import FormatError, IncfsError
from incfs.model import (
    MAX_GENERATION,
    MAX_LEGS,
    MAX_POLICY_BYTES,
    MAX_STORAGE_ID,
    MAX_STRIPE_COLUMNS,
    MAX_STRIPE_ROWS,
    MAX_VOLUME_BYTES,
    MAX_XATTR_BYTES,
    OWN_XATTRS,
    REDUNDANCIES,
    USER_XATTRS,
    Bookmark,
    Snapshot,
    Storage,
    StoredPolicy,
    Volume,
    validate_name,
)
from incfs.replication import ReplicaConfig
from incfs.transfers import decode_receiving


def validate(record: Record, block_bytes: int) -> None:
    """Refuse a record that no pool has.

    Raises:
        FormatError: It holds a value that cannot be.
    """
    match record:
        case Storage():
            sound = _is_storage(record)
        case Volume():
            sound = _is_volume(record)
        case Snapshot():
            sound = _is_snapshot(record, block_bytes)
        case Bookmark():
            sound = _is_bookmark(record)
        case StoredPolicy():
            size = len(record.text.encode("utf-8", "surrogatepass"))
            sound = size <= MAX_POLICY_BYTES and all(type(when) is int for when in record.runs.values())
    if not (sound and _is_plain(record)):
        raise FormatError(f"a record holds a value that cannot be: {str(record)[:200]}")


def _is_plain(record: Record) -> bool:
    """Numbers fit into what they are stored in, texts are Unicode, a UUID is one."""
    values = encode_record(record)
    if not all(0 <= value < 1 << 63 for value in values.values() if isinstance(value, int)):
        return False
    try:
        "".join([*(value for value in values.values() if isinstance(value, str)), *values.get("xattrs", ())]).encode()
        return isinstance(record, StoredPolicy) or bool(UUID(record.uuid).int + 1)
    except ValueError:
        return False


def _is_storage(record: Storage) -> bool:
    legs = record.leg_paths
    return (
        1 <= record.id <= MAX_STORAGE_ID
        and 0 < record.capacity_blocks <= 1 << 48
        and record.redundancy in REDUNDANCIES
        and not any("\0" in path for path in legs)
        and all(legs)
        and len(legs) <= MAX_LEGS
        and set(record.stale_legs) < set(range(len(legs)))  # one at least is sound
        and all(_is_left_leg(left, record.stale_legs) for left in record.left_legs)
    )


def _is_left_leg(left: tuple[int, ...], stale_legs: tuple[int, ...]) -> bool:
    """A stale leg, an epoch and a point."""
    return len(left) == 5 and left[0] in stale_legs and all(0 <= number < 1 << 64 for number in left)


def _is_volume(record: Volume) -> bool:
    _require_name(record.name, "volume")
    _require_parts(record)
    return (
        1 <= record.id < 1 << 32
        and 0 <= record.size_bytes <= MAX_VOLUME_BYTES
        and 0 <= record.mode <= 0o7777
        and 0 <= record.last_generation <= MAX_GENERATION
        and 0 <= (record.flat_generation or 0) <= MAX_GENERATION
        and 0 <= (record.trim_from_bytes or 0) <= MAX_VOLUME_BYTES
        and 0 <= record.uid < 1 << 32
        and 0 <= record.gid < 1 << 32
        and _are_xattrs(record.xattrs)
        and len(record.stripes) <= MAX_STRIPE_ROWS
        and all(_is_stripe_row(row) for row in record.stripes)
    )


def _are_xattrs(xattrs: Mapping[str, bytes]) -> bool:
    """Only what a user may set: with others a file would have rights, or be taken for another filesystem's."""
    total = 0
    for name, value in xattrs.items():
        if not name.startswith(USER_XATTRS) or name.startswith(OWN_XATTRS) or "\0" in name:
            return False
        if not isinstance(value, bytes):
            return False
        total += len(name.encode("utf-8", "surrogatepass")) + len(value)
    return total <= MAX_XATTR_BYTES


def _is_stripe_row(row: tuple[int, ...]) -> bool:
    """A time, a unit, and columns that differ."""
    columns = row[2:]
    return (
        len(row) > 2
        and 0 <= row[0] < 1 << 63
        and 0 < row[1] <= MAX_VOLUME_BYTES
        and len(set(columns)) == len(columns) <= MAX_STRIPE_COLUMNS
        and all(1 <= column <= MAX_STORAGE_ID for column in columns)
    )


def _require_parts(record: Volume) -> None:
    """Take apart what a volume's record holds in packed form."""
    if record.baseline:
        BaselineFacts.decode(record.baseline)
    if record.receive_state:
        decode_receiving(record.receive_state)
    for name, text in record.replicas.items():
        if ReplicaConfig.from_text(text).name != name:
            raise FormatError(f"volume {record.id} has a replica {name!r:.80} of another name")


def _is_snapshot(record: Snapshot, block_bytes: int) -> bool:
    for name in (record.name, *record.holds):
        _require_name(name, "snapshot")
    return (
        1 <= record.generation <= MAX_GENERATION
        and 0 <= record.size_bytes <= MAX_VOLUME_BYTES
        and 0 <= record.mapped_blocks <= MAX_VOLUME_BYTES // block_bytes
        and all(type(when) in {int, NoneType} for when in record.holds.values())
    )


def _is_bookmark(record: Bookmark) -> bool:
    if not {type(name) for name in record.names} <= {str}:
        return False
    for name in record.names:
        _require_name(name, "bookmark")
    return (
        1 <= record.generation <= MAX_GENERATION
        and 0 <= record.size_bytes <= MAX_VOLUME_BYTES
        and all(record.names)
        and all(type(when) is int and 0 <= when < 1 << 63 for when in record.names.values())
    )


def _require_name(name: str, what: str) -> None:
    try:
        if name:
            validate_name(name, what=what)
    except IncfsError as error:
        raise FormatError(f"a {what} record holds a bad name: {error}") from error
