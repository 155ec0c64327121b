"""The daemon's end of the admin socket; ``client`` has the other one.

Owns ``POOL/control.sock``, which is without a name where a full disk has no room for that; ``protocol`` owns what is
said on it.  Requests may follow each other on one connection, each after the result of the one before.

1. Nothing a client sends, or stops sending, ends the server or another client's request.
2. Only root and the daemon's own user are served.
3. A request that changes something is carried out whole even when its client has gone.
"""

import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from incfs.admin import VERBS, run_verb
from incfs.channel import Channel, Progress
from incfs.documents import Document
from incfs.errors import NO_ROOM, DaemonError, IncfsError, PermissionRefused, UsageError
from incfs.protocol import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    PROTOCOL_VERSION,
    SOCKET_NAME,
    data_of,
    encode_frame,
    error_document,
    peer_of,
    receive_frame,
    short_path,
    spare_address,
)

if TYPE_CHECKING:
    from incfs.service import Service

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S: Final = 0.2


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
            try:
                path.unlink(missing_ok=True)
                with short_path(directory) as short:
                    listening.bind(short)
                path.chmod(stat.S_IRUSR | stat.S_IWUSR)
            except OSError as error:
                if error.errno not in (*NO_ROOM, errno.EROFS):
                    raise
                level = logging.INFO if error.errno == errno.EROFS else logging.WARNING
                logger.log(level, "%s: the admin socket %s is without a name", error.strerror, path)
                listening.bind(spare_address(directory))
            listening.listen(64)
        except OSError as error:
            raise DaemonError(f"cannot make the admin socket {path}: {error.strerror}") from error
        try:
            yield listening
        finally:
            with contextlib.suppress(OSError):  # its disk may be lost; the next daemon takes it away
                path.unlink(missing_ok=True)


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
    uid = peer_of(stream.socket).uid
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
