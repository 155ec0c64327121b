"""The mount's request handlers: a thin adapter from what the kernel asks to what the service does.

Owns the shape of the tree (names to inodes) and nothing else: sizes, permissions to change, durability and
errors are the service's.  ``fuse_files`` has the handlers of open files; ``boundary`` wraps each handler.

1. Every inode number is made from ids that are never used twice (``inodes``), so no look-up count is needed:
   an inode that is gone answers ENOENT whoever asks.
2. Names are looked up at the service each time; the kernel caches none.
"""

import errno
import os
import stat
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import pyfuse3

from incfs import fuse_attributes as attributes
from incfs import inodes
from incfs.boundary import handler, look
from incfs.errors import InvalidName, LimitExceeded, NotFound
from incfs.fuse_files import CacheMode, FileHandlers
from incfs.histogram import Histogram
from incfs.inodes import Kind, kind_of, volume_of
from incfs.model import MAX_NAME_BYTES, OWN_XATTRS, USER_XATTRS, MapId

if TYPE_CHECKING:
    from incfs.service import Service

_MAX_FILES: Final = (1 << 32) - 1
"""Volume ids; what ``df -i`` counts from."""


class Operations(FileHandlers):
    """All handlers of one mount."""

    def __init__(self, service: "Service", cache: CacheMode = "writeback") -> None:
        super().__init__(service, cache)
        self.durations = defaultdict(Histogram)
        self._block_bytes = int(service.facts()["block_bytes"])
        self._listings: dict[int, tuple[int, list[inodes.Entry]]] = {}

    # ------------------------------------------------------------------------- attributes

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        """Return an inode's attributes; raises NotFound or ENOENT when it is gone."""
        kind = kind_of(inode)
        if kind is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if kind in (Kind.VOLUME, Kind.SNAPSHOT):
            return self._table_attributes(MapId(inode))
        if kind is Kind.SNAPSHOT_DIRECTORY:
            return attributes.snapshot_directory_entry(self.service.volume_by_id(volume_of(inode)), inode)
        return attributes.fixed_entry(inode)

    def _table_attributes(self, table: MapId) -> pyfuse3.EntryAttributes:
        size_bytes, facts = self.service.stat(table)
        return attributes.table_entry(table, size_bytes, facts, self._block_bytes)

    @look
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Answer ``stat``."""
        return self._attributes(inode)

    @handler
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Answer ``truncate``, ``chmod``, ``chown`` and ``utimens``.

        Under write-back the kernel keeps size and times by itself and sends the times here when it writes a file.
        """
        kind = kind_of(inode)
        owner_or_size = fields.update_size or fields.update_mode or fields.update_uid or fields.update_gid
        if not owner_or_size and self._is_gone(inode):
            # The kernel writes back the times of a file it has unlinked; a refusal would fail the next syncfs.
            return attributes.entry(inode, stat.S_IFREG, links=0)
        if kind is Kind.VOLUME:
            return await self._set_volume_attributes(inode, attr, fields)
        if owner_or_size:
            raise pyfuse3.FUSEError(errno.EROFS if kind is Kind.SNAPSHOT else errno.EPERM)
        if kind is not Kind.SNAPSHOT:
            raise pyfuse3.FUSEError(errno.EPERM)
        # `touch` sets times after it has taken the snapshot; the snapshot keeps its own.
        return self._attributes(inode)

    def _is_gone(self, inode: int) -> bool:
        try:
            self._attributes(inode)
        except NotFound:
            return True
        return False

    async def _set_volume_attributes(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields
    ) -> pyfuse3.EntryAttributes:
        volume_id = volume_of(inode)
        if fields.update_size:
            await self.service.resize_volume(volume_id, attr.st_size, shrink=True)
        changes: dict[str, int] = {}
        if fields.update_mode:
            changes["mode"] = attr.st_mode & 0o777
        if fields.update_uid:
            changes["uid"] = attr.st_uid
        if fields.update_gid:
            changes["gid"] = attr.st_gid
        if fields.update_atime:
            changes["accessed_ns"] = attr.st_atime_ns
        if fields.update_mtime:
            changes["modified_ns"] = attr.st_mtime_ns
        if changes:
            await self.service.set_attributes(volume_id, **changes)
        return self._attributes(inode)

    # ------------------------------------------------------------------------- names

    @look
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Find a name in a directory."""
        if name == b".":
            return self._attributes(parent_inode)
        if name == b"..":
            return self._attributes(inodes.parent_of(parent_inode))
        text = _decode_name(name)
        match kind_of(parent_inode):
            case Kind.ROOT:
                return self._attributes(self._inode_in_root(text))
            case Kind.SNAPSHOTS:
                return self._attributes(inodes.snapshot_directory(self.service.volume(text).id))
            case Kind.SNAPSHOT_DIRECTORY:
                return self._table_attributes(self.service.snapshot(volume_of(parent_inode), text).map_id)
            case Kind.STATUS if text in inodes.STATUS_FILES:
                return self._attributes(inodes.FIRST_STATUS_FILE + inodes.STATUS_FILES.index(text))
            case _:
                raise pyfuse3.FUSEError(errno.ENOENT)

    def _inode_in_root(self, name: str) -> int:
        for entry in inodes.root_directories():
            if entry.name == name:
                return entry.inode
        return self.service.volume(name).map_id

    @handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Create a volume, or take a snapshot, and open it."""
        entry = await self._create(parent_inode, name, mode, ctx)
        is_volume = kind_of(entry.st_ino) is Kind.VOLUME
        is_writable = is_volume and flags & os.O_ACCMODE != os.O_RDONLY
        # The kernel believes that it may write to a snapshot that it has just "created": without a cache it has to ask.
        opened = self._open_table(MapId(entry.st_ino), ctx.pid, flags, is_writable=is_writable, is_cached=is_volume)
        return opened, entry

    @handler
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Create a volume, or take a snapshot; only regular files exist here."""
        if not stat.S_ISREG(mode):
            raise pyfuse3.FUSEError(errno.EPERM)
        return await self._create(parent_inode, name, mode, ctx)

    async def _create(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        text = _decode_name(name)
        match kind_of(parent_inode):
            case Kind.ROOT:
                volume = await self.service.create_volume(text, mode=mode & 0o777, uid=ctx.uid, gid=ctx.gid)
                return self._table_attributes(volume.map_id)
            case Kind.SNAPSHOT_DIRECTORY:
                snapshots = await self.service.create_snapshots([(volume_of(parent_inode), text)])
                return self._table_attributes(snapshots[0].map_id)
            case _:
                raise pyfuse3.FUSEError(errno.EPERM)

    @handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a volume or a snapshot; a volume that is open stays usable until it is closed."""
        text = _decode_name(name)
        match kind_of(parent_inode):
            case Kind.ROOT:
                await self.service.remove_volume(self.service.volume(text).id)
            case Kind.SNAPSHOT_DIRECTORY:
                await self.service.remove_snapshot(volume_of(parent_inode), text)
            case _:
                raise pyfuse3.FUSEError(errno.EPERM)

    @handler
    async def rename(
        self,
        parent_inode: int,
        name: bytes,
        new_parent_inode: int,
        new_name: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        """Rename a volume or a snapshot in its directory."""
        kind = kind_of(parent_inode)
        old, new = _decode_name(name), _decode_name(new_name)
        if parent_inode != new_parent_inode or kind not in (Kind.ROOT, Kind.SNAPSHOT_DIRECTORY):
            # Not EXDEV: `mv` would copy and then remove.
            raise pyfuse3.FUSEError(errno.EPERM)
        if flags & ~(pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE):
            raise pyfuse3.FUSEError(errno.EINVAL)
        if kind is Kind.ROOT:
            await self._rename_volume(old, new, flags)
        else:
            await self._rename_snapshot(parent_inode, old, new, flags)

    async def _rename_volume(self, old: str, new: str, flags: int) -> None:
        moved = self.service.volume(old)
        if flags & pyfuse3.RENAME_EXCHANGE:
            await self.service.exchange_volumes(moved.id, self.service.volume(new).id)
        else:
            replace = not flags & pyfuse3.RENAME_NOREPLACE
            await self.service.rename_volume(moved.id, new, replace=replace)

    async def _rename_snapshot(self, directory: int, old: str, new: str, flags: int) -> None:
        """A snapshot never replaces another: what was promised to be kept would be gone."""
        if flags & pyfuse3.RENAME_EXCHANGE:
            raise pyfuse3.FUSEError(errno.EINVAL)
        await self.service.rename_snapshot(volume_of(directory), old, new)

    @look
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Refuse: the tree's directories are given."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @look
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Refuse: the tree's directories are given."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @look
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Refuse: there are no links."""
        raise pyfuse3.FUSEError(errno.EPERM)

    @look
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Refuse: a volume has one name."""
        raise pyfuse3.FUSEError(errno.EPERM)

    # ------------------------------------------------------------------------- directories

    @look
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Begin a listing."""
        fh = next(self._numbers)
        self._listings[fh] = inode, []
        return fh

    @look
    async def releasedir(self, fh: int) -> None:
        """End a listing."""
        del self._listings[fh]

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Commit, as ``fsync`` does; names are durable already."""
        await self.service.commit()

    @look
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List what the directory held when the listing began, less what has gone since."""
        inode, entries = self._listings[fh]
        if start_id == 0:
            entries = self._list(inode)
            self._listings[fh] = inode, entries
        first = bisect_right(entries, start_id, key=lambda entry: entry.cookie)
        for entry in entries[first:]:
            try:
                found = self._attributes(entry.inode)
            except (pyfuse3.FUSEError, NotFound):
                continue
            if not pyfuse3.readdir_reply(token, entry.name.encode(), found, entry.cookie):
                return

    def _list(self, inode: int) -> list[inodes.Entry]:
        """Return the entries of a directory, by rising cookie."""
        entries = inodes.dot_entries(inode, inodes.parent_of(inode))
        match kind_of(inode):
            case Kind.ROOT:
                entries += inodes.root_directories()
                volumes = sorted(self.service.volumes(), key=lambda volume: volume.id)
                entries += [inodes.id_entry(v.id, v.map_id, v.name) for v in volumes]
            case Kind.SNAPSHOTS:
                volumes = sorted(self.service.volumes(), key=lambda volume: volume.id)
                entries += [inodes.id_entry(v.id, inodes.snapshot_directory(v.id), v.name) for v in volumes]
            case Kind.SNAPSHOT_DIRECTORY:
                snapshots = self.service.snapshots(volume_of(inode))
                entries += [inodes.id_entry(s.generation, s.map_id, s.name) for s in snapshots]
            case Kind.STATUS:
                entries += inodes.status_entries()
            case _:
                raise pyfuse3.FUSEError(errno.ENOTDIR)
        return entries

    @look
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Answer ``df``: the pool's blocks."""
        facts = self.service.facts()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = self._block_bytes
        data.f_blocks = facts["capacity_bytes"] // self._block_bytes
        data.f_bfree = facts["free_bytes"] // self._block_bytes
        data.f_bavail = (facts["free_bytes"] - facts["reserved_bytes"]) // self._block_bytes
        data.f_files = _MAX_FILES
        data.f_ffree = data.f_favail = _MAX_FILES - self.service.volume_count
        data.f_namemax = MAX_NAME_BYTES
        return data

    # ------------------------------------------------------------------------- extended attributes

    @look
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Return a stored ``user.`` attribute or a fact."""
        text = _decode_attribute(name)
        if text.startswith(OWN_XATTRS):
            fact = attributes.facts_of(self.service, inode).get(text.removeprefix(OWN_XATTRS))
            value = None if fact is None else fact.encode()
        else:
            value = self._stored(inode).get(text)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @look
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """List stored attributes and facts."""
        facts = [OWN_XATTRS + key for key in attributes.facts_of(self.service, inode)]
        return [name.encode() for name in [*self._stored(inode), *facts]]

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Store a ``user.`` attribute of a volume (pyfuse3 has looked at XATTR_CREATE and XATTR_REPLACE).

        Facts stay what they are, and nobody is told: rsync, cp, tar and mv bring the other file's along.
        """
        if _is_fact(name):
            return
        text = self._changeable_attribute(inode, name)
        try:
            await self.service.set_xattr(volume_of(inode), text, value)
        except LimitExceeded as error:
            raise pyfuse3.FUSEError(errno.ENOSPC) from error

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a stored ``user.`` attribute of a volume; facts stay, as in ``setxattr``."""
        if _is_fact(name):
            await self.getxattr(inode, name, ctx)  # ENODATA where there is none
            return
        text = self._changeable_attribute(inode, name)
        if text not in self._stored(inode):
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        await self.service.remove_xattr(volume_of(inode), text)

    def _stored(self, inode: int) -> dict[str, bytes]:
        if kind_of(inode) is not Kind.VOLUME:
            return {}
        return dict(self.service.volume_by_id(volume_of(inode)).xattrs)

    def _changeable_attribute(self, inode: int, name: bytes) -> str:
        text = _decode_attribute(name)
        kind = kind_of(inode)
        if not text.startswith(USER_XATTRS):
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        if kind not in (Kind.VOLUME, Kind.SNAPSHOT):
            raise pyfuse3.FUSEError(errno.EPERM)
        if kind is Kind.SNAPSHOT:
            raise pyfuse3.FUSEError(errno.EROFS)
        return text


def _decode_name(name: bytes) -> str:
    """Return a file name as text.

    Raises:
        FUSEError: ENAMETOOLONG.
        InvalidName: It is not UTF-8.
    """
    if len(name) > MAX_NAME_BYTES:
        raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise InvalidName(f"the name {name!r} is not UTF-8", name=repr(name)) from error


def _is_fact(name: bytes) -> bool:
    return name.startswith(OWN_XATTRS.encode())


def _decode_attribute(name: bytes) -> str:
    """Return an attribute's name as text; raises EINVAL when it is not UTF-8."""
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise pyfuse3.FUSEError(errno.EINVAL) from error
