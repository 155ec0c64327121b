"""Handlers of open files: open, read, write, fallocate, seek, copy, fsync, release.

Owns the table of file handles.  What the operations mean is the service's business.

1. A file handle is counted at the service from its open to its release, so that a volume without a name keeps
   its data while it is open.
2. Under write-back the kernel reads through handles that were opened for writing only, and writes through any
   handle that may write; so nothing but ``is_writable`` is asked of a handle.
"""

import errno
import os
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Final, Literal, Protocol

import pyfuse3

from incfs import statusfiles
from incfs.boundary import handler, look
from incfs.histogram import Histogram
from incfs.inodes import Kind, kind_of, status_file_name, volume_of
from incfs.model import MapId, split_map_id
from incfs.rangecopy import clone_range

if TYPE_CHECKING:
    from incfs.service import Service

CacheMode = Literal["writeback", "writethrough", "none"]

FALLOC_KEEP_SIZE: Final = 0x01
FALLOC_PUNCH_HOLE: Final = 0x02
FALLOC_ZERO_RANGE: Final = 0x10
MAX_COPY_BYTES: Final = 1 << 30
"""The kernel's answer to copy_file_range has 32 bits; callers go on after a short copy."""


@dataclass(frozen=True, slots=True)
class Handle:
    """An open file."""

    inode: int
    map_id: MapId
    is_writable: bool
    is_ours: bool = False
    """Whether the process that makes our system calls on the mount has it open."""
    content: bytes | None = None
    """Of a status file, as it was when opened; None for volumes and snapshots."""


class Kernel(Protocol):
    """What handlers ask of the kernel."""

    async def write_back(self, name: str, inode: int) -> bool:
        """Make it write its changed pages of a volume; whether all of them are here now.

        Unlike fsync this does not take the kernel's lock of the file, which a seek holds while we answer it.
        """

    async def size_of(self, name: str, inode: int) -> int | None:
        """Return a volume's size as the kernel has it; None when its name belongs to it no more."""

    async def wait_to_answer_sync(self, table: MapId) -> None:
        """Wait, before FSYNC of a volume is answered, until the kernel may let go of its lock of the file."""

    def is_ours(self, pid: int) -> bool:
        """Tell whether a process is the one that makes our system calls on the mount."""

    def forget_attributes(self, inode: int) -> None:
        """Make it ask for an inode's attributes the next time."""


class FileHandlers(pyfuse3.Operations):
    """The handlers whose first argument is a file handle, and ``open``.

    Args:
        service: The pool.
        cache: Who caches: ``writeback`` (the kernel, also writes), ``writethrough`` (the kernel, reads), ``none``.
    """

    def __init__(self, service: "Service", cache: CacheMode) -> None:
        super().__init__()
        self.service = service
        self.cache = cache
        self.enable_writeback_cache = cache == "writeback"
        self.kernel: Kernel | None = None
        """Set while mounted."""
        self.durations: dict[str, Histogram]
        self._handles: dict[int, Handle] = {}
        self._numbers = count(1)

    def fail(self, reason: str) -> None:
        """Put the pool into its failsafe (I10)."""
        self.service.fail(reason)

    def inode_of_handle(self, fh: int) -> int:
        """Return the inode that ``fh`` is open on; 0 when unknown."""
        handle = self._handles.get(fh)
        return handle.inode if handle else 0

    # ------------------------------------------------------------------------- open and close

    @look
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a volume, a snapshot (read-only) or a status file."""
        kind = kind_of(inode)
        wants_write = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if kind is Kind.STATUS_FILE:
            return self._open_status_file(inode, wants_write=wants_write)
        if kind is Kind.SNAPSHOT:
            if wants_write:
                raise pyfuse3.FUSEError(errno.EROFS)
            volume_id, generation = split_map_id(MapId(inode))
            self.service.snapshot_by_generation(volume_id, generation)
        elif kind is Kind.VOLUME:
            volume = self.service.volume_by_id(volume_of(inode))
            if wants_write:
                self.service.require_ordinary(volume.id)
            if flags & os.O_TRUNC and volume.size_bytes:
                await self.service.resize_volume(volume.id, 0, shrink=True)
        else:
            raise pyfuse3.FUSEError(errno.EISDIR)
        return self._open_table(MapId(inode), ctx.pid, flags, is_writable=wants_write)

    def _open_status_file(self, inode: int, *, wants_write: bool) -> pyfuse3.FileInfo:
        if wants_write:
            raise pyfuse3.FUSEError(errno.EACCES)
        content = statusfiles.render(status_file_name(inode), self.service)
        fh = self._register(Handle(inode, MapId(0), is_writable=False, content=content))
        return pyfuse3.FileInfo(fh=fh, direct_io=True, keep_cache=False)

    def _open_table(
        self, table: MapId, pid: int, flags: int, *, is_writable: bool, is_cached: bool = True
    ) -> pyfuse3.FileInfo:
        self.service.handles.open(table, describe_process(pid))
        is_ours = self.kernel is not None and not is_writable and self.kernel.is_ours(pid)
        handle = Handle(table, table, is_writable=is_writable, is_ours=is_ours)
        fh = self._register(handle, only_writes=flags & os.O_ACCMODE == os.O_WRONLY)
        # But for rollbacks and streams, a table changes through the mount only: the kernel may keep its pages.
        is_cached = is_cached and self.cache != "none"
        is_kept = is_cached and not self.service.branches.take_changed(table)
        return pyfuse3.FileInfo(fh=fh, direct_io=not is_cached, keep_cache=is_kept)

    def _register(self, handle: Handle, *, only_writes: bool = False) -> int:
        fh = next(self._numbers) << 1 | only_writes  # as the extension reads it, which refuses writers of a full pool
        self._handles[fh] = handle
        return fh

    @look
    async def release(self, fh: int) -> None:
        """Forget a handle: its last descriptor and mapping are gone."""
        handle = self._handles.pop(fh)
        if handle.content is None:
            self.service.handles.close(handle.map_id)

    @look
    async def flush(self, fh: int) -> None:
        """Answer ``close``: the kernel has written its pages; what was written is not made durable."""

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Commit: everything written to the pool so far is durable afterwards.

        Our own are for the kernel's pages only: writers, who wait for the answer, do not wait for a disk as well.
        """
        handle = self._handles[fh]
        if handle.content is not None:
            return
        if self.kernel is not None:
            await self.kernel.wait_to_answer_sync(handle.map_id)
        if not handle.is_ours:
            await self.service.commit()
        if self.kernel is not None:
            # Under write-back the kernel does not know that its writes changed the count of blocks.
            self.kernel.forget_attributes(handle.inode)

    # ------------------------------------------------------------------------- data

    @look
    async def read(self, fh: int, offset: int, size: int) -> bytes:
        """Read; short only at the end of the file."""
        handle = self._handles[fh]
        if handle.content is not None:
            return handle.content[offset : offset + size]
        return await self.service.read_for_user(handle.map_id, offset, size)

    @handler
    async def write(self, fh: int, offset: int, buf: bytes) -> int:
        """Write all of ``buf``."""
        return await self.service.write(self._writable(fh).map_id, offset, buf)

    def _writable(self, fh: int) -> Handle:
        handle = self._handles[fh]
        if handle.content is not None or kind_of(handle.inode) is Kind.SNAPSHOT:
            raise pyfuse3.FUSEError(errno.EROFS)
        return handle

    @handler
    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        """Extend, punch a hole or zero a range; nothing is ever reserved, volumes are thin."""
        handle = self._writable(fh)
        keeps_size = bool(mode & FALLOC_KEEP_SIZE)
        what = mode & ~FALLOC_KEEP_SIZE
        if what not in (0, FALLOC_ZERO_RANGE) and not (what == FALLOC_PUNCH_HOLE and keeps_size):
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        volume_id = volume_of(handle.inode)
        size_bytes = self.service.volume_by_id(volume_id).size_bytes
        if what and offset < size_bytes:
            await self.service.discard(handle.map_id, offset, min(length, size_bytes - offset))
        if not keeps_size and offset + length > size_bytes:
            await self.service.resize_volume(volume_id, offset + length)

    @look
    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        """Find data or a hole (the kernel does the other kinds of seek by itself)."""
        handle = self._handles[fh]
        if handle.content is not None or whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise pyfuse3.FUSEError(errno.EINVAL)
        if self._may_have_unwritten_pages(handle.map_id) and not await self._write_back(handle.inode):
            return await self._seek_as_if_all_data(handle.inode, offset, whence)
        return await self.service.seek(handle.map_id, offset, data=whence == os.SEEK_DATA)

    async def _write_back(self, inode: int) -> bool:
        """Have the kernel write its changed pages: it asks without, and they would look like holes."""
        name = self._name_of(inode)
        return self.kernel is not None and bool(name) and await self.kernel.write_back(name, inode)

    async def _seek_as_if_all_data(self, inode: int, offset: int, whence: int) -> int:
        """Answer where unwritten pages cannot be waited for, but need not be missed.

        So for a volume without a name, and on a kernel that waits for no page without the lock of the file.
        """
        size_bytes = await self._size_in_the_kernel(inode)
        if not 0 <= offset < size_bytes:
            raise pyfuse3.FUSEError(errno.ENXIO)
        return offset if whence == os.SEEK_DATA else size_bytes

    async def _size_in_the_kernel(self, inode: int) -> int:
        """Return a volume's size with what the kernel has appended and not written; without a name, as it is here."""
        while self.kernel is not None and (name := self._name_of(inode)):
            size_bytes = await self.kernel.size_of(name, inode)
            if size_bytes is not None:
                return size_bytes
            if name == self._name_of(inode):
                break
        return self.service.volume_by_id(volume_of(inode)).size_bytes

    def _name_of(self, inode: int) -> str:
        return self.service.volume_by_id(volume_of(inode)).name

    def _may_have_unwritten_pages(self, table: MapId) -> bool:
        """Closing writes a file's pages and a mapping keeps its handle open, so a writer's handle tells."""
        return self.enable_writeback_cache and any(
            handle.map_id == table and handle.is_writable for handle in self._handles.values()
        )

    def writers(self) -> set[MapId]:
        """Give the volumes that somebody has open for writing: only of these may the kernel have unwritten pages."""
        return {handle.map_id for handle in self._handles.values() if handle.is_writable}

    @handler
    async def copy_file_range(
        self, fh_in: int, offset_in: int, fh_out: int, offset_out: int, length: int, flags: int
    ) -> int:
        """Copy inside the pool; holes stay holes."""
        source = self._handles[fh_in]
        if source.content is not None or flags:
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        target = self._writable(fh_out)
        length = min(length, MAX_COPY_BYTES)
        return await clone_range(self.service, source.map_id, offset_in, target.map_id, offset_out, length)


def describe_process(pid: int) -> str:
    """Say who opens a file, for the message of ``Busy``."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as stream:
            return f"pid {pid} ({stream.read().strip()})"
    except OSError:
        # Another PID namespace, or the process has gone: the number is all there is.
        return f"pid {pid}"
