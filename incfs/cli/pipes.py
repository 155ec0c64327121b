"""Streams in and out of a command: files, stdin, stdout; never a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Final

from incfs.errors import BackingError, UsageError

READ_BYTES: Final = 1 << 18


def require_stream_output() -> BinaryIO:
    """Give stdout for a stream.

    Raises:
        UsageError: It is a terminal.
    """
    if sys.stdout.isatty():
        raise UsageError("a stream is not written to a terminal; redirect it: > FILE, or | ...")
    return sys.stdout.buffer


def write_stream(data: bytes) -> None:
    """Write a part of a stream to stdout.

    Raises:
        BackingError: Nobody reads it, or the file's disk is full.
    """
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        raise BackingError(f"the stream cannot be written: {error.strerror}") from error


@contextmanager
def open_input(name: str) -> Iterator[Callable[[], bytes]]:
    """Open a stream for reading, ``-`` for stdin; give what returns the next bytes, none at the end.

    Raises:
        UsageError: It cannot be opened, or stdin is a terminal.
    """
    if name == "-":
        if sys.stdin.isatty():
            raise UsageError("no stream: stdin is a terminal; redirect it: < FILE, or ... |")
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
