"""A command's end of the admin socket: how it reaches the daemon that has the pool open."""

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import trio

from incfs.backing import ReadingBacking
from incfs.channel import NO_CHANNEL, Channel, Progress
from incfs.documents import Document
from incfs.errors import DaemonError, IncfsError, PermissionRefused
from incfs.protocol import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    PROTOCOL_VERSION,
    encode_frame,
    peer_of,
    rebuild_error,
    receive_frame,
    short_path,
    spare_address,
)
from incfs.roster import other_directories

CONNECT_TIMEOUT_S: Final = 10
_TIMEVAL: Final = struct.Struct("ll")


class ControlClient:
    """A connection to the daemon of one pool; use ``connect_control``."""

    def __init__(self, stream: trio.SocketStream, progress: Progress) -> None:
        self._stream = stream
        self._progress = progress

    async def call(self, verb: str, **arguments: Any) -> Document:
        """Have the daemon run a verb and return its document.

        Raises:
            IncfsError: What the verb raised.
            DaemonError: The daemon went away or broke the protocol.
        """
        await self._ask(verb, arguments)
        return await self._result(NO_CHANNEL)

    async def transfer(self, verb: str, channel: Channel, arguments: Document) -> Document:
        """Do as ``call``, for a verb that has bulk data.

        Args:
            verb: Its name.
            channel: Takes and gives the data.
            arguments: Of the verb.
        """
        await self._ask(verb, arguments)
        outcome: Document | IncfsError
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, channel)
            try:
                outcome = await self._result(channel)
            except IncfsError as error:
                outcome = error  # raised outside: a nursery would wrap it
            nursery.cancel_scope.cancel()
        if isinstance(outcome, IncfsError):
            raise outcome
        return outcome

    async def _ask(self, verb: str, arguments: Document) -> None:
        request = {"version": PROTOCOL_VERSION, "verb": verb, "arguments": arguments}
        with contextlib.suppress(trio.BrokenResourceError):
            # A daemon that refuses this user answers and closes without reading.
            await self._stream.send_all(encode_frame(request, limit_bytes=MAX_REQUEST_BYTES))

    async def _pump(self, channel: Channel) -> None:
        """Send what the channel gives; the daemon says in its result what it thinks of it."""
        data = b"first"
        with contextlib.suppress(trio.BrokenResourceError):
            while data:
                data = await channel.take()
                await self._stream.send_all(encode_frame({"data": data}, limit_bytes=MAX_REQUEST_BYTES))

    async def _result(self, channel: Channel) -> Document:
        while True:
            reply = await self._receive()
            if "result" in reply:
                result: Document = reply["result"]
                return result
            if isinstance(reply.get("error"), dict):
                raise rebuild_error(reply["error"])
            if isinstance(reply.get("data"), bytes):
                await channel.put(reply["data"])
            else:
                self._report(reply.get("progress"))

    async def _receive(self) -> Document:
        try:
            reply = await receive_frame(self._stream, limit_bytes=MAX_REPLY_BYTES)
        except trio.BrokenResourceError:
            reply = None
        if reply is None:
            raise DaemonError("the daemon went away before it answered; the request may have been carried out")
        return reply

    def _report(self, progress: object) -> None:
        match progress:
            case {"done": int(done), "total": int(total), "unit": str(unit)}:
                self._progress(done, total, unit)
            case _:
                raise DaemonError("the daemon sent a reply that this command does not know")


@contextlib.asynccontextmanager
async def connect_control(directory: Path, progress: Progress) -> AsyncIterator[ControlClient | None]:
    """Connect to the daemon of the pool in ``directory``, or in another copy of it; None when there is none.

    A socket file that a killed daemon left behind counts as none.

    Raises:
        PermissionRefused: The daemon belongs to another user.
        DaemonError: The daemon does not accept connections.
    """
    connected = await trio.to_thread.run_sync(_connect_any, directory)
    if connected is None:
        yield None
        return
    connected.setblocking(False)
    async with trio.SocketStream(trio.socket.from_stdlib_socket(connected)) as stream:
        yield ControlClient(stream, progress)


def _connect_any(directory: Path) -> socket.socket | None:
    """Connect where the pool was opened: in this directory, or in another that holds its metadata."""
    connected = connect(directory)
    others = other_directories(ReadingBacking(), directory) if connected is None else []
    return connected or next(filter(None, map(connect, others)), None)


def connect(directory: Path) -> socket.socket | None:
    """Connect to the daemon that has this directory open; None when nobody does.  Blocks for some seconds at most.

    Raises:
        PermissionRefused: It belongs to another user.
        DaemonError: It does not accept connections.
    """
    try:
        with short_path(directory) as path:
            return _connect_to(path)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return _connect_without_name(directory)
    except PermissionError as error:
        raise PermissionRefused(f"you may not administer the pool in {directory}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DaemonError(f"the daemon of {directory} does not answer: {reason}") from error


def _connect_without_name(directory: Path) -> socket.socket | None:
    """Connect where a daemon listens that found no room for its socket's name; not to anybody else there."""
    try:
        owner = os.stat(directory).st_uid
        connected = _connect_to(spare_address(directory))
    except OSError:
        return None
    if peer_of(connected).uid not in (0, os.geteuid(), owner):
        connected.close()
        return None
    return connected


def _connect_to(address: str) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # While the daemon is slow to accept, the kernel waits this long before EAGAIN.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(CONNECT_TIMEOUT_S, 0))
        connected.connect(address)
    except BaseException:
        connected.close()
        raise
    return connected
