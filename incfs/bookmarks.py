"""Bookmarks: points of a volume that increments can start from when their snapshots are gone.

One is made from a snapshot and holds no data, so it is in nobody's way: its snapshot may be removed, and the blocks
of that are free.  ``trails`` keeps what was written since.  Several names of one snapshot share a record.
"""

from dataclasses import replace

from incfs.errors import AlreadyExists, BookmarkNotFound, LimitExceeded
from incfs.model import Bookmark, Generation, Snapshot, Volume, VolumeId, validate_name
from incfs.overlay import TableKey
from incfs.store import Store

MAX_NAMES = 256
"""Bookmarks of one snapshot: their record stays small."""


def create(store: Store, snapshot: Snapshot, name: str) -> Bookmark:
    """Give a snapshot's point a name that outlives it.

    Cost: independent of the volume's size (I6).

    Raises:
        InvalidName, AlreadyExists: Of the name.
        LimitExceeded: The snapshot has too many bookmarks.
    """
    store.begin_change()
    validate_name(name, what="bookmark")
    volume = store.catalog.volume(snapshot.volume_id)
    if any(name in bookmark.names for bookmark in store.catalog.bookmarks(volume.id)):
        raise AlreadyExists(f"volume {volume.name} has a bookmark {name!r} already", volume=volume.name, bookmark=name)
    known = store.catalog.get(("bookmark", (volume.id, snapshot.generation)))
    names = {**known.names, name: store.clock()} if isinstance(known, Bookmark) else {name: store.clock()}
    if len(names) > MAX_NAMES:
        raise LimitExceeded(f"snapshot {snapshot.name} has {MAX_NAMES} bookmarks already; remove one first")
    facts = snapshot.uuid, snapshot.size_bytes, snapshot.created_ns
    made = Bookmark(volume.id, snapshot.generation, *facts, names)
    store.change(made)
    return made


def remove(store: Store, volume_id: VolumeId, name: str) -> Bookmark:
    """Forget a bookmark; with the last name of its point ``forget_some`` empties the trail, later.

    Returns:
        It, without the name.

    Raises:
        BookmarkNotFound: No such bookmark.
    """
    store.begin_change()
    found = named(store, volume_id, name)
    left = replace(found, names={known: when for known, when in found.names.items() if known != name})
    store.change(left)
    return left


def named(store: Store, volume_id: VolumeId, name: str) -> Bookmark:
    """Look up a bookmark by its name alone.

    Raises:
        BookmarkNotFound: No such bookmark.
    """
    found = store.catalog.bookmark(volume_id, name)
    if name not in found.names:
        whose = store.catalog.volume(volume_id).name
        raise BookmarkNotFound(f"{name!r} is no name of a bookmark of volume {whose}", volume=whose, bookmark=name)
    return found


def newer_than(store: Store, target: Snapshot) -> list[Bookmark]:
    """List the bookmarks of points that a rollback undoes."""
    return [known for known in store.catalog.bookmarks(target.volume_id) if known.generation > target.generation]


def forget_some(store: Store, volume: Volume, page_count: int) -> bool:
    """Empty trails of removed bookmarks, and of all if the volume is removed; one bounded step.

    Returns:
        Whether nothing is left to do.
    """
    gone = [known for known in store.catalog.bookmarks(volume.id, removed=True) if not (volume.name and known.names)]
    if not gone:
        return True
    generation = Generation(gone[0].generation)
    pages = store.log.occupied_pages(TableKey(volume.id, generation, is_trail=True), page_count)
    if pages:
        store.trails.hand_on(volume, generation, pages)
    else:
        store.drop(("bookmark", (volume.id, generation)))
    return False
