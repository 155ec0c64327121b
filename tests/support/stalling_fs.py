"""A filesystem below a daemon that stops answering when a test says so, and goes on when it says that: a child process.

usage: python -m tests.support.stalling_fs DIRECTORY MOUNTPOINT SWITCH

The files of DIRECTORY appear at MOUNTPOINT, not cached by the kernel.  SWITCH is memory that a test shares.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import trio

from tests.support.recording_fs import Operations, serve, served

import pyfuse3  # isort: skip - after the extension, which stands between it and libfuse

NOTHING, WRITES, EVERYTHING = range(3)
_LOOK_EVERY_S: Final = 0.005
_TASKS: Final = 64


class Switch(ctypes.Structure):
    """What both processes see."""

    _fields_ = (("stalls", ctypes.c_int32), ("held", ctypes.c_uint32))

    @classmethod
    def at(cls, path: Path) -> "Switch":
        """Share the one in a file."""
        with open(path, "r+b") as stream:
            stream.truncate(max(os.fstat(stream.fileno()).st_size, ctypes.sizeof(cls)))
            return cls.from_buffer(mmap.mmap(stream.fileno(), ctypes.sizeof(cls)))


class _Unrecorded:
    def add(self, *_: Any, **__: Any) -> None:
        return


class Stalling(Operations):
    """Holds what the switch says; ``held`` operations wait."""

    def __init__(self, root: Path, switch: Switch) -> None:
        super().__init__(root, _Unrecorded())
        self._switch = switch

    async def _pass(self, least: int) -> None:
        if self._switch.stalls < least:
            return
        self._switch.held += 1
        while self._switch.stalls >= least:
            await trio.sleep(_LOOK_EVERY_S)
        self._switch.held -= 1

    def _open(self, path: Path, flags: int, mode: int = 0o600) -> pyfuse3.FileInfo:
        opened = super()._open(path, flags, mode)
        opened.direct_io = True
        return opened

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        data = bytes(buf)
        await self._pass(WRITES)
        return await super().write(fh, off, data)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self._pass(EVERYTHING)
        return await super().read(fh, off, size)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._pass(EVERYTHING)
        await super().fsync(fh, datasync)

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        await self._pass(EVERYTHING)
        return await super().getattr(inode, ctx)

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        await self._pass(EVERYTHING)
        return await super().lookup(parent_inode, name, ctx)

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        await self._pass(EVERYTHING)
        return await super().statfs(ctx)

    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        await self._pass(EVERYTHING)
        await super().fallocate(fh, mode, offset, length)


@contextmanager
def stalling(directory: Path, mountpoint: Path, path: Path) -> Iterator[Switch]:
    """Have the directory's files at the mount point, and the switch, which lies at ``path``."""
    path.touch()
    switch = Switch.at(path)
    with served(__spec__.name, directory, mountpoint, path):
        try:
            yield switch
        finally:
            switch.stalls = NOTHING  # a process that hangs could not even be killed


if __name__ == "__main__":
    serve(Stalling(Path(sys.argv[1]), Switch.at(Path(sys.argv[3]))), sys.argv[2], tasks=_TASKS)
