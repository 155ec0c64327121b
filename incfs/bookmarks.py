"""Bookmarks: points of a volume that increments can start from when their snapshots are gone.

One is made from a snapshot and holds no data, so it is in nobody's way: its snapshot may be removed, and the blocks
of that are free.  ``trails`` keeps what was written since.  Several names of one snapshot share a record.
"""

from incfs.errors import AlreadyExists, BookmarkNotFound, LimitExceeded
from incfs.memory import one_step
from incfs.model import Bookmark, Snapshot, Volume, VolumeId, validate_name
from incfs.overlay import TableKey
from incfs.store import Store

MAX_NAMES = 256
"""Bookmarks of one snapshot: their record stays small."""


@one_step
def create(store: Store, snapshot: Snapshot, name: str) -> Bookmark:
    """Give a snapshot's point a name that outlives it.

    Cost: independent of the volume's size (I6).

    Raises:
        InvalidName, AlreadyExists: Of the name.
        LimitExceeded: The snapshot has too many bookmarks.
    """
    validate_name(name, what="bookmark")
    volume = store.catalog.volume(snapshot.volume_id)
    if store.catalog.has_bookmark_name(volume.id, name):
        raise AlreadyExists(f"volume {volume.name} has a bookmark {name!r} already", volume=volume.name, bookmark=name)
    return _give_name(store, snapshot, name)


def _give_name(store: Store, snapshot: Snapshot, name: str) -> Bookmark:
    known = store.catalog.get(("bookmark", (snapshot.volume_id, snapshot.generation)))
    names = {**known.names, name: store.clock()} if isinstance(known, Bookmark) else {name: store.clock()}
    if len(names) > MAX_NAMES:
        raise LimitExceeded(f"snapshot {snapshot.name} has {MAX_NAMES} bookmarks already; remove one first")
    if isinstance(known, Bookmark):
        return store.amend(known, names=names)
    facts = snapshot.uuid, snapshot.size_bytes, snapshot.created_ns
    made = Bookmark(snapshot.volume_id, snapshot.generation, *facts, names)
    store.add(made)
    return made


@one_step
def move(store: Store, snapshot: Snapshot, name: str) -> Bookmark:
    """Let a bookmark be of another snapshot of its volume; it is made if there is none.

    Atomicity: one change.

    Raises:
        InvalidName, LimitExceeded: As ``create``.
    """
    known = find(store, snapshot.volume_id, name)
    if known is None:
        return create(store, snapshot, name)
    if known.generation == snapshot.generation:
        return known
    _take_name(store, known, name)
    return _give_name(store, snapshot, name)


def find(store: Store, volume_id: VolumeId, name: str) -> Bookmark | None:
    """Look up a bookmark by its name alone, if there is one."""
    is_there = store.catalog.has_bookmark_name(volume_id, name)
    return store.catalog.bookmark(volume_id, name) if is_there else None


def _take_name(store: Store, bookmark: Bookmark, name: str) -> Bookmark:
    return store.amend(bookmark, names={known: when for known, when in bookmark.names.items() if known != name})


@one_step
def remove(store: Store, volume_id: VolumeId, name: str) -> Bookmark:
    """Forget a bookmark; with the last name of its point ``forget_some`` empties the trail, later.

    Returns:
        It, without the name.

    Raises:
        BookmarkNotFound: No such bookmark.
    """
    return _take_name(store, named(store, volume_id, name), name)


def named(store: Store, volume_id: VolumeId, name: str) -> Bookmark:
    """Look up a bookmark by its name alone.

    Raises:
        BookmarkNotFound: No such bookmark.
    """
    found = find(store, volume_id, name)
    if found is None:
        whose = store.catalog.volume(volume_id).name
        raise BookmarkNotFound(f"volume {whose} has no bookmark {name!r}", volume=whose, bookmark=name)
    return found


def newer_than(store: Store, target: Snapshot) -> list[Bookmark]:
    """List the bookmarks of points that a rollback undoes."""
    return [known for known in store.catalog.bookmarks(target.volume_id) if known.generation > target.generation]


def forget_some(store: Store, volume: Volume, page_count: int) -> bool:
    """Empty trails of removed bookmarks, and of all if the volume is removed; one bounded step.

    Returns:
        Whether nothing is left to do.
    """
    generation = store.catalog.bookmark_to_forget(volume)
    if not generation:
        return True
    pages = store.log.occupied_pages(TableKey(volume.id, generation, is_trail=True), page_count)
    if pages:
        store.trails.hand_on(volume, generation, pages)
    else:
        store.drop(("bookmark", (volume.id, generation)))
    return False
