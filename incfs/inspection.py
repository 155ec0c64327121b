"""Looks at an open pool that take a while: checks, dumps, differences, where data lies.  Changes nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from incfs import dump, extents, removal, snapshot, status
from incfs.check import Checker, CheckReport, Progress
from incfs.committer import Committer, offload
from incfs.errors import IncfsError
from incfs.extents import Extent
from incfs.handles import Handles
from incfs.model import PAGE_BLOCKS, MapId, Snapshot, VolumeId
from incfs.store import Store

_EXTENTS_STEP = 8
"""Stretches listed between two chances for others to run."""


class Inspection:
    """Looks at one open pool.  The trio thread."""

    def __init__(self, store: Store, committer: Committer, handles: Handles) -> None:
        self._store = store
        self._committer = committer
        self._handles = handles

    def checksum_errors(self) -> int:
        """Count the copies of blocks that were found wrong since the pool was opened."""
        return self._store.checksum_errors + sum(v.healed_blocks for v in self._store.pool.volumes.values())

    def event_counts(self) -> dict[str, int]:
        """Count the events of each kind since the pool was opened."""
        return self._store.events.counts

    async def diff(
        self, volume_id: VolumeId, from_name: str | None, to_name: str, *, start_bytes: int, limit: int
    ) -> tuple[list[dict[str, Any]], int | None]:
        """List the stretches that may differ between a snapshot, or ``#BOOKMARK``, and a newer one, as that has them.

        Returns:
            At most ``limit`` of them from ``start_bytes`` on, and where to go on, None when nothing is left.
        """
        newer = self._store.catalog.snapshot(volume_id, to_name)
        older = None if from_name is None else self._store.catalog.base(volume_id, from_name)
        pinned = [s.map_id for s in (older, newer) if s is not None]
        for table in pinned:
            self._handles.pin(table, "snapshot diff")
        try:
            found: list[Extent] = []
            page_bytes = self._store.block_bytes * PAGE_BLOCKS
            for page in snapshot.changed_pages(self._store, older, newer, start_bytes // page_bytes):
                for extent in snapshot.changed_extents(self._store, older, newer, page):
                    if extent.offset_bytes + extent.length_bytes > start_bytes:
                        extents.join_extents(
                            found, extents.cut(extent, start_bytes, self._store.block_bytes), self._store.block_bytes
                        )
                if len(found) > limit:
                    break
                await trio.lowlevel.checkpoint()
            rest = found[limit].offset_bytes if len(found) > limit else None
            return [status.extent_document(extent) for extent in found[:limit]], rest
        finally:
            for table in pinned:
                self._handles.close(table)

    async def plan_removal(self, volume_id: VolumeId, doomed: Sequence[Snapshot]) -> removal.Freed:
        """Count what removing a set of snapshots of one volume frees, in blocks."""
        freed = removal.Freed()
        for freed in removal.plan(self._store, volume_id, {taken.generation for taken in doomed}):  # noqa: B007
            await trio.lowlevel.checkpoint()
        return freed

    async def extents(self, table: MapId, start_bytes: int, limit: int) -> list[dict[str, Any]]:
        """List where a volume or snapshot is stored, at most ``limit`` stretches from ``start_bytes``."""
        found: list[Extent] = []
        size = self._store.catalog.size_bytes(table)
        while start_bytes < size and len(found) < limit:
            for extent, _ in zip(extents.extents(self._store, table, start_bytes), range(_EXTENTS_STEP), strict=False):
                extents.join_extents(found, extent, self._store.block_bytes)
                start_bytes = extent.offset_bytes + extent.length_bytes
            await trio.lowlevel.checkpoint()
        return [status.extent_document(extent) for extent in found[:limit]]

    async def check(self, data: bool, progress: Progress | None = None) -> CheckReport:
        """Check the pool as of now; with ``data`` every live block is read."""

        def run() -> CheckReport:
            def report(done: int, total: int) -> None:
                trio.from_thread.check_cancelled()
                if progress is not None:
                    progress(done, total)

            with self._store.tables.reading() as reader:
                volumes, block_bytes = self._store.pool.volumes, self._store.block_bytes
                found = Checker(reader, volumes, block_bytes, data=data, progress=report).run()
            if self._store.mismatch is not None:
                found.damage("parts", str(self._store.mismatch))
            self._check_other_copies(found)
            return found

        self._store.pool.reuse.held += 1
        try:
            if self._store.failure is None:
                await self._committer.checkpoint()
            report = await offload(run)
        finally:
            self._store.pool.reuse.held -= 1
        if data and not report.is_damaged and self._store.failure is None and self._store.standing.is_unproved:
            await offload(self._store.prove)
        return report

    def _check_other_copies(self, report: CheckReport) -> None:
        """Prove those copies of the tables that nobody reads.  Any thread."""
        for number in self._store.copies.current[1:]:
            try:
                self._store.table_copies.verify(number)
            except IncfsError as error:
                report.damage(f"metadata in {self._store.copies.path_of(number)}", str(error))

    async def dump(self, path: Path) -> int:
        """Write the metadata as of now to a file as text; give its length in bytes."""
        if self._store.failure is None:
            await self._committer.checkpoint()
        return await offload(lambda: dump.write_dump(self._store, path))

    async def debug_dump(self) -> list[dict[str, Any]]:
        """List every record of the tables, as of now."""
        if self._store.failure is None:
            await self._committer.checkpoint()
        return await offload(lambda: status.dump_tables(self._store.tables))

    async def debug_map(self, table: MapId, page_index: int) -> list[dict[str, Any]]:
        """List the mappings of one page."""
        self._store.catalog.size_bytes(table)
        return status.dump_page(self._store, table, page_index)

    async def debug_journal(self) -> list[dict[str, Any]]:
        """List the journal's records that no checkpoint has folded yet."""
        return await offload(lambda: status.dump_journal(self._store.journal))
