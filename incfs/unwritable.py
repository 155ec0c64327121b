"""A pool on media that nobody can write: an archive, a read-only snapshot or backup of its disk.

It is opened through a copy of its metadata in a temporary directory, where the journal is folded; images are only read.
Data that a journal record carries stays in memory.  Everything that would change the pool is refused.

1. Nothing below the pool's directories is written, not even the lock: that is shared by those who only read.
2. Directory and images belong together as in any other opening (I14).
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from incfs.backing import ReadingBacking, translate
from incfs.epoch import EPOCH_NAME
from incfs.errors import EpochMismatch, MetadataStale, PoolLocked, PoolReadOnly
from incfs.gather import find
from incfs.journal import journal_paths
from incfs.lock import LOCK_NAME, read_holder
from incfs.metadata import TABLES_NAME
from incfs.options import Options, Salvage
from incfs.recovery import open_store
from incfs.repair import parts_apart
from incfs.store import Store
from incfs.superblock import SUPERBLOCK_NAME, read_superblock


def is_unwritable(directory: Path) -> bool:
    """Tell whether the pool's directory is on a filesystem that is mounted read-only."""
    try:
        return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)
    except OSError:
        return False  # whoever opens it says what is wrong


@contextlib.contextmanager
def opened_unwritable(directory: Path, options: Options) -> Iterator[Store]:
    """Open the pool in ``directory`` for reading; the caller lets go of it (``Store.abandon``).

    Cost: copies the metadata to the directory for temporary files (``TMPDIR``).

    Raises:
        IncfsError: As ``recovery.open_store``.
    """
    with contextlib.ExitStack() as stack:
        source = _newest_copy(directory)
        stack.enter_context(_shared_lock(source))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="incfs-")))
        read_superblock(ReadingBacking(), source)
        for path in (source / SUPERBLOCK_NAME, source / TABLES_NAME, source / EPOCH_NAME, *journal_paths(source)):
            _copy(path, scratch)
        salvage = Salvage(source, {}, cut_journal=False)
        chosen = Options(degraded=options.degraded, dump_interval_s=None, data_plane="python", salvage=salvage)
        store = open_store(scratch, chosen, ReadingBacking(scratch))
        apart = parts_apart(source, store)
        if apart and not options.force_older:
            store.abandon()
            raise EpochMismatch("; ".join(apart))
        store.directory = directory
        store.fail(PoolReadOnly(f"{directory} is on a filesystem that is mounted read-only"))
        yield store


def _newest_copy(directory: Path) -> Path:
    """Choose a directory whose metadata is up to date, this one if it is."""
    found = find(ReadingBacking(), directory)
    if found is None:
        return directory
    current = [found.directories[number] for number in found.newest.current if number in found.directories]
    if not current:
        raise MetadataStale(f"the newest metadata of the pool in {directory} is on a disk that is away; bring it back")
    return directory if directory in current else current[0]


@contextlib.contextmanager
def _shared_lock(source: Path) -> Iterator[None]:
    """Keep writers out where there can be any: the same disk may be writable by another path."""
    try:
        fd = os.open(source / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    except OSError as error:
        raise translate(error, source / LOCK_NAME, "open") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = read_holder(source)
            raise PoolLocked(f"pool {source} is in use by process {holder}", pid=holder) from error
        yield
    finally:
        os.close(fd)


def _copy(path: Path, scratch: Path) -> None:
    try:
        shutil.copyfile(path, scratch / path.name)
    except OSError as error:
        if error.errno == errno.ENOENT and path.name == EPOCH_NAME:
            return
        raise translate(error, path, "copy") from error
