"""The admin socket: how a command reaches the daemon that has the pool open.

Owns ``POOL/control.sock``; ``protocol`` owns what is said on it.  Requests may follow each other
on one connection, each after the result of the one before.

1. Nothing a client sends, or stops sending, ends the server or another client's request.
2. Only root and the daemon's own user are served.
3. A request that changes something is carried out whole even when its client has gone.
"""

import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from incfs.admin import VERBS, run_verb
from incfs.admin.verb import NO_CHANNEL, Channel, Progress
from incfs.backing import Backing
from incfs.documents import Document
from incfs.errors import DaemonError, IncfsError, PermissionRefused, UsageError
from incfs.gather import other_directories
from incfs.protocol import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    PROTOCOL_VERSION,
    data_of,
    encode_frame,
    error_document,
    rebuild_error,
    receive_frame,
)

if TYPE_CHECKING:
    from incfs.service import Service

logger = logging.getLogger(__name__)

SOCKET_NAME: Final = "control.sock"
MAX_SOCKET_PATH_BYTES: Final = 107
"""Of ``sun_path`` in unix(7), without its final NUL."""
PROGRESS_EVERY_S: Final = 0.2
CONNECT_TIMEOUT_S: Final = 10
_TIMEVAL: Final = struct.Struct("ll")
_PEER: Final = struct.Struct("3i")
"""pid, uid and gid of ``struct ucred``."""


# ----------------------------------------------------------------------------------- server


async def serve_control(
    service: "Service",
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer admin requests on the pool's socket until cancelled; started once it listens.

    The caller holds the pool's lock, so a socket file that is there already is a dead one.

    Raises:
        DaemonError: The socket cannot be made.
    """
    with _listening_socket(service.directory) as listening:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))

        async def serve_one(stream: trio.SocketStream) -> None:
            await _serve_client(service, stream)

        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, serve_one, [listener])
            task_status.started()


@contextlib.contextmanager
def _listening_socket(directory: Path) -> Iterator[socket.socket]:
    """Make the socket, mode 0600 before anybody can connect; unlink it at the end."""
    path = directory / SOCKET_NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        try:
            path.unlink(missing_ok=True)
            with _short_path(directory) as short:
                listening.bind(short)
            path.chmod(stat.S_IRUSR | stat.S_IWUSR)
            listening.listen(64)
        except OSError as error:
            raise DaemonError(f"cannot make the admin socket {path}: {error.strerror}") from error
        try:
            yield listening
        finally:
            with contextlib.suppress(OSError):  # its disk may be lost; the next daemon takes it away
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _short_path(directory: Path) -> Iterator[str]:
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


async def _serve_client(service: "Service", stream: trio.SocketStream) -> None:
    """Answer one client until it goes; only cancellation leaves this function early."""
    try:
        async with stream:
            try:
                _check_peer(stream)
                while True:
                    request = await receive_frame(stream, limit_bytes=MAX_REQUEST_BYTES)
                    if request is None:
                        return
                    if "data" in request:
                        continue  # was on its way to a request that has failed
                    await _answer(service, stream, request)
            except DaemonError as error:
                logger.warning("admin client refused: %s", error)
                await stream.send_all(_error_frame(error))
    except (trio.BrokenResourceError, OSError):
        logger.debug("an admin client went away")
    except Exception:
        logger.exception("an admin client was dropped because of an unexpected error")


def _check_peer(stream: trio.SocketStream) -> None:
    raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, uid, _ = _PEER.unpack(raw)
    if uid not in (0, os.geteuid()):
        raise PermissionRefused(f"user {uid} may not administer this pool", uid=uid)


async def _answer(service: "Service", stream: trio.SocketStream, request: Document) -> None:
    """Carry out one request and send its replies."""
    newest = _NewestProgress()
    finished = trio.Event()
    working = trio.CancelScope()
    watching = trio.CancelScope()
    sending = trio.Lock()
    channel = _data_channel(stream, sending)
    verb = VERBS.get(str(request.get("verb")))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_send_progress, stream, sending, newest, finished)
        if verb is not None and (verb.is_read_only or verb.can_stop):
            nursery.start_soon(_cancel_on_hangup, stream, working, watching)
        reply = b""
        with working:
            reply = await _carry_out(service, request, newest.set, channel)
        finished.set()
        watching.cancel()
    if reply:
        await stream.send_all(reply)


def _data_channel(stream: trio.SocketStream, sending: trio.Lock) -> Channel:
    """Carry bulk data as messages of their own, between the request and its result."""

    async def put(data: bytes) -> None:
        try:
            async with sending:
                await stream.send_all(encode_frame({"data": data}, limit_bytes=MAX_REPLY_BYTES))
        except trio.BrokenResourceError as error:
            raise DaemonError("the client went away while it was sent data") from error

    async def take() -> bytes:
        try:
            return data_of(await receive_frame(stream, limit_bytes=MAX_REQUEST_BYTES))
        except trio.BrokenResourceError:
            return b""  # as where it goes between two messages

    return Channel(put, take)


async def _carry_out(service: "Service", request: Document, progress: Progress, channel: Channel) -> bytes:
    """Run the request's verb and return the frame of its result or error."""
    verb = request.get("verb")
    arguments = request.get("arguments")
    try:
        if request.get("version") != PROTOCOL_VERSION:
            raise UsageError("the command and the daemon are of different versions; remount")
        if not isinstance(verb, str) or not isinstance(arguments, dict):
            raise UsageError("the request names no verb or has no arguments")
        result = await run_verb(service, verb, arguments, progress, channel)
        return encode_frame({"result": result}, limit_bytes=MAX_REPLY_BYTES)
    except IncfsError as error:
        return _error_frame(error)
    except Exception as error:
        # A bug in one verb must not take the mount down: say so, log it, live on.
        logger.exception("admin request %s failed unexpectedly", verb)
        return _error_frame(IncfsError(f"internal error ({error!r}); see the daemon's log"))


def _error_frame(error: IncfsError) -> bytes:
    return encode_frame({"error": error_document(error)}, limit_bytes=MAX_REPLY_BYTES)


class _NewestProgress:
    """The last progress told, from whatever thread; intermediate values are not sent."""

    def __init__(self) -> None:
        self.value: Document | None = None

    def set(self, done: int, total: int, unit: str) -> None:
        self.value = {"done": done, "total": total, "unit": unit}


async def _send_progress(
    stream: trio.SocketStream, sending: trio.Lock, newest: _NewestProgress, finished: trio.Event
) -> None:
    """Send progress now and then; ends only between frames, never inside one."""
    sent = None
    while not finished.is_set():
        with trio.move_on_after(PROGRESS_EVERY_S):
            await finished.wait()
        if newest.value is not None and newest.value is not sent:
            sent = newest.value
            try:
                async with sending:
                    await stream.send_all(encode_frame({"progress": sent}, limit_bytes=MAX_REPLY_BYTES))
            except trio.BrokenResourceError:
                return


async def _cancel_on_hangup(stream: trio.SocketStream, working: trio.CancelScope, watching: trio.CancelScope) -> None:
    """Cancel ``working`` when the client closes its end while it should be waiting."""
    with watching:
        try:
            peeked = await stream.socket.recv(1, socket.MSG_PEEK)
        except OSError:
            peeked = b""
        if not peeked:
            working.cancel()


# ----------------------------------------------------------------------------------- client


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
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
        # While the daemon is slow to accept, the kernel waits this long before EAGAIN.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(CONNECT_TIMEOUT_S, 0))
        if not await trio.to_thread.run_sync(_connect_any, connected, directory):
            yield None
            return
        connected.setblocking(False)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(connected)) as stream:
            yield ControlClient(stream, progress)


def _connect_any(unconnected: socket.socket, directory: Path) -> bool:
    """Connect where the pool was opened: in this directory, or in another that holds its metadata."""
    if _connect(unconnected, directory):
        return True
    return any(_connect(unconnected, other) for other in other_directories(Backing(), directory))


def _connect(unconnected: socket.socket, directory: Path) -> bool:
    try:
        with _short_path(directory) as path:
            unconnected.connect(path)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return False
    except PermissionError as error:
        raise PermissionRefused(f"you may not administer the pool in {directory}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DaemonError(f"the daemon of {directory} does not answer: {reason}") from error
    return True
