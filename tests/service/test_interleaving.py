"""Operations of the service, at each await of which something else happens: what that changed stays changed."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
import trio

from incfs import removal, snapshot
from incfs import volume as volumes
from incfs.dataplane import Refused
from incfs.errors import Busy
from incfs.model import MapId, StorageId, VolumeId
from incfs.service import Service, open_service
from incfs.store import Store
from tests.support.interleaving import act_at
from tests.support.pools import check_memory, make_pool, tiny_options

BLOCK = 64
PAGE = 512 * BLOCK
OPERATION_S = 60
DATA = b"v" * 2 * PAGE
LATER = b"w" * BLOCK


class Bench:
    """A service with two storage volumes, a volume ``v`` with snapshots ``s`` and ``gone``, and a clone of it."""

    def __init__(self, service: Service, volume_id: VolumeId, clone_id: VolumeId) -> None:
        self.service = service
        self.volume_id = volume_id
        self.clone_id = clone_id
        self.has_acted = False
        self.data = DATA

    @property
    def store(self) -> Store:
        return self.service._store

    @property
    def table(self) -> MapId:
        return self.store.catalog.volume(self.volume_id).map_id

    def act(self) -> None:
        """What others do in one step: a write, a snapshot made, one removed, a volume renamed, a leg that fails."""
        store = self.store
        self.has_acted = True
        with suppress(Refused):  # a page or a lease is missing: it would wait, as hot threads do
            store.plane.write(self.table, BLOCK, LATER)
            self.data = DATA[:BLOCK] + LATER + DATA[2 * BLOCK :]
        snapshot.create(store, [(self.volume_id, "between")])
        removal.remove(store, [store.catalog.snapshot(self.volume_id, "gone")])
        volumes.rename(store, self.volume_id, "renamed")
        volumes.set_attributes(store, self.clone_id, mode=0o640)
        store.touch(store.catalog.storage(StorageId(1)), stale_legs=(1,))

    async def prove(self) -> None:
        """All of that is there, whatever the operation had read before."""
        store, service = self.store, self.service
        if self.has_acted:
            assert store.catalog.volume(self.volume_id).name == "renamed"
            assert store.catalog.volume(self.clone_id).mode == 0o640
            assert store.catalog.storage(StorageId(1)).stale_legs == (1,)
            assert [s.name for s in service.snapshots(self.volume_id) if s.name in ("gone", "between")] == ["between"]
        await service.wait_reclaimed()
        for name, expected in (("s", DATA), ("between", self.data)):
            if name != "between" or self.has_acted:
                taken = service.snapshot(self.volume_id, name)
                assert await service.read(taken.map_id, 0, 2 * PAGE) == expected
        assert await service.read(self.table, 0, 2 * PAGE) == self.data
        assert await service.read(store.catalog.volume(self.clone_id).map_id, 0, 2 * PAGE) == DATA
        await service.checkpoint()
        report = await service.inspection.check(data=True)
        assert report.is_clean, report.problems
        check_memory(store)


@asynccontextmanager
async def bench_of(home: Path) -> AsyncIterator[Bench]:
    home.mkdir()
    async with open_service(make_pool(home, storages=2), tiny_options()) as service:
        made = await service.create_volume("v", 2 * PAGE)
        await service.write(made.map_id, 0, DATA)
        await service.create_snapshots([(made.id, "s")])
        await service.create_snapshots([(made.id, "gone")])
        clone = await service.branches.clone(service.snapshot(made.id, "s"), "c")
        await service.write(made.map_id, 0, DATA[:BLOCK])  # leases some more
        yield Bench(service, made.id, clone.id)


def quiet_progress(_done: int, _total: int) -> None:
    """Nobody looks."""


async def remove_in_use(b: Bench) -> None:
    with pytest.raises(Busy):
        await b.service.upkeep.remove_storage(StorageId(1))


Operation = Callable[[Bench], Awaitable[object]]
OPERATIONS: dict[str, Operation] = {
    "evacuate": lambda b: b.service.upkeep.evacuate(StorageId(1), rate_bytes=None, progress=quiet_progress),
    "remove a storage volume in use": remove_in_use,
    "stripe": lambda b: b.service.upkeep.stripe(b.volume_id, columns=2, unit_bytes=BLOCK),
    "flatten": lambda b: b.service.branches.flatten(b.clone_id, quiet_progress),
    "grow": lambda b: b.service.resize_volume(b.volume_id, 3 * PAGE),
    "snapshot": lambda b: b.service.create_snapshots([(b.volume_id, "own"), (b.clone_id, "own")]),
    "commit": lambda b: b.service.commit(),
    "checkpoint": lambda b: b.service.checkpoint(),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
async def test_something_else_at_each_await(operation: Operation, pool_home: Path) -> None:
    for step in count(1):
        async with bench_of(pool_home / f"step{step}") as bench:
            with trio.fail_after(OPERATION_S):
                has_acted = await act_at(step, lambda bench=bench: operation(bench), bench.act)  # type: ignore[misc]
                await bench.prove()
        if not has_acted:
            break
    assert step > 1
