"""Named points at which a daemon kills itself: the moments between which the disk's state changes.

The product knows nothing of them: ``arm`` wraps the function that a point names, in a daemon that a ``Spawner`` starts.
The wrapped functions belong to Python's side of both data planes.  A point may be limited to calls from inside another
function, as the flush inside the journal's append.
"""

import functools
import inspect
import os
import random
import signal
import threading
from dataclasses import dataclass
from typing import Any

from tests.support.mishaps import wrap
from tests.support.spawner import Preparation


@dataclass(frozen=True)
class Point:
    """Where a daemon dies."""

    name: str
    function: str
    """``module:qualified name``, below ``incfs``; where it is looked up, if it is imported by name."""
    moment: str = "after"
    """``before`` and ``after`` the call; ``half``: after half of a file's write; ``during``: soon after its begin."""
    inside: str = ""
    """Only in calls that this function makes, in the same thread."""
    load: str = "work"
    """What brings the daemon there: ``work``, ``start`` after a kill, ``end`` after SIGTERM."""
    most: int = 6
    """The kill is at one of the first so many passes."""
    options: str = ""
    """Mount options that it needs."""

    def __str__(self) -> str:
        return self.name

    def armed(self, rng: random.Random) -> Preparation:
        """Have a daemon die here."""
        return "tests.support.failpoints:arm", self.name, rng.randint(1, self.most), rng.randrange(1 << 30)


_PUNCH = "storage:StorageVolume.punch"
_FOLD = "checkpoint:Checkpoint.run_fold"
_APPEND, _SEGMENT = "journal:Journal.append", "journal:Journal.start_segment"
_STAMP = "storage:write_stamp"
_RECOVER = "store:Store.fold_recovered"
_WRITE, _SYNC, _ALLOCATE = "backing:File.pwrite", "backing:File.sync", "backing:File.allocate"
_COPIES = "copies:write"
_PUT, _TABLES = "tables:Tables._put", "tables:Tables.write"

_ALL = (
    # A commit: seal, read back or flush, record, flush, acknowledgement, answer.
    Point("seal.begun", "store:Store.absorb", "before", most=40),
    Point("seal.half", "store:Store.append_mappings", "before"),
    Point("seal.ended", "store:Store.append_mappings"),
    Point("commit.begun", "checkpoint:Commit.run", "before"),
    Point("commit.read-back", "checkpoint:Commit._read_back"),
    Point("commit.images-flushing", "pool:Pool.sync", "during", "checkpoint:Commit.run", most=3),
    Point("commit.images-flushed", "pool:Pool.sync", "after", "checkpoint:Commit.run", most=3),
    Point("commit.record-torn", _WRITE, "half", _APPEND),
    Point("commit.record-written", _WRITE, "after", _APPEND),
    Point("commit.record-flushed", _SYNC, "after", _APPEND),
    Point("commit.acknowledged", _APPEND),
    Point("commit.durable-untold", "store:Store.end_commit", "before"),
    Point("commit.told", "store:Store.end_commit"),
    # A segment change.
    Point("segment.header-torn", _WRITE, "half", _SEGMENT, most=3),
    Point("segment.header-written", _WRITE, "after", _SEGMENT, most=3),
    Point("segment.started", _SEGMENT, most=3),
    # A checkpoint and its fold into the tables.
    Point("checkpoint.begun", "store:Store.begin_checkpoint", most=3),
    Point("checkpoint.committed", "store:Store.end_checkpoint_commit", most=3),
    Point("checkpoint.reserving", "tables:Tables.reserve", "after", "checkpoint:Checkpoint.reserve", most=3),
    Point("checkpoint.reserved", "checkpoint:Checkpoint.reserve", most=3),
    Point("fold.stamp-torn", _WRITE, "half", _STAMP, most=3),
    Point("fold.stamped", "pool:Pool.write_stamps", most=3),
    Point("fold.images-flushed", "pool:Pool.sync_stamped", "after", _FOLD, most=3),
    Point("fold.page-put", "tables:Tables._fold", "after", _FOLD),
    Point("fold.value-put", _PUT, "after", _FOLD, most=20),
    Point("fold.writing", _TABLES, "during", _FOLD, most=3),
    Point("fold.durable", _TABLES, "after", _FOLD, most=3),
    Point("fold.ended", "store:Store.end_checkpoint", most=3),
    # Freed blocks and their host space.
    Point("free.ended", "reuse:Reuse.make_free", most=3),
    Point("punch.planned", "reuse:Reuse.plan"),
    Point("punch.begun", _PUNCH, "before", most=3),
    Point("punch.one", _PUNCH, most=3),
    Point("punch.ended", "reuse:Reuse.punched", most=3),
    # Growth and leases.
    Point("growth.begun", "storage:StorageVolume.grow", "before", most=1),
    Point("growth.allocated", _ALLOCATE, "after", "storage:StorageVolume.grow", most=1),
    Point("growth.ended", "space:Growth.run", most=1),
    Point("lease.granted", "space:Space.grant"),
    # Snapshots, removal, resizing.
    Point("snapshot.changed", "snapshot:create", most=3),
    Point("snapshot.committed", "service:Service.create_snapshots", most=3),
    Point("snapshot.removed", "removal:remove", most=2),
    Point("snapshot.removal-committed", "service:Service.remove_snapshot", most=2),
    Point("removal.increment-folded", "moves:Moves.fold", most=3),
    Point("removal.step", "volume:reclaim", most=4),
    Point("removal.volume-changed", "volume:remove", most=2),
    Point("removal.volume-committed", "service:Service.remove_volume", most=2),
    Point("removal.pages-dropped", "moves:Moves.empty", most=2),
    Point("resize.changed", "volume:resize", most=3),
    Point("resize.trimmed", "ranges:trim", most=4),
    Point("volume.created", "volume:create", most=2),
    Point("volume.renamed", "volume:rename", most=2),
    # Another storage volume.
    Point("storage.header-torn", _WRITE, "half", "images:Images.create", most=1),
    Point("storage.image-created", "images:Images.create", most=1),
    Point("storage.attached", "pool:Pool.add", "after", "upkeep:Upkeep.add_storage", most=1),
    Point("storage.committed", "upkeep:Upkeep.add_storage", most=1),
    # The copy of the metadata.
    Point("dump.begun", _COPIES, "before", most=2, options="dump=checkpoint"),
    Point("dump.torn", _WRITE, "half", _COPIES, most=2, options="dump=checkpoint"),
    Point("dump.replacing", "backing:Backing.replace", "before", _COPIES, most=5, options="dump=checkpoint"),
    Point("dump.replaced", "backing:Backing.replace", "after", _COPIES, most=5, options="dump=checkpoint"),
    # Recovery after a kill.
    Point("recovery.opened", "store:Store.__init__", load="start", most=1),
    Point("recovery.loaded", "recovery:_load_records", load="start", most=1),
    Point("raise.announcement-torn", _WRITE, "half", "parts:write_standing", "start", most=1),
    Point("raise.announced", "parts:write_standing", load="start", most=1),
    Point("raise.stamp-torn", _WRITE, "half", "parts:_stamp_part", "start", most=1),
    Point("raise.stamped", "parts:Raise._stamp", load="start", most=1),
    Point("raise.settled", "parts:Raise.run", load="start", most=1),
    Point("recovery.mustered", "recovery:muster", load="start", most=1),
    Point("recovery.applied", "recovery:apply_record", load="start", most=3),
    Point("recovery.data-torn", _WRITE, "half", "recovery:_apply_map", "start", most=3),
    Point("recovery.replayed", "recovery:_replay", load="start", most=1),
    Point("recovery.images-flushed", "pool:Pool.sync_stamped", "after", _RECOVER, "start", most=1),
    Point("recovery.value-put", _PUT, "after", _RECOVER, "start", most=5),
    Point("recovery.fold-writing", _TABLES, "during", _RECOVER, "start", most=1),
    Point("recovery.fold-durable", _TABLES, "after", _RECOVER, "start", most=1),
    Point("recovery.ended", "recovery:open_store", load="start", most=1),
    Point("start.mounted", "fusext:start", load="start", most=1),
    Point("start.control", "mount:serve_control", "before", load="start", most=1),
    Point("start.untold", "daemon:Parent.tell_ready", "before", load="start", most=1),
    # A clean end that is cut off.
    Point("end.asked", "mount:_Stopping._unmount", "before", load="end", most=1),
    Point("end.detached", "mount:_Stopping._unmount", load="end", most=1),
    Point("end.closing", "service:Service.close", "before", load="end", most=1),
    Point("end.folding", _TABLES, "during", load="end", most=1),
    Point("end.folded", "service:Service.close", load="end", most=1),
    Point("end.raising", "parts:Raise.run", "before", load="end", most=1),
    Point("end.raise-stamped", "parts:Raise._stamp", load="end", most=1),
    Point("end.raised", "store:Store.raise_epoch", load="end", most=1),
    Point("end.closed", "store:Store.abandon", load="end", most=1),
)
_BEGINS = {"work": "daemon:Parent.tell_ready", "end": "mount:_Stopping._unmount"}
"""From when on the passes of a kind of point count."""
POINTS = {point.name: point for point in _ALL}


class _Inside(threading.local):
    """How deep a thread is in the function that a point is limited to."""

    depth = 0


def arm(name: str, passes: int, seed: int) -> None:
    """Have this process kill itself at the ``passes``-th pass of a point."""
    wrap("keeper:_GIVE_BACK_EVERY_S", lambda _: 0.1)  # so that those of giving back are passed
    point, inside = POINTS[name], _Inside()
    trigger = _Trigger(name, point.moment, passes, seed)
    wrap(point.function, lambda function: _failing(function, trigger, inside, is_limited=bool(point.inside)))
    if point.inside:
        wrap(point.inside, lambda function: _marking(function, inside))
    if point.load == "start":
        trigger.is_active = True
    else:
        wrap(_BEGINS[point.load], lambda function: _activating(function, trigger))


class _Trigger:
    """Counts down to the kill."""

    def __init__(self, name: str, moment: str, passes: int, seed: int) -> None:
        self._name, self.moment, self._left = name, moment, passes
        self._delay_s = random.Random(seed).expovariate(2000)
        self._lock = threading.Lock()
        self.is_active = False
        """Whether passes count; recovery, for one, folds too."""

    def is_due(self) -> bool:
        with self._lock:
            self._left -= self.is_active
            return self.is_active and self._left == 0

    def kill(self) -> None:
        os.write(2, f"{died_at(self._name)}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_soon(self) -> None:
        threading.Timer(self._delay_s, self.kill).start()


def died_at(name: str) -> str:
    """Give the last words of a daemon that dies at a point."""
    return f"the daemon kills itself at {name}"


def _failing(function: Any, trigger: _Trigger, inside: _Inside, *, is_limited: bool) -> Any:
    def before(arguments: tuple[Any, ...]) -> bool:
        """Die, or say whether to die afterwards."""
        if (is_limited and not inside.depth) or not trigger.is_due():
            return False
        if trigger.moment == "before":
            trigger.kill()
        elif trigger.moment == "during":
            trigger.kill_soon()
        elif trigger.moment == "half":
            file, offset, data = arguments
            function(file, offset, data[: len(data) // 2])
            trigger.kill()
        return trigger.moment == "after"

    @functools.wraps(function)
    def plain(*arguments: Any, **named: Any) -> Any:
        dies = before(arguments)
        result = function(*arguments, **named)
        if dies:
            trigger.kill()
        return result

    @functools.wraps(function)
    async def awaited(*arguments: Any, **named: Any) -> Any:
        dies = before(arguments)
        result = await function(*arguments, **named)
        if dies:
            trigger.kill()
        return result

    return awaited if inspect.iscoroutinefunction(function) else plain


def _marking(function: Any, inside: _Inside) -> Any:
    @functools.wraps(function)
    def plain(*arguments: Any, **named: Any) -> Any:
        inside.depth += 1
        try:
            return function(*arguments, **named)
        finally:
            inside.depth -= 1

    @functools.wraps(function)
    async def awaited(*arguments: Any, **named: Any) -> Any:
        inside.depth += 1
        try:
            return await function(*arguments, **named)
        finally:
            inside.depth -= 1

    return awaited if inspect.iscoroutinefunction(function) else plain


def _activating(function: Any, trigger: _Trigger) -> Any:
    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        trigger.is_active = True
        return function(*arguments, **named)

    return wrapped
