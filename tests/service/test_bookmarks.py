"""Bookmarks while somebody uses them."""

from pathlib import Path

import pytest
import trio

from incfs.errors import Busy
from incfs.model import Snapshot
from incfs.recovery import create_pool
from incfs.service import Service, open_service


async def prepare(service: Service) -> Snapshot:
    """A bookmark whose snapshot is gone, and a newer snapshot."""
    volume = await service.create_volume("a", 1 << 20)
    (first,) = await service.create_snapshots([(volume.id, "one")])
    await service.branches.bookmark(first, "m")
    await service.remove_snapshots([first])
    await service.wait_reclaimed()
    await service.write(volume.map_id, 0, b"x" * 200_000)
    (taken,) = await service.create_snapshots([(volume.id, "two")])
    return taken


async def test_a_bookmark_is_not_removed_while_a_stream_starts_from_it(tmp_path: Path) -> None:
    """Its trail would go to an older one, or be dropped, and the stream would lack blocks."""
    create_pool(tmp_path)
    async with open_service(tmp_path) as service:
        taken = await prepare(service)
        plan = service.transfers.plan([(service.volume("a"), taken)], base="#m")
        begun, proceed = trio.Event(), trio.Event()

        async def put(data: bytes) -> None:
            del data
            begun.set()
            await proceed.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: service.transfers.send(plan, put, level=1))
            await begun.wait()
            with pytest.raises(Busy, match="a#m is in use by send"):
                await service.branches.remove_bookmarks([(taken.volume_id, "m")])
            with pytest.raises(Busy, match="a#m is in use by send"):
                await service.branches.move_bookmark(taken, "m")
            proceed.set()
        moved = await service.branches.move_bookmark(taken, "m")
        assert (moved.uuid, service.branches.bookmarks(taken.volume_id)) == (taken.uuid, [moved])
        await service.branches.remove_bookmarks([(taken.volume_id, "m")])
        assert service.branches.bookmarks(taken.volume_id) == []
