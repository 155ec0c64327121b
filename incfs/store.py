"""The store: the only place where data and tables meet.  Commit and checkpoint.

Owns the order in which things become durable.  Knows neither trio nor FUSE: slow work comes
as ``Commit`` and ``Checkpoint`` objects whose ``run*`` methods a worker thread may execute,
while everything else belongs to one owner thread.

Invariants:
    1. At most one commit runs; record n+1 is begun after n ended (journal invariant 2).
    2. After a failure (``fail``) nothing is written any more (I10).
    3. A record that found no room is kept (``refused``) and comes before anything else: that is no failure.
"""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID

from incfs.backing import Backing
from incfs.checkpoint import PAGE_COST_BYTES, Checkpoint, Commit, fold_bytes
from incfs.codec import encode_record
from incfs.dataplane import DataPlane
from incfs.epoch import NEVER, Point, Stamp, Standing
from incfs.errors import BackingError, IncfsError, MetadataFull, NoSpace
from incfs.gather import Gathered
from incfs.memory import Memory
from incfs.options import Options
from incfs.parts import Part, Raise, next_epoch, write_standing

logger = logging.getLogger(__name__)


class Store(Memory):
    """An open pool.

    Concurrency: the owner thread, unless a method says otherwise.
    """

    def __init__(self, directory: Path, gathered: Gathered, backing: Backing, options: Options) -> None:
        self.copies = gathered.copies
        self.journal = gathered.journal
        self.journal_files = gathered.journal_files
        self.table_copies = gathered.tables
        self.agree = gathered.agree
        """Lets the copies of the metadata be alike: the first thing that is written."""
        self._stamping = threading.Lock()
        """A checkpoint stamps the images with the epoch, and a copy that is left behind ends it."""
        super().__init__(directory, gathered.superblock, backing, gathered.tables, options, home=gathered.copies.home)
        self.copies.on_left = self._raise_without_left_copies
        self.loaded_sequence = 0
        """The last commit that the tables contained when the pool was opened."""
        self._folded_sequence = 0
        self._commit: Commit | None = None
        self._checkpoint: Checkpoint | None = None
        self._is_turning = False
        """Whether the journal is about to go on in its next segment."""
        self.refused: Commit | Checkpoint | None = None
        """What found no room in the journal."""
        self.is_fold_waiting = False
        """Whether a checkpoint waits for room in the tables."""
        self._aside_refusal: IncfsError | None = None
        """Why space for the next fold could not be set aside when that was last tried."""
        self._aside_pages = 0
        """For so many pages it was tried."""

    # Commit and checkpoint

    def begin_commit(self) -> Commit | None:
        """Gather everything since the last commit; None when everything is durable.

        What the data plane's own threads have put into a record that is still being flushed is waited for, too (I13).
        The caller runs ``Commit.run`` in any thread, then ``end_commit`` here.
        """
        self.require_writable()  # first: a commit that failed stays
        assert self._commit is None, "one commit at a time; one that was refused comes first"
        assert self._step is None, "a step is in one commit"
        self.absorb()
        self.note_failed_legs()
        for identity in self._touched:
            record = self.catalog.get(identity)
            assert record is not None
            self._pending.append(["put", identity[0], encode_record(record)])
        self._touched.clear()
        if not self._pending and self.durable_sequence == self.sequence:
            return None
        self.sequence += bool(self._pending)
        changes, self._pending, self.pending_mappings = self._pending, [], 0
        self._commit = Commit(
            self.sequence,
            changes,
            self.pool,
            self.journal,
            self.block_bytes,
            self.options.small_commit_bytes,
            self._folded_sequence,
        )
        return self._commit

    def end_commit(self, commit: Commit) -> None:
        """Note that a commit is durable."""
        assert commit is self._commit
        self._commit = None
        self.durable_sequence = commit.sequence
        self.note_left_copies()

    def begin_checkpoint(self, nonce: int) -> Checkpoint:
        """Begin a commit and freeze what it leads to.

        The caller runs ``run_commit`` (any thread), ``end_checkpoint_commit`` (here; commits
        may go on from then), ``run_fold`` (any thread) and ``end_checkpoint`` (here).
        """
        commit = self.begin_commit()
        if commit is not None:
            commit.is_last = True
        self._is_turning = True
        return self._freeze(commit, self.journal.segment.number + 1, nonce)

    def _freeze(self, commit: Commit | None, segment_number: int, nonce: int) -> Checkpoint:
        assert self._checkpoint is None, "one checkpoint at a time"
        groups, freed = self.pool.freeze()
        self._checkpoint = Checkpoint(
            commit=commit,
            sequence=self.sequence,
            segment_number=segment_number,
            nonce=nonce,
            last_volume_id=self.catalog.last_volume_id,
            layer=self.log.freeze(),
            records=self.catalog.freeze(),
            groups=groups,
            freed=freed,
            pool=self.pool,
            journal=self.journal,
            tables=self.table_copies,
            stamps=self,
        )
        return self._checkpoint

    def fold_recovered(self, sequence: int) -> None:
        """After replay: fold it into the tables and go on appending to the same segment.

        Before this is durable the journal is untouched, so recovery may be cut off anywhere
        and begins again (I5).  Without room for it on the host the checkpoint stays unfinished.
        """
        self.sequence = self.durable_sequence = sequence
        self.note_failed_legs()
        self._touched.clear()
        self._stripe_all()
        checkpoint = self._freeze(None, self.journal.segment.number, 0)
        try:
            checkpoint.reserve()
        except NoSpace as error:
            logger.warning("pool %s is opened without folding its journal: %s", self.directory, error)
            return
        checkpoint.run_fold()
        self.end_checkpoint(checkpoint)

    def keep_recovered(self, sequence: int) -> None:
        """After replay into a pool that must not be written: everything stays in memory."""
        self.sequence = self.durable_sequence = sequence
        self._touched.clear()
        self._stripe_all()

    def end_checkpoint_commit(self, checkpoint: Checkpoint) -> None:
        """Note that the checkpoint's own commit is durable."""
        self._is_turning = False
        if checkpoint.commit is not None:
            self.end_commit(checkpoint.commit)

    def end_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Note that the tables contain the checkpoint: its freed blocks are free."""
        assert checkpoint is self._checkpoint
        self._checkpoint = None
        self._folded_sequence = checkpoint.sequence
        self.plane.set_folded(checkpoint.sequence)
        self.log.thaw()
        self.pool.reuse.make_free(checkpoint.freed)
        self.note_left_copies()

    def write(self, work: Commit | Checkpoint) -> None:
        """Run a commit, also that of a checkpoint.  Any thread.

        Raises:
            MetadataFull: There was no room; ``refuse`` it.
            BackingError: As ``Commit.run``.
        """
        work.run() if isinstance(work, Commit) else work.run_commit()

    def accept(self, work: Commit | Checkpoint) -> None:
        """Note that it is durable."""
        self.refused = None
        if isinstance(work, Commit):
            self.end_commit(work)
        else:
            self.end_checkpoint_commit(work)
        self.review_room()

    def refuse(self, work: Commit | Checkpoint, error: MetadataFull) -> None:
        """Keep a commit for which the journal has no room: until it has, nothing more is written.

        Whoever waits for it is told.  Memory stays as it is, and so does the journal: nothing of the record counts.
        """
        if self.refused is None:
            logger.warning("pool %s has no room for metadata: %s", self.directory, error)
            self.events.record("metadata-full", "pool", str(error))
        self.refused = work
        self.review_room()

    def prepare_again(self, work: Commit | Checkpoint) -> None:
        """Let what found no room take what is left for a segment's last record, if the next segment may follow."""
        if isinstance(work, Commit):
            work.is_last = self._checkpoint is None

    def review_room(self) -> None:
        """Refuse writes, or take them again: as long as the journal has no room for the next records.

        While a fold waits for room, the last quarter of the segment is kept for what makes some: removals, discards.
        """
        is_short = self.is_fold_waiting and self.journal.used_bytes * 4 > self.superblock.journal_bytes * 3
        before, self.no_room = self.no_room, None
        if self.refused is not None or is_short:
            self.no_room = before or MetadataFull(
                f"the disk of the metadata in {self.directory} is full: nothing can be written until there is room; "
                f"free space on it"
            )
        if (before is None) != (self.no_room is None):
            self.serve_anew()
        if before is not None and self.no_room is None:
            logger.info("pool %s has room for metadata again", self.directory)

    @property
    def unfolded_pages(self) -> int:
        """How many pages, records and bitmaps wait to be folded."""
        return self.log.overlay_pages + self.pool.dirty_group_count + self.catalog.unsaved_count

    @property
    def wants_aside(self) -> bool:
        """Whether more space should be set aside for the next fold than is."""
        return 2 * self.unfolded_pages > self._aside_pages

    def set_aside(self, page_count: int) -> None:
        """Have the hosts of the metadata set space aside: for the next fold, and for the last record of a segment.

        So neither depends on what others leave on the disk.  That there is none now is no error; it is asked for
        again.  Any thread.
        """
        pages = max(2 * page_count, self.superblock.journal_bytes // PAGE_COST_BYTES)
        before, self._aside_refusal = self._aside_refusal, None
        try:
            self.journal.reserve()
            self.table_copies.set_aside(fold_bytes(pages))
        except IncfsError as error:
            self._aside_refusal = error
            if before is None:
                logger.warning("space for the next checkpoint cannot be set aside: %s", error)
        self._aside_pages = pages

    @property
    def _is_aside_short(self) -> bool:
        """Whether what is set aside, and cannot be more, is half used up by what waits to be folded."""
        return (
            self._aside_refusal is not None
            and 2 * fold_bytes(self.unfolded_pages) > self.table_copies.reserved_bytes
            and self.unfolded_pages > 0
        )

    def note_left_copies(self) -> None:
        """Tell of copies of the metadata that were left behind; the others know already."""
        for number, reason in self.copies.take_failed().items():
            self.events.record("metadata-failed", f"metadata {self.copies.path_of(number)}", reason, copy=number)

    def look_at_metadata(self) -> None:
        """Learn on which filesystems the metadata is: images leave some of them free.  Any thread."""
        paths = self.copies.current_directories
        self.account.metadata_devices = frozenset(self.backing.measure_directory(path)[2] for path in paths)

    def enter(self, standing: Standing) -> None:
        """Go on in an epoch that parts and directory are at."""
        self.standing = standing
        self.journal.epoch = standing.settled
        self.pool.reuse.is_withheld = standing.is_unproved

    @property
    def point(self) -> Point:
        """How far journal and commits are, durably."""
        return Point(self.journal.segment.number, self.durable_sequence)

    def raise_epoch(self) -> None:
        """End the epoch: what was copied from the pool while it was open fits no more.  Any thread.

        Nothing may be written beside it or afterwards.

        Durability: as ``parts.Raise.run``.

        Raises:
            BackingError: The host failed; everything else is durable.
        """
        self._raise()
        self.copies.settle()

    def _raise(self) -> None:
        with self._stamping:
            begun = Raise(
                self.backing,
                UUID(self.superblock.uuid),
                self.copies.current_directories,
                self.pool.parts(),
                self.point,
                self.copies.leave_directory,
            )
            standing, failed = begun.run(self.standing, next_epoch(self.standing.newest))
            self.enter(standing)
            for part, error in failed.items():
                self._leave_leg(part, error)
            for volume in list(self.pool.volumes.values()):
                if volume.mirror is not None:
                    volume.mirror.note_stamped(Stamp(standing.settled, begun.point))

    def _leave_leg(self, part: Part, error: IncfsError) -> None:
        logger.warning("leg %d of storage volume %d is left behind: %s", part.leg, part.storage_id, error)
        mirror = self.pool.volumes[part.storage_id].mirror
        if mirror is not None:
            mirror.leave(part.leg, str(error))

    def _raise_without_left_copies(self) -> None:
        """End the epoch because a copy of the metadata lacks what comes now: alone, it fits no image any more."""
        if self.standing.settled != NEVER:
            self._raise()

    def write_stamps(self, point: Point) -> None:
        """Write what images and legs say from a checkpoint on.  Any thread."""
        with self._stamping:
            self.pool.write_stamps(Stamp(self.standing.settled, point))

    def sync_stamped(self, point: Point) -> None:
        """Make all data durable, and what images and legs say from a checkpoint on.  Any thread."""
        with self._stamping:
            self.pool.sync_stamped(Stamp(self.standing.settled, point))

    def prove(self) -> None:
        """Take a directory for right that somebody insisted on: all data was checked.  Any thread.

        Durability: durable on return.
        """
        standing = replace(self.standing, is_unproved=False)
        uuid = UUID(self.superblock.uuid)
        self.copies.each_directory(lambda path: write_standing(self.backing, path, uuid, standing))
        self.enter(standing)
        self.copies.settle()

    @property
    def was_written(self) -> bool:
        """Whether anything became durable that the tables did not contain when the pool was opened."""
        return self.durable_sequence > self.loaded_sequence

    @property
    def has_uncommitted(self) -> bool:
        """Whether a commit would write anything."""
        return bool(self._pending or self._touched or self.plane.fresh_count or self.refused)

    @property
    def has_unfolded(self) -> bool:
        """Whether a checkpoint would write anything."""
        return self.has_uncommitted or self.sequence > self._folded_sequence

    @property
    def wants_checkpoint(self) -> bool:
        """Whether journal, memory or what waits to be free have grown enough for a checkpoint."""
        return (
            self.journal.used_bytes * 2 > self.superblock.journal_bytes
            or self.log.overlay_pages > self.options.overlay_pages
            or self.freed_bytes >= self.account.extend_bytes
            or self._is_aside_short
        )

    @property
    def is_checkpointing(self) -> bool:
        """Whether a checkpoint was begun and has not ended."""
        return self._checkpoint is not None

    @property
    def unfinished_checkpoint(self) -> Checkpoint | None:
        """The checkpoint that was begun and has not ended: after opening, recovery's own, which lacked room."""
        return self._checkpoint

    def lend_journal(self) -> None:
        """Let the data plane's own threads commit by themselves, while nothing else waits to be committed."""
        is_at_rest = not (self._pending or self._touched or self._commit or self._is_turning)
        if self._is_watched and is_at_rest and self.failure is None:
            assert not isinstance(self.plane, DataPlane)
            most_blocks = self.options.small_commit_bytes // self.block_bytes
            self.journal.lend(self.plane, sequence=self.sequence, folded=self._folded_sequence, most_blocks=most_blocks)

    # Synchronous driving: offline commands, tests

    def commit(self) -> None:
        """Make everything written so far durable.

        Durability: durable on return.
        """
        self._write_refused()
        commit = self.begin_commit()
        if commit is not None:
            self._write(commit)

    def _write_refused(self) -> None:
        if self.refused is not None:
            self.prepare_again(self.refused)
            self._write(self.refused)

    def _write(self, work: Commit | Checkpoint) -> None:
        try:
            self._guard(lambda: self.write(work))
        except MetadataFull as error:
            self.refuse(work, error)
            raise
        self.accept(work)

    def checkpoint(self) -> None:
        """Commit, and fold everything into the tables."""
        self.require_writable()  # the one that is unfinished may be what failed
        self._write_refused()
        if self._checkpoint is not None:
            self._finish(self._checkpoint)
        checkpoint = self.begin_checkpoint(new_nonce())
        self._write(checkpoint)
        self._finish(checkpoint)

    def _finish(self, checkpoint: Checkpoint) -> None:
        """Fold; when the host has no room for that, it may be tried again."""
        try:
            checkpoint.write_stamps()
        except BackingError as error:
            self.fail(error)
            raise
        checkpoint.reserve()
        self._guard(checkpoint.run_fold)
        self.end_checkpoint(checkpoint)
        self.set_aside(self.unfolded_pages)

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except MetadataFull:
            raise  # nothing is harmed
        except IncfsError as error:
            self.fail(error)
            raise

    def close(self) -> None:
        """Checkpoint unless the pool failed, and let go of every file.

        Durability: everything is durable on return, or the error is raised; files are closed
        in both cases.  Without room for a checkpoint it is all in the journal.
        """
        try:
            if self.failure is None:
                self._checkpoint_or_commit()
                self._guard(self.raise_epoch)
        finally:
            self.abandon()

    def _checkpoint_or_commit(self) -> None:
        try:
            self.checkpoint()
        except NoSpace as error:
            if self.failure is not None:
                raise
            self.commit()  # the checkpoint that lacks room may be an earlier one
            logger.warning("pool %s is closed without a checkpoint: %s", self.directory, error)

    def abandon(self) -> None:
        """Let go of every file without writing, as a crash would."""
        self.events.flush()
        self.pool.close()
        self.baselines.close()
        self.journal.close()
        self.table_copies.close()
        self.copies.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, IncfsError):
            self.close()
        else:
            self.abandon()


def new_nonce() -> int:
    """Make the random mark of a journal segment."""
    return int.from_bytes(os.urandom(8), "little")
