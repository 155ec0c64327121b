"""Asks the filesystems of the images how full they are, and notices those that do not answer.

Each storage volume is asked in a thread of its own, and not again before it has answered: a host that hangs keeps
that one thread, and nobody else.  What is known of it stays what it last said.
"""

import logging
from collections.abc import Callable

import trio

from incfs.errors import IncfsError
from incfs.events import EventLog
from incfs.model import StorageId
from incfs.pool import Pool
from incfs.storage import StorageVolume

logger = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""So long a look waits for answers."""
SILENT_AFTER_S = 5.0
"""A host that has not answered for so long is told of."""


class Hosts:
    """What is asked of the host filesystems of one pool.  The trio thread.

    Args:
        pool: Its storage volumes.
        events: Where to tell of a host that does not answer.
    """

    def __init__(self, pool: Pool, events: EventLog) -> None:
        self._pool = pool
        self._events = events
        self._asking: dict[StorageId, tuple[float, trio.Event]] = {}
        """Since when, and what is set when it has answered."""
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the threads that ask; never returns.  Cancelled, those that wait are left alone."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def look(self) -> None:
        """Ask every host that has answered before; return when all have, or patience has an end."""
        if self._nursery is None:
            return
        for storage_id, volume in self._pool.volumes.items():
            if volume.state == "online" and storage_id not in self._asking:
                self._asking[storage_id] = trio.current_time(), trio.Event()
                self._nursery.start_soon(self._ask, storage_id, volume)
        with trio.move_on_after(PATIENCE_S):
            for asked_at, answered in list(self._asking.values()):
                if trio.current_time() - asked_at < SILENT_AFTER_S:
                    await answered.wait()
        self._tell_silent()

    async def _ask(self, storage_id: StorageId, volume: StorageVolume) -> None:
        try:
            await in_own_thread(volume.measure_host)
        except IncfsError as error:
            logger.warning("how full %s is cannot be told: %s", volume.path.parent, error)
        _, answered = self._asking.pop(storage_id)
        answered.set()
        if volume.is_silent:
            volume.is_silent = False
            self._events.record("host-answers", f"storage {storage_id}", f"{volume.path.parent} answers again")

    def _tell_silent(self) -> None:
        for storage_id, (asked_at, _) in self._asking.items():
            volume = self._pool.volumes.get(storage_id)
            if volume is not None and not volume.is_silent and trio.current_time() - asked_at >= SILENT_AFTER_S:
                volume.is_silent = True
                reason = f"{volume.path.parent} has not answered for {SILENT_AFTER_S:g} s; whoever needs it waits"
                self._events.record("host-silent", f"storage {storage_id}", reason)


async def in_own_thread(work: Callable[[], None]) -> None:
    """Run what may wait for ever in a thread that nobody else needs; cancelled, it is left to itself."""
    await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
