"""Which inode number and which directory cookie stands for what.

Pure functions.  No number is ever used for two things in the life of a pool, so the kernel may
keep what it knows of one for as long as it likes:

    1                           the root
    2                           .snapshots
    3                           .incfs
    4 ..                        the status files in .incfs
    volume id << 32             a live volume         (its map id)
    volume id << 32 | generation  a snapshot          (its map id)
    volume id << 32 | 0xffffffff  .snapshots/NAME     (no snapshot has this generation)

Cookies are what ``readdir`` goes on from.  They are made from ids, not from positions in a list,
so that a listing misses nothing and repeats nothing while entries come and go.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from incfs.model import Generation, MapId, VolumeId, map_id, split_map_id

ROOT: Final = 1
SNAPSHOTS: Final = 2
STATUS: Final = 3
FIRST_STATUS_FILE: Final = 4

SNAPSHOTS_NAME: Final = ".snapshots"
STATUS_NAME: Final = ".incfs"
STATUS_FILES: Final = ("stats.json", "metrics")

DIRECTORY_GENERATION: Final = Generation(0xFFFFFFFF)
"""Stands for the directory of a volume's snapshots, so no snapshot may have it."""

_FIRST_MAP_ID: Final = 1 << 32
_FIRST_ID_COOKIE: Final = 16
"""Cookies below are those of the fixed entries."""


class Kind(Enum):
    """What an inode is."""

    ROOT = "root"
    SNAPSHOTS = "snapshots"
    STATUS = "status"
    STATUS_FILE = "status file"
    VOLUME = "volume"
    SNAPSHOT_DIRECTORY = "snapshot directory"
    SNAPSHOT = "snapshot"


_FIXED: Final = {ROOT: Kind.ROOT, SNAPSHOTS: Kind.SNAPSHOTS, STATUS: Kind.STATUS}


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a directory."""

    cookie: int
    inode: int
    name: str


def kind_of(inode: int) -> Kind | None:
    """Say what the inode is; None for a number that stands for nothing."""
    if inode >= _FIRST_MAP_ID:
        generation = inode & 0xFFFFFFFF
        if generation == 0:
            return Kind.VOLUME
        return Kind.SNAPSHOT_DIRECTORY if generation == DIRECTORY_GENERATION else Kind.SNAPSHOT
    if FIRST_STATUS_FILE <= inode < FIRST_STATUS_FILE + len(STATUS_FILES):
        return Kind.STATUS_FILE
    return _FIXED.get(inode)


def volume_of(inode: int) -> VolumeId:
    """Return the volume that a volume, a snapshot or a snapshot directory belongs to."""
    return split_map_id(MapId(inode))[0]


def snapshot_directory(volume_id: VolumeId) -> int:
    """Return the inode of ``.snapshots/NAME``."""
    return map_id(volume_id, DIRECTORY_GENERATION)


def status_file_name(inode: int) -> str:
    """Return the name of a status file."""
    return STATUS_FILES[inode - FIRST_STATUS_FILE]


def status_entries() -> list[Entry]:
    """List ``.incfs``."""
    return [Entry(_FIRST_ID_COOKIE + index, FIRST_STATUS_FILE + index, name) for index, name in enumerate(STATUS_FILES)]


def dot_entries(inode: int, parent: int) -> list[Entry]:
    """Return ``.`` and ``..`` of a directory; they come first."""
    return [Entry(1, inode, "."), Entry(2, parent, "..")]


def root_directories() -> list[Entry]:
    """Return the directories in the root; they come before the volumes."""
    return [Entry(3, SNAPSHOTS, SNAPSHOTS_NAME), Entry(4, STATUS, STATUS_NAME)]


def id_entry(identity: int, inode: int, name: str) -> Entry:
    """Return the entry of something with an id (volume id, generation) that is rising and unique in its directory."""
    return Entry(_FIRST_ID_COOKIE + identity, inode, name)


def parent_of(inode: int) -> int:
    """Return the directory that holds the inode."""
    match kind_of(inode):
        case Kind.STATUS_FILE:
            return STATUS
        case Kind.SNAPSHOT_DIRECTORY:
            return SNAPSHOTS
        case Kind.SNAPSHOT:
            return snapshot_directory(volume_of(inode))
        case _:
            return ROOT
