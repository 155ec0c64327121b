"""The boundary between handlers and the kernel: which exception becomes which errno, and how long it took.

pyfuse3 ends a mount when a handler raises anything but ``FUSEError``.  So every handler is wrapped:

1. An ``IncfsError`` becomes its ``errno``; ``FUSEError`` passes; cancellation passes.
2. Anything else is a bug: EIO for this request and one log line.  The mount lives on.
3. After a bug in a ``handler``, which may have left a change half done, the pool goes into its failsafe (I10).
   A ``look`` changes nothing of the pool: whoever looked hears that it failed, and writers go on.
"""

import errno
import functools
import inspect
import logging
import time
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3

from incfs.errors import IncfsError
from incfs.histogram import Histogram

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class Bounded(Protocol):
    """What the boundary needs of the object whose handlers it wraps."""

    durations: dict[str, Histogram]

    def fail(self, reason: str) -> None:
        """Put the pool into its failsafe."""

    def inode_of_handle(self, fh: int) -> int:
        """Return the inode that a file handle is open on; 0 when unknown."""


S = TypeVar("S", bound=Bounded)


def handler(
    function: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Wrap a request handler that may change the pool.

    The parameters ``inode``, ``parent_inode``, ``fh`` and ``offset`` are found by name for the log line.
    """
    return _bounded(function, may_change=True)


def look(
    function: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Wrap a request handler that changes nothing of the pool; as ``handler`` else."""
    return _bounded(function, may_change=False)


def _bounded(
    function: Callable[Concatenate[S, P], Coroutine[Any, Any, R]], *, may_change: bool
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    operation = function.__name__
    signature = inspect.signature(function)

    @functools.wraps(function)
    async def wrapped(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        started = time.perf_counter()
        try:
            return await function(self, *args, **kwargs)
        except IncfsError as error:
            raise pyfuse3.FUSEError(error.errno) from error
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            where = _report_bug(self, operation, signature.bind(self, *args, **kwargs).arguments, error)
            if may_change:
                self.fail(where)
            raise pyfuse3.FUSEError(errno.EIO) from error
        finally:
            self.durations[operation].add(time.perf_counter() - started)

    wrapped.may_change = may_change  # type: ignore[attr-defined]  # for the test that every handler says which it is
    return wrapped


def _report_bug(operations: Bounded, operation: str, arguments: dict[str, object], error: Exception) -> str:
    """Write the one line; give what to say of it elsewhere."""
    inode = arguments.get("inode", arguments.get("parent_inode"))
    if inode is None:
        fh = arguments.get("fh", arguments.get("fh_in", 0))
        inode = operations.inode_of_handle(fh) if isinstance(fh, int) else 0
    offset = arguments.get("offset", arguments.get("offset_in", "-"))
    frames = traceback.extract_tb(error.__traceback__)
    trace = " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)
    text = repr(str(error))
    logger.error(
        "unexpected %s in %s of inode %s at offset %s: %s (%s)",
        type(error).__name__,
        operation,
        inode,
        offset,
        text,
        trace,
    )
    return f"unexpected {type(error).__name__} in {operation} of inode {inode} at offset {offset}: {text}"
