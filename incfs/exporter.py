"""Serves the metrics over HTTP, on a unix socket or on 127.0.0.1, to whoever may reach that.

Answers ``GET /metrics`` and nothing else, one request a connection: own code, because a web
server would be a bigger risk than these lines.  Nothing a client sends, or does not send, ends
it or keeps others out.
"""

import contextlib
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from incfs.errors import BackingError, Busy

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 8192
MAX_CLIENTS: Final = 8
CLIENT_TIMEOUT_S: Final = 10.0
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


async def serve_metrics(
    address: str, render: Callable[[], str], *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled; started, with the port, once it listens.

    Args:
        address: An absolute path for a unix socket, or a port of 127.0.0.1 (0: any).
        render: Makes the text.
        task_status: Told when it listens.

    Raises:
        Busy: Somebody has that address.
        BackingError: It cannot be listened on.
    """
    limiter = trio.CapacityLimiter(MAX_CLIENTS)
    with contextlib.ExitStack() as stack:
        listener = await _listen(address, stack)

        async def answer(stream: trio.SocketStream) -> None:
            async with limiter, stream:
                with trio.move_on_after(CLIENT_TIMEOUT_S), contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(_reply(await _read_head(stream), render))

        name = listener.socket.getsockname()
        task_status.started(name[1] if isinstance(name, tuple) else 0)
        await trio.serve_listeners(answer, [listener])


async def _listen(address: str, stack: contextlib.ExitStack) -> trio.SocketListener:
    is_unix = address.startswith("/")
    made = trio.socket.socket(trio.socket.AF_UNIX if is_unix else trio.socket.AF_INET, trio.socket.SOCK_STREAM)
    stack.callback(made.close)
    try:
        if is_unix:
            _remove_stale(Path(address))
            await made.bind(address)
            os.chmod(address, 0o660)
            stack.callback(Path(address).unlink, missing_ok=True)
        else:
            made.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
            await made.bind(("127.0.0.1", int(address)))
        made.listen(MAX_CLIENTS)
    except OSError as error:
        raise BackingError(f"metrics cannot be served on {address}: {error.strerror or error}") from error
    return trio.SocketListener(made)


def _remove_stale(path: Path) -> None:
    """Take away the socket that a killed daemon left; never another kind of file."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise Busy(f"metrics cannot be served on {path}: something that is no socket is there")
        path.unlink()


async def _read_head(stream: trio.SocketStream) -> bytes:
    head = bytearray()
    while b"\r\n\r\n" not in head and len(head) < MAX_HEAD_BYTES:
        data = await stream.receive_some(MAX_HEAD_BYTES - len(head))
        if not data:
            break
        head += data
    return bytes(head)


def _reply(head: bytes, render: Callable[[], str]) -> bytes:
    words = head.partition(b"\r\n")[0].split()
    if b"\r\n\r\n" not in head or len(words) != 3 or words[0] not in {b"GET", b"HEAD"}:
        return _response("400 Bad Request", b"ask GET /metrics\n")
    if words[1].partition(b"?")[0] != b"/metrics":
        return _response("404 Not Found", b"there is only /metrics\n")
    body = render().encode()
    return _response("200 OK", body) if words[0] == b"GET" else _response("200 OK", body).removesuffix(body)


def _response(status: str, body: bytes) -> bytes:
    lines = (f"HTTP/1.1 {status}", f"Content-Type: {CONTENT_TYPE}", f"Content-Length: {len(body)}", "Connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
