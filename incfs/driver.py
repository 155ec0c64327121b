"""Requests of the core, awaited: does what a refused one lacks, then asks again.

The asynchronous twin of ``ranges.drive``: pages are fetched, the disk is read and images
grow in worker threads.
"""

from collections.abc import Callable
from itertools import count
from typing import Protocol, TypeVar

import trio

from incfs import ranges
from incfs.committer import Committer, offload
from incfs.dataplane import LeaseExhausted, NotResident, ReadWouldWait
from incfs.errors import NoSpace
from incfs.model import MapId, VolumeId
from incfs.ranges import TrimPending
from incfs.store import Store

Result = TypeVar("Result")

_CACHED_READ_TRIES = 3
"""Times a read is asked for from the page cache before it may wait for the disk in place."""


class Idle(Protocol):
    """Something that is done at some time."""

    async def wait_idle(self) -> None:
        """Wait until it is."""


class Driver:
    """Drives requests of the core for tasks."""

    def __init__(self, store: Store, committer: Committer, reclaimer: Idle) -> None:
        self._store = store
        self._committer = committer
        self._reclaimer = reclaimer
        self.space_lock = trio.Lock()
        """Held while storage volumes grow or are added."""

    async def drive(self, request: Callable[[bool], Result]) -> Result:
        """Ask until nothing is refused.

        Args:
            request: Called with whether it may wait for the disk.

        Raises:
            NoSpace: The pool is full, also after everything removed was reclaimed.
            IncfsError: Whatever the request raises.
        """
        for attempt in count():
            try:
                return request(attempt > _CACHED_READ_TRIES)
            except NotResident as refusal:
                await self._load(refusal.map_id, refusal.page_index)
            except LeaseExhausted as refusal:
                await self._make_space(refusal.map_id, refusal.block_count)
            except ReadWouldWait as refusal:
                await offload(refusal.warm)
            except TrimPending as refusal:
                await self.trim(refusal.volume_id)
        raise AssertionError("unreachable")

    async def trim(self, volume_id: VolumeId) -> None:
        """Drop what lies behind the end of a shrunk volume."""
        while not await self.drive(lambda wait: ranges.trim(self._store, volume_id, wait=wait)):
            await trio.lowlevel.checkpoint()

    async def _load(self, table: MapId, page_index: int) -> None:
        """Load a page, unless a checkpoint or a snapshot came between: then the caller asks again."""
        log, catalog = self._store.log, self._store.catalog
        chain, epoch = catalog.chain(table), log.epoch
        stored = await offload(lambda: log.fetch(chain, page_index))
        if self._store.plane.is_resident(table, page_index):
            return
        if epoch == log.epoch and chain == catalog.chain(table):
            self._store.install(table, page_index, log.resolve(chain, page_index, stored))

    async def _make_space(self, table: MapId, block_count: int) -> None:
        try:
            async with self.space_lock:
                while not self._store.grant(table, block_count):
                    if self._store.freed_bytes >= self._store.options.extend_bytes:
                        await self._committer.checkpoint()
                    else:
                        await offload(self._store.grow)
        except NoSpace as error:
            await self._scrape_space(table, block_count, error)

    async def _scrape_space(self, table: MapId, block_count: int, error: NoSpace) -> None:
        """The images cannot grow: use what others leased, what was removed, what was freed."""
        self._store.reclaim_leases()
        if self._store.grant(table, block_count):
            return
        await self._reclaimer.wait_idle()
        await self._committer.checkpoint()
        if not self._store.grant(table, block_count):
            raise error
