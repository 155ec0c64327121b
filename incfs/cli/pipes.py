"""Streams in and out of a command: files, stdin, stdout; never a terminal."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Final

import trio

from incfs.errors import BackingError, UsageError
from incfs.surroundings import is_closed

READ_BYTES: Final = 1 << 18


def require_stream_output() -> None:
    """Make sure that stdout can take a stream.

    Raises:
        UsageError: It is a terminal, or closed.
    """
    if is_closed("stdout"):
        raise UsageError("a stream needs somewhere to go, and standard output is closed; redirect it: > FILE, or | ...")
    if sys.stdout.isatty():
        raise UsageError("a stream is not written to a terminal; redirect it: > FILE, or | ...")


def write_stream(data: bytes) -> None:
    """Write a part of a stream to stdout.

    Raises:
        BackingError: Nobody reads it, or the file's disk is full.
    """
    # Not through sys.stdout: it would try again at exit what a closed pipe refused.
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(sys.stdout.fileno(), view) :]
    except OSError as error:
        raise BackingError(f"the stream cannot be written: {error.strerror}") from error


def require_stream_input() -> None:
    """Make sure that stdin can bring a stream.

    Raises:
        UsageError: It is a terminal, or closed.
    """
    if is_closed("stdin"):
        raise UsageError("no stream: standard input is closed; redirect it: < FILE, or ... |")
    if sys.stdin.isatty():
        raise UsageError("no stream: stdin is a terminal; redirect it: < FILE, or ... |")


async def put_stdout(data: bytes) -> None:
    """Write a part of a stream to stdout from a worker thread."""
    await trio.to_thread.run_sync(write_stream, data)


async def take_nothing() -> bytes:
    """Read nothing: a stream goes out."""
    return b""


async def take_stdin() -> bytes:
    """Read the next part of a stream from stdin in a worker thread, which is left behind when this is cancelled."""
    return await trio.to_thread.run_sync(_read_stdin, abandon_on_cancel=True)


def _read_stdin() -> bytes:
    # Not through sys.stdin: a thread that was left behind would hold its lock when the interpreter ends.
    try:
        return os.read(sys.stdin.fileno(), READ_BYTES)
    except OSError as error:
        raise BackingError(f"cannot read stdin: {error.strerror}") from error


@contextmanager
def open_input(name: str) -> Iterator[Callable[[], bytes]]:
    """Open a stream for reading, ``-`` for stdin; give what returns the next bytes, none at the end.

    Raises:
        UsageError: It cannot be opened, or stdin is a terminal.
    """
    if name == "-":
        require_stream_input()
        yield _reader(sys.stdin.buffer, "stdin")
        return
    try:
        stream = open(name, "rb")  # noqa: SIM115 - closed below, and only what opening raises is translated
    except OSError as error:
        raise UsageError(f"cannot open {name}: {error.strerror}", path=name) from error
    with stream:
        yield _reader(stream, name)


def _reader(stream: BinaryIO, name: str) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return stream.read(READ_BYTES)
        except OSError as error:
            raise BackingError(f"cannot read {name}: {error.strerror}", path=name) from error

    return read
