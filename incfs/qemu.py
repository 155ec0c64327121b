"""Disk images of other formats, read and written through ``qemu-nbd``: it knows them, and a socket lies between.

Owns a process for each open image, which ends with it, and the directory of its socket.  Nothing else of the host is
opened for an image: one that lies over another file, or keeps its data in one, is refused, for who made the image
is not who asks for it.  Any thread, one at a time.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from bisect import bisect_right
from pathlib import Path
from typing import Any, Final

from incfs.backing import Backing, translate
from incfs.errors import AlreadyExists, BackingError, NotSupported
from incfs.foreign import IMAGES
from incfs.model import MAX_VOLUME_BYTES
from incfs.rawsource import join_ranges
from incfs.stream.records import Member, SnapBegin

START_S: Final = 30.0
"""How long qemu-nbd has to open an image."""
ANSWER_S: Final = 120.0
"""How long one read or write may take."""
PARTIAL_SUFFIX: Final = ".partial"
_PAUSE_S: Final = 0.02
_MAX_DESCRIPTOR_BYTES: Final = 1 << 20
_EXTENT: Final = re.compile(rb'^\s*(?:RW|RDONLY|NOACCESS)\s[^"\n]*"([^"\r\n]*)', re.MULTILINE)

# The protocol of NBD, as far as it goes here: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
_GREETING: Final = struct.Struct(">8s8sH")
_OPTION: Final = struct.Struct(">I8sII")
_EXPORT: Final = struct.Struct(">QH")
_REQUEST: Final = struct.Struct(">IHHQQI")
_REPLY: Final = struct.Struct(">IIQ")
_FLAGS: Final = 0b11  # fixed newstyle, no zeros behind the export
_EXPORT_NAME: Final = 1
_REQUEST_MAGIC: Final = 0x25609513
_REPLY_MAGIC: Final = 0x67446698
_READ, _WRITE, _DISCONNECT, _FLUSH = range(4)


class QemuSource:
    """An image that is read.

    Raises:
        NotSupported: qemu's programs are missing, or the image needs another file, or is larger than a volume can be.
        BackingError: It is no such image, or cannot be read.
    """

    def __init__(self, path: Path, image_format: str) -> None:
        self.path = path
        _require_alone(path, image_format)
        self._data = _data_ranges(path, image_format)
        self._starts = [start for start, _ in self._data]
        self._server = _Server(path, image_format, is_read_only=True)
        self.size_bytes = self._server.size_bytes
        if self.size_bytes > MAX_VOLUME_BYTES:
            self.close()
            raise NotSupported(f"{path} has {self.size_bytes} bytes, a volume can have {MAX_VOLUME_BYTES}")

    def close(self) -> None:
        """Close the image."""
        self._server.stop()

    def stamp(self) -> tuple[int, int]:
        """Give the file's size and time of modification."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise translate(error, self.path, "examine") from error
        return status.st_size, status.st_mtime_ns

    def stretch(self, start_bytes: int, end_bytes: int) -> tuple[bool, int]:
        """Say whether there is data at an offset, and up to where it is all the same."""
        place = bisect_right(self._starts, start_bytes) - 1
        if place >= 0 and start_bytes < self._data[place][1]:
            return True, min(end_bytes, self._data[place][1])
        following = self._starts[place + 1] if place + 1 < len(self._starts) else end_bytes
        return False, min(end_bytes, following)

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Read a range.

        Raises:
            BackingError: qemu-nbd could not, or has ended.
        """
        return self._server.read(offset_bytes, length_bytes)


class QemuTarget:
    """An image that is written, under a name of its own until all of it is durable.

    Raises:
        AlreadyExists: There is such a file, and ``force`` is false.
        NotSupported: qemu's programs are missing, or this is no place for an image.
    """

    is_empty = True

    def __init__(self, path: Path, image_format: str, *, force: bool) -> None:
        if path.exists() and not path.is_file():
            raise NotSupported(f"{path} is no regular file; a device takes raw images only", path=str(path))
        if path.exists() and not force:
            raise AlreadyExists(f"{path} is there already; replace it with --force", path=str(path))
        _program("qemu-nbd")
        self._path = path
        self._format = image_format
        self._scratch = path.with_name(path.name + PARTIAL_SUFFIX)
        self._server: _Server | None = None

    def begin(self, volume: Member, snapshot: SnapBegin) -> None:
        """Make the image; its size is rounded up to what the format can say.

        Raises:
            BackingError: qemu-img could not.
        """
        del volume
        with contextlib.suppress(FileNotFoundError):
            self._scratch.unlink()
        size = -(-snapshot.size_bytes // 512) * 512
        # A VHD would get the size that a disk of cylinders and heads can have.
        exact = ["-o", "force_size=on"] if self._format == "vpc" else []
        _run("qemu-img", "create", "-q", "-f", self._format, *exact, str(self._scratch), str(size))
        self._scratch.chmod(0o600)
        self._server = _Server(self._scratch, self._format, is_read_only=False)
        if self._server.size_bytes < snapshot.size_bytes:
            raise NotSupported(f"a {IMAGES[self._format]} image cannot have {snapshot.size_bytes} bytes")

    def write(self, offset_bytes: int, data: bytes) -> None:
        """Take data."""
        assert self._server is not None, "it was begun"
        self._server.write(offset_bytes, data)

    def clear(self, offset_bytes: int, length_bytes: int) -> None:
        """Do nothing: it is empty where nothing was written, and each range comes once."""

    def end(self) -> None:
        """Make all of it durable, and give it its name."""
        assert self._server is not None, "it was begun"
        self._server.flush()
        self._server.finish()
        backing = Backing()
        file = backing.open(self._scratch)
        try:
            file.sync()
        finally:
            file.close()
        backing.replace(self._scratch, self._path)
        backing.sync_directory(self._path.parent)

    def close(self) -> None:
        """Close it; what is not whole is removed."""
        if self._server is not None:
            self._server.stop()
        with contextlib.suppress(FileNotFoundError):
            self._scratch.unlink()


class _Server:
    """One qemu-nbd, which ends when its only client goes."""

    def __init__(self, path: Path, image_format: str, *, is_read_only: bool) -> None:
        self._path = path
        self._directory = tempfile.TemporaryDirectory(prefix="incfs-nbd-")
        self._said = Path(self._directory.name) / "said"
        place = Path(self._directory.name) / "socket"
        flags = ["--read-only"] if is_read_only else []
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [_program("qemu-nbd"), *flags, f"--format={image_format}", f"--socket={place}", str(path)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
            )  # fmt: skip
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(place)
            self.size_bytes = self._shake_hands()
        except BaseException:
            self.stop()
            raise

    def _connect(self, place: Path) -> None:
        deadline = time.monotonic() + START_S
        self._socket.settimeout(ANSWER_S)
        while True:
            try:
                return self._socket.connect(str(place))
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise self._failure() from None
            time.sleep(_PAUSE_S)

    def _shake_hands(self) -> int:
        with self._watched():
            *magic, _ = _GREETING.unpack(self._receive(_GREETING.size))
            if magic != [b"NBDMAGIC", b"IHAVEOPT"]:
                raise self._failure()
            self._socket.sendall(_OPTION.pack(_FLAGS, b"IHAVEOPT", _EXPORT_NAME, 0))
            size, _ = _EXPORT.unpack(self._receive(_EXPORT.size))
        return int(size)

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        with self._watched():
            self._ask(_READ, offset_bytes, length_bytes)
            return self._receive(length_bytes)

    def write(self, offset_bytes: int, data: bytes) -> None:
        with self._watched():
            self._ask(_WRITE, offset_bytes, len(data), data)

    def flush(self) -> None:
        with self._watched():
            self._ask(_FLUSH, 0, 0)

    def _ask(self, kind: int, offset_bytes: int, length_bytes: int, data: bytes = b"") -> None:
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, kind, 0, offset_bytes, length_bytes) + data)
        magic, error, _ = _REPLY.unpack(self._receive(_REPLY.size))
        if magic != _REPLY_MAGIC:
            raise self._failure()
        if error:
            raise translate(OSError(error, os.strerror(error)), self._path, "write" if data else "read")

    def _receive(self, length_bytes: int) -> bytes:
        data = bytearray(length_bytes)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise self._failure()
            view = view[count:]
        return bytes(data)

    @contextlib.contextmanager
    def _watched(self) -> Any:
        try:
            yield
        except OSError as error:
            raise self._failure(str(error)) from error

    def _failure(self, otherwise: str = "it does not answer") -> BackingError:
        if self._process.poll() is None:
            return BackingError(f"qemu-nbd fails on {self._path}: {otherwise}", path=str(self._path))
        words = _words(self._said.read_bytes()) or f"it ended with {self._process.returncode}"
        return BackingError(f"qemu-nbd fails on {self._path}: {words}", path=str(self._path))

    def finish(self) -> None:
        """Have the image closed.

        Raises:
            BackingError: That failed.
        """
        try:
            with self._watched():
                self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))
            if self._process.wait(ANSWER_S):
                raise self._failure()
        except subprocess.TimeoutExpired as error:
            raise self._failure("it does not end") from error
        finally:
            self.stop()

    def stop(self) -> None:
        """End it, whatever it does."""
        self._socket.close()
        self._process.kill()
        self._process.wait()
        self._directory.cleanup()


def _require_alone(path: Path, image_format: str) -> None:
    """Refuse an image that would have other files opened."""
    if image_format == "vmdk":
        for name in _extent_names(path):
            if "/" in name or ":" in name or (path.parent / name).is_symlink():
                raise NotSupported(f"{path} keeps its data in {name}, which is not beside it", path=str(path))
    facts = json.loads(_run("qemu-img", "info", "--output=json", "-f", image_format, str(path)))
    below = facts.get("backing-filename")
    data = facts.get("format-specific", {}).get("data", {}).get("data-file")
    if below or data:
        how = f"lies over {below}" if below else f"keeps its data in {data}"
        here, raw = shlex.quote(str(path)), shlex.quote(str(path.with_suffix(".raw")))
        raise NotSupported(
            f"{path} {how}; if you trust who made it, `qemu-img convert -f {image_format} -O raw {here} {raw}` "
            f"makes one image of both",
            path=str(path),
        )


def _extent_names(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            head = file.read(_MAX_DESCRIPTOR_BYTES)
    except OSError as error:
        raise translate(error, path, "read") from error
    if not head.startswith(b"#"):
        return []
    return [name.decode("utf-8", "surrogateescape") for name in _EXTENT.findall(head)]


def _data_ranges(path: Path, image_format: str) -> list[tuple[int, int]]:
    """List (start, end) of what does not read as zeros for sure, ascending and joined."""
    parts = json.loads(_run("qemu-img", "map", "--output=json", "-f", image_format, str(path)))
    return join_ranges((part["start"], part["start"] + part["length"]) for part in parts if not part["zero"])


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise NotSupported(f"{name} is not installed here (package qemu-utils), and no other program reads such images")
    return found


def _run(name: str, *arguments: str) -> bytes:
    done = subprocess.run([_program(name), *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        words = _words(done.stderr)
        raise BackingError(f"{name} fails: {words or f'it ended with {done.returncode}'}")
    return done.stdout


def _words(said: bytes) -> str:
    return " ".join(said.decode("utf-8", "replace").split())
