"""The admin socket: where it is, how messages on it are framed, and how an error travels.

A frame is a little-endian 32-bit length and a msgpack map.  A request is ``{version, verb,
arguments}``.  The replies to it are any number of ``{progress: {done, total, unit}}``, then one
``{result: ...}`` or ``{error: {code, message, facts, exit_code}}``.  Bulk data goes between them, as any
number of ``{data: bytes}`` in either direction; the client's ends with an empty one.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack
import trio

from incfs.errors import DaemonError, IncfsError

SOCKET_NAME: Final = "control.sock"
MAX_SOCKET_PATH_BYTES: Final = 107
"""Of ``sun_path`` in unix(7), without its final NUL."""
PROTOCOL_VERSION: Final = 1
MAX_REQUEST_BYTES: Final = 1 << 20
MAX_REPLY_BYTES: Final = 256 << 20
_LENGTH: Final = struct.Struct("<I")
_PEER: Final = struct.Struct("3i")
_TORN: Final = "the peer closed the admin socket in the middle of a message"

Document = dict[str, Any]


@contextlib.contextmanager
def short_path(directory: Path) -> Iterator[str]:
    """Yield a path of the socket that fits an address, through /proc when it is too long."""
    path = str(directory / SOCKET_NAME)
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        yield path
        return
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"
    finally:
        os.close(descriptor)


def spare_address(directory: Path) -> str:
    """Give the address without a file, where the socket is while the directory's disk has no room for its name.

    Anybody may listen there who is first, so it is for the client to look who does.
    """
    found = os.stat(directory)
    return f"\0incfs-{found.st_dev:x}-{found.st_ino:x}"


class Peer(NamedTuple):
    """``struct ucred``: who is at the other end."""

    pid: int
    uid: int
    gid: int


def peer_of(connected: socket.socket | trio.socket.SocketType) -> Peer:
    """Tell who connected, or listens, as the kernel knows it."""
    return Peer._make(_PEER.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)))


def encode_frame(message: Document, *, limit_bytes: int) -> bytes:
    """Frame one message.

    Raises:
        DaemonError: It is longer than ``limit_bytes``.
    """
    body: bytes = msgpack.packb(message)
    if len(body) > limit_bytes:
        raise DaemonError(f"a message of {len(body)} bytes is too long (limit {limit_bytes})")
    return _LENGTH.pack(len(body)) + body


async def receive_frame(stream: trio.abc.ReceiveStream, *, limit_bytes: int) -> Document | None:
    """Return the next message, or None when the peer closed the connection between frames.

    Raises:
        DaemonError: The frame is too long, or no msgpack map with text keys.
        trio.BrokenResourceError: The connection broke, or the peer closed it within the frame.
    """
    head = await _receive_bytes(stream, _LENGTH.size)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise trio.BrokenResourceError(_TORN)
    (length,) = _LENGTH.unpack(head)
    if length > limit_bytes:
        raise DaemonError(f"a message of {length} bytes is too long (limit {limit_bytes})")
    body = await _receive_bytes(stream, length)
    if len(body) < length:
        raise trio.BrokenResourceError(_TORN)
    try:
        message = msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:  # TypeError: a key that cannot be one
        raise DaemonError("a message on the admin socket is not msgpack") from error
    if not isinstance(message, dict):
        raise DaemonError("a message on the admin socket is not a map")
    return message


def data_of(message: Document | None) -> bytes:
    """Take the bytes out of a data message; none when the peer has gone.

    Raises:
        DaemonError: It is another message.
    """
    if message is None:
        return b""
    data = message.get("data")
    if not isinstance(data, bytes):
        raise DaemonError("a message on the admin socket holds no data where data should follow")
    return data


async def _receive_bytes(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    """Return ``count`` bytes, or fewer when the peer closed the connection before the last."""
    received = bytearray()
    while len(received) < count:
        chunk = await stream.receive_some(min(count - len(received), 1 << 16))
        if not chunk:
            break
        received += chunk
    return bytes(received)


def error_document(error: IncfsError) -> Document:
    """Return an error as it travels."""
    facts = {key: value if _is_plain(value) else str(value) for key, value in error.facts.items()}
    return {
        "code": error.code,
        "message": error.message,
        "facts": facts,
        "exit_code": error.exit_code,
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def rebuild_error(document: Document) -> IncfsError:
    """Return the error that ``error_document`` described.

    A code that this version does not know keeps its message and exit code.
    """
    code, message = str(document.get("code")), str(document.get("message"))
    known = _classes_by_code().get(code)
    if known is None:
        exit_code = document.get("exit_code")
        attributes = {"code": code, "exit_code": exit_code if isinstance(exit_code, int) else 1}
        known = type("UnknownDaemonError", (DaemonError,), attributes)
    facts = document.get("facts")
    error = known(message)
    # Not as keyword arguments: a fact could have any name.
    error.facts = facts if isinstance(facts, dict) else {}
    return error


def _classes_by_code() -> dict[str, type[IncfsError]]:
    found: dict[str, type[IncfsError]] = {}
    waiting: list[type[IncfsError]] = [IncfsError]
    while waiting:
        cls = waiting.pop()
        found.setdefault(cls.code, cls)
        waiting += cls.__subclasses__()
    return found
