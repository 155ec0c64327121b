"""What the service does with the copies of the metadata: adds, removes, brings back those that were left behind.

A copy is written beside commits, but not beside a checkpoint; it begins to count between two commits.
The trio thread.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Final

import trio

from incfs import copymaker
from incfs.committer import Committer, offload
from incfs.errors import IncfsError, NotFound, UsageError
from incfs.gather import real_directory
from incfs.roster import Place
from incfs.store import Store

logger = logging.getLogger(__name__)

_LOOK_EVERY_S: Final = 15.0
"""How often it is looked whether a copy that was left behind is there again."""


class CopyKeeper:
    """The copies of one open pool's metadata."""

    def __init__(self, store: Store, committer: Committer) -> None:
        self._store = store
        self._committer = committer
        self._lock = trio.Lock()

    async def add(self, directory: Path, *, force: bool = False) -> None:
        """Have the metadata in a further directory; or bring the copy there up to date, if there is one already.

        Durability: that copy has everything on return.

        Raises:
            AlreadyExists: The directory is not empty.
            UsageError: It is up to date already, or on a filesystem that has a copy.
            LimitExceeded: There are four copies.
        """
        self._store.require_writable()
        async with self._lock:
            number = await self._committer.at_rest(partial(copymaker.announce, self._store, directory, force=force))
            if number in self._store.copies.current:
                raise UsageError(f"the copy of the metadata in {directory} is up to date already")
            await self._bring_back(number)
            self._store.events.record("metadata-added", f"metadata {directory}", "somebody asked for it")

    async def _bring_back(self, number: int) -> None:
        with trio.CancelScope(shield=True):  # what is half made would keep its lock and its files
            async with self._committer.without_checkpoints():
                begun = await offload(partial(copymaker.begin, self._store, number))
                await self._committer.at_rest(partial(copymaker.finish, self._store, begun))

    async def remove(self, directory: Path) -> None:
        """Let a directory hold no copy any more, and delete the files in it if it is there.

        Raises:
            NotFound: It holds none.
            UsageError: The pool was opened by it, or its images lie in it.
        """
        self._store.require_writable()
        async with self._lock:
            number = self._number_of(directory)
            path = await self._committer.at_rest(partial(copymaker.remove, self._store, number))
            self._store.events.record("metadata-removed", f"metadata {path}", "somebody asked for it")
            try:
                await offload(partial(copymaker.delete, self._store, number, path))
            except IncfsError as error:
                logger.warning(
                    "%s is no copy of the metadata any more, but its files could not be deleted: %s", path, error
                )

    def _number_of(self, directory: Path) -> int:
        wanted = real_directory(directory)
        for place in self._places():
            if Path(place.path) == wanted or self._store.copies.directories.get(place.number) == wanted:
                return place.number
        raise NotFound(f"{directory} holds no copy of this pool's metadata; see `incfs pool metadata list`")

    def _places(self) -> tuple[Place, ...]:
        roster = self._store.copies.roster
        return roster.places if roster is not None else ()

    async def scrub(self) -> dict[str, str]:
        """Read every copy whole; make those anew that are damaged while another is not.

        Returns:
            The directories of damaged ones, and what is wrong with each.
        """
        copies, damaged = self._store.copies, dict[int, str]()
        async with self._lock:
            for number in list(copies.current):
                try:
                    await offload(partial(self._store.table_copies.verify, number))
                except IncfsError as error:
                    damaged[number] = str(error)
            if set(copies.current) - set(damaged) and self._store.failure is None:
                for number, reason in damaged.items():
                    await self._make_anew(number, reason)
        return {str(copies.path_of(number)): reason for number, reason in damaged.items()}

    async def _make_anew(self, number: int, reason: str) -> None:
        copies = self._store.copies
        if copies.leave(number, reason):
            await self._committer.at_rest(copies.settle)
            self._store.note_left_copies()
            await self._bring_back(number)
            copymaker.tell_restored(self._store, number)

    async def run(self) -> None:
        """Bring copies back that were left behind as soon as they are there again; never returns."""
        while True:
            await trio.sleep(_LOOK_EVERY_S)
            if self._store.failure is None and len(self._store.copies.current) < len(self._places()):
                await self._look()

    async def _look(self) -> None:
        async with self._lock:
            for place in self._places():
                if place.number not in self._store.copies.current:
                    await self._try(place)

    async def _try(self, place: Place) -> None:
        reasons = self._store.copies.reasons
        try:
            if not await offload(partial(copymaker.is_there, self._store, place)):
                return
            await self._bring_back(place.number)
        except IncfsError as error:
            if reasons.get(place.number) != str(error):
                logger.warning("the metadata in %s cannot be brought up to date: %s", place.path, error)
            reasons[place.number] = str(error)
        else:
            copymaker.tell_restored(self._store, place.number)
