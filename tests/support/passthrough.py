"""A child process that mounts the regular files of one directory through pyfuse3 and the extension.

usage: python -m tests.support.passthrough DIRECTORY MOUNTPOINT [MODE]

Each of the three operations is printed as a JSON line ``[operation, arguments]`` when it arrives. The
name of a file chooses what its handler does (see ``Handlers._arrived``). MODE replaces the handlers:

    normal   pass the operation on to the file below
    late     pyfuse3 is imported before incfs, so the extension cannot get between
    idle     the extension is in place, but no handlers are started
    broken   dispatch itself raises
    drop     dispatch forgets the request
    keep     dispatch keeps the request, and replies only after the session has ended

SIGTERM ends the session loop without unmounting first, as a stopping daemon would.
"""

import sys

if sys.argv[3:] == ["late"]:
    import pyfuse3

import ctypes
import errno
import functools
import json
import logging
import os
import signal
from typing import Any

import trio

from incfs import _fusext, fusext

if sys.argv[3:] != ["late"]:
    import pyfuse3

LIMITS = fusext.Limits(max_background=77, congestion_threshold=55, max_readahead_bytes=65536)
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def say(*what: Any) -> None:
    print(json.dumps(what), flush=True)


class Operations(pyfuse3.Operations):
    """Inode numbers 2, 3, ... stand for the sorted names of the directory; a file handle is a descriptor."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.paths = [os.path.join(directory, name) for name in sorted(os.listdir(directory))]

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        found = os.stat(os.path.dirname(self.paths[0]) if inode == pyfuse3.ROOT_INODE else self.paths[inode - 2])
        entry.st_mode, entry.st_nlink, entry.st_size = found.st_mode, found.st_nlink, found.st_size
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        for index, path in enumerate(self.paths):
            if os.path.basename(path) == os.fsdecode(name):
                return await self.getattr(index + 2)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=os.open(self.paths[inode - 2], flags & os.O_ACCMODE))

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(fh, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return os.pwrite(fh, buf, off)


class Handlers:
    async def _arrived(self, fh: int, *operation: Any) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fh}"))
        say(*operation)
        if name == "refuses":
            raise pyfuse3.FUSEError(errno.EPERM)
        if name == "raises":
            raise ValueError("a bug in a handler")
        if name == "hangs":
            await trio.sleep_forever()

    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        await self._arrived(fh, "lseek", offset, whence)
        try:
            return os.lseek(fh, offset, whence)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        await self._arrived(fh, "fallocate", mode, offset, length)
        if libc.fallocate(fh, mode, offset, length) != 0:
            raise pyfuse3.FUSEError(ctypes.get_errno())

    async def copy_file_range(
        self, fh_in: int, offset_in: int, fh_out: int, offset_out: int, length: int, flags: int
    ) -> int:
        await self._arrived(fh_in, "copy_file_range", offset_in, offset_out, length, flags)
        return os.copy_file_range(fh_in, fh_out, length, offset_in, offset_out)


kept: list[_fusext.Request] = []


def broken(operation: str, request: _fusext.Request, *arguments: int) -> None:
    raise RuntimeError("a bug in dispatch")


def drop(operation: str, request: _fusext.Request, *arguments: int) -> None:
    say(operation, request.uid, request.gid, request.pid)


def keep(operation: str, request: _fusext.Request, *arguments: int) -> None:
    kept.append(request)
    say("kept", request.pending)


async def stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            pyfuse3.terminate()
            scope.cancel()


async def serve(mode: str) -> None:
    async with trio.open_nursery() as nursery:
        if mode in ("normal", "late"):
            say("started", fusext.start(nursery, Handlers()))
        elif mode != "idle":
            _fusext.start({"broken": broken, "drop": drop, "keep": keep}[mode])
        nursery.start_soon(stop_on_signal, nursery.cancel_scope)
        say("ready")
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def reply_late() -> None:
    """Reply after the session has ended, and then once more."""
    for request in kept:
        request.reply_lseek(0)
        try:
            request.reply_lseek(0)
        except RuntimeError as error:
            say("late reply", request.pending, str(error))


def main(directory: str, mountpoint: str, mode: str = "normal") -> None:
    logging.basicConfig(format="%(levelname)s %(message)s")
    say("installed", fusext.install(LIMITS))
    options = {*pyfuse3.default_options, "fsname=incfs-passthrough"}
    pyfuse3.init(Operations(directory), mountpoint, options)
    try:
        trio.run(functools.partial(serve, mode))
        say("negotiated", fusext.negotiated())
    finally:
        if mode != "keep":  # there, destroying the session has to see to it
            fusext.stop()
        pyfuse3.close()
    reply_late()


if __name__ == "__main__":
    main(*sys.argv[1:])
