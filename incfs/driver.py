"""Requests of the core, awaited: does what a refused one lacks, then asks again.

The asynchronous twin of ``ranges.drive``: pages are fetched, the disk is read and images
grow in worker threads.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

import trio

from incfs import legs, ranges
from incfs.committer import Committer, offload
from incfs.dataplane import LeaseExhausted, LegFailed, NotResident, ReadWouldWait
from incfs.errors import BackingError, ChecksumMismatch, IncfsError, MetadataFull, NoSpace, QuotaExceeded
from incfs.hosts import Hosts
from incfs.model import MapId, StorageId, VolumeId
from incfs.pageloader import PageLoader
from incfs.placement import Rule
from incfs.ranges import StepsPending
from incfs.space import Growth, NewImage, Step, refused_storage
from incfs.store import Store

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_LOOK_EVERY_S = 0.1
"""How often a write that waits for space looks for it; the host does not say when it has some."""
_TRY_EVERY_S = 1.0
"""How often it asks for it, whatever the host says: a quota does not show in how much is free."""
_THREADS = 16
"""Most threads that wait for reads of one storage volume."""
_THREADS_OF_WRITES = 256
"""Most threads that write: a request of the kernel has a task each, and these may all be of one disk that hangs."""
_CACHED_READ_TRIES = 3
"""Times a read is asked for from the page cache before it may wait for the disk in place."""


class Idle(Protocol):
    """Something that is done at some time."""

    async def wait_idle(self) -> None:
        """Wait until it is."""


class SpaceKeeper(Protocol):
    """Who brings in storage volumes."""

    hosts: Hosts
    """Asks the filesystems of the images how full they are."""

    def look_soon(self) -> None:
        """Look how full they are."""

    def need_space(self) -> None:
        """Somebody has none: give back at once what a host lacks, and prune what the policy can do without."""

    async def add_image(self, rules: Sequence[Rule]) -> None:
        """Make another one that the rules allow, if the settings do; under the space lock."""


class Driver:
    """Drives requests of the core for tasks."""

    def __init__(self, store: Store, committer: Committer, reclaimer: Idle) -> None:
        self._store = store
        self.pages = PageLoader(store)
        self._committer = committer
        self._reclaimer = reclaimer
        self.space_lock = trio.Lock()
        """Held while storage volumes grow, are added or give space back."""
        self._grows_ahead = False
        self._writing = trio.CapacityLimiter(_THREADS_OF_WRITES)
        self._limiters: WeakKeyDictionary[object, trio.CapacityLimiter] = WeakKeyDictionary()
        self.keeper: SpaceKeeper
        """Set by the service."""
        self._fullness = ""
        """What was told last of a full pool: queue, full, or nothing."""
        self._full_at: int | None = None
        """So much was free when a write failed for lack of space; None when space came back since."""
        self.became_full = trio.Event()
        """Set while the pool is full; then there is a new one."""

    async def drive(
        self, request: Callable[[bool], Result], *, in_thread: bool = False, may_wait_in_thread: bool = False
    ) -> Result:
        """Ask until nothing is refused.

        Args:
            request: Called with whether it may wait for the disk.
            in_thread: Ask in a worker thread: it waits for a host.
            may_wait_in_thread: Ask there when it may wait: it does not need the owner thread.

        Raises:
            NoSpace: The pool is full, also after everything removed was reclaimed.
            IncfsError: Whatever the request raises.
        """
        mended: set[object] = set()
        needs: dict[MapId, int] = {}
        refused: dict[StorageId, float] = {}
        place: object = None
        deadline = self._deadline()
        for attempt in count():
            try:
                may_wait = attempt - len(mended) > _CACHED_READ_TRIES
                if in_thread or (may_wait and may_wait_in_thread):
                    return await trio.to_thread.run_sync(request, may_wait, limiter=self._limiter(place))
                return request(may_wait)
            except LegFailed as refusal:
                legs.leave(self._store, refusal)
            except (ChecksumMismatch, BackingError) as error:
                if not await self._mend(error, mended):
                    self._store.checksum_errors += isinstance(error, ChecksumMismatch)
                    raise
            except MetadataFull as error:
                await self._wait_for_metadata(error, deadline)
            except NoSpace as error:
                await self.turn_away(error, refused)
            except NotResident as refusal:
                await self.pages.load(refusal.map_id, refusal.page_index)
            except LeaseExhausted as refusal:
                needs[refusal.map_id] = refusal.block_count  # of a striped volume each column has a lease
                await self.make_space(needs, urgent=refusal.is_urgent)
            except ReadWouldWait as refusal:
                place = refusal.file
                await trio.to_thread.run_sync(refusal.warm, limiter=self._limiter(place))
            except StepsPending as refusal:
                await self._finish(refusal)
        raise AssertionError("unreachable")

    async def _finish(self, pending: StepsPending) -> None:
        """Finish what was begun and must come first."""
        while not await self.drive(pending.step):
            await trio.lowlevel.checkpoint()

    async def commit(self) -> None:
        """Commit; while the metadata's disk is full, wait for it as long as the settings say.

        Raises:
            MetadataFull: It still is; nothing is harmed.
            IncfsError: As ``Committer.commit``.
        """
        deadline = self._deadline()
        while True:
            try:
                return await self._committer.commit()
            except MetadataFull as error:
                await self._wait_for_metadata(error, deadline)

    def _deadline(self) -> float:
        return trio.current_time() + self._store.account.settings.queue_s

    async def _wait_for_metadata(self, error: MetadataFull, deadline: float) -> None:
        """Wait until the metadata may have room; there is no more to do for it here.

        Raises:
            MetadataFull: It has none in time.
        """
        while self._store.no_room is not None and trio.current_time() < deadline:  # noqa: ASYNC110 - the host tells nobody
            await trio.sleep(_LOOK_EVERY_S)
        if self._store.no_room is not None:
            raise error

    def _limiter(self, place: object) -> trio.CapacityLimiter:
        """Give what bounds the threads that wait for one storage volume: a disk that hangs takes no others."""
        if place is None:
            return self._writing
        return self._limiters.setdefault(place, trio.CapacityLimiter(_THREADS))

    async def _mend(self, error: IncfsError, mended: set[object]) -> bool:
        """Have what a read found wrong put right; False when that cannot be, or did not help."""
        mend = legs.plan_mend(self._store, error, mended)
        with self._store.pool.reuse.withholding():
            is_mended = await offload(mend)
        self._store.note_failed_legs()
        return is_mended

    async def turn_away(self, error: NoSpace, refused: dict[StorageId, float]) -> None:
        """Let a write go elsewhere, or wait, that the host refused although it had reserved the blocks.

        Args:
            error: Why.
            refused: Storage volumes that refused this write before, and since when.

        Raises:
            NoSpace: It is no such refusal; or the host goes on refusing, for as long as the settings let writes wait.
        """
        storage_id = refused_storage(error)
        if storage_id is None:
            raise error
        self._store.absorb()
        self._store.space.note_refused(storage_id)
        since = refused.get(storage_id)
        if since is None:
            refused[storage_id] = trio.current_time()
        elif trio.current_time() - since >= self._store.account.settings.queue_s or self._store.failure is not None:
            self._tell_full(error)
            raise error
        else:
            self._enter_queue(error)
            await trio.sleep(_LOOK_EVERY_S)

    async def trim(self, volume_id: VolumeId) -> None:
        """Drop what lies behind the end of a shrunk volume."""
        while not await self.drive(lambda wait: ranges.trim(self._store, volume_id, wait=wait)):
            await trio.lowlevel.checkpoint()

    async def make_space(self, needs: Mapping[MapId, int], *, urgent: bool = False) -> None:
        """Get the blocks that a request needs (lease -> how many); in a full pool wait as long as the settings say."""
        space = self._store.space
        if space.grant_all(needs, urgent=urgent):  # who holds the lock may wait for a disk that is not needed here
            return self._leave_queue()
        deadline = trio.current_time() + self._store.account.settings.queue_s
        while True:
            try:
                async with self.space_lock:
                    self._store.absorb()
                    for step in space.steps(needs, urgent=urgent):
                        await self._perform(step)
                return self._leave_queue()
            except NoSpace as error:
                self.keeper.need_space()
                if trio.current_time() >= deadline or self._store.failure is not None:
                    self._tell_full(error)
                    raise
                self._enter_queue(error)
            await self._wait_for_space(needs, deadline, urgent=urgent)

    async def grow_ahead(self, leases: list[MapId]) -> None:
        """Let images grow before these leases are used up; that none can, the writes that need it are told."""
        if self._grows_ahead:
            return
        self._grows_ahead = True
        try:
            async with self.space_lock:
                for lease in leases:
                    await self._grow_if_short(lease)
        finally:
            self._grows_ahead = False

    async def _grow_if_short(self, lease: MapId) -> None:
        space = self._store.space
        is_needed = self._store.is_served(lease) and space.is_short(lease) and space.can_grow(lease)
        growth = space.next_growth(lease) if is_needed else None
        if growth is not None:
            try:
                await self._perform(growth)
            except IncfsError as error:
                logger.warning("%s does not grow: %s", growth.storage.path, error)

    async def _perform(self, step: Step | Growth | NewImage) -> None:
        if isinstance(step, Growth):
            try:
                await offload(step.run)
            finally:
                step.end()
            self.keeper.look_soon()
        elif isinstance(step, NewImage):
            await self.keeper.add_image(step.rules)
        elif step is Step.RECLAIM:
            await self._reclaimer.wait_idle()
        else:
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        """Free what a checkpoint frees; without room for it in the metadata the images may still grow."""
        try:
            await self._committer.checkpoint()
        except NoSpace as error:
            self._store.space.checkpoint_refusal = error

    async def _wait_for_space(self, needs: Mapping[MapId, int], deadline: float, *, urgent: bool) -> None:
        """Wait until another try may end otherwise."""
        store = self._store
        deadline = min(deadline, trio.current_time() + _TRY_EVERY_S)
        while trio.current_time() < deadline and store.failure is None:
            await trio.sleep(_LOOK_EVERY_S)
            if store.pool.freed_blocks or store.space.grant_all(needs, urgent=urgent):
                return
            await self.keeper.hosts.look()
            if any(store.space.can_grow(lease) for lease in needs):
                return

    def _enter_queue(self, error: NoSpace) -> None:
        self._note_fullness("queue", f"{error}; writes wait up to {self._store.account.settings.queue_s:g} s for space")

    def _tell_full(self, error: NoSpace) -> None:
        if not isinstance(error, QuotaExceeded):
            self._note_fullness("full", f"{error}; writes fail with ENOSPC")
            self._full_at = self._store.account.free_bytes()
            if self._full_at < self._store.account.extend_bytes:  # else only some volumes may not use what there is
                self.became_full.set()

    @property
    def is_full(self) -> bool:
        """Whether a write failed for lack of space, and no space came back since."""
        if self.became_full.is_set() and self._full_at is not None:
            if self._store.account.free_bytes() <= self._full_at:
                return True
            self.became_full = trio.Event()
        return False

    def _leave_queue(self) -> None:
        if self._fullness:
            self._note_fullness("", "")
            self._full_at = None
            self._store.events.record("space-returned", "pool", "blocks are free again; writes go on")

    def _note_fullness(self, kind: str, reason: str) -> None:
        if kind and kind != self._fullness:
            self._store.events.record(kind, "pool", reason)
        self._fullness = kind
