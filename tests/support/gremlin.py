"""Hot threads that act between any two calls of the owner thread: to the plane, its lane, the journal, the host.

``GremlinPlane`` is the native data plane.  Before each call of the owner thread it asks its ``Gremlin`` whether
somebody else acts first: a write, a read or an fsync as hot threads make them, or the power fails.  Nothing is left
to chance: a *plan* says at which call, counted from when it was made, who does what, so that a story can be told
again, and shrunk.

An fsync may be *held* while the lane's round is under way, and goes on at a later call, or fails there.  Then it has
a thread of its own, which runs only while the owner thread waits for it: one of the two stands still at any time.
"""

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest import mock

from incfs import memory
from incfs.model import MapId
from incfs.nativeplane import NativePlane
from incfs.options import Options
from incfs.store import Store
from tests.support import pools
from tests.support.outage import OutageBacking
from tests.support.served import Served, Sync

_WRITE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64)
_FLUSH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
_PATIENCE_S = 60
"""How long a call may take that should take microseconds: a deadlock is told, not waited for."""
WAITING_CALLS: Final = ("reclaim", "settle")
"""Calls that close the lane and wait for the round under way."""


class Stage(IntEnum):
    """Where a round of the lane can be held: its mappings are sealed and queued, nobody is answered."""

    QUEUED = 0
    WRITTEN = 1
    """The record is in the page cache."""
    FLUSHED = 2
    """The record is durable."""


@dataclass(frozen=True)
class HotWrite:
    """A hot thread writes whole blocks, of a pattern that the seed says."""

    choice: int
    block: int
    count: int
    seed: int


@dataclass(frozen=True)
class HotRead:
    """A hot thread reads whole blocks of a volume or a snapshot."""

    choice: int
    block: int
    count: int


@dataclass(frozen=True)
class HotSync:
    """A hot thread writes a block, unless its seed is 0, and fsyncs; it is held when its round has come so far."""

    choice: int
    block: int
    seed: int
    held_at: Stage | None = None
    """None: it is not held."""


@dataclass(frozen=True)
class GoOn:
    """The round that is held goes on, or its write or flush fails."""

    fails: bool = False
    is_full: bool = False
    """The write finds no room, which harms nothing."""


@dataclass(frozen=True)
class Cut:
    """The power fails, in another world: the story goes on, but what would be found is looked at."""

    seed: int


Act = HotWrite | HotRead | HotSync | GoOn | Cut
Plan = Iterable[tuple[int, Act]]
"""(number of the call before which it happens, what)."""


class _Round:
    """The thread of an fsync that leads, and where it stands."""

    def __init__(self) -> None:
        self.held_at: Stage | None = None
        self.is_held = False
        self.has_failed = False
        self._error = 0
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], object], held_at: Stage | None) -> None:
        """Do it in a thread of its own, until it has ended or is held."""
        self.held_at, self._error = held_at, 0

        def body() -> None:
            work()
            self._thread = None
            self._stopped.release()

        self._thread = threading.Thread(target=body, daemon=True)
        self._thread.start()
        self._wait()

    def go_on(self, error: int) -> None:
        """Let it go on to its end; with an errno its write or flush fails."""
        self._error = error
        self.is_held = False
        self._go.release()
        self._wait()

    def _wait(self) -> None:
        assert self._stopped.acquire(timeout=_PATIENCE_S), "an fsync neither ends nor is held: a deadlock"

    def reach(self, stage: Stage) -> int:
        """Its thread has come so far; give the errno if it fails here."""
        if threading.current_thread() is not self._thread or self.held_at != stage:
            return 0
        self.held_at, self.is_held = None, True
        self._stopped.release()
        assert self._go.acquire(timeout=_PATIENCE_S), "nobody lets a held fsync go on"
        is_harmless = stage == Stage.FLUSHED or (stage == Stage.QUEUED and self._error == errno.ENOSPC)
        self.has_failed |= bool(self._error) and not is_harmless
        return self._error


class Listener:
    """What a gremlin tells and asks the test that owns it.  All in the owner thread, all between two calls."""

    def act(self, act: Act) -> None:
        """Let something happen now."""

    def sealed(self) -> None:
        """The owner thread seals next: what hot threads wrote comes before what it changes."""

    def written(self, table: MapId, offset_bytes: int, data: bytes) -> None:
        """The owner thread has written this."""

    def synced(self, sync: Sync, error: int | None) -> None:
        """An fsync was answered: 0, an errno, or None when the owner thread should see to it."""


class Gremlin:
    """Lets hot threads act at the calls that a plan says.

    Args:
        listener: Who carries the acts out, and knows what must be found.
        backing: The host's files.
    """

    def __init__(self, listener: Listener, backing: OutageBacking) -> None:
        self.calls: list[str] = []
        """The owner thread's calls since the last plan was made."""
        self._listener = listener
        self._backing = backing
        self._plan: dict[int, list[Act]] = {}
        self._is_awake = False
        self._round = _Round()
        self._answers: list[tuple[Sync, int | None]] = []
        self._write, self._flush = _WRITE(self._write_record), _FLUSH(self._flush_record)
        self.plane: GremlinPlane
        self.served: Served
        backing.meet = self.meet

    def haunt(self, plane: "GremlinPlane") -> None:
        """Begin with a plane."""
        self.plane = plane
        plane.gremlin = self
        self.served = Served(plane, lambda sync, error: self._answers.append((sync, error)))
        plane._divert(*(ctypes.cast(call, ctypes.c_void_p).value or 0 for call in (self._write, self._flush)))

    def leave(self) -> None:
        """Let go of the plane, which is used no more: the capsule of what it serves would keep both for ever."""
        self.go_on(fails=False)
        self.plane.gremlin = None
        del self.plane, self.served

    # Moments

    @contextmanager
    def awake(self, plan: Plan) -> Iterator[None]:
        """Follow a plan meanwhile; the acts of call 0 are the first that happens."""
        self.calls, self._plan = [], {}
        for number, act in plan:
            self._plan.setdefault(number, []).append(act)
        self._is_awake = True
        try:
            self.meet("begin")
            yield
        finally:
            self._is_awake = False

    def meet(self, call: str) -> None:
        """Come to a call of the owner thread: others may act first."""
        if not self._is_awake:
            return
        self._is_awake = False  # what acts now is not the owner thread
        try:
            for act in self._plan.pop(len(self.calls), ()):
                self._listener.act(act)
        finally:
            self._is_awake = True
        self.calls.append(call)

    def call(self, name: str, real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Make a call of the owner thread to the plane."""
        self.meet(name)
        if name in WAITING_CALLS and self.is_held:
            NativePlane.close_journal(self.plane)
            self.go_on(fails=False)
        if name == "seal":
            self._listener.sealed()
        result = real(self.plane, *arguments, **named)
        if name == "write":
            table, offset_bytes, data = arguments
            self._listener.written(table, offset_bytes, bytes(data))
        elif name == "discard":
            table, first, count = arguments
            self._listener.written(table, first * self.plane.block_bytes, bytes(count * self.plane.block_bytes))
        return result

    # Hot threads

    def write(self, table: MapId, offset_bytes: int, data: bytes) -> bool:
        """Write as a hot thread does; whether it was served."""
        return self.served.write(table, offset_bytes, data)

    def read(self, table: MapId, offset_bytes: int, length_bytes: int) -> bytes | None:
        """Read as a hot thread does; None when it is not served."""
        return self.served.read(table, offset_bytes, length_bytes)

    @property
    def is_held(self) -> bool:
        """Whether a round is under way."""
        return self._round.is_held

    @property
    def has_failed(self) -> bool:
        """Whether a round was made to fail."""
        return self._round.has_failed

    def sync(self, table: MapId, held_at: Stage | None) -> Sync:
        """Begin an fsync as a hot thread does; what is answered, the listener hears."""
        sync = Sync(table)

        def work() -> None:
            if not self.served.sync(sync):
                self._answers.append((sync, None))

        if self.is_held:  # it joins those who wait for the next round
            work()
        else:
            self._round.run(work, held_at)
        return sync

    def go_on(self, *, fails: bool = False, is_full: bool = False) -> None:
        """Let the round that is held end."""
        if self.is_held:
            self._round.go_on(errno.ENOSPC if is_full else errno.EIO if fails else 0)
        self.hear()

    def hear(self) -> None:
        """Hear what was answered."""
        answers, self._answers = self._answers, []
        for sync, error in answers:
            self._listener.synced(sync, error)

    def _write_record(self, fd: int, data: int, length: int, offset: int) -> int:
        if error := self._round.reach(Stage.QUEUED):
            return error
        return 0 if os.pwrite(fd, ctypes.string_at(data, length), offset) == length else errno.EIO

    def _flush_record(self, fd: int) -> int:
        if error := self._round.reach(Stage.WRITTEN):
            return error
        os.fdatasync(fd)
        self._backing.note_sync_of(fd)
        self._round.reach(Stage.FLUSHED)
        return 0


class GremlinPlane(NativePlane):
    """The native plane, between any two calls of which others act."""

    gremlin: Gremlin | None = None

    def __init__(self, block_bytes: int, files: Any) -> None:
        super().__init__(block_bytes, files)
        self.block_bytes = block_bytes


def _haunted(name: str) -> Callable[..., Any]:
    real = getattr(NativePlane, name)

    def call(self: GremlinPlane, *arguments: Any, **named: Any) -> Any:
        if self.gremlin is None:
            return real(self, *arguments, **named)
        return self.gremlin.call(name, real, *arguments, **named)

    return call


def _haunted_property(name: str) -> property:
    real = getattr(NativePlane, name)

    def get(self: GremlinPlane) -> Any:
        if self.gremlin is not None:
            self.gremlin.meet(name)
        return real.__get__(self)

    return property(get)


for _name in dir(NativePlane.__base__):
    if not _name.startswith("_") and _name != "server":
        _is_method = callable(getattr(NativePlane, _name))
        setattr(GremlinPlane, _name, _haunted(_name) if _is_method else _haunted_property(_name))


def open_haunted(pool: Path, options: Options, backing: OutageBacking, gremlin: Gremlin) -> Store:
    """Open a pool over a plane that a gremlin haunts."""
    with mock.patch.object(memory, "make_plane", lambda _, block_bytes, files, __: GremlinPlane(block_bytes, files)):
        store = pools.open_tiny(pool, options, backing)
    assert isinstance(store.plane, GremlinPlane)
    gremlin.haunt(store.plane)
    store.watch()
    return store


def pattern(seed: int, length: int) -> bytes:
    """Bytes of a write; those of seed 0 are zeros."""
    return Random(seed).randbytes(length) if seed else bytes(length)
