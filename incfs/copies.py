"""The copies of the metadata that lie beside the images: when one is due, and how they are written.

One lies beside each leg, so that whatever disk is left has one.  All are written side by side, from one pass
over the tables.  They are for a pool directory that is lost: that one cannot be written harms nothing else.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from incfs.backing import translate
from incfs.dump import Writing, dump_lines, packed
from incfs.errors import IncfsError
from incfs.store import Store

SUFFIX = ".dump.gz"
"""Behind the name of an image: the copy beside it."""
END_INTERVAL_S = 3600.0
"""When a pool that was written is closed, copies that are older are replaced."""
_END_LIMIT_S = 10.0
_END_LEAST_S = 1.0
_END_LIMIT_WITHOUT_S = 60.0
_RECENT_S = 7 * 86400.0
_CLOCK_SLACK_S = 60.0


def paths(store: Store) -> list[Path]:
    """Name the copies beside the legs that are there."""
    return [image.with_name(image.name + SUFFIX) for image in _legs(store)]


def _legs(store: Store) -> Iterator[Path]:
    for storage in list(store.catalog.storages.values()):
        volume = store.pool.volumes.get(storage.id)
        mirror = volume.mirror if volume is not None else None
        for number, path in enumerate(store.pool.images.leg_paths(storage)):
            if mirror is None or (mirror.legs[number] is not None and number not in mirror.failed):
                yield path


def are_due(store: Store, interval_s: float) -> bool:
    """Tell whether a leg has no copy that is younger than ``interval_s``; one of the future is none.  Any thread.

    Raises:
        BackingError: The host does not tell.
    """
    now = time.time()
    return any(not now - interval_s <= _written(path) <= now + _CLOCK_SLACK_S for path in paths(store))


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return -1.0
    except OSError as error:
        raise translate(error, path, "examine") from error


def end_limit_s(store: Store, open_for_s: float) -> float:
    """Tell how long closing a pool may take for copies.  Any thread.

    No longer than it was open: a short command holds up the next one.  Longer if there is none of the last week.

    Raises:
        BackingError: The host does not tell.
    """
    if are_due(store, _RECENT_S):
        return _END_LIMIT_WITHOUT_S
    return min(_END_LIMIT_S, max(_END_LEAST_S, open_for_s))


def write(store: Store, goes_on: Callable[[], bool] = lambda: True) -> bool:
    """Write a dump of the last checkpoint beside each leg; the one that was there is kept as ``.1``.  Any thread.

    Durability: durable on return.
    Atomicity: each appears whole, or not at all.

    Args:
        store: The pool.
        goes_on: Asked now and then; when it says no the copies that are there stay.

    Returns:
        Whether it was let go on to the end.

    Raises:
        IncfsError: A copy could not be written; the others were.
    """
    pieces = packed(dump_lines(store))
    attempts = _Attempts(store)
    try:
        for piece in pieces:
            if not goes_on():
                return False
            attempts.each(lambda writing, piece=piece: writing.append(piece))  # type: ignore[misc]
        attempts.each(_publish)
    finally:
        pieces.close()
        attempts.abandon()
    if attempts.failure is not None:
        raise attempts.failure
    return True


def _publish(writing: Writing) -> None:
    writing.publish(kept_as=writing.path.with_name(writing.path.name + ".1"))


class _Attempts:
    """Copies under way; one that fails is given up, the others go on."""

    def __init__(self, store: Store) -> None:
        self.failure: IncfsError | None = None
        self._writings: list[Writing] = []
        for path in paths(store):
            try:
                self._writings.append(Writing(store.backing, path))
            except IncfsError as error:
                self.failure = error

    def each(self, work: Callable[[Writing], None]) -> None:
        for writing in list(self._writings):
            try:
                work(writing)
            except IncfsError as error:
                self.failure = error
                self._writings.remove(writing)
                writing.abandon()

    def abandon(self) -> None:
        for writing in self._writings:
            writing.abandon()
