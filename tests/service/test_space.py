"""Space as tasks see it: growth before a write fails, full pools, queues, quotas, reservations."""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
import trio.testing

from incfs import removal
from incfs.enforcer import enforce
from incfs.errors import NoSpace, QuotaExceeded
from incfs.model import StorageId, Volume
from incfs.policy.facts import POLICY_TAG
from incfs.service import Service, open_service
from incfs.settings import Amount, Directory, PoolSettings, VolumeSettings
from incfs.storage import StorageVolume
from tests.support import pools

BLOCK = pools.BLOCK
BLOCKS = 400


def noise(count: int, seed: int = 1) -> bytes:
    return Random(seed).randbytes(count * BLOCK)


@asynccontextmanager
async def opened(home: Path, *, storages: int = 1, reserve_blocks: int = 8) -> AsyncIterator[Service]:
    pool = pools.make_pool(home, capacity_bytes=storages * BLOCKS * BLOCK, storages=storages)
    async with open_service(pool, pools.tiny_options(reserve_blocks=reserve_blocks)) as service:
        yield service


async def until(is_so: Callable[[], Any]) -> None:
    with trio.fail_after(60):
        while not is_so():
            await trio.sleep(0.01)


async def fill(service: Service, volume: Volume, *, step: int = 10) -> int:
    """Write until there is no space; give the blocks written."""
    written = 0
    try:
        while True:
            await service.write(volume.map_id, written * BLOCK, noise(step, seed=written + 1))
            written += step
    except NoSpace:
        return written


def kinds(service: Service) -> list[str]:
    return [event["kind"] for event in service.events()]


async def test_a_full_pool_lets_parts_of_blocks_be_discarded_and_snapshots_be_removed(pool_home: Path) -> None:
    async with opened(pool_home) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(50))
        await service.create_snapshots([(volume.id, "s")])
        await fill(service, volume, step=1)
        assert "full" in kinds(service)
        for block in range(8):
            await service.discard(volume.map_id, block * BLOCK + 3, 5)
        assert (await service.inspection.check(data=True)).is_clean
        await service.remove_snapshot(volume.id, "s")
        await service.wait_reclaimed()
        await service.write(volume.map_id, 0, noise(30, seed=3))
        assert await service.read(volume.map_id, 0, 30 * BLOCK) == noise(30, seed=3)
        assert "space-returned" in kinds(service)


async def test_a_queued_write_waits_for_space_and_reads_go_on(pool_home: Path) -> None:
    async with opened(pool_home) as service:
        volume = await service.create_volume("db", 1 << 20)
        written = await fill(service, volume)
        service.apply_settings(PoolSettings(queue_s=60))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.write, volume.map_id, written * BLOCK, noise(20, seed=7))
            await until(lambda: "queue" in kinds(service))
            assert await service.read(volume.map_id, 0, BLOCK) == noise(10, seed=1)[:BLOCK]
            await service.discard(volume.map_id, 0, 40 * BLOCK)
        assert await service.read(volume.map_id, written * BLOCK, 20 * BLOCK) == noise(20, seed=7)
        assert kinds(service)[-1] == "space-returned"


async def test_a_queued_write_fails_when_its_time_is_up(pool_home: Path) -> None:
    async with opened(pool_home) as service:
        volume = await service.create_volume("db", 1 << 20)
        written = await fill(service, volume)
        service.apply_settings(PoolSettings(queue_s=0.3))
        start = trio.current_time()
        with pytest.raises(NoSpace):
            await service.write(volume.map_id, written * BLOCK, noise(20))
        assert 0.3 <= trio.current_time() - start < 30
        assert service.facts()["failure"] is None


async def test_a_write_that_waits_has_the_policy_prune(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy looked at space every ten minutes: whoever waits for 60 s never saw the end of it."""
    monkeypatch.setattr("incfs.keeper._PRUNE_EVERY_S", 0.1)
    async with opened(pool_home) as service, trio.open_nursery() as nursery:
        volume = await service.create_volume("db", 1 << 20)
        for day in range(4):
            service._store.clock = lambda day=day: (20_000 + day) * 86400 * 10**9  # type: ignore[misc]
            await service.write(volume.map_id, 0, noise(60, seed=day))
            await service.create_snapshots([(volume.id, f"day{day}")], tag=POLICY_TAG)
        text = '[pool]\nwhen_full = "queue:60s"\n[volume."*"]\nprune_when_low = true\nkeep = { last = 1, daily = 9 }\n'
        await service.policies.set(text)
        nursery.start_soon(enforce, service)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert len(service.snapshots(volume.id)) == 4
        with trio.fail_after(30):
            for first in range(60, 360, 30):
                await service.write(volume.map_id, first * BLOCK, noise(30, seed=first))
        assert len(service.snapshots(volume.id)) < 4
        assert await service.read(volume.map_id, 330 * BLOCK, 30 * BLOCK) == noise(30, seed=330)
        nursery.cancel_scope.cancel()


async def test_the_second_storage_volume_comes_in_at_low_water_of_the_first(pool_home: Path) -> None:
    async with opened(pool_home, storages=2) as service:
        service.apply_settings(PoolSettings(low_water=Amount(percent=Fraction(25))))
        volume = await service.create_volume("db", 1 << 20)
        for step in range(60):
            await service.write(volume.map_id, step * 10 * BLOCK, noise(10, seed=step + 1))
            await service.commit()
        used = {s["id"]: s["used_bytes"] // BLOCK for s in service.storages()}
        assert 250 <= used[1] <= 330, used
        assert used[2] == 600 - used[1]
        (assigned,) = (event for event in service.events() if event["kind"] == "assigned")
        assert assigned["subject"] == "volume db"


async def test_an_image_is_made_in_a_configured_directory_before_a_write_fails(pool_home: Path) -> None:
    (pool_home / "more").mkdir()
    async with opened(pool_home) as service:
        service.apply_settings(PoolSettings(directories=(Directory(str(pool_home / "more")),)))
        volume = await service.create_volume("db", 1 << 20)
        for step in range(60):
            await service.write(volume.map_id, step * 10 * BLOCK, noise(10, seed=step + 1))
        made = [event for event in service.events() if event["kind"] == "image-added"]
        assert [event["subject"] for event in made] == ["storage 2"]
        assert "low water" in made[0]["reason"]
        assert list((pool_home / "more").iterdir())
        for step in range(60):
            assert await service.read(volume.map_id, step * 10 * BLOCK, 10 * BLOCK) == noise(10, seed=step + 1)


async def test_an_image_is_made_where_its_class_is_wanted(pool_home: Path) -> None:
    """There is room on others; only the directory of that class will do."""
    for name in ("hdd", "ssd"):
        (pool_home / name).mkdir()
    directories = Directory(str(pool_home / "hdd"), "hdd"), Directory(str(pool_home / "ssd"), "ssd")
    async with opened(pool_home) as service:
        places = {"fast": VolumeSettings(place=("class=ssd",)), "lost": VolumeSettings(place=("class=tape",))}
        rules = pools.by_name(places)
        service.apply_settings(PoolSettings(directories=directories, volume_settings=rules))
        fast, lost = await service.create_volume("fast", 1 << 20), await service.create_volume("lost", 1 << 20)
        await service.write(fast.map_id, 0, noise(10))
        await service.commit()
        two = service.storages()[1]
        assert (two["id"], two["class"], Path(two["path"]).parent) == (2, "ssd", pool_home / "ssd")
        assert two["used_bytes"] == 10 * BLOCK
        (added,) = [event for event in service.events() if event["kind"] == "image-added"]
        assert "class=ssd" in added["reason"]
        with pytest.raises(NoSpace, match="class=tape"):
            await service.write(lost.map_id, 0, noise(10))
        assert len(service.storages()) == 2


async def refuse(work: Awaitable[Any]) -> None:
    with pytest.raises(QuotaExceeded):
        await work


async def test_zeros_that_are_kept_count_for_a_quota_and_holes_do_not(pool_home: Path) -> None:
    pools.make_pool(pool_home)
    async with open_service(pool_home / "pool", pools.tiny_options()) as service:
        settings = {
            "thick": VolumeSettings(quota_bytes=10 * BLOCK, zero_elision=False),
            "thin": VolumeSettings(quota_bytes=10 * BLOCK),
        }
        service.apply_settings(PoolSettings(volume_settings=pools.by_name(settings)))
        thick, thin = [await service.create_volume(name, 1 << 20) for name in ("thick", "thin")]
        await service.write(thin.map_id, 0, bytes(20 * BLOCK))
        with pytest.raises(QuotaExceeded):
            await service.write(thick.map_id, 0, bytes(20 * BLOCK))
        await service.write(thick.map_id, 0, bytes(10 * BLOCK))
        assert [service.mapped_bytes(volume.map_id) for volume in (thick, thin)] == [10 * BLOCK, 0]


async def test_a_quota_limits_a_volume_with_its_snapshots_but_not_rewriting(pool_home: Path) -> None:
    async with opened(pool_home) as service:
        service.apply_settings(
            PoolSettings(volume_settings=pools.by_name({"db": VolumeSettings(quota_bytes=100 * BLOCK, snapshot_max=1)}))
        )
        db, other = await service.create_volume("db", 1 << 20), await service.create_volume("other", 1 << 20)
        await service.write(db.map_id, 0, noise(60))
        await service.create_snapshots([(db.id, "s")])
        await refuse(service.create_snapshots([(db.id, "t")]))
        await service.write(db.map_id, 0, noise(40, seed=2))
        await service.write(db.map_id, 0, noise(40, seed=3))
        await refuse(service.write(db.map_id, 39 * BLOCK, noise(2)))
        await refuse(service.write(db.map_id, 70 * BLOCK, noise(1)))
        await service.write(db.map_id, 70 * BLOCK, bytes(BLOCK))
        await service.write(other.map_id, 0, noise(120))
        await service.remove_snapshot(db.id, "s")
        await service.wait_reclaimed()
        await service.write(db.map_id, 60 * BLOCK, noise(40))
        assert await service.read(db.map_id, 0, 40 * BLOCK) == noise(40, seed=3)


async def test_a_reservation_is_kept_for_its_volume(pool_home: Path) -> None:
    async with opened(pool_home) as service:
        db, other = await service.create_volume("db", 1 << 20), await service.create_volume("other", 1 << 20)
        settings = PoolSettings(volume_settings=pools.by_name({"db": VolumeSettings(reservation_bytes=100 * BLOCK)}))
        service.apply_settings(settings)
        taken = await fill(service, other, step=1)
        assert 270 <= taken <= BLOCKS - 100
        for block in range(100):
            await service.write(db.map_id, block * BLOCK, noise(1, seed=block + 1))
        service.apply_settings(replace(settings, low_water=Amount(fixed_bytes=0)))


@pytest.mark.parametrize("piece", [1, 64], ids=["single-blocks", "whole-chunks"])
async def test_what_a_crash_kept_from_being_punched_goes_back_to_the_host(pool_home: Path, piece: int) -> None:
    """A snapshot is removed, the checkpoint that frees its blocks is durable, and the daemon dies."""
    home = pools.make_pool(pool_home, block_bytes=4096)
    store = pools.open_tiny(home)
    volume = pools.new_volume(store, "db")
    pools.write(store, volume.map_id, 0, Random(1).randbytes(512 * 4096))
    pools.take_snapshots(store, [(volume.id, "s")])
    for first in range(0, 512, 2 * piece):
        pools.write(store, volume.map_id, first * 4096, Random(first).randbytes(piece * 4096))
    store.checkpoint()
    removal.remove(store, store.catalog.snapshots(volume.id))
    pools.reclaim(store)
    checkpoint = store.begin_checkpoint(1)
    checkpoint.run_commit()
    store.end_checkpoint_commit(checkpoint)
    checkpoint.run_fold()
    path = store.pool.volumes[StorageId(1)].path
    store.abandon()
    before = path.stat().st_blocks * 512
    async with open_service(home, pools.tiny_options()) as service:
        with trio.fail_after(60):
            while before - path.stat().st_blocks * 512 < 250 * 4096:
                await trio.sleep(0.005)
        content = bytearray(Random(1).randbytes(512 * 4096))
        for first in range(0, 512, 2 * piece):
            content[first * 4096 : (first + piece) * 4096] = Random(first).randbytes(piece * 4096)
        assert await service.read(volume.map_id, 0, len(content)) == bytes(content)
        assert (await service.inspection.check(data=True)).is_clean
        await service.write(volume.map_id, 0, bytes(content))  # what was punched can be used
        assert await service.read(volume.map_id, 0, len(content)) == bytes(content)


# Free blocks go back to the host


def occupied(service: Service) -> int:
    return Path(service.storages()[0]["path"]).stat().st_blocks * 512


@asynccontextmanager
async def half_discarded(home: Path) -> AsyncIterator[Service]:
    """A pool with 512 blocks of 4 KiB, of which every second 64 KiB were discarded, and no checkpoint since."""
    pool = pools.make_pool(home, block_bytes=4096)
    async with open_service(pool, pools.tiny_options(extend_bytes=1 << 20)) as service:
        volume = await service.create_volume("db")
        await service.write(volume.map_id, 0, Random(1).randbytes(512 * 4096))
        await service.checkpoint()
        for first in range(0, 512, 32):
            await service.discard(volume.map_id, first * 4096, 16 * 4096)
        yield service


async def test_a_pool_that_is_never_quiet_gives_space_back(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was given back only when five seconds had gone by without a reason to look at the pool's space."""
    monkeypatch.setattr("incfs.keeper._GIVE_BACK_EVERY_S", 0.05)
    async with half_discarded(pool_home) as service:
        before = occupied(service)
        await service.checkpoint()
        with trio.fail_after(60):
            while before - occupied(service) < 250 * 4096:
                service._keeper.look_soon()
                await trio.sleep(0.001)


@pytest.mark.parametrize("is_short", [False, True])
async def test_only_a_host_that_is_short_of_space_gets_it_at_once(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch, is_short: bool
) -> None:
    monkeypatch.setattr("incfs.keeper._GIVE_BACK_EVERY_S", 3600)
    async with half_discarded(pool_home) as service:
        service.apply_settings(PoolSettings(low_water=Amount(percent=Fraction(100 if is_short else 0))))
        before = occupied(service)
        await service.checkpoint()
        if is_short:
            await until(lambda: before - occupied(service) >= 250 * 4096)
        await trio.testing.wait_all_tasks_blocked()
        assert (before > occupied(service)) == is_short


async def test_what_became_free_goes_back_before_the_pool_is_closed(pool_home: Path) -> None:
    async with half_discarded(pool_home) as service:
        before, path = occupied(service), Path(service.storages()[0]["path"])
        await service.discard(service.volume("db").map_id, 17 * 4096, 4096)  # not a chunk
    assert before - path.stat().st_blocks * 512 >= 257 * 4096


@pytest.fixture
def slow_punch(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """(Set when something is being given back, lets it go on)."""
    begun, go_on = threading.Event(), threading.Event()
    punch = StorageVolume.punch

    def slowly(volume: StorageVolume, block_index: int, count: int) -> None:
        begun.set()
        assert go_on.wait(60)
        punch(volume, block_index, count)

    monkeypatch.setattr(StorageVolume, "punch", slowly)
    yield begun, go_on
    go_on.set()


async def beside_giving_back(
    service: Service, slow_punch: tuple[threading.Event, threading.Event], work: Callable[..., Any], *arguments: object
) -> None:
    """Begin some work while space is being given back, and let both end."""
    begun, go_on = slow_punch
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service._keeper.give_back_rest)
        await until(begun.is_set)
        nursery.start_soon(work, *arguments)
        await trio.testing.wait_all_tasks_blocked(0.05)
        go_on.set()


async def test_a_write_that_needs_what_is_being_given_back_waits_for_it(
    pool_home: Path, slow_punch: tuple[threading.Event, threading.Event]
) -> None:
    """Nobody may be told of a full pool because free blocks are held for a moment."""
    pool = pools.make_pool(pool_home, block_bytes=4096, capacity_bytes=1 << 20)
    async with open_service(pool, pools.tiny_options(extend_bytes=1 << 20)) as service:
        volume = await service.create_volume("db")
        await service.write(volume.map_id, 0, Random(1).randbytes(250 * 4096))
        await service.discard(volume.map_id, 0, 250 * 4096)
        await service.checkpoint()
        await beside_giving_back(service, slow_punch, service.write, volume.map_id, 0, Random(2).randbytes(250 * 4096))
    assert "full" not in kinds(service)


async def test_a_storage_volume_is_removed_while_space_is_given_back(
    pool_home: Path, slow_punch: tuple[threading.Event, threading.Event]
) -> None:
    """Blocks held for that counted as in use: it could not be removed, as if it held data."""
    pool = pools.make_pool(pool_home, block_bytes=4096, storages=2)
    async with open_service(pool, pools.tiny_options(extend_bytes=1 << 20)) as service:
        volume = await service.create_volume("db")
        await service.write(volume.map_id, 0, Random(1).randbytes(100 * 4096))
        await service.discard(volume.map_id, 0, 100 * 4096)
        await service.checkpoint()
        await beside_giving_back(service, slow_punch, service.upkeep.remove_storage, StorageId(1))
    assert "image-removed" in kinds(service)
