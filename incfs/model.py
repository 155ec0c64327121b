"""The values that incfs is about: volumes, snapshots, storage volumes and their limits.

Owns the frozen records and the rules for names.  No I/O, no clock, no randomness.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NewType

from incfs.errors import InvalidName

VolumeId = NewType("VolumeId", int)
"""1 .. 2^32-1, never used twice in a pool."""
Generation = NewType("Generation", int)
"""Number of a snapshot within its volume, rising, 1 .. 2^32-2; 0 stands for the live volume."""
MapId = NewType("MapId", int)
"""A readable table: ``volume_id << 32 | generation``; generation 0 is the live volume."""
StorageId = NewType("StorageId", int)
"""1 .. 65535."""
Address = NewType("Address", int)
"""A storage address: ``storage_id << 48 | block_index``, or INHERIT, or HOLE."""

INHERIT: Final = Address(0)
"""Reads the origin at the same offset; zeros when there is no origin."""
HOLE: Final = Address(1)
"""Reads as zeros even if the origin has data."""

NO_ORIGIN: Final = MapId(0)
"""No table: unmapped blocks read as zeros."""

PAGE_BLOCKS: Final = 512
"""Consecutive virtual blocks whose mappings form one map page."""
MIN_BLOCK_BYTES: Final = 64
"""Smallest block the core accepts; the command line asks for at least 512."""
MAX_BLOCK_BYTES: Final = 65536
DEFAULT_BLOCK_BYTES: Final = 4096
MAX_VOLUME_BYTES: Final = (1 << 63) - MAX_BLOCK_BYTES
"""8 EiB less one block: offsets stay within a signed 64-bit integer."""
IMPORTING_SUFFIX: Final = ".importing"
"""Of the name of a volume that an import has not finished."""
MAX_NAME_BYTES: Final = 200
MAX_GENERATION: Final = 0xFFFFFFFE
"""The one above it stands for a volume's snapshot directory among the inodes."""
MAX_STORAGE_ID: Final = 65535
REDUNDANCIES: Final = ("none", "raid1", "raid5", "raid6", "raid10")
"""What may lie below an image."""
STALE_GROUPS: Final = 1 << 62
"""Added to the index of a group, in the key of the bitmap of blocks that stale legs lack."""
MAX_LEGS: Final = 4
MAX_STRIPE_COLUMNS: Final = 64
MAX_STRIPE_ROWS: Final = 32
"""Rows of a stripe map that are kept; the oldest is forgotten, its data stays where it is."""
MAX_XATTR_BYTES: Final = 65536
"""All extended attributes of one volume together."""
USER_XATTRS: Final = "user."
"""What the names of extended attributes that are stored begin with."""
OWN_XATTRS: Final = "user.incfs."
"""What the names of facts that look like attributes begin with; none of these is stored."""


def map_id(volume_id: VolumeId, generation: Generation = Generation(0)) -> MapId:
    """Name the table of a live volume (generation 0) or of one of its snapshots."""
    return MapId(volume_id << 32 | generation)


def split_map_id(value: MapId) -> tuple[VolumeId, Generation]:
    """Undo ``map_id``."""
    return VolumeId(value >> 32), Generation(value & 0xFFFFFFFF)


def validate_name(name: str, *, what: str = "volume") -> str:
    """Return ``name`` if it may name a volume or a snapshot.

    Raises:
        InvalidName: Not 1-200 bytes of UTF-8, a forbidden character, or a leading '.' or '-'.
    """
    if not 1 <= len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES:
        raise InvalidName(f"{what} name must be 1 to {MAX_NAME_BYTES} bytes long", name=name)
    bad = next((c for c in name if c in "/@#" or not c.isprintable()), None)
    if bad is not None:
        raise InvalidName(f"{what} name {name!r} must not contain {bad!r}", name=name)
    if name[0] in ".-":
        raise InvalidName(f"{what} name {name!r} must not begin with {name[0]!r}", name=name)
    return name


class StripeRow(NamedTuple):
    """Where new stripes of a volume go from some time on."""

    since_ns: int
    unit_blocks: int
    """Consecutive virtual blocks that go to one column."""
    columns: tuple[int, ...]
    """Ids of storage volumes: virtual block b goes to number ``b // unit_blocks % len(columns)``."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A virtual volume: a named sparse byte space."""

    id: VolumeId
    uuid: str
    name: str
    """Empty once the volume is being removed: its name is free again."""
    size_bytes: int
    mapped_blocks: int
    """Blocks of the current contents that occupy storage, as of the last seal."""
    mode: int
    """Permission bits only."""
    uid: int
    gid: int
    created_ns: int
    modified_ns: int
    changed_ns: int
    accessed_ns: int
    newest_generation: Generation = Generation(0)
    """Generation of the newest snapshot that still exists; 0 without one."""
    last_generation: Generation = Generation(0)
    """Highest generation ever given out."""
    trim_from_bytes: int | None = None
    """Where dropping what lies behind the end goes on (interrupted shrink); MAX_VOLUME_BYTES: only the
    rest of the last block is left."""
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    origin: MapId = NO_ORIGIN
    """The snapshot's table that unmapped blocks read from."""
    baseline: Mapping[str, Any] = field(default_factory=dict)
    """The raw image below the volume, when its origin is one: see ``baseline.BaselineFacts``."""
    flat_generation: int | None = None
    """Only snapshots up to this generation still inherit from the origin; None: the current contents do, too."""
    rollback_to: Generation = Generation(0)
    """The snapshot whose contents are the current ones, until the last page is unrolled; 0 without a rollback."""
    rollback_mark: Generation = Generation(0)
    """Writes since that rollback displace into this generation and later ones."""
    receive_lead: VolumeId = VolumeId(0)
    """While the volume receives a stream: the volume whose record has the state of that, maybe itself."""
    receive_state: str = ""
    """What ``transfers`` keeps of an unfinished receive; at its lead only."""
    is_replica: bool = False
    """Changed by streams only, until it is promoted."""
    replicas: Mapping[str, str] = field(default_factory=dict)
    """Where this volume is replicated to: name -> what ``replicas`` keeps of it."""

    stripes: tuple[tuple[int, ...], ...] = ()
    """The stripe map: rows of (since_ns, unit_blocks, columns...), the newest last; none: not striped."""

    @property
    def map_id(self) -> MapId:
        """The live table."""
        return map_id(self.id)

    @property
    def stripe_row(self) -> StripeRow | None:
        """The row that rules new stripes."""
        return StripeRow(self.stripes[-1][0], self.stripes[-1][1], self.stripes[-1][2:]) if self.stripes else None

    @property
    def is_hidden(self) -> bool:
        """Whether its first snapshot is still being received: nobody sees it, but its name is taken."""
        return bool(self.receive_lead) and not self.last_generation


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A named, immutable point of a volume."""

    volume_id: VolumeId
    generation: Generation
    uuid: str
    name: str
    """Empty once the snapshot is being removed."""
    size_bytes: int
    mapped_blocks: int
    """Blocks that occupied storage at the time of the snapshot."""
    created_ns: int
    held_blocks: int = 0
    """Stored blocks in this snapshot's increment."""
    tag: str = ""
    holds: Mapping[str, int | None] = field(default_factory=dict)
    """Tag -> when it expires (nanoseconds since 1970), None for never: while one is in force it is not removed."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its name; nothing once it is being removed."""
        return (self.name,) if self.name else ()

    @property
    def map_id(self) -> MapId:
        """The snapshot's table."""
        return map_id(self.volume_id, self.generation)

    def holds_at(self, now_ns: int) -> dict[str, int | None]:
        """Give the holds that are in force at a time."""
        return {tag: expires for tag, expires in self.holds.items() if expires is None or expires > now_ns}


@dataclass(frozen=True, slots=True)
class Bookmark:
    """A point of a volume that increments can start from, also when its snapshot is gone.  It holds no data."""

    volume_id: VolumeId
    generation: Generation
    """Of the snapshot that it was made from."""
    uuid: str
    """Of that snapshot: what a receiver knows it by."""
    size_bytes: int
    """Of the volume at that snapshot."""
    taken_ns: int
    """When that snapshot was taken."""
    names: Mapping[str, int] = field(default_factory=dict)
    """Name -> when it was given, nanoseconds since 1970; none once the bookmark is being removed."""

    @property
    def name(self) -> str:
        """One of its names, for messages."""
        return min(self.names, default="")

    @property
    def map_id(self) -> MapId:
        """The table of its snapshot, which may be gone."""
        return map_id(self.volume_id, self.generation)


Base = Snapshot | Bookmark
"""What increments start from."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage volume: one backing image file."""

    id: StorageId
    uuid: str
    path: str
    """Relative to the pool directory when inside it, else absolute."""
    capacity_blocks: int
    """Most blocks the image may grow to."""
    created_ns: int
    storage_class: str = ""
    redundancy: str = "none"
    """What lies below the image: none, raid1, raid5, raid6, raid10."""
    is_evacuating: bool = False
    """Its blocks move elsewhere: it gets no new ones."""
    mirrors: tuple[str, ...] = ()
    """Paths of further images with the same contents: with ``path`` they are the legs of a mirror."""
    stale_legs: tuple[int, ...] = ()
    """Legs that lack something (0 is ``path``): not used until they are resilvered."""
    left_legs: tuple[tuple[int, ...], ...] = ()
    """Of stale legs of which it is known what they lack: (leg, counter and nonce of the epoch in which it was left
    behind, journal segment and commit that it surely has); one that says something else of itself lacks everything."""

    @property
    def leg_paths(self) -> tuple[str, ...]:
        """Where the legs are; one without mirrors."""
        return (self.path, *self.mirrors)


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """The pool's policy, as it was set, and what it has done."""

    text: str
    """TOML; ``incfs.policy`` reads it."""
    set_ns: int
    runs: Mapping[str, int] = field(default_factory=dict)
    """Task -> when it last ran, in nanoseconds since 1970."""


MAX_POLICY_BYTES: Final = 32768
"""Of the text: it fits into one small journal record."""


class Facts(NamedTuple):
    """What ``stat`` shows of a table besides its size."""

    mode: int
    """Permission bits."""
    uid: int
    gid: int
    link_count: int
    mapped_blocks: int
    accessed_ns: int
    modified_ns: int
    changed_ns: int


def volume_facts(volume: Volume) -> Facts:
    """Tell what ``stat`` shows of a live volume; one without a name has no links.

    Never setuid bits, wherever the record came from: the kernel was told that none need to be taken away.
    """
    links = 1 if volume.name else 0
    owner = volume.mode & 0o777, volume.uid, volume.gid
    return Facts(*owner, links, volume.mapped_blocks, volume.accessed_ns, volume.modified_ns, volume.changed_ns)


def snapshot_facts(volume: Volume, snapshot: Snapshot) -> Facts:
    """Tell what ``stat`` shows of a snapshot: its volume's owner and read permissions, nobody may write."""
    links = 1 if snapshot.name else 0
    times = (snapshot.created_ns,) * 3
    return Facts(volume.mode & 0o444, volume.uid, volume.gid, links, snapshot.mapped_blocks, *times)
