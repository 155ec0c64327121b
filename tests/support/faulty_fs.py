"""A filesystem below a daemon of which one operation fails, is short, or hangs: a child process.

usage: python -m tests.support.faulty_fs DIRECTORY MOUNTPOINT SWITCH

The files of DIRECTORY appear at MOUNTPOINT.  Whatever a process does there with images, journal and tables - in C too -
is counted, by file and kind, and the operation that SWITCH names fails.  SWITCH is memory that a test shares.

Images and journal are not cached by the kernel: every read of them arrives here.
"""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from tests.support.media import SECTOR
from tests.support.recording_fs import Operations, serve, served

import pyfuse3  # isort: skip - after the extension, which stands between it and libfuse

FILES: Final = ("image", "leg", "journal", "tables")
LEG_NAME: Final = "leg.img"
"""Of the second leg of a mirror."""
ACTIONS: Final = ("read", "write", "sync", "allocate", "punch")
KINDS: Final = tuple((file, action) for file in FILES for action in ACTIONS)
WAYS: Final = ("fails", "short", "hangs")
_LOOK_EVERY_S = 0.002


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to which operation."""

    file: str
    action: str
    number: int
    """From 0, among the operations of that kind on such a file."""
    way: str = "fails"
    """``fails``; ``short``: half is done and said so; ``hangs`` until released, then it is done."""
    host_errno: int = 0
    lasts: bool = False
    """Every later one of that kind, too."""
    partly: bool = False
    """Half of a write is done before it fails."""

    def __str__(self) -> str:
        what = errno.errorcode[self.host_errno] if self.way == "fails" else self.way
        how = "-half-done" * self.partly + "-and-all-later" * self.lasts
        return f"{self.file}-{self.action}-{self.number}-{what}{how}"


class Switch(ctypes.Structure):
    """What both processes see."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("number", ctypes.c_uint32),
        ("way", ctypes.c_int32),
        ("host_errno", ctypes.c_int32),
        ("lasts", ctypes.c_bool),
        ("partly", ctypes.c_bool),
        ("is_released", ctypes.c_bool),
        ("met", ctypes.c_uint32),
        ("counts", ctypes.c_uint32 * len(KINDS)),
    )

    @classmethod
    def at(cls, path: Path) -> "Switch":
        """Share the one in a file."""
        with open(path, "r+b") as stream:
            stream.truncate(max(os.fstat(stream.fileno()).st_size, ctypes.sizeof(cls)))
            return cls.from_buffer(mmap.mmap(stream.fileno(), ctypes.sizeof(cls)))

    def arm(self, fault: Fault | None) -> None:
        """Count from now on, and let the fault happen; nothing any more without one."""
        self.kind = -1
        self.counts[:] = [0] * len(KINDS)
        self.met, self.is_released = 0, False
        if fault is not None:
            self.number, self.host_errno = fault.number, fault.host_errno
            self.way = WAYS.index(fault.way)
            self.lasts, self.partly = fault.lasts, fault.partly
            self.kind = KINDS.index((fault.file, fault.action))

    def heal(self) -> None:
        """The cause is gone: nothing fails any more, what hangs goes on; ``met`` stays."""
        self.kind = -1
        self.is_released = True

    def hits(self, kind: int) -> bool:
        """Count an operation; tell whether it is one to which something happens."""
        number = self.counts[kind]
        self.counts[kind] += 1
        is_hit = kind == self.kind and (number >= self.number if self.lasts else number == self.number)
        self.met += is_hit
        return bool(is_hit)


def _file_of(name: str) -> str:
    """Tell what kind of file of a pool it is; empty for others."""
    name = Path(name).name
    if name.endswith(".img"):
        return "leg" if name == LEG_NAME else "image"
    return {"journal": "journal", "tables.mdb": "tables"}.get(name.removesuffix(".0").removesuffix(".1"), "")


def _half(length: int) -> int:
    """Halve a length, in whole sectors if there are several."""
    return max(1, length // 2) if length <= SECTOR else max(SECTOR, length // 2 // SECTOR * SECTOR)


class _Unrecorded:
    def add(self, *_: Any, **__: Any) -> None:
        return


class Faulty(Operations):
    """Does to one operation what the switch says."""

    def __init__(self, root: Path, switch: Switch) -> None:
        super().__init__(root, _Unrecorded())
        self._switch = switch

    def _open(self, path: Path, flags: int, mode: int = 0o600) -> pyfuse3.FileInfo:
        opened = super()._open(path, flags, mode)
        opened.direct_io = _file_of(path.name) in ("image", "leg", "journal")
        return opened

    async def _meet(self, fh: int, action: str) -> str:
        """Give what happens to an operation: nothing, half of it is done, or half of it and then it fails."""
        file = _file_of(self._names[fh])
        switch = self._switch
        if not file or not switch.hits(KINDS.index((file, action))):
            return ""
        if WAYS[switch.way] == "short":
            return "short"
        if WAYS[switch.way] == "hangs":
            while not switch.is_released:
                await trio.sleep(_LOOK_EVERY_S)
            return ""
        if switch.partly:
            return "partly"
        raise pyfuse3.FUSEError(switch.host_errno)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        met = await self._meet(fh, "read")
        return await super().read(fh, off, _half(size) if met else size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        met = await self._meet(fh, "write")
        written = await super().write(fh, off, bytes(buf)[: _half(len(buf))] if met else buf)
        if met == "partly":
            raise pyfuse3.FUSEError(self._switch.host_errno)
        return written

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._meet(fh, "sync")
        await super().fsync(fh, datasync)

    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        await self._meet(fh, "punch" if mode & 2 else "allocate")
        await super().fallocate(fh, mode, offset, length)


@contextmanager
def faulty(directory: Path, mountpoint: Path, path: Path) -> Iterator[Switch]:
    """Have the directory's files at the mount point, and the switch, which lies at ``path``."""
    path.touch()
    switch = Switch.at(path)
    switch.arm(None)
    with served(__spec__.name, directory, mountpoint, path):
        try:
            yield switch
        finally:
            switch.heal()  # a process that hangs could not even be killed


if __name__ == "__main__":
    serve(Faulty(Path(sys.argv[1]), Switch.at(Path(sys.argv[3]))), sys.argv[2], tasks=8)
