"""The Python side of ``incfs._fusext``: three FUSE operations and the connection limits that pyfuse3 lacks.

Owns the order of events around a mount, and the tasks that answer lseek, fallocate and
copy_file_range.  Knows nothing of volumes: what the operations mean is the handlers' business.

    install(limits)  ->  pyfuse3.init(...)  ->  start(nursery, handlers)  ->  pyfuse3.main()
                                                 ... ->  stop()  ->  pyfuse3.close()

1. Nothing here raises: without the extension the mount works, only without the three operations.
2. Each request is answered once, whatever its handler does.
"""

import errno
import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from incfs.histogram import Histogram

if TYPE_CHECKING:
    from incfs._fusext import Request

logger = logging.getLogger(__name__)


class Handlers(Protocol):
    """Answers the operations; raises ``pyfuse3.FUSEError`` to pass an errno to the caller.

    ENOSYS makes the kernel stop asking for as long as the mount lives and help itself.
    """

    def lseek(self, fh: int, offset: int, whence: int, /) -> Awaitable[int]:
        """Return the next data (SEEK_DATA) or hole (SEEK_HOLE) at or after ``offset``."""
        ...

    def fallocate(self, fh: int, mode: int, offset: int, length: int, /) -> Awaitable[None]:
        """Allocate, punch out or zero a range; ``mode`` holds the FALLOC_FL bits."""
        ...

    def copy_file_range(
        self, fh_in: int, offset_in: int, fh_out: int, offset_out: int, length: int, flags: int, /
    ) -> Awaitable[int]:
        """Copy between two open files of the mount; return the count of bytes copied."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What to agree with the kernel when the mount begins; 0 leaves the kernel's choice."""

    max_background: int = 64
    """Most requests (read-ahead, write-back, direct asynchronous) in flight; the kernel's own is 12."""
    congestion_threshold: int = 48
    """Requests in flight at which the kernel holds back read-ahead."""
    max_readahead_bytes: int = 1 << 20
    """Only lowers what the kernel offers; ``backing_device`` raises what it does once it is mounted."""
    max_request_bytes: int = 0
    """What one read or write carries at most; the kernel sends the parts of a larger one all at once."""
    hot_threads: int = 0
    """Threads that answer what a data plane can serve, past Python."""
    maps_shared: bool = False
    """Whether a file that the kernel does not cache may be mapped shared (Linux 6.6)."""

    @property
    def mount_options(self) -> set[str]:
        """What libfuse wants to be told of it as text, too."""
        return {f"max_read={self.max_request_bytes}"} if self.max_request_bytes else set()


_UNHEARD: Final = ("fuse_release(): fuse_reply_* failed", "fuse_releasedir(): fuse_reply_* failed")

DEFAULT_LIMITS: Final = Limits()


def install(limits: Limits = DEFAULT_LIMITS) -> bool:
    """Let the next ``pyfuse3.init`` go through the extension, with these limits.

    Returns:
        False when it cannot; one warning in the log says why.
    """
    try:
        from incfs import _fusext
    except ImportError as error:
        logger.warning("no holes, discard or copy_file_range in this mount: the C extension does not load: %s", error)
        return False
    if not _fusext.is_interposed():
        logger.warning("no holes, discard or copy_file_range in this mount: pyfuse3 was imported before incfs")
        return False
    _fusext.configure(
        max_background=limits.max_background,
        congestion_threshold=limits.congestion_threshold,
        max_readahead=limits.max_readahead_bytes,
        max_request=limits.max_request_bytes,
        hot_threads=limits.hot_threads,
        maps_shared=limits.maps_shared,
    )
    return True


def start(nursery: trio.Nursery, handlers: Handlers, server: object = None) -> bool:
    """Answer the three operations with ``handlers``, each request in a task of ``nursery``.

    Call between ``pyfuse3.init`` and ``pyfuse3.main``.

    Args:
        nursery: For tasks that answer.
        handlers: What the operations mean.
        server: What the hot threads serve from, if the limits had any: ``DataPlane.server()``.

    Returns:
        False when the session is not the extension's; the reason is in the log.

    Concurrency:
        The requests arrive on the thread that runs ``pyfuse3.main``, which has to be the nursery's.
    """
    try:
        from incfs import _fusext
    except ImportError:
        return False  # install() has said so
    if not _fusext.has_session():
        logger.warning("no holes, discard or copy_file_range in this mount: pyfuse3 did not call the C extension")
        return False

    def dispatch(operation: str, request: "Request", *arguments: int) -> None:
        nursery.start_soon(_answer, handlers, operation, request, arguments, name=f"fuse {operation}")

    _fusext.start(dispatch)
    if _fusext.is_hot():
        logging.getLogger("pyfuse3").addFilter(_is_news)
        _fusext.start_hot(server)
    return True


def stop() -> None:
    """Answer what is pending with EIO and hand over no more; for any number of calls at any time."""
    try:
        from incfs import _fusext
    except ImportError:
        return
    _fusext.stop_hot()
    _fusext.stop()


def leave_syncs(is_left: bool) -> None:
    """Have hot threads leave every FSYNC to Python, or serve them again."""
    try:
        from incfs import _fusext
    except ImportError:
        return  # then Python has them all
    _fusext.leave_syncs(is_left)


def refuse_writers(are_refused: bool) -> None:
    """Let writers whose writes the kernel caches hear ENOSPC before each, as long as they cannot read; or no more."""
    try:
        from incfs import _fusext
    except ImportError:
        return  # they hear it from fsync and close
    _fusext.refuse_writers(are_refused)


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether to log; not that nobody took the answer to a close.

    An unmount does not wait for those.  Hot threads take them off the kernel before it ends, so
    that Python, which answers them, is told.
    """
    return not (isinstance(record.msg, str) and record.msg.startswith(_UNHEARD))


def hot_counts() -> dict[str, int]:
    """Return how many requests, and bytes, went past Python, and how many could not; empty without hot threads."""
    try:
        from incfs import _fusext
    except ImportError:
        return {}
    return _fusext.hot_counts() if _fusext.is_hot() else {}


def hot_durations() -> dict[str, Histogram]:
    """Return how long requests took that went past Python, by operation as Python names it."""
    try:
        from incfs import _fusext
    except ImportError:
        return {}
    found = _fusext.hot_durations() if _fusext.is_hot() else {}
    return {name: Histogram(counts, sum_ns / 1e9) for name, (counts, sum_ns) in found.items()}


def negotiated() -> dict[str, int]:
    """Return what was agreed with the kernel: max_write, max_background, want, ...; empty before."""
    try:
        from incfs import _fusext
    except ImportError:
        return {}
    agreed = _fusext.negotiated()
    return agreed if agreed["proto_major"] else {}


async def _answer(handlers: Handlers, operation: str, request: "Request", arguments: tuple[Any, ...]) -> None:
    """Run one handler and send its answer."""
    from pyfuse3 import FUSEError

    try:
        match operation:
            case "lseek":
                request.reply_lseek(await handlers.lseek(*arguments))
            case "fallocate":
                await handlers.fallocate(*arguments)
                request.reply_err(0)
            case "copy_file_range":
                request.reply_write(await handlers.copy_file_range(*arguments))
            case _:
                raise AssertionError(f"unknown operation {operation}")
    except FUSEError as error:
        request.reply_err(error.errno)
    except Exception as error:  # noqa: BLE001  the last boundary before the kernel: the mount must live on
        logger.error("%s%r failed: %s: %s", operation, arguments, type(error).__name__, error)
        if request.pending:
            request.reply_err(errno.EIO)
    # Cancelled: the request is dropped with the task, and that answers EIO.
