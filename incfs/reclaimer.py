"""Frees the blocks of removed volumes and snapshots, in small steps beside everything else.

What it had not done when the pool was cut off, it goes on with at the next open.
"""

import logging
from collections.abc import Callable

import trio

from incfs import volume
from incfs.committer import COMMIT_AT_MAPPINGS, Committer
from incfs.errors import Damaged, IncfsError, MetadataFull
from incfs.model import MapId, VolumeId
from incfs.store import Store

logger = logging.getLogger(__name__)

_STEP_PAGES = 2
"""Map pages of one step, about 0.3 ms each: what others wait for it at the most."""
_NO_ROOM_RETRY_S = 1.0


class Reclaimer:
    """The one task that reclaims."""

    def __init__(self, store: Store, committer: Committer, is_open: Callable[[MapId], bool]) -> None:
        self._store = store
        self._committer = committer
        self._is_open = is_open
        self._wanted = trio.Event()
        self._idle = trio.Event()

    def reclaim_soon(self) -> None:
        """Say that something was removed, or that a removed volume was closed."""
        self._wanted.set()
        if self._idle.is_set():
            self._idle = trio.Event()

    async def wait_idle(self) -> None:
        """Wait until all that was removed is reclaimed, but for what is still open."""
        await self._idle.wait()

    async def run(self) -> None:
        """Reclaim whenever something was removed; never returns."""
        while True:
            try:
                for volume_id in self._store.catalog.volumes_to_reclaim():
                    await self._reclaim_sound(volume_id)
            except MetadataFull:  # what is left is reclaimed when there is room; who waits for space has none of it
                self._idle.set()
                await trio.sleep(_NO_ROOM_RETRY_S)
                continue
            except IncfsError as error:
                self._store.fail(error)
            if not self._wanted.is_set():
                self._idle.set()
            await self._wanted.wait()
            self._wanted = trio.Event()

    async def _reclaim_sound(self, volume_id: VolumeId) -> None:
        try:
            await self._reclaim(volume_id)
        except Damaged as error:
            # Nothing was changed by the step that failed.  What is left of this one stays in use.
            logger.warning("what was removed of volume %d is not reclaimed: %s", volume_id, error)

    async def _reclaim(self, volume_id: VolumeId) -> None:
        while self._store.failure is None and not self._is_held(volume_id):
            if volume.reclaim(self._store, volume_id, _STEP_PAGES):
                return
            if self._store.pending_mappings >= COMMIT_AT_MAPPINGS:
                await self._committer.commit()
            await trio.lowlevel.checkpoint()

    def _is_held(self, volume_id: VolumeId) -> bool:
        found = self._store.catalog.volume(volume_id)
        return not found.name and self._is_open(found.map_id)
