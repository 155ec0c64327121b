"""A filesystem below a daemon that writes down what is done to its files: a child process.

usage: python -m tests.support.recording_fs DIRECTORY MOUNTPOINT RECORD

The files of DIRECTORY appear at MOUNTPOINT.  Whatever changes one is written to RECORD in the order in which it was
answered, before it is answered: writes with their data, changes of length, holes, flushes, names.  The first 8 bytes of
RECORD count the events, so that a test can tell which of them came before something that it saw.

The kernel caches reads only, as LMDB's mapping needs; each write of a process arrives here before its call returns.
"""

import errno
import mmap
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgpack
import trio

from incfs import fusext

import pyfuse3  # isort: skip - after the extension, which stands between it and libfuse

from tests.mount.test_fusext import KEEP_SIZE, PUNCH_HOLE, libc
from tests.support.cli import environment
from tests.support.media import Event

_COUNT = struct.Struct("<Q")


class Notes(Protocol):
    """What becomes of events."""

    def add(self, kind: str, name: str, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        """Take one."""


class _Recorder:
    """Appends events, and counts them where another process can see it."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "w+b", buffering=0)  # noqa: SIM115 - for the life of the process
        self._stream.write(_COUNT.pack(0))
        self._shared = mmap.mmap(self._stream.fileno(), _COUNT.size)
        self._count = 0

    def add(self, kind: str, name: str, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        self._stream.write(msgpack.packb([kind, name, offset, length, data]))
        self._count += 1
        self._shared[:] = _COUNT.pack(self._count)


class Record:
    """A record, as another process reads it.

    Args:
        path: The record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with open(path, "rb") as stream:
            self._shared = mmap.mmap(stream.fileno(), _COUNT.size, prot=mmap.PROT_READ)

    @property
    def count(self) -> int:
        """How many events there are by now."""
        return int(_COUNT.unpack(self._shared[:])[0])

    def events(self) -> Iterator[Event]:
        """Yield them."""
        with open(self._path, "rb") as stream:
            stream.seek(_COUNT.size)
            for kind, name, offset, length, data in msgpack.Unpacker(stream, max_buffer_size=0):
                yield Event(kind, name, offset, length, data, data.decode() if kind == "replace" else None)


class Operations(pyfuse3.Operations):
    """Passes everything on to a directory, one request at a time."""

    supports_dot_lookup = True

    def __init__(self, root: Path, recorder: Notes) -> None:
        super().__init__()
        self._root, self._recorder = root, recorder
        self._paths: dict[int, Path] = {pyfuse3.ROOT_INODE: root}
        self._names: dict[int, str] = {}
        self._flushes: set[int] = set()
        """Handles whose writes are flushed each (O_DSYNC)."""
        self._listings: dict[int, list[str]] = {}

    def _attributes(self, path: Path) -> pyfuse3.EntryAttributes:
        try:
            found = os.lstat(path)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        entry = pyfuse3.EntryAttributes()
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(found, name))
        entry.st_atime_ns = found.st_atime_ns
        entry.st_blksize = 4096
        entry.st_ino = pyfuse3.ROOT_INODE if path == self._root else found.st_ino
        entry.attr_timeout = entry.entry_timeout = 0
        self._paths[entry.st_ino] = path
        return entry

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self._root))

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        return self._attributes(self._paths[inode])

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        return self._attributes(self._paths[parent_inode] / os.fsdecode(name))

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> pyfuse3.EntryAttributes:
        path = self._paths[inode]
        if fields.update_size:
            os.truncate(path, attr.st_size)
            self._recorder.add("truncate", self._relative(path), length=attr.st_size)
        if fields.update_mode:
            os.chmod(path, stat.S_IMODE(attr.st_mode))
        return self._attributes(path)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        path = self._paths[parent_inode] / os.fsdecode(name)
        path.mkdir(mode=mode)
        return self._attributes(path)

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> pyfuse3.EntryAttributes:
        path = self._paths[parent_inode] / os.fsdecode(name)
        os.mknod(path, mode)  # the admin socket
        return self._attributes(path)

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        path = self._paths[parent_inode] / os.fsdecode(name)
        return self._open(path, flags | os.O_CREAT, mode), self._attributes(path)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return self._open(self._paths[inode], flags)

    def _open(self, path: Path, flags: int, mode: int = 0o600) -> pyfuse3.FileInfo:
        if not path.exists() or flags & os.O_TRUNC:
            self._recorder.add("truncate", self._relative(path))
        kept = flags & (os.O_CREAT | os.O_EXCL | os.O_TRUNC)
        try:
            fh = os.open(path, kept | os.O_RDWR, mode)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        self._names[fh] = self._relative(path)
        if flags & os.O_DSYNC:
            self._flushes.add(fh)
        return pyfuse3.FileInfo(fh=fh)

    async def release(self, fh: int) -> None:
        self._names.pop(fh)
        self._flushes.discard(fh)
        os.close(fh)

    async def flush(self, fh: int) -> None:
        pass

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(fh, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        data = bytes(buf)
        os.pwrite(fh, data, off)
        self._recorder.add("flushed-write" if fh in self._flushes else "write", self._names[fh], off, len(data), data)
        return len(data)

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._recorder.add("sync", self._names[fh])

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass

    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        before = os.fstat(fh).st_size
        if libc.fallocate(fh, mode, offset, length):
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        after = os.fstat(fh).st_size
        if mode == PUNCH_HOLE | KEEP_SIZE:
            self._recorder.add("punch", self._names[fh], offset, length)
        elif after != before:
            self._recorder.add("truncate", self._names[fh], length=after)

    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def copy_file_range(self, *arguments: int) -> int:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def rename(self, old_parent: int, old: bytes, new_parent: int, new: bytes, flags: int, ctx: Any) -> None:
        source, target = (self._paths[p] / os.fsdecode(n) for p, n in ((old_parent, old), (new_parent, new)))
        source.rename(target)
        self._recorder.add("replace", self._relative(source), data=self._relative(target).encode())
        self._moved(source, target)

    def _moved(self, source: Path, target: Path) -> None:
        for inode, path in self._paths.items():
            if path == source:
                self._paths[inode] = target
        for fh, name in self._names.items():
            if name == self._relative(source):
                self._names[fh] = self._relative(target)

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        path = self._paths[parent_inode] / os.fsdecode(name)
        path.unlink()
        self._recorder.add("remove", self._relative(path))

    async def opendir(self, inode: int, ctx: Any) -> int:
        self._listings[inode] = sorted(os.listdir(self._paths[inode]))
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        for number, name in list(enumerate(self._listings[fh], 1))[start_id:]:
            if not pyfuse3.readdir_reply(token, name.encode(), self._attributes(self._paths[fh] / name), number):
                return

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        found, data = os.statvfs(self._root), pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, name, getattr(found, name))
        data.f_namemax = 255
        return data


async def _serve(operations: Operations, tasks: int) -> None:
    async with trio.open_nursery() as nursery:
        fusext.start(nursery, operations)
        print("ready", flush=True)
        await pyfuse3.main(min_tasks=1, max_tasks=tasks)
        nursery.cancel_scope.cancel()


def serve(operations: Operations, mountpoint: str, tasks: int = 1) -> None:
    """Serve until unmounted, so many requests at a time."""
    fusext.install()
    pyfuse3.init(operations, mountpoint, {"fsname=incfs-recording", "allow_other", "default_permissions"})
    try:
        trio.run(_serve, operations, tasks)
    finally:
        fusext.stop()
        pyfuse3.close(unmount=False)


@contextmanager
def served(module: str, directory: Path, mountpoint: Path, shared: Path) -> Iterator[None]:
    """Have the directory's files at the mount point, served by a module of the tests that gets these three paths."""
    mountpoint.mkdir(exist_ok=True)
    command = [sys.executable, "-m", module, str(directory), str(mountpoint), str(shared)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n", "the filesystem does not start"
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        subprocess.run(["umount", "--lazy", mountpoint], check=True)


@contextmanager
def recording(directory: Path, mountpoint: Path, record: Path) -> Iterator[Record]:
    """Have the directory's files at the mount point, and a record of what is done to them."""
    with served(__spec__.name, directory, mountpoint, record):
        yield Record(record)


if __name__ == "__main__":
    serve(Operations(Path(sys.argv[1]), _Recorder(Path(sys.argv[3]))), sys.argv[2])
