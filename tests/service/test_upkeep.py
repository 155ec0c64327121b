"""Data that moves while it is used: evacuation, removal, restriping, balance."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
import trio

from incfs.errors import Busy, NoSpace, UsageError
from incfs.model import StorageId
from incfs.service import Service, open_service
from incfs.settings import PoolSettings, VolumeSettings
from tests.support import pools

BLOCK = pools.BLOCK
ONE, TWO = StorageId(1), StorageId(2)


def noise(count: int, seed: int = 1) -> bytes:
    return Random(seed).randbytes(count * BLOCK)


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total or not total


@asynccontextmanager
async def opened(home: Path, *, storages: int = 2, capacity_blocks: int = 4000) -> AsyncIterator[Service]:
    if not (home / "pool").exists():
        pools.make_pool(home, storages=storages, capacity_bytes=storages * capacity_blocks * BLOCK)
    async with open_service(home / "pool", pools.tiny_options(reserve_blocks=8)) as service:
        yield service


def used(service: Service) -> dict[int, int]:
    return {s["id"]: s["used_bytes"] // BLOCK for s in service.storages()}


async def test_a_storage_volume_is_emptied_while_it_is_written_and_then_removed(pool_home: Path) -> None:
    async with opened(pool_home) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(1500))
        (taken,) = await service.create_snapshots([(volume.id, "s")])
        await service.write(volume.map_id, 0, noise(300, seed=2))
        clone = await service.branches.clone(taken, "clone")
        await service.write(clone.map_id, 100 * BLOCK, noise(10, seed=3))
        path = Path(service.storages()[0]["path"])
        expected = bytearray(noise(1500))
        expected[: 300 * BLOCK] = noise(300, seed=2)
        is_over = False

        async def write_on() -> None:
            step = 0
            while not is_over:
                first = Random(step).randrange(1490)
                expected[first * BLOCK : (first + 7) * BLOCK] = noise(7, seed=step)
                await service.write(volume.map_id, first * BLOCK, noise(7, seed=step))
                assert await service.read(taken.map_id, first * BLOCK, BLOCK) == noise(1500)[first * BLOCK :][:BLOCK]
                step += 1
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_on)
            with pytest.raises(Busy):
                await service.upkeep.remove_storage(ONE)
            report = await service.upkeep.evacuate(ONE, rate_bytes=None, progress=quiet)
            is_over = True
        assert report.moved_blocks > 1500
        assert not report.unreadable_blocks
        assert used(service)[ONE] == 0
        await service.upkeep.remove_storage(ONE)
        assert not path.exists()
        assert list(used(service)) == [TWO]
        assert (await service.inspection.check(data=True)).is_clean
        assert await service.read(volume.map_id, 0, 1500 * BLOCK) == bytes(expected)
        assert await service.read(taken.map_id, 0, 1500 * BLOCK) == noise(1500)
        assert (await service.read(clone.map_id, 0, 200 * BLOCK))[: 100 * BLOCK] == noise(1500)[: 100 * BLOCK]
        await service.upkeep.add_storage(str(pool_home / "pool" / "third.img"), capacity_bytes=BLOCK * 100)
        assert list(used(service)) == [TWO, 3]
    async with opened(pool_home) as service:
        assert (await service.inspection.check(data=True)).is_clean
        assert await service.read(taken.map_id, 0, 1500 * BLOCK) == noise(1500)


async def test_an_interrupted_evacuation_goes_on(pool_home: Path) -> None:
    async with opened(pool_home) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(2000))
        with trio.CancelScope() as scope:
            await service.upkeep.evacuate(ONE, rate_bytes=10_000, progress=lambda *_: scope.cancel())
        assert scope.cancelled_caught
        assert 0 < used(service)[ONE] < 2000
        assert service.storages()[0]["state"] == "evacuating"
    async with opened(pool_home) as service:
        await service.write(volume.map_id, 0, noise(10, seed=5))
        await service.upkeep.evacuate(ONE, rate_bytes=None, progress=quiet)
        assert used(service)[ONE] == 0
        await service.upkeep.cancel_evacuation(ONE)
        assert service.storages()[0]["state"] == "online"
        assert (await service.inspection.check(data=True)).is_clean


async def test_an_evacuation_without_room_moves_what_fits_and_says_so(pool_home: Path) -> None:
    async with opened(pool_home, capacity_blocks=1000) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(1500))
        with pytest.raises(NoSpace):
            await service.upkeep.evacuate(ONE, rate_bytes=None, progress=quiet)
        assert await service.read(volume.map_id, 0, 1500 * BLOCK) == noise(1500)
        assert (await service.inspection.check(data=True)).is_clean


async def test_the_only_storage_volume_stays(pool_home: Path) -> None:
    async with opened(pool_home, storages=1) as service:
        for work in (service.upkeep.evacuate(ONE, rate_bytes=None, progress=quiet), service.upkeep.remove_storage(ONE)):
            with pytest.raises(UsageError):
                await work


async def test_damaged_blocks_stay_and_are_counted(pool_home: Path) -> None:
    async with opened(pool_home) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(100))
        await service.checkpoint()
        with Path(service.storages()[0]["path"]).open("r+b") as image:
            image.seek(65536 + 10 * BLOCK)
            image.write(b"damage")
        report = await service.upkeep.evacuate(ONE, rate_bytes=None, progress=quiet)
        assert (report.moved_blocks, report.unreadable_blocks) == (99, 1)
        assert used(service)[ONE] == 1
        with pytest.raises(Busy):
            await service.upkeep.remove_storage(ONE)
        await service.write(volume.map_id, 10 * BLOCK, noise(1))
        await service.upkeep.remove_storage(ONE)


async def test_restriping_moves_what_is_stored_of_volume_and_snapshots(pool_home: Path) -> None:
    async with opened(pool_home, storages=3) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(300))
        (taken,) = await service.create_snapshots([(volume.id, "s")])
        await service.write(volume.map_id, 0, noise(60, seed=2))
        await service.upkeep.stripe(volume.id, columns=3, unit_bytes=10 * BLOCK)
        await service.upkeep.restripe(volume.id, rate_bytes=None, progress=quiet)
        extents = await service.inspection.extents(volume.map_id, 0, 1000)
        for extent in extents:
            if extent["kind"] == "data":
                assert extent["storage"] == extent["offset"] // BLOCK // 10 % 3 + 1
        assert used(service) == {1: 120, 2: 120, 3: 120}
        assert await service.read(taken.map_id, 0, 300 * BLOCK) == noise(300)
        assert (await service.inspection.check(data=True)).is_clean


async def test_balance_evens_out_and_migration_follows_the_rules(pool_home: Path) -> None:
    async with opened(pool_home) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(1000))
        await service.upkeep.balance(rate_bytes=None, progress=quiet)
        assert abs(used(service)[1] - 500) < 120, used(service)
        assert sum(used(service).values()) == 1000
        rules = PoolSettings(volume_settings=pools.by_name({"db": VolumeSettings(place=("id=2",))}))
        service.apply_settings(rules)
        await service.upkeep.migrate(volume.id, rate_bytes=None, progress=quiet)
        assert used(service) == {1: 0, 2: 1000}
        assert await service.read(volume.map_id, 0, 1000 * BLOCK) == noise(1000)
        assert (await service.inspection.check(data=True)).is_clean
