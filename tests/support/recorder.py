"""Records a workload and what each of its commits must bring back after a power cut (I5)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

from incfs import reuse
from incfs.checkpoint import Commit
from incfs.model import PAGE_BLOCKS, Bookmark
from incfs.options import Options
from incfs.overlay import TableKey
from incfs.store import Store, new_nonce
from tests.support import pools
from tests.support.media import Event, Media, MemoryBacking, seeded_randomness
from tests.support.power import Machine

CHUNK_BYTES = 512
"""Stretches that are punched in tiny pools."""


def picture(store: Store) -> bytes:
    """Give a digest of everything in the pool: records, trails, and the bytes of each volume and snapshot."""
    digest = blake2b(digest_size=16)
    for kind in ("storages", "volumes"):
        digest.update(repr(sorted(getattr(store.catalog, kind).items())).encode())
    digest.update(repr(store.catalog.policy).encode())
    for volume in sorted(store.catalog.volumes.values(), key=lambda v: v.id):
        for taken in store.catalog.snapshots(volume.id, removed=True):
            digest.update(repr(taken).encode())
            if taken.name and volume.name:
                digest.update(pools.read(store, taken.map_id))
        for bookmark in store.catalog.bookmarks(volume.id, removed=True):
            digest.update(repr((bookmark, trail(store, bookmark))).encode())
        if volume.name:
            digest.update(pools.read(store, volume.map_id))
    return digest.digest()


def trail(store: Store, bookmark: Bookmark) -> list[int]:
    """List the virtual blocks that a bookmark's trail names."""
    table = TableKey(bookmark.volume_id, bookmark.generation, is_trail=True)
    pages = store.log.page_indexes(table)
    return [page * PAGE_BLOCKS + slot for page in pages for slot in sorted(store.log.noted(table, page))]


@dataclass(frozen=True, slots=True)
class Cut:
    """A moment at which the power may fail."""

    number: int
    event: Event
    machine: Machine
    allowed: frozenset[bytes]
    """What may be found afterwards."""


class Recorder:
    """Runs a workload in memory and notes what each commit must bring back (I5)."""

    def __init__(self, root: Path, media: Media, options: Options, backing: MemoryBacking | None = None) -> None:
        self.options = options
        self.media = media
        self.points: list[bytes] = []
        self.backing = backing or MemoryBacking(root)
        self._root = root
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(seeded_randomness(1))
        self._stack.enter_context(tiny_punches())
        self.backing.load(self.media)
        self._stack.enter_context(self.backing.recording_tables())
        self.store = pools.open_tiny(self._root / "pool", self.options, self.backing)
        self._stack.callback(self.store.abandon)
        self.points.append(picture(self.store))
        self._watch_commits(self.store)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _watch_commits(self, store: Store) -> None:
        """Commits and checkpoints happen inside other operations too, to make space."""
        begin_commit, end_commit, checkpoint = store.begin_commit, store.end_commit, store.checkpoint

        def begin() -> Commit | None:
            commit = begin_commit()
            if commit is not None:
                with self.backing.undisturbed():
                    self.points.append(picture(store))
                self.backing.mark(("begun", len(self.points) - 1))
            return commit

        def end(commit: Commit) -> None:
            end_commit(commit)
            self.backing.mark(("durable", len(self.points) - 1))

        def fold() -> None:
            checkpoint()
            pools.give_back(store)

        store.begin_commit = begin  # type: ignore[method-assign]
        store.end_commit = end  # type: ignore[method-assign]
        store.checkpoint = fold  # type: ignore[method-assign]

    def checkpoint(self, between: Callable[[], None]) -> None:
        """A checkpoint, with work and commits between its parts."""
        checkpoint = self.store.begin_checkpoint(new_nonce())
        checkpoint.run_commit()
        self.store.end_checkpoint_commit(checkpoint)
        between()
        checkpoint.run_fold()
        self.store.end_checkpoint(checkpoint)
        pools.give_back(self.store, between)

    def cuts(self) -> Iterator[Cut]:
        """Yield the moments before each sync and around each commit.

        What a cut at another moment may leave is among what a cut before the next sync may
        leave: without the writes in between.
        """
        machine = Machine(self.media)
        oldest = newest = 0
        events = self.backing.events
        is_new = True
        for number, event in enumerate(events):
            machine.play(event)
            if event.kind == "mark":
                kind, point = event.note
                oldest, newest = (point, newest) if kind == "durable" else (oldest, point)
            is_new |= event.kind != "mark" or event.note[0] == "durable"
            is_last = number + 1 == len(events)
            if is_new and (is_last or events[number + 1].kind in ("sync", "sync-directory", "mark")):
                is_new = False
                yield Cut(number, event, machine, frozenset(self.points[oldest : newest + 1]))


@contextmanager
def tiny_punches() -> Iterator[None]:
    """Let tiny pools punch holes, too."""
    original = reuse.CHUNK_BYTES
    reuse.CHUNK_BYTES = CHUNK_BYTES
    try:
        yield
    finally:
        reuse.CHUNK_BYTES = original


def make_media(root: Path, fill: Callable[[Store], None] | None = None, **options: Any) -> Media:
    """Create a tiny pool in memory; give its files when everything is durable."""
    with seeded_randomness(0):
        backing = MemoryBacking(root)
        pool = pools.make_pool(root, backing=backing, **options)
        if fill is not None:
            store = pools.open_tiny(pool, pools.tiny_options(), backing)
            fill(store)
            store.close()
        return backing.media()
