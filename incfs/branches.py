"""Clones, holds, bookmarks, going back: what the service does with the branches of volumes.

Owns nothing but references to the parts of an open pool; the trio thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import trio

from incfs import baseline, bookmarks, clone, holds, rollback, snapshot, volume
from incfs.committer import COMMIT_AT_MAPPINGS, Committer, offload
from incfs.driver import Driver
from incfs.errors import Busy, ImageMismatch, UsageError
from incfs.handles import Handles
from incfs.model import Base, Bookmark, Generation, MapId, Snapshot, Volume, VolumeId, map_id
from incfs.reclaimer import Reclaimer
from incfs.store import Store
from incfs.transfers import require_ordinary


class Branches:
    """The verbs of clones, holds and bookmarks on an open pool.

    A change that has begun is completed; it is durable on return.
    """

    def __init__(
        self,
        store: Store,
        committer: Committer,
        driver: Driver,
        reclaimer: Reclaimer,
        handles: Handles,
    ) -> None:
        self._store = store
        self._handles = handles
        self._committer = committer
        self._driver = driver
        self._reclaimer = reclaimer
        self._changed: set[MapId] = set()
        self._flattening: set[VolumeId] = set()

    async def clone(self, origin: Snapshot, name: str) -> Volume:
        """Add a volume that reads as a snapshot until it is written."""
        made = clone.create(self._store, origin, name)
        await self._committer.commit()
        return made

    async def create_on_baseline(self, name: str, path: Path) -> Volume:
        """Add a volume that reads as a raw image or block device, whole blocks of it, until it is written."""
        facts = await offload(lambda: baseline.describe(path, self._store.baselines.new_id()))
        origin = map_id(VolumeId(0), Generation(facts.id))
        made = volume.create(self._store, name, facts.size_bytes, mode=0o600, origin=origin, baseline=facts.encode())
        await self._committer.commit()
        return made

    async def verify_baseline(
        self, volume_id: VolumeId, progress: Callable[[int, int], None], *, record: bool = False
    ) -> baseline.BaselineFacts:
        """Read a volume's baseline to its end, and compare its content with the digest that was recorded.

        A content that is another one is remembered: what is inherited from it fails until it is found as it was.

        Args:
            volume_id: The volume.
            progress: Called with bytes done and in all; from a worker thread.
            record: Record the digest if there is none yet.

        Raises:
            UsageError: There is no baseline, or no digest.
            ImageMismatch: It was changed.
        """
        facts = self._baseline_of(volume_id)
        if not (facts.digest or record):
            raise UsageError(f"no digest of {facts.path} was recorded; --record does, of the content that it has now")

        def report(done: int, total: int) -> None:
            trio.from_thread.check_cancelled()
            progress(done, total)

        found = await offload(lambda: baseline.content_digest(facts, report))
        facts = self._baseline_of(volume_id)
        try:
            baseline.require_digest(facts, found)
        except ImageMismatch as error:
            self._store.events.record(
                "baseline-changed", f"volume {self._store.catalog.volume(volume_id).name}", str(error)
            )
            await self._put_baseline(volume_id, replace(facts, is_changed=True))
            raise
        facts = replace(facts, digest=found, is_changed=False)
        await self._put_baseline(volume_id, facts)
        return facts

    def _baseline_of(self, volume_id: VolumeId) -> baseline.BaselineFacts:
        volume = self._store.catalog.volume(volume_id)
        if not volume.baseline:
            raise UsageError(f"volume {volume.name} lies over no raw image", volume=volume.name)
        return baseline.BaselineFacts.decode(volume.baseline)

    async def _put_baseline(self, volume_id: VolumeId, facts: baseline.BaselineFacts) -> None:
        if self._baseline_of(volume_id) != facts:
            with self._store.step():
                self._store.amend(self._store.catalog.volume(volume_id), baseline=facts.encode())
            await self._committer.commit()

    async def flatten(self, volume_id: VolumeId, progress: Callable[[int, int], None]) -> Volume:
        """Copy what a clone inherits, and cut its origin.  May be cancelled, and done again: it goes on.

        Raises:
            Busy: It is being flattened.
            NoSpace: The pool is full.
        """
        require_ordinary(self._store.catalog.volume(volume_id), "be flattened")
        if volume_id in self._flattening:
            raise Busy(f"volume {self._store.catalog.volume(volume_id).name} is being flattened already")
        self._flattening.add(volume_id)
        try:
            await self._copy_inherited(volume_id, progress)
        finally:
            self._flattening.remove(volume_id)
        clone.cut_origin(self._store, volume_id)
        self._reclaimer.reclaim_soon()
        await self._committer.commit()
        return self._store.catalog.volume(volume_id)

    async def count_inherited(self, volume_id: VolumeId) -> int:
        """Count the blocks that ``flatten`` would copy; change nothing."""
        require_ordinary(self._store.catalog.volume(volume_id), "be flattened")
        self._store.absorb()
        found, page_index = 0, 0
        while (page := clone.count_inherited(self._store, volume_id, page_index)) is not None:
            found += page[1]
            page_index = page[0] + 1
            await trio.lowlevel.checkpoint()
        return found

    async def _copy_inherited(self, volume_id: VolumeId, progress: Callable[[int, int], None]) -> None:
        block: int | None = 0
        while block is not None:
            start = block
            block = await self._driver.drive(
                lambda wait, start=start: clone.flatten_step(self._store, volume_id, start, wait=wait)  # type: ignore[misc]
            )
            size = self._store.catalog.volume(volume_id).size_bytes
            progress(size if block is None else min(size, block * self._store.block_bytes), size)
            if self._store.pending_mappings >= COMMIT_AT_MAPPINGS:
                await self._committer.commit()
            await trio.lowlevel.checkpoint()

    async def roll_back(self, volume_id: VolumeId, name: str, *, force: bool = False) -> None:
        """Let a volume be what it was at a snapshot; newer snapshots go, if ``force`` says so.

        The caller has seen to it that nobody has those open, nor, without ``force``, the volume.
        """
        require_ordinary(self._store.catalog.volume(volume_id), "be rolled back")
        if volume_id in self._flattening:
            raise Busy(f"volume {self._store.catalog.volume(volume_id).name} is being flattened; try later")
        await self._driver.drive(lambda _: rollback.roll_back(self._store, volume_id, name, force=force))
        self.note_changed(map_id(volume_id))
        self._reclaimer.reclaim_soon()
        await self._committer.commit()

    def note_changed(self, table: MapId) -> None:
        """Note that a table that nobody has open was changed: what the kernel has of it is of before."""
        self._changed.add(table)

    def take_changed(self, table: MapId) -> bool:
        """Tell, once, whether a table was changed behind the kernel's back."""
        if table not in self._changed:
            return False
        self._changed.remove(table)
        return True

    def require_removable(self, snapshots: Sequence[Snapshot]) -> None:
        """Refuse to remove snapshots that have clones or are held."""
        snapshot.require_removable(self._store, snapshots)

    def newer_snapshots(self, target: Snapshot, *, force: bool = False) -> list[Snapshot]:
        """List the snapshots that a rollback would remove; refused as it would be."""
        return rollback.require_newest(self._store, target, force=force)

    async def freed_by_roll_back(self, target: Snapshot) -> int:
        """Say how many bytes a rollback would free."""
        freed = 0
        for blocks in rollback.freed_blocks(self._store, target):
            freed += blocks * self._store.block_bytes
            await trio.lowlevel.checkpoint()
        return freed

    async def hold(
        self, wanted: Sequence[tuple[VolumeId, str]], tag: str, *, expires_ns: int | None = None
    ) -> list[Snapshot]:
        """Keep snapshots from being removed; a hold of the same tag is renewed."""
        held = [holds.hold(self._store, volume_id, name, tag, expires_ns=expires_ns) for volume_id, name in wanted]
        await self._committer.commit()
        return held

    async def release(self, wanted: Sequence[tuple[VolumeId, str]], tag: str) -> list[Snapshot]:
        """End the holds of a tag."""
        released = [holds.release(self._store, volume_id, name, tag) for volume_id, name in wanted]
        await self._committer.commit()
        return released

    def bookmarks(self, volume_id: VolumeId) -> list[Bookmark]:
        """List the bookmarked points of a volume, oldest first."""
        return self._store.catalog.bookmarks(volume_id)

    def base(self, volume: Volume, name: str) -> Base:
        """Look up what increments of a volume start from: ``SNAP``, ``#MARK`` or ``uuid:...`` of either."""
        return self._store.catalog.base(volume.id, name)

    async def bookmark(self, taken: Snapshot, name: str) -> Bookmark:
        """Let increments start from a snapshot also when it is gone."""
        made = bookmarks.create(self._store, taken, name)
        await self._committer.commit()
        return made

    async def move_bookmark(self, taken: Snapshot, name: str) -> Bookmark:
        """Let a bookmark be of another snapshot of its volume; it is made if there is none.

        Raises:
            Busy: A stream starts from it, and its snapshot is gone.
        """
        known = bookmarks.find(self._store, taken.volume_id, name)
        if known is not None and known.generation != taken.generation:
            self._require_unused(known)
        moved = bookmarks.move(self._store, taken, name)
        self._reclaimer.reclaim_soon()
        await self._committer.commit()
        return moved

    async def remove_bookmarks(self, doomed: Sequence[tuple[VolumeId, str]]) -> None:
        """Forget bookmarks, all or none.

        Raises:
            UsageError, BookmarkNotFound, Busy: As ``require_forgettable``.
        """
        self.require_forgettable(doomed)
        for volume_id, name in doomed:
            bookmarks.remove(self._store, volume_id, name)
        self._reclaimer.reclaim_soon()
        await self._committer.commit()

    def require_forgettable(self, doomed: Sequence[tuple[VolumeId, str]]) -> None:
        """Refuse to forget bookmarks.

        Raises:
            UsageError: One is named twice.
            BookmarkNotFound: There is none of that name.
            Busy: A stream starts from one whose snapshot is gone.
        """
        if len(set(doomed)) < len(doomed):
            raise UsageError("name each bookmark once")
        for volume_id, name in doomed:
            self._require_unused(bookmarks.named(self._store, volume_id, name))

    def _require_unused(self, bookmark: Bookmark) -> None:
        holders = self._handles.of_table(bookmark.map_id)
        has_snapshot = ("snapshot", (bookmark.volume_id, bookmark.generation)) in self._store.catalog
        if holders and not has_snapshot:
            whose = f"{self._store.catalog.volume(bookmark.volume_id).name}#{bookmark.name}"
            raise Busy(f"bookmark {whose} is in use by {', '.join(holders)}; let that end first", holders=holders)
