"""Every error that incfs raises on purpose.

Owns the tree, the stable codes, and for each class its errno (FUSE), its exit code
(command line) and its code (control protocol).  Must not import anything of incfs.

    IncfsError
    ├── UsageError                 a value the caller gave makes no sense
    │   ├── InvalidName
    │   └── InvalidPolicy
    ├── NotFound
    │   ├── VolumeNotFound
    │   ├── SnapshotNotFound
    │   ├── BookmarkNotFound
    │   ├── StorageNotFound
    │   ├── ReplicaNotFound
    │   ├── HoldNotFound
    │   └── NotAPool
    ├── AlreadyExists
    ├── Busy                       names who holds it
    │   └── PoolLocked
    ├── NotSupported
    ├── ReplicaReadOnly            until it is promoted
    ├── NoSpace
    │   ├── MetadataFull           of the metadata's disk
    │   └── QuotaExceeded          of a volume's own limit
    ├── LimitExceeded
    ├── NoData
    ├── BackingError               the host failed to read, write or sync a file
    ├── Damaged                    what was read is not what was written
    │   ├── ChecksumMismatch
    │   ├── FormatError
    │   ├── JournalDamaged
    │   └── ImageMismatch
    ├── StreamError                a send stream is no good
    │   ├── StreamCorrupt
    │   │   └── StreamTruncated
    │   ├── StreamUnsupported      a newer incfs made it
    │   └── TokenStale             what a resume token stands for is not there any more
    ├── ReplicaFailed              the next run goes on
    ├── BaseMismatch               a stream's base is not what the target holds
    ├── EpochMismatch              parts of a pool are of different times, or of different forks of it
    ├── MetadataStale              the newest metadata is elsewhere
    ├── UnsupportedFormat          a newer incfs wrote this
    ├── HookFailed                 a program around a snapshot
    ├── JobStopped                 somebody stopped it; what it did stays done
    ├── PoolReadOnly               failsafe after a failed write, sync or commit (I10)
    └── DaemonError                the daemon could not be reached, or refused the caller
        └── PermissionRefused

Bugs are assertions, not members of this tree.
"""

import errno as _errno
from typing import Any, ClassVar, Final

NO_ROOM: Final = (_errno.ENOSPC, _errno.EDQUOT, _errno.EFBIG)
"""A full filesystem, a quota, the largest file of a filesystem or a process: the host has no room there."""


class IncfsError(Exception):
    """Something went wrong that a user can understand and act on.

    Args:
        message: What happened, where, what was expected and found, and what to do next.
        facts: The same as typed values; they become attributes and the ``facts`` of ``--json``.
    """

    code: ClassVar[str] = "incfs.error"
    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(name)


class UsageError(IncfsError):
    """A value the caller gave makes no sense here."""

    code = "usage.invalid"
    errno = _errno.EINVAL
    exit_code = 2


class InvalidName(UsageError):
    """A volume or snapshot name breaks the rules of ``model.validate_name``."""

    code = "usage.invalid-name"


class InvalidPolicy(UsageError):
    """A policy's text breaks the rules of ``docs/POLICY.md``; the message begins with the line."""

    code = "policy.invalid"


class NotFound(IncfsError):
    """The thing named does not exist."""

    code = "not-found"
    errno = _errno.ENOENT
    exit_code = 10


class VolumeNotFound(NotFound):
    """No virtual volume of that name, id or UUID."""

    code = "volume.not-found"


class SnapshotNotFound(NotFound):
    """No snapshot of that name on that volume."""

    code = "snapshot.not-found"


class BookmarkNotFound(NotFound):
    """No bookmark of that name on that volume."""

    code = "bookmark.not-found"


class StorageNotFound(NotFound):
    """No storage volume of that id."""

    code = "storage.not-found"


class HoldNotFound(NotFound):
    """The snapshot is not held by that tag."""

    code = "hold.not-found"


class NotAPool(NotFound):
    """The directory holds no incfs pool."""

    code = "pool.not-a-pool"


class AlreadyExists(IncfsError):
    """The name or the path is taken."""

    code = "already-exists"
    errno = _errno.EEXIST
    exit_code = 1


class Busy(IncfsError):
    """Somebody holds it; the message says who."""

    code = "busy"
    errno = _errno.EBUSY
    exit_code = 11


class PoolLocked(Busy):
    """Another process has the pool open."""

    code = "pool.locked"


class NotSupported(IncfsError):
    """The operation does not exist for this kind of object."""

    code = "not-supported"
    errno = _errno.EOPNOTSUPP
    exit_code = 2


class NoSpace(IncfsError):
    """No block, no host space or no metadata space is left; nothing was harmed."""

    code = "pool.no-space"
    errno = _errno.ENOSPC
    exit_code = 13


class MetadataFull(NoSpace):
    """The disk of the metadata has no room for the next record, or to fold the journal; it goes on when it has."""

    code = "pool.metadata-full"


class QuotaExceeded(NoSpace):
    """A volume's quota, or its limit of snapshots, would be passed."""

    code = "volume.quota-exceeded"
    errno = _errno.EDQUOT


class ReplicaReadOnly(IncfsError):
    """A replica changes by streams only, until it is promoted."""

    code = "volume.replica"
    errno = _errno.EROFS
    exit_code = 11


class LimitExceeded(IncfsError):
    """A documented limit (volume size, number of volumes, xattr size) would be passed."""

    code = "limit-exceeded"
    errno = _errno.EFBIG
    exit_code = 2


class BackingError(IncfsError):
    """The host failed to open, read, write or sync a file of the pool."""

    code = "backing.failed"


class Damaged(IncfsError):
    """What was read is not what was written."""

    code = "damaged"
    exit_code = 4


class ChecksumMismatch(Damaged):
    """A block's CRC32C differs from the one stored with its mapping (I4)."""

    code = "pool.checksum-mismatch"


class FormatError(Damaged):
    """Stored bytes do not decode: wrong length, wrong CRC, value out of range."""

    code = "format.invalid"


class TablesLost(Damaged):
    """The file of the tables cannot be read any more while the pool is open."""

    code = "pool.tables-lost"


class JournalDamaged(Damaged):
    """A journal record before the tail is damaged, or a segment is missing."""

    code = "journal.damaged"


class ImageMismatch(Damaged):
    """An image file is missing, truncated, or belongs to another storage volume."""

    code = "storage.image-mismatch"


class StreamError(IncfsError):
    """A send stream is no good; what was published before stays as it is."""

    code = "stream.failed"
    exit_code = 14


class StreamCorrupt(StreamError):
    """A stream's bytes are not what was sent, or say what no stream may say."""

    code = "stream.corrupt"


class StreamTruncated(StreamCorrupt):
    """A stream ends before its STREAM_END."""

    code = "stream.truncated"


class StreamUnsupported(StreamError):
    """A newer incfs made this stream."""

    code = "stream.unsupported"


class TokenStale(StreamError):
    """A resume token is damaged, or what it stands for is not there any more."""

    code = "stream.token-stale"


class ReplicaFailed(IncfsError):
    """A replica could not be brought up to date; the next run goes on where this one ended."""

    code = "replica.failed"


class ReplicaNotFound(NotFound):
    """No replica of that name."""

    code = "replica.not-found"


class BaseMismatch(IncfsError):
    """The target does not hold exactly the snapshot that a stream starts from, or is in use."""

    code = "stream.base-mismatch"
    errno = _errno.EBUSY
    exit_code = 12


class EpochMismatch(IncfsError):
    """A pool's directory and an image of it are of different times, or of different forks of the pool (I14)."""

    code = "pool.epoch-mismatch"
    exit_code = 12


class NamesOutside(IncfsError):
    """A dump names files, programs or targets outside of its pool, and nobody agreed to that."""

    code = "restore.names-outside"
    errno = _errno.EPERM
    exit_code = 2


class MetadataStale(IncfsError):
    """The copies of the metadata that are there are not the newest, or two were used without each other."""

    code = "pool.metadata-stale"
    exit_code = 12


class UnsupportedFormat(IncfsError):
    """A newer incfs wrote this pool and this one cannot use it safely."""

    code = "format.unsupported"
    exit_code = 1


class PoolReadOnly(IncfsError):
    """A write, sync or commit failed earlier: the pool refuses changes (I10)."""

    code = "pool.read-only"
    errno = _errno.EROFS


class DaemonError(IncfsError):
    """The daemon did not answer, or broke the protocol."""

    code = "daemon.unreachable"


class PermissionRefused(DaemonError):
    """The daemon refused this user."""

    code = "daemon.permission-refused"
    errno = _errno.EACCES


class HookFailed(IncfsError):
    """A program that a policy names did not start, failed, took too long, or may not run on this host."""

    code = "policy.hook-failed"


class JobStopped(IncfsError):
    """A job was stopped by somebody else; what it did stays done."""

    code = "job.stopped"
    errno = _errno.ECANCELED
    exit_code = 1


class NoData(IncfsError):
    """No data at or after the offset (SEEK_DATA, SEEK_HOLE beyond the end)."""

    code = "volume.no-data"
    errno = _errno.ENXIO
