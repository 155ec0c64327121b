"""The floor under any pyfuse3 server: each READ and WRITE is one pread or pwrite, in Python.

usage: binding.py IMAGE MOUNTPOINT      MOUNTPOINT/volume is IMAGE

It maps nothing, checks nothing and stores nothing of its own; whatever the Python data plane takes longer than this
is incfs.  In the foreground; ends when it is unmounted or gets SIGTERM.
"""

import errno
import os
import signal
import stat
import sys

import pyfuse3
import trio

VOLUME_NAME = b"volume"
VOLUME_INODE = pyfuse3.InodeT(2)
FOREVER_S = 86400.0


class PassThrough(pyfuse3.Operations):
    """One file, handed through.

    Args:
        image: The file.
    """

    enable_writeback_cache = True

    def __init__(self, image: str) -> None:
        super().__init__()
        self._fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Describe the directory or the volume."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.attr_timeout = entry.entry_timeout = FOREVER_S
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755)
            entry.st_nlink = 2
        else:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o600)
            entry.st_nlink = 1
            entry.st_size = os.fstat(self._fd).st_size
        return entry

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Set the size; ignore the rest."""
        if fields.update_size:
            os.ftruncate(self._fd, attr.st_size)
        return await self.getattr(inode, ctx)

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find the volume."""
        if name != VOLUME_NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(VOLUME_INODE, ctx)

    async def open(self, inode: pyfuse3.InodeT, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open the volume."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1), keep_cache=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Read."""
        return os.pread(self._fd, size, off)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Write."""
        return os.pwrite(self._fd, buf, off)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Flush, in a thread: others go on meanwhile."""
        await trio.to_thread.run_sync(os.fdatasync, self._fd)

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """Answer ``close``."""

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Forget the handle."""

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Describe the filesystem of the image."""
        host, facts = os.fstatvfs(self._fd), pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(facts, name, getattr(host, name))
        facts.f_namemax = 255
        return facts


async def serve() -> None:
    """Serve until unmounted or told to end."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_end_on_signal)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


async def _end_on_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as received:
        async for _ in received:
            pyfuse3.terminate()


def main() -> None:
    image, mountpoint = sys.argv[1:3]
    options = set(pyfuse3.default_options) | {"fsname=floor", "subtype=floor"}
    pyfuse3.init(PassThrough(image), mountpoint, options)
    try:
        trio.run(serve)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
