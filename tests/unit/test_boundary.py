"""The boundary: whatever a handler raises, the kernel gets an errno."""

import errno
import logging
from collections import defaultdict

import pyfuse3
import pytest
import trio

from incfs import errors
from incfs.boundary import handler, look
from incfs.fuse_ops import Operations
from incfs.histogram import Histogram, merge


class Handlers:
    def __init__(self, raised: Exception | None = None) -> None:
        self.raised = raised
        self.failures: list[str] = []
        self.durations: dict[str, Histogram] = defaultdict(Histogram)

    def fail(self, reason: str) -> None:
        self.failures.append(reason)

    def inode_of_handle(self, fh: int) -> int:
        return fh + 1000

    @handler
    async def write(self, fh, offset, size):
        if self.raised:
            raise self.raised
        return b"x" * size

    @look
    async def readdir(self, fh, start_id, token):
        raise self.raised or AssertionError

    @handler
    async def setattr(self, inode, ctx):
        raise self.raised or AssertionError


def all_errors(base=errors.IncfsError):
    return [base, *(found for below in base.__subclasses__() for found in all_errors(below))]


async def errno_of(awaitable):
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await awaitable
    return raised.value.errno


@pytest.mark.parametrize("error", all_errors())
async def test_every_error_of_ours_becomes_its_errno(error, caplog):
    handlers = Handlers(error("a sentence"))
    assert await errno_of(handlers.write(1, 2, 3)) == error.errno
    assert error.errno in errno.errorcode
    assert not handlers.failures
    assert not caplog.records


async def test_results_and_fuse_errors_pass():
    assert await Handlers().write(1, 0, 3) == b"xxx"
    assert await errno_of(Handlers(pyfuse3.FUSEError(errno.ENODATA)).write(1, 0, 3)) == errno.ENODATA


@pytest.mark.parametrize(
    "error", [ValueError("two\nlines"), AssertionError(), MemoryError(), OSError(5, "disk"), KeyError(3)]
)
async def test_anything_else_is_eio_one_line_and_the_failsafe(error, caplog):
    handlers = Handlers(error)
    with caplog.at_level(logging.DEBUG, logger="incfs"):
        assert await errno_of(handlers.write(7, 4096, 3)) == errno.EIO
    (record,) = caplog.records
    line = record.getMessage()
    assert "\n" not in line
    assert record.exc_info is None
    for part in (type(error).__name__, "write", "inode 1007", "offset 4096", "test_boundary.py"):
        assert part in line
    (failure,) = handlers.failures
    assert "inode 1007" in failure


async def test_a_look_that_fails_stops_no_writer(caplog):
    """One name that the locale could not say, listed by anybody, made all volumes read-only."""
    handlers = Handlers(UnicodeEncodeError("latin-1", "x", 0, 1, "why"))
    assert await errno_of(handlers.readdir(7, 0, None)) == errno.EIO
    (record,) = caplog.records
    assert "UnicodeEncodeError in readdir of inode 1007" in record.getMessage()
    assert not handlers.failures


CHANGES = {"setattr", "create", "mknod", "unlink", "rename", "setxattr", "removexattr", "write", "fsync", "fsyncdir",
           "fallocate", "copy_file_range"}  # fmt: skip


def test_what_changes_nothing_is_a_look():
    """Whoever adds a handler says which it is."""
    bounded = {name: found for name in dir(Operations) if hasattr(found := getattr(Operations, name), "may_change")}
    assert {name for name, found in bounded.items() if found.may_change} == CHANGES
    assert {
        "getattr",
        "lookup",
        "readdir",
        "read",
        "open",
        "statfs",
        "getxattr",
        "listxattr",
    } < bounded.keys() - CHANGES


async def test_the_inode_is_found_by_name():
    handlers = Handlers(ValueError("x"))
    assert await errno_of(handlers.setattr(42, None)) == errno.EIO
    assert "inode 42 at offset -" in handlers.failures[0]


async def test_cancellation_passes():
    class Waiting(Handlers):
        @handler
        async def flush(self, fh):
            await trio.sleep_forever()

    handlers = Waiting()
    with trio.move_on_after(0) as scope:
        await handlers.flush(1)
    assert scope.cancelled_caught
    assert not handlers.failures


async def test_durations_are_counted():
    handlers = Handlers()
    await handlers.write(1, 0, 1)
    assert sum(handlers.durations["write"].counts) == 1
    assert handlers.durations["write"].sum_s > 0


def test_the_last_bucket_has_no_bound():
    histogram = Histogram()
    for duration_s in (0.00005, 0.5, 100.0):
        histogram.add(duration_s)
    assert histogram.counts == [0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1]


def test_histograms_of_one_operation_add_up():
    first, second = Histogram(), Histogram()
    first.add(0.5)
    second.add(0.5)
    second.add(100.0)
    merged = merge({"write": first, "read": first}, {"read": second})
    assert list(merged) == ["read", "write"]
    assert (merged["read"].counts[-4:], merged["read"].sum_s) == ([2, 0, 0, 1], 101.0)
    assert (first.counts[-4:], merged["write"].sum_s) == ([1, 0, 0, 0], 0.5)
