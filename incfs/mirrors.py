"""What the service does with mirrors: resilvers, replaces legs, scrubs.  The trio thread.

Works through the tables page by page beside everything else; while a page is worked on, no freed block is
used again, so what it names stays what it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from incfs import legs, relocation
from incfs.committer import Committer, offload
from incfs.errors import NotFound
from incfs.model import StorageId
from incfs.overlay import TableKey
from incfs.recovery import stored_path
from incfs.scrubstate import ScrubState, last_end_ns
from incfs.store import Store

_SAVE_EVERY_S = 10.0

Progress = Callable[[int, int], None]

_STEP_PAGES = 64
"""Pages listed at once."""


def walk_pages(store: Store, table: TableKey, start: int = 0) -> Iterator[int]:
    """Yield the pages of a table that may hold mappings; others may run, and change it, between two."""
    while pages := store.log.page_indexes(table, start, _STEP_PAGES):
        yield from pages
        start = pages[-1] + 1


async def throttle(length_bytes: int, rate_bytes: int | None) -> None:
    """Wait as long as so much may take."""
    if rate_bytes:
        await trio.sleep(length_bytes / rate_bytes)


@dataclass
class ResilverReport:
    """What a resilver came to."""

    copied_blocks: int = 0
    lost_blocks: int = 0
    """No sound leg had them right."""

    def to_dict(self, block_bytes: int) -> dict[str, Any]:
        """Give plain values."""
        return {"copied_bytes": self.copied_blocks * block_bytes, "lost_blocks": self.lost_blocks}


class Mirrors:
    """The verbs of mirrors, and the scrub, on an open pool.

    Args:
        store: The pool.
        committer: Makes changes durable.
        moving: Held while something works through the tables.
        space_lock: Held while storage volumes grow.
    """

    def __init__(self, store: Store, committer: Committer, moving: trio.Lock, space_lock: trio.Lock) -> None:
        self._store = store
        self._committer = committer
        self._moving = moving
        self._space_lock = space_lock
        self.scrub_ended_ns = 0
        """When the last whole scrub ended; 0 if never."""
        self._save_at = 0.0
        """When the state of a scrub is saved next, so that a kill costs little of it."""

    def load(self) -> None:
        """Read when the last whole scrub ended.  Any thread."""
        self.scrub_ended_ns = last_end_ns(self._store.directory) or 0

    async def resilver(self, storage_id: StorageId, *, rate_bytes: int | None, progress: Progress) -> ResilverReport:
        """Bring the stale legs of a mirror up to date: copy what they lack, verified.

        Raises:
            UsageError: It is not mirrored.
            ImageMismatch: A leg is still missing, or another's.
        """
        mirror, report = legs.mirror_of(self._store, storage_id), ResilverReport()
        async with self._moving:
            self._store.note_failed_legs()
            for number in sorted(mirror.stale):
                await self._resilver_leg(storage_id, number, report, rate_bytes, progress)
        return report

    async def _resilver_leg(
        self, storage_id: StorageId, number: int, report: ResilverReport, rate_bytes: int | None, progress: Progress
    ) -> None:
        store, volume = self._store, self._store.pool.volume(storage_id)
        await self._committer.commit()  # its staleness is durable before it is touched
        async with self._space_lock:  # meanwhile the others do not grow
            await offload(lambda: legs.open_leg(store, storage_id, number))
            legs.attach_leg(store, storage_id, number)
        bits = dict(volume.changed)
        total = sum(group.bit_count() for group in bits.values())
        reason = f"leg {number} lacks up to {total * store.block_bytes} bytes that were written while it was away"
        self._tell("resilver-begun", storage_id, reason)
        copied = 0
        for table in relocation.tables(store):
            for page_index in walk_pages(store, table):
                await trio.lowlevel.checkpoint()
                lacks = legs.lacking(store, table, page_index, storage_id, bits)
                if lacks:
                    report.lost_blocks += await self._copy(storage_id, number, lacks)
                    copied += len(lacks)
                    progress(min(copied, total), total)
                    await throttle(len(lacks) * store.block_bytes, rate_bytes)
        report.copied_blocks += copied
        await offload(lambda: legs.sync_leg(store, storage_id, number))
        legs.finish_resilver(store, storage_id, number)
        await self._committer.commit()
        self._tell("resilver-ended", storage_id, f"{copied * store.block_bytes} bytes were copied to leg {number}")

    async def _copy(self, storage_id: StorageId, number: int, lacks: legs.Lacking) -> int:
        with self._store.pool.reuse.withholding():
            return len(await offload(lambda: legs.copy_lacking(self._store, storage_id, number, lacks)))

    async def replace_leg(self, storage_id: StorageId, number: int, path: str) -> None:
        """Let a new, empty file be a leg of a mirror; ``resilver`` fills it.

        Raises:
            UsageError: Not mirrored, or it is the only sound leg.
            NotFound: There is no such leg.
            AlreadyExists: The file is there already.
        """
        store, mirror = self._store, legs.mirror_of(self._store, storage_id)
        if not 0 <= number < len(mirror.legs):
            raise NotFound(f"storage volume {storage_id} has no leg {number}", storage=storage_id)
        legs.require_other_leg(store, storage_id, number)
        name = f"incfs-{store.superblock.uuid[:8]}-{storage_id}.leg{number}.img"
        stored = await offload(lambda: stored_path(store.home, Path(path), name))
        record = store.catalog.storage(storage_id)
        await offload(lambda: store.pool.images.create_leg(record, store.home / stored))
        legs.replace_leg(store, storage_id, number, stored)
        await self._committer.commit()
        self._tell("leg-replaced", storage_id, f"leg {number} is {stored} from now on; it is empty")

    async def scrub(self, *, rate_bytes: int | None, restart: bool, progress: Progress) -> dict[str, Any]:
        """Verify every copy of every block on disk; heal those of mirrors; go on where the last one was stopped."""
        store = self._store
        state = ScrubState() if restart else await offload(lambda: ScrubState.load(store.directory))
        async with self._moving:
            await self._committer.commit()
            total = sum(volume.live_blocks for volume in store.pool.volumes.values())
            store.events.record("scrub-begun", "pool", f"{total * store.block_bytes} bytes are verified")
            try:
                for table in relocation.tables(store):
                    if (table.volume_id, table.generation) >= state.done[:2]:
                        await self._scrub_table(table, state, rate_bytes, lambda: progress(state.blocks, total))
            except BaseException:
                with trio.CancelScope(shield=True):
                    await offload(lambda: state.save(store.directory))
                raise
        store.events.record("scrub-ended", "pool", state.summary(), **state.to_dict())
        self.scrub_ended_ns = store.clock()
        await offload(lambda: state.finish(store.directory, self.scrub_ended_ns))
        return state.to_dict()

    async def _scrub_table(
        self, table: TableKey, state: ScrubState, rate_bytes: int | None, tell: Callable[[], None]
    ) -> None:
        first = state.done[2] if (table.volume_id, table.generation) == state.done[:2] else 0
        for page_index in walk_pages(self._store, table, first):
            await trio.lowlevel.checkpoint()
            blocks = legs.page_blocks(self._store, table, page_index)
            found = await self._scrub_blocks(blocks)
            if found.lost_blocks:
                where = f"volume {table.volume_id}, snapshot {table.generation}, page {page_index}"
                self._store.events.record("damage", where, f"{found.lost_blocks} blocks have no right copy")
            state.add(table, page_index, len(blocks), found)
            tell()
            if trio.current_time() >= self._save_at:
                self._save_at = trio.current_time() + _SAVE_EVERY_S
                await offload(lambda: state.save(self._store.directory))
            await throttle(len(blocks) * self._store.block_bytes, rate_bytes)

    async def _scrub_blocks(self, blocks: list[tuple[StorageId, int, int]]) -> legs.Scrubbed:
        with self._store.pool.reuse.withholding():
            return await offload(lambda: legs.scrub_blocks(self._store, blocks))

    def _tell(self, kind: str, storage_id: StorageId, reason: str) -> None:
        self._store.events.record(kind, f"storage {storage_id}", reason)
