"""Every operation of the service, cancelled at each of its awaits: nothing is kept, everything goes on."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
import trio

from incfs.errors import AlreadyExists, NoSpace, NotFound
from incfs.model import MapId, VolumeId
from incfs.rangecopy import clone_range
from incfs.service import Service, open_service
from incfs.storage import StorageVolume
from incfs.store import Store
from tests.support.cancelling import cancel_at
from tests.support.pools import check_memory, make_pool, tiny_options

BLOCK = 64
PAGE = 512 * BLOCK
OPERATION_S = 60
"""No operation here takes more than milliseconds: this long means that it is stuck."""


class Bench:
    """A service with a volume ``v`` of three pages, two snapshots of it, and what each round needs anew."""

    def __init__(self, service: Service, home: Path) -> None:
        self.service = service
        self.home = home
        self.volume_id = VolumeId(0)
        self.round = 0

    @property
    def store(self) -> Store:
        return self.service._store

    @property
    def table(self) -> MapId:
        return self.service.volume_by_id(self.volume_id).map_id

    async def begin(self) -> None:
        """Prepare a round: names of its own, and nothing resident."""
        self.round += 1
        for name in (f"old{self.round}", f"other{self.round}"):
            made = await self.service.create_volume(name, 2 * PAGE)
            await self.service.write(made.map_id, BLOCK, b"o" * PAGE)
        volume = self.service.volume(f"old{self.round}")
        await self.service.create_snapshots([(volume.id, "s"), (self.volume_id, f"r{self.round}")])
        await self.service.write(volume.map_id, 0, b"p" * PAGE)
        await self.service.checkpoint()
        for table in (self.table, volume.map_id, self.service.snapshot(volume.id, "s").map_id):
            self.store.evict(table)

    def own(self, name: str = "old") -> VolumeId:
        """A volume that only this round has."""
        return self.service.volume(f"{name}{self.round}").id

    def prove_complete(self) -> None:
        """Nothing was left half done: a shrink kept its volume out of the native data plane until the next one."""
        assert all(v.trim_from_bytes is None for v in self.store.catalog.volumes.values())

    async def prove(self) -> None:
        """Nothing is held, and the rest of the service works."""
        async with self.service._driver.space_lock:  # who left it locked would have us wait for ever
            pass  # the keeper may give space back at this moment
        assert self.store.pool.reuse.held == 0
        assert not self.service.handles._holders
        name = f"proof{self.round}"
        made = await self.service.create_volume(name)
        await self.service.write(made.map_id, 10, b"z" * 100)
        await self.service.create_snapshots([(made.id, "s")])
        await self.service.discard(made.map_id, 0, BLOCK)
        assert await self.service.read(made.map_id, 0, 200) == bytes(BLOCK) + b"z" * (110 - BLOCK)
        await self.service.remove_volume(made.id, snapshots=True)
        for volume in self.service.volumes():
            if volume.name != "v":
                await self.service.remove_volume(volume.id, snapshots=True)
        await self.service.wait_reclaimed()
        assert [v.name for v in self.store.catalog.volumes.values()] == ["v"]
        report = await self.service.inspection.check(data=True)
        assert report.is_clean, report.problems
        check_memory(self.store)


@asynccontextmanager
async def bench_of(home: Path) -> AsyncIterator[Bench]:
    home.mkdir(exist_ok=True)
    async with open_service(make_pool(home), tiny_options()) as service:
        bench = Bench(service, home)
        bench.volume_id = (await service.create_volume("v", 3 * PAGE)).id
        await service.write(bench.table, 0, b"v" * 3 * PAGE)
        yield bench


Operation = Callable[[Bench], Awaitable[object]]


async def copy_a_range(b: Bench) -> None:
    target = b.service.volume_by_id(b.own()).map_id
    await clone_range(b.service, b.table, 3, target, 5, 2 * PAGE)


async def copy_holes(b: Bench) -> None:
    empty = await b.service.create_volume(f"empty{b.round}", 4 * PAGE)
    await clone_range(b.service, empty.map_id, 0, b.service.volume_by_id(b.own()).map_id, 0, 4 * PAGE)


async def with_a_handle(b: Bench) -> None:
    b.service.handles.open(b.table, "test")
    try:
        await b.service.write(b.table, 1, b"h" * PAGE)
        await b.service.commit()
    finally:
        b.service.handles.close(b.table)


async def two_writers(b: Bench) -> None:
    async with trio.open_nursery() as nursery:
        for i in range(2):
            nursery.start_soon(b.service.write, b.table, i * BLOCK + 7, b"w" * PAGE)
        nursery.start_soon(b.service.checkpoint)


OPERATIONS: dict[str, Operation] = {
    "read": lambda b: b.service.read(b.table, 3, 2 * PAGE),
    "read a snapshot": lambda b: b.service.read(b.service.snapshot(b.own(), "s").map_id, 3, PAGE),
    "write": lambda b: b.service.write(b.table, 5, b"w" * 2 * PAGE),
    "grow by writing": lambda b: b.service.write(b.service.volume_by_id(b.own()).map_id, 2 * PAGE + 5, b"w" * PAGE),
    "discard": lambda b: b.service.discard(b.table, 5, 2 * PAGE),
    "seek": lambda b: b.service.seek(b.service.snapshot(b.own(), "s").map_id, 0, data=False),
    "clone a range": copy_a_range,
    "clone holes": copy_holes,
    "commit": lambda b: b.service.commit(),
    "checkpoint": lambda b: b.service.checkpoint(),
    "create a volume": lambda b: b.service.create_volume(f"new{b.round}", PAGE),
    "grow": lambda b: b.service.resize_volume(b.own(), 9 * PAGE),
    "shrink": lambda b: b.service.resize_volume(b.own(), 100, shrink=True),
    "rename": lambda b: b.service.rename_volume(b.own(), f"renamed{b.round}"),
    "replace": lambda b: b.service.rename_volume(b.own(), f"other{b.round}", replace=True),
    "exchange": lambda b: b.service.exchange_volumes(b.own(), b.own("other")),
    "remove a volume": lambda b: b.service.remove_volume(b.own("other")),
    "remove with snapshots": lambda b: b.service.remove_volume(b.own(), snapshots=True),
    "set attributes": lambda b: b.service.set_attributes(b.own(), mode=0o644),
    "set xattr": lambda b: b.service.set_xattr(b.own(), "user.a", b"1"),
    "take snapshots": lambda b: b.service.create_snapshots([(b.own(), "t"), (b.volume_id, f"t{b.round}")]),
    "rename a snapshot": lambda b: b.service.rename_snapshot(b.own(), "s", "u"),
    "remove a snapshot": lambda b: b.service.remove_snapshot(b.own(), "s"),
    "diff": lambda b: b.service.inspection.diff(b.own(), None, "s", start_bytes=0, limit=100),
    "extents": lambda b: b.service.inspection.extents(b.table, 0, 100),
    "add storage": lambda b: b.service.upkeep.add_storage(str(b.home / f"disk{b.round}.img"), capacity_bytes=1 << 20),
    "check": lambda b: b.service.inspection.check(data=True),
    "dump": lambda b: b.service.inspection.dump(b.home / "dump"),
    "debug dump": lambda b: b.service.inspection.debug_dump(),
    "debug map": lambda b: b.service.inspection.debug_map(b.table, 0),
    "debug journal": lambda b: b.service.inspection.debug_journal(),
    "wait until reclaimed": lambda b: b.service.wait_reclaimed(),
    "an open handle": with_a_handle,
    "two writers and a checkpoint": two_writers,
}
DONE_ALREADY = (AlreadyExists, NotFound)
"""What repeating an operation says that was carried out, with or without a caller who waited for it."""


@pytest.fixture(autouse=True)
def cold_page_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every second read wait for the disk, which files in memory never do."""
    numbers = count()
    read_cached = StorageVolume.read_blocks_cached

    def read_blocks_cached(self: StorageVolume, block_index: int, block_count: int) -> bytes | None:
        return read_cached(self, block_index, block_count) if next(numbers) % 2 else None

    monkeypatch.setattr(StorageVolume, "read_blocks_cached", read_blocks_cached)
    monkeypatch.setenv("INCFS_DATA_PLANE", "python")


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
async def test_cancelled_at_each_await(operation: Operation, pool_home: Path) -> None:
    async with bench_of(pool_home) as bench:
        was_cancelled = True
        for step in count():
            if not was_cancelled:
                break
            with trio.fail_after(OPERATION_S):
                await bench.begin()
                was_cancelled = await cancel_at(step, lambda: operation(bench))
                bench.prove_complete()
                with suppress(*DONE_ALREADY):
                    await operation(bench)
                await bench.prove()


async def test_writers_into_a_full_pool_cancelled_at_each_await(pool_home: Path) -> None:
    """The way through reclaiming, checkpointing and giving up, with the space lock."""
    pool = make_pool(pool_home, capacity_bytes=64 * BLOCK)
    async with open_service(pool, tiny_options()) as service:
        volume = await service.create_volume("v", PAGE)
        await service.write(volume.map_id, 0, b"v" * 40 * BLOCK)
        for step in range(30):
            with trio.fail_after(OPERATION_S):
                await service.create_snapshots([(volume.id, "s")])

                async def fill() -> None:
                    with pytest.raises(NoSpace):
                        await service.write(volume.map_id, 0, b"f" * 40 * BLOCK)

                was_cancelled = await cancel_at(step, fill)
                await fill()
                assert not service._driver.space_lock.locked()
                await service.remove_snapshot(volume.id, "s")
                await service.write(volume.map_id, 0, b"%02d" % step * 10 * BLOCK)
                assert (await service.inspection.check(data=True)).is_clean
            if not was_cancelled:
                break
        assert not was_cancelled


async def test_service_cut_off_at_each_await(pool_home: Path) -> None:
    """The tasks of a service that is cancelled leave a pool that another one can open at once."""
    was_cancelled, step = True, 0
    pool = make_pool(pool_home)

    async def work() -> None:
        async with open_service(pool, tiny_options()) as service:
            made = await service.create_volume(f"v{step}", PAGE)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.write, made.map_id, 0, b"w" * PAGE)
                nursery.start_soon(service.checkpoint)
            await service.create_snapshots([(made.id, "s")])
            await service.remove_volume(made.id, snapshots=True)

    while was_cancelled:
        with trio.fail_after(OPERATION_S):
            was_cancelled = await cancel_at(step, work)
            async with open_service(pool, tiny_options()) as service:
                await service.wait_reclaimed()
                assert (await service.inspection.check(data=True)).is_clean
                for volume in service.volumes():
                    await service.remove_volume(volume.id, snapshots=True)
        step += 1
    assert step > 5
