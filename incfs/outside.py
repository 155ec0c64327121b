"""System calls on our own mount, made by another process.

Owns that process.  A thread of the daemon must never wait for the daemon's own mount: once a request has been read
from ``/dev/fuse``, the wait for its answer cannot be killed.  After SIGKILL such a thread would keep the daemon's
files open, ``/dev/fuse`` and the pool's lock among them, so that nobody ever answers it: the mount would hang and
the pool would stay locked until somebody aborts the connection by hand.  This process has neither file; when the
daemon dies, its requests are aborted, it finds its sockets closed, and ends.

1. It is forked before there are threads, the pool's lock or ``/dev/fuse``, and keeps none of the daemon's files.
2. It ignores signals that mean an end, which a service manager and a terminal send to everybody: the daemon ends it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import trio

from incfs.errors import DaemonError

MAX_CALLS: Final = 16
"""Calls at one time; further ones wait."""
_STACK_BYTES: Final = 256 << 10
"""Of a thread there: some calls take one for each of many files."""

_ENDS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

T = TypeVar("T")


class Outside:
    """The way to the process; use ``fork_outside``.

    Args:
        connections: One for each call at a time.
        pid: Of the process.
    """

    def __init__(self, connections: list[Connection], pid: int) -> None:
        self._pid = pid
        self._idle = list(connections)
        self._limiter = trio.CapacityLimiter(len(connections))
        self._waiting: set[trio.CancelScope] = set()
        self._is_given_up = False

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Call a module's function there and return its result.

        Concurrency: may be cancelled; the call goes on without anybody waiting for it.

        Raises:
            DaemonError: The process has gone, or ``give_up`` was called.
            Exception: What the function raised.
        """
        with trio.CancelScope() as scope:
            self._waiting.add(scope)
            if self._is_given_up:
                scope.cancel()
            try:
                result: T = await trio.to_thread.run_sync(
                    self._exchange, function, args, limiter=self._limiter, abandon_on_cancel=True
                )
                return result
            finally:
                self._waiting.discard(scope)
        raise DaemonError("the mount is ending, and answers nothing any more")

    def has_thread(self, thread_id: int) -> bool:
        """Tell whether a thread, as requests of the kernel name it, is of that process."""
        return os.path.exists(f"/proc/{self._pid}/task/{thread_id}")

    def give_up(self) -> None:
        """Wait for no call any more: the mount that they wait for answers nothing from now on."""
        self._is_given_up = True
        for scope in self._waiting:
            scope.cancel()

    def _exchange(self, function: Callable[..., Any], args: tuple[object, ...]) -> Any:
        connection = self._idle.pop()
        try:
            connection.send((function, args))
            result, error = connection.recv()
        except (EOFError, OSError) as gone:
            raise DaemonError("the process that reaches the mount has gone; unmount and mount again") from gone
        finally:
            self._idle.append(connection)
        if error is not None:
            raise error
        return result


@contextlib.contextmanager
def fork_outside() -> Iterator[Outside]:
    """Fork the process; at the end, end it.

    Concurrency: while this process has one thread, before it opens the pool and ``/dev/fuse``.
    """
    pairs = [Pipe() for _ in range(MAX_CALLS + 1)]
    # A signal in the hooks of a fork would be lost: Python ignores what is raised there.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    pid = os.fork()
    if pid == 0:
        _live([theirs for _, theirs in pairs])
    signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    for _, theirs in pairs:
        theirs.close()
    ours = [connection for connection, _ in pairs]
    try:
        yield Outside(ours[1:], pid)
    finally:
        for connection in ours:
            connection.close()
        os.waitpid(pid, 0)


def _live(connections: list[Connection]) -> NoReturn:
    """Be the process: serve each connection in a thread; end with the first connection, which carries nothing."""
    try:
        for number in _ENDS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
        _drop_files({connection.fileno() for connection in connections})
        os.chdir("/")
        threading.stack_size(_STACK_BYTES)
        for connection in connections[1:]:
            threading.Thread(target=_serve, args=(connection,), daemon=True).start()
        with contextlib.suppress(EOFError, OSError):
            connections[0].recv()
    finally:
        # Not sys.exit: threads may wait for a mount, and what the daemon registered for its end is not ours.
        os._exit(0)


def _drop_files(kept: set[int]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if number > 2 and number not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(number)


def _serve(connection: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, args = connection.recv()
            connection.send(_outcome(function, args))


def _outcome(function: Callable[..., Any], args: tuple[object, ...]) -> tuple[Any, Exception | None]:
    try:
        return function(*args), None
    except Exception as error:  # noqa: BLE001 - it is raised again where the call came from
        return None, error
