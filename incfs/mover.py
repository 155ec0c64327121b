"""Moves data that lies elsewhere than it should: walks the tables of volumes, page by page, beside everything else.

Whatever ends a move early leaves the pool as it should be, and the same move goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from incfs import relocation
from incfs.committer import COMMIT_AT_MAPPINGS, Committer, offload
from incfs.driver import Driver
from incfs.errors import BackingError, NoSpace
from incfs.mirrors import Progress, throttle, walk_pages
from incfs.model import StorageId, VolumeId
from incfs.overlay import TableKey
from incfs.relocation import Relocation, Wish
from incfs.store import Store


@dataclass
class MoveReport:
    """What a move came to."""

    moved_blocks: int = 0
    unreadable_blocks: int = 0
    first_error: str | None = None

    def note(self, moved: int, relocation_: Relocation) -> None:
        """Add one page's."""
        self.moved_blocks += moved
        self.unreadable_blocks += len(relocation_.unreadable)
        for error in relocation_.unreadable.values():
            self.first_error = self.first_error or str(error)

    def to_dict(self, block_bytes: int) -> dict[str, Any]:
        """Give plain values."""
        return {
            "moved_bytes": self.moved_blocks * block_bytes,
            "unreadable_blocks": self.unreadable_blocks,
            "first_error": self.first_error,
        }


@dataclass(frozen=True, slots=True)
class MovePlan:
    """What a move would come to now."""

    block_count: int
    reason: str

    def to_dict(self, block_bytes: int) -> dict[str, Any]:
        """Give plain values."""
        return {"moved_bytes": self.block_count * block_bytes, "reason": self.reason}


class Mover:
    """Carries moves out on an open pool, one at a time.  The trio thread."""

    def __init__(self, store: Store, committer: Committer, driver: Driver) -> None:
        self._store = store
        self._committer = committer
        self._driver = driver
        self.lock = trio.Lock()
        """Held while something works through the tables."""

    async def move(
        self, wish: Wish, volumes: Sequence[VolumeId], rate_bytes: int | None, progress: Progress
    ) -> MoveReport:
        """Walk the tables of volumes once and move what the wish says.

        Durability: durable, and the old blocks free, on return.
        """
        report = MoveReport()
        async with self.lock:
            store = self._store
            store.require_writable()
            store.absorb()
            total = sum(store.account.used_blocks(v) for v in store.catalog.volumes.values() if v.id in volumes)

            def tell() -> None:
                progress(report.moved_blocks, total)

            for table in relocation.tables(store):
                if table.volume_id in volumes:
                    await self._move_table(table, wish, report, rate_bytes, tell)
            await self._committer.checkpoint()
        return report

    async def count(self, wish: Wish, volumes: Sequence[VolumeId]) -> int:
        """Count the blocks that ``move`` would move now."""
        store, found = self._store, 0
        store.absorb()
        for table in relocation.tables(store):
            if table.volume_id in volumes:
                for page_index in walk_pages(store, table):
                    await trio.lowlevel.checkpoint()
                    planned = relocation.plan(store, table, page_index, wish)
                    found += planned.block_count if planned is not None else 0
        return found

    async def _move_table(
        self, table: TableKey, wish: Wish, report: MoveReport, rate_bytes: int | None, tell: Callable[[], None]
    ) -> None:
        for page_index in walk_pages(self._store, table):
            await trio.lowlevel.checkpoint()
            self._store.absorb()
            planned = relocation.plan(self._store, table, page_index, wish)
            if planned is not None:
                report.note(await self._carry_out(planned), planned)
                tell()
                await throttle(planned.block_count * self._store.block_bytes, rate_bytes)

    async def _carry_out(self, planned: Relocation) -> int:
        """Move one page, elsewhere or later where a host refuses the copy; give how many blocks."""
        refused: dict[StorageId, float] = {}
        while True:
            try:
                return await self._copy_and_finish(planned)
            except NoSpace as error:
                await self._driver.turn_away(error, refused)

    async def _copy_and_finish(self, planned: Relocation) -> int:
        store, moved = self._store, 0
        try:
            for lease, slots in planned.slots.items():
                while len([slot for slot in slots if slot in planned.targets]) < len(slots):
                    await self._driver.make_space({lease: len(slots)})
                    relocation.take_targets(store, planned, lease)
            with trio.CancelScope(shield=True):
                await offload(lambda: planned.copy(store))
        except BackingError as error:
            store.fail(error)
            raise
        except BaseException:
            relocation.abandon(store, planned)
            raise
        moved = relocation.finish(store, planned)
        if store.pending_mappings >= COMMIT_AT_MAPPINGS:
            await self._committer.commit()
        return moved
