"""Group commit and checkpoints, for many tasks at once.

Owns the one task that begins commits.  Callers that arrive while a commit runs share the
next one.  A checkpoint's slow half runs beside later commits.

Locks: none.  The task itself is the exclusion; everything else is one step of the trio
thread.  Worker threads get only what the store froze for them.
"""

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar, cast

import trio

from incfs import copies
from incfs.checkpoint import Checkpoint, Commit
from incfs.errors import IncfsError, MetadataFull, NoSpace
from incfs.store import Store, new_nonce

logger = logging.getLogger(__name__)
COMMIT_AT_MAPPINGS = 16384
"""Uncommitted mappings that trigger a commit: bounds its record and the memory."""
_NO_SPACE_RETRY_S = 1.0

Result = TypeVar("Result")


async def offload(work: Callable[[], Result]) -> Result:
    """Run slow work in a worker thread; not interrupted by cancellation."""
    return await trio.to_thread.run_sync(work)


class _Round:
    """One commit and those who wait for it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: IncfsError | None = None


class _Interlude:
    """Work that is done while nobody commits."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.done = trio.Event()
        self.result: object = None
        self.error: IncfsError | None = None


def _unexpected(where: str, error: Exception) -> IncfsError:
    logger.exception("unexpected error in %s", where)
    return IncfsError(f"unexpected error in {where}: {error!r}")


class Committer:
    """Makes everything written so far durable, for whoever asks."""

    def __init__(self, store: Store, nursery: trio.Nursery) -> None:
        self._store = store
        self._nursery = nursery
        self._next = _Round()
        self._wake = trio.Event()
        self._wants_checkpoint = False
        self._checkpoints_begun = 0
        self._fold_told = trio.Event()
        """The last checkpoint begun has ended, or waits for room: those who wait for it may look."""
        self._fold_told.set()
        self._no_room: NoSpace | None = None
        """Why it waits; None when it does not."""
        self._copies_ended = trio.Event()
        """Set while no copies of the metadata are being written."""
        self._copies_ended.set()
        self._opened = time.monotonic()
        self._copies_deadline: float | None = None
        """When those under way are given up: the pool is being closed."""
        self._at_rest: list[_Interlude] = []
        """What waits to be done between two commits."""
        self._holders = 0
        """Who does not want a checkpoint meanwhile."""
        self._unheld = trio.Event()
        self._unheld.set()
        self.freed: Callable[[], None]
        """Called when a checkpoint has made blocks free; set by the service."""
        self.is_closing = False
        """Set for the last checkpoint: it does not wait for a full disk to get room."""

    async def commit(self) -> None:
        """Wait until everything written before the call is durable.

        Raises:
            MetadataFull: The journal's disk is full.  Nothing is harmed; it is tried again.
            PoolReadOnly: The pool had failed before.
            BackingError: This commit failed, and the pool with it.
        """
        self._store.require_writable()
        current = self._next
        self._wake.set()
        await current.done.wait()
        if current.error is not None:
            raise current.error

    def commit_soon(self) -> None:
        """Ask for a commit without waiting for it."""
        self._wake.set()

    def checkpoint_soon(self) -> None:
        """Ask for a checkpoint without waiting for it."""
        self._wants_checkpoint = True
        self._wake.set()

    async def checkpoint(self) -> None:
        """Wait until a checkpoint that begins after the call has ended, its freed blocks included.

        Raises:
            NoSpace: The metadata's disk is full.  Nothing is harmed; the checkpoint is tried again
                in the background until there is room.
            PoolReadOnly, BackingError: As ``commit``.
        """
        begun = self._checkpoints_begun
        while self._checkpoints_begun == begun:  # one that is under way may have frozen less than is there now
            await self._wait_for_fold()
            self._wants_checkpoint = True
            await self.commit()
        await self._wait_for_fold()
        self._store.require_writable()

    async def at_rest(self, work: Callable[[], Result]) -> Result:
        """Run something in a worker thread while no commit is under way; those that come meanwhile wait."""
        interlude = _Interlude(work)
        self._at_rest.append(interlude)
        self._wake.set()
        with trio.CancelScope(shield=True):
            await interlude.done.wait()
        if interlude.error is not None:
            raise interlude.error
        return cast(Result, interlude.result)

    async def _do_at_rest(self) -> None:
        waiting, self._at_rest = self._at_rest, []
        for interlude in waiting:
            try:
                interlude.result = await offload(interlude.work)
            except IncfsError as error:
                interlude.error = error
            except Exception as error:  # noqa: BLE001 - as in run
                interlude.error = _unexpected("work between two commits", error)
            interlude.done.set()

    @asynccontextmanager
    async def without_checkpoints(self) -> AsyncIterator[None]:
        """Let no checkpoint begin meanwhile; the one under way ends before.

        Raises:
            NoSpace: It waits for room on the metadata's disk.
        """
        if not self._holders:
            self._unheld = trio.Event()
        self._holders += 1
        try:
            while self._store.is_checkpointing:
                await self._fold_told.wait()
                self._raise_no_room()
                await trio.lowlevel.checkpoint()
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._unheld.set()
                self._wake.set()

    async def _wait_for_fold(self) -> None:
        await self._unheld.wait()
        await self._fold_told.wait()
        self._raise_no_room()

    def _raise_no_room(self) -> None:
        if self._no_room is not None:
            raise type(self._no_room)(self._no_room.message, **self._no_room.facts)
        if self._store.refused is not None:
            self._store.require_room()

    async def run(self) -> None:
        """Commit whenever asked; never returns."""
        self._go_on_with_recovery()
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            current, self._next = self._next, _Round()
            try:
                with trio.CancelScope(shield=True):
                    await self._do_at_rest()
                    await self._commit_or_checkpoint()
                self._store.lend_journal()
            except MetadataFull as error:
                current.error = error
                self._nursery.start_soon(self._try_again)
            except IncfsError as error:
                self._store.fail(error)
                current.error = error
            except Exception as error:  # noqa: BLE001 - a bug must not take the mount down: the pool becomes read-only
                current.error = _unexpected("a commit", error)
                self._store.fail(current.error)
            finally:
                current.done.set()
            if self._store.failure is None and self._store.wants_checkpoint and not self._must_wait_for_checkpoint:
                self.checkpoint_soon()

    async def _try_again(self) -> None:
        """Have what was refused tried again: the host does not say when it has room."""
        await trio.sleep(_NO_SPACE_RETRY_S)
        if not self.is_closing:
            self._wake.set()

    @property
    def _must_wait_for_checkpoint(self) -> bool:
        return self._store.is_checkpointing or bool(self._holders)

    def _go_on_with_recovery(self) -> None:
        """Finish the checkpoint that there was no room for when the pool was opened."""
        checkpoint = self._store.unfinished_checkpoint
        if checkpoint is not None:
            self._fold_told = trio.Event()
            self._nursery.start_soon(self._fold, checkpoint)

    async def run_timers(self) -> None:
        """Commit and checkpoint without being asked, as the options say; never returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._commit_now_and_then)
            nursery.start_soon(self._checkpoint_now_and_then)

    async def _commit_now_and_then(self) -> None:
        while True:
            await trio.sleep(self._store.options.commit_interval_s)
            if self._store.has_uncommitted and self._store.failure is None:
                self.commit_soon()

    async def _checkpoint_now_and_then(self) -> None:
        while True:
            await trio.sleep(self._store.options.checkpoint_interval_s)
            if self._store.failure is None and self._store.has_unfolded:
                self.checkpoint_soon()

    async def _commit_or_checkpoint(self) -> None:
        store = self._store
        if store.refused is not None:
            store.prepare_again(store.refused)
            await self._write(store.refused)
        if self._wants_checkpoint and not self._must_wait_for_checkpoint:
            self._wants_checkpoint = False
            checkpoint = store.begin_checkpoint(new_nonce())
            self._checkpoints_begun += 1
            await self._write(checkpoint)
        elif (commit := store.begin_commit()) is not None:
            await self._write(commit)
        store.review_room()
        if store.wants_aside:
            await self._set_aside()

    async def _write(self, work: Commit | Checkpoint) -> None:
        """Write a commit, and have a checkpoint folded.

        Raises:
            MetadataFull: The journal has no room; it is refused, and kept.
            BackingError: As ``Commit.run``.
        """
        under_way = self._fold_told
        if isinstance(work, Checkpoint):
            # In the step that counts it: else who sees that it has begun would take the last one's end for its own.
            self._fold_told = trio.Event()
        try:
            await self._write_once_there_is_room(work, under_way)
        except BaseException as error:
            if isinstance(error, MetadataFull):
                self._store.refuse(work, error)
            if isinstance(work, Checkpoint):
                self._fold_told.set()
            raise
        self._store.accept(work)
        if isinstance(work, Checkpoint):
            self._nursery.start_soon(self._fold, work)

    async def _write_once_there_is_room(self, work: Commit | Checkpoint, fold_under_way: trio.Event) -> None:
        """A commit for which the journal has no room may find some when the fold under way has ended."""
        try:
            await offload(lambda: self._store.write(work))
        except MetadataFull:
            if fold_under_way.is_set():
                raise
            await fold_under_way.wait()
            self._store.prepare_again(work)
            await offload(lambda: self._store.write(work))

    async def _fold(self, checkpoint: Checkpoint) -> None:
        told = self._fold_told
        try:
            with trio.CancelScope(shield=True):
                if not await self._fold_once_there_is_room(checkpoint):
                    return
                told = self._fold_told  # the next checkpoint, which has its own, may begin before this one is through
                self._store.end_checkpoint(checkpoint)
                self.freed()
                await self._set_aside()
            told.set()
            interval_s = self._store.options.dump_interval_s
            if interval_s is not None and not self.is_closing:
                await self._copy_if_due(interval_s)
        except IncfsError as error:
            self._store.fail(error)
        except Exception as error:  # noqa: BLE001 - as in run
            self._store.fail(_unexpected("a checkpoint", error))
        finally:
            told.set()

    async def _set_aside(self) -> None:
        """Have space set aside for the next fold while there is some."""
        pages = self._store.unfolded_pages
        await offload(lambda: self._store.set_aside(pages))

    async def _copy_if_due(self, interval_s: float) -> None:
        """Keep copies of the metadata beside the images; that this fails is said, and harms nothing else."""
        if not self._copies_ended.is_set():  # the next checkpoint may come this far before they are written
            return
        self._copies_ended = trio.Event()
        try:
            await offload(lambda: self._copy_now_if_due(interval_s))
        except IncfsError as error:
            logger.warning("the copy of the metadata beside the images could not be written: %s", error)
        finally:
            self._copies_ended.set()

    def _copy_now_if_due(self, interval_s: float) -> None:
        if copies.are_due(self._store, interval_s) and not copies.write(self._store, self._may_copy):
            logger.warning("the metadata is not copied beside the images now: it takes too long to wait for at the end")

    def _may_copy(self) -> bool:
        return self._copies_deadline is None or time.monotonic() < self._copies_deadline

    async def copy_at_end(self) -> None:
        """Before a pool that was written is closed: copy the metadata if there is no copy of the last hour.

        Nobody waits for that longer than ``copies.end_limit_s``.
        """
        interval_s = self._store.options.dump_interval_s
        if interval_s is None:
            return
        with contextlib.suppress(IncfsError):
            self._copies_deadline = time.monotonic() + await offload(
                lambda: copies.end_limit_s(self._store, time.monotonic() - self._opened)
            )
        await self._copies_ended.wait()
        if self._store.was_written:
            await self._copy_if_due(min(interval_s, copies.END_INTERVAL_S))

    async def _fold_once_there_is_room(self, checkpoint: Checkpoint) -> bool:
        """A full metadata disk harms nothing: the journal has everything until there is room; False at the end."""
        while True:
            try:
                await offload(checkpoint.reserve)
            except NoSpace as error:
                await self._wait_for_room(error)
                if self.is_closing:
                    return False
                continue
            self._found_room()
            try:
                await offload(checkpoint.run_fold)
            except MetadataFull as error:
                await self._wait_for_room(error)
                if self.is_closing:
                    return False
                continue
            return True

    async def _wait_for_room(self, error: NoSpace) -> None:
        if self._no_room is None:
            logger.warning("checkpoint waits for room: %s", error)
        self._no_room = error
        self._store.is_fold_waiting = True
        self._store.review_room()
        self._fold_told.set()
        if not self.is_closing:
            await trio.sleep(_NO_SPACE_RETRY_S)

    def _found_room(self) -> None:
        if self._no_room is not None:
            logger.info("checkpoint found room")
            self._no_room, self._fold_told = None, trio.Event()
            self._store.is_fold_waiting = False
            self._store.review_room()
