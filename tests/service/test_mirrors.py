"""Mirrors: every leg is written, what is wrong is healed, a leg that was away gets what it lacks."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio

from incfs import legs, restore
from incfs.backing import File
from incfs.errors import BackingError, ChecksumMismatch, ImageMismatch, UsageError
from incfs.mirror import Healed, MirroredFile
from incfs.model import StorageId
from incfs.planes import HAS_NATIVE, PlaneKind
from incfs.service import Service, open_service
from tests.support import pools

BLOCK = pools.BLOCK
TWO = StorageId(2)
DATA_OFFSET = 65536


def noise(count: int, seed: int = 1) -> bytes:
    return Random(seed).randbytes(count * BLOCK)


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total or not total


@pytest.fixture(params=["python", pytest.param("native", marks=pytest.mark.skipif(not HAS_NATIVE, reason="no C"))])
def plane(request: pytest.FixtureRequest) -> PlaneKind:
    kind: PlaneKind = request.param
    return kind


@asynccontextmanager
async def opened(home: Path, plane: PlaneKind) -> AsyncIterator[Service]:
    """A pool whose only storage volume is a mirror of two legs."""
    is_new = not (home / "pool").exists()
    if is_new:
        pools.make_pool(home)
    options = replace(pools.tiny_options(small_commit_bytes=1000), data_plane=plane)
    async with open_service(home / "pool", options) as service:
        if is_new:
            with pytest.raises(UsageError):
                await service.upkeep.add_storage(str(home / "a.img"), mirrors=[str(home / "b.img")])
            await service.upkeep.add_storage(str(home / "a.img"), mirrors=[str(home / "b.img")], force=True)
            await service.upkeep.evacuate(StorageId(1), rate_bytes=None, progress=quiet)
            await service.upkeep.remove_storage(StorageId(1))
        yield service


def spoil(path: Path, blocks: list[int]) -> None:
    with path.open("r+b") as image:
        for block in blocks:
            image.seek(DATA_OFFSET + block * BLOCK)
            image.write(os.urandom(BLOCK))


def blocks_of(path: Path, count: int) -> bytes:
    return path.read_bytes()[DATA_OFFSET : DATA_OFFSET + count * BLOCK]


def mirror(service: Service) -> dict[str, Any]:
    (found,) = service.storages()
    return found


def leg_states(service: Service) -> list[str]:
    return [leg["state"] for leg in mirror(service)["legs"]]


async def test_both_legs_hold_the_same_and_wrong_blocks_are_healed_while_reading(
    pool_home: Path, plane: PlaneKind
) -> None:
    async with opened(pool_home, plane) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(1000))
        await service.checkpoint()
        legs = pool_home / "a.img", pool_home / "b.img"
        assert blocks_of(legs[0], 1000) == blocks_of(legs[1], 1000)
        wrong = Random(7).sample(range(1000), 100)
        for leg in legs:
            spoil(leg, wrong)
            assert await service.read(volume.map_id, 0, 1000 * BLOCK) == noise(1000) if leg == legs[0] else True
        report = await service.upkeep.mirrors.scrub(rate_bytes=None, restart=False, progress=quiet)
        assert (report["verified_blocks"], report["wrong_blocks"], report["lost_blocks"]) == (2000, 100, 0)
        assert blocks_of(legs[0], 1000) == blocks_of(legs[1], 1000)
        assert await service.read(volume.map_id, 0, 1000 * BLOCK) == noise(1000)
        assert mirror(service)["healed_blocks"] == 200


@pytest.fixture
def mends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each healing looked at."""
    found: list[int] = []
    heal = MirroredFile.heal

    def counted(file: MirroredFile, offset_bytes: int, block_bytes: int, are_right: Any) -> Healed:
        found.append(len(are_right))
        return heal(file, offset_bytes, block_bytes, are_right)

    monkeypatch.setattr(MirroredFile, "heal", counted)
    return found


async def test_a_leg_that_is_blank_is_healed_by_runs(pool_home: Path, plane: PlaneKind, mends: list[int]) -> None:
    """Each block was a round trip of its own: a read of 1 MiB came at 10 MB/s."""
    async with opened(pool_home, plane) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(1000))
        await service.checkpoint()
        spoil(pool_home / "a.img", list(range(1000)))
        assert await service.read(volume.map_id, 0, 1000 * BLOCK) == noise(1000)
        assert (sum(mends), len(mends) <= 4) == (1000, True)
        assert blocks_of(pool_home / "a.img", 1000) == blocks_of(pool_home / "b.img", 1000)
        assert mirror(service)["healed_blocks"] == 1000


async def test_of_a_run_only_what_no_leg_has_right_is_lost(pool_home: Path, plane: PlaneKind, mends: list[int]) -> None:
    async with opened(pool_home, plane) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(50))
        await service.checkpoint()
        spoil(pool_home / "a.img", list(range(40)))
        spoil(pool_home / "b.img", [20])
        with pytest.raises(ChecksumMismatch):
            await service.read(volume.map_id, 0, 50 * BLOCK)
        assert len(mends) == 2
        for first, count in ((0, 20), (21, 29)):
            found = await service.read(volume.map_id, first * BLOCK, count * BLOCK)
            assert found == noise(50)[first * BLOCK : (first + count) * BLOCK]
        assert len(mends) == 2
        assert mirror(service)["healed_blocks"] == 39


async def test_a_block_that_was_moved_meanwhile_is_mended_alone(pool_home: Path, plane: PlaneKind) -> None:
    """What stands behind it in the page now is not what the read was about to meet."""
    async with opened(pool_home, plane) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(50))
        await service.checkpoint()
        spoil(pool_home / "a.img", [7, 8])
        store = service._store
        with pytest.raises(ChecksumMismatch) as caught:
            store.plane.read(volume.map_id, 7, 1, wait=True)
        assert [len(run[2]) for run in legs._runs_behind(store, caught.value)] == [43]
        await service.write(volume.map_id, 7 * BLOCK, noise(1, seed=2))
        await service.commit()
        assert legs._runs_behind(store, caught.value) == []


def test_blocks_beside_one_that_cannot_be_read_are_read(tmp_path: Path) -> None:
    class Bad(File):
        def pread(self, offset_bytes: int, length_bytes: int) -> bytes:
            if offset_bytes <= 5 * BLOCK < offset_bytes + length_bytes and not self.is_mended:
                raise BackingError("a bad sector", action="read")
            return super().pread(offset_bytes, length_bytes)

        def pwrite(self, offset_bytes: int, data: bytes | memoryview) -> None:
            self.is_mended |= offset_bytes == 5 * BLOCK
            super().pwrite(offset_bytes, data)

        is_mended = False

    files = []
    for name, kind in (("a", Bad), ("b", File)):
        (tmp_path / name).write_bytes(noise(9))
        files.append(kind(tmp_path / name, os.open(tmp_path / name, os.O_RDWR)))
    file = MirroredFile(tmp_path / "a", files, [])
    assert file.heal(0, BLOCK, [lambda _: True] * 9) == Healed(1, frozenset())
    assert file.pread(0, 9 * BLOCK) == noise(9)
    assert not file.failed
    file.close()


async def test_readers_that_find_the_same_block_wrong_are_all_served(pool_home: Path, plane: PlaneKind) -> None:
    """The second found it healed already, and took that for a block that nobody has right."""
    async with opened(pool_home, plane) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(50))
        await service.checkpoint()
        spoil(pool_home / "a.img", list(range(50)))
        found: list[bytes] = []

        async def read() -> None:
            found.append(await service.read(volume.map_id, 0, 50 * BLOCK))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(read)
        assert found == [noise(50)] * 8
        assert mirror(service)["healed_blocks"] == 50


async def test_a_leg_that_was_away_gets_what_it_lacks_and_no_more(pool_home: Path, plane: PlaneKind) -> None:
    async with opened(pool_home, plane) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(2000))
    (pool_home / "b.img").rename(pool_home / "away")
    expected = bytearray(noise(2000))
    async with opened(pool_home, plane) as service:
        assert leg_states(service) == ["online", "stale"]
        assert mirror(service)["state"] == "degraded"
        expected[50 * BLOCK : 150 * BLOCK] = noise(100, seed=2)
        await service.write(volume.map_id, 50 * BLOCK, noise(100, seed=2))
        await service.commit()
    async with opened(pool_home, plane) as service:
        expected[500 * BLOCK : 530 * BLOCK] = noise(30, seed=3)
        await service.write(volume.map_id, 500 * BLOCK, noise(30, seed=3))
        await service.commit()
        with pytest.raises(ImageMismatch):
            await service.upkeep.mirrors.resilver(TWO, rate_bytes=None, progress=quiet)
        (pool_home / "away").rename(pool_home / "b.img")
        report = await service.upkeep.mirrors.resilver(TWO, rate_bytes=None, progress=quiet)
        assert 130 <= report.copied_blocks <= 200, report
        assert not report.lost_blocks
        assert leg_states(service) == ["online", "online"]
        assert mirror(service)["changed_bytes"] == 0
        await service.write(volume.map_id, 700 * BLOCK, noise(10, seed=4))
        expected[700 * BLOCK : 710 * BLOCK] = noise(10, seed=4)
        await service.checkpoint()
        spoil(pool_home / "a.img", list(range(2200)))
        assert await service.read(volume.map_id, 0, 2000 * BLOCK) == bytes(expected)
    async with opened(pool_home, plane) as service:
        assert leg_states(service) == ["online", "online"]
        assert (await service.inspection.check(data=True)).is_clean


async def test_a_resilver_says_what_nobody_has_right(pool_home: Path, plane: PlaneKind) -> None:
    async with opened(pool_home, plane) as service:
        volume = await service.create_volume("db", 1 << 20)
    (pool_home / "b.img").rename(pool_home / "away")
    async with opened(pool_home, plane) as service:
        await service.write(volume.map_id, 0, noise(100))
        await service.checkpoint()
        (pool_home / "away").rename(pool_home / "b.img")
        spoil(pool_home / "a.img", list(range(7, 9)))
        report = await service.upkeep.mirrors.resilver(TWO, rate_bytes=None, progress=quiet)
        assert report.lost_blocks == 2
        with pytest.raises(ChecksumMismatch):
            await service.read(volume.map_id, 0, 100 * BLOCK)


async def test_a_stale_leg_alone_is_refused(pool_home: Path, plane: PlaneKind) -> None:
    async with opened(pool_home, plane) as service:
        await service.create_volume("db", 1 << 20)
    (pool_home / "b.img").rename(pool_home / "away")
    async with opened(pool_home, plane) as service:
        volume = service.volume("db")
        await service.write(volume.map_id, 0, noise(10))
    (pool_home / "away").rename(pool_home / "b.img")
    (pool_home / "a.img").rename(pool_home / "away")
    with pytest.raises(ImageMismatch, match="no sound leg"):
        async with opened(pool_home, plane):
            pass


async def test_a_lost_leg_is_replaced_by_an_empty_one_under_load(pool_home: Path, plane: PlaneKind) -> None:
    async with opened(pool_home, plane) as service:
        volume = await service.create_volume("db", 1 << 20)
        expected = bytearray(noise(1000))
        await service.write(volume.map_id, 0, noise(1000))
        (taken,) = await service.create_snapshots([(volume.id, "s")])
        await service.upkeep.mirrors.replace_leg(TWO, 0, str(pool_home / "c.img"))
        assert leg_states(service) == ["stale", "online"]
        is_over = False

        async def write_on() -> None:
            step = 0
            while not is_over:
                first = Random(step).randrange(990)
                expected[first * BLOCK : (first + 7) * BLOCK] = noise(7, seed=step)
                await service.write(volume.map_id, first * BLOCK, noise(7, seed=step))
                step += 1
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_on)
            report = await service.upkeep.mirrors.resilver(TWO, rate_bytes=None, progress=quiet)
            is_over = True
        assert report.copied_blocks >= 1000
        await service.checkpoint()
        spoil(pool_home / "b.img", list(range(2000)))
        assert await service.read(volume.map_id, 0, 1000 * BLOCK) == bytes(expected)
        assert await service.read(taken.map_id, 0, 1000 * BLOCK) == noise(1000)
        await service.upkeep.mirrors.replace_leg(TWO, 0, str(pool_home / "d.img"))
        with pytest.raises(UsageError, match="only sound one"):
            await service.upkeep.mirrors.replace_leg(TWO, 1, str(pool_home / "e.img"))


async def test_what_a_leg_lacks_is_known_after_a_crash(pool_home: Path, plane: PlaneKind) -> None:
    async with opened(pool_home, plane) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(300))
    (pool_home / "b.img").rename(pool_home / "away")
    options = replace(pools.tiny_options(), data_plane=plane)
    store = pools.open_tiny(pool_home / "pool", options)
    for seed in range(2, 5):
        pools.write(store, volume.map_id, seed * 20 * BLOCK, noise(20, seed=seed))
        store.commit()
        if seed == 3:
            store.checkpoint()
    store = pools.crash(store, options)
    lacking = sum(bits.bit_count() for bits in store.pool.volumes[TWO].changed.values())
    assert lacking >= 60
    store.abandon()
    (pool_home / "away").rename(pool_home / "b.img")
    async with opened(pool_home, plane) as service:
        await service.upkeep.mirrors.resilver(TWO, rate_bytes=None, progress=quiet)
        spoil(pool_home / "a.img", list(range(500)))
        for seed in range(2, 5):
            assert await service.read(volume.map_id, seed * 20 * BLOCK, 20 * BLOCK) == noise(20, seed=seed)


async def test_a_scrub_that_was_stopped_goes_on(pool_home: Path, plane: PlaneKind) -> None:
    async with opened(pool_home, plane) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(5000))
        with trio.CancelScope() as scope:
            await service.upkeep.mirrors.scrub(rate_bytes=None, restart=False, progress=lambda *_: scope.cancel())
        assert scope.cancelled_caught
        assert (pool_home / "pool" / "scrub.json").exists()
        report = await service.upkeep.mirrors.scrub(rate_bytes=None, restart=False, progress=quiet)
        assert report["verified_blocks"] == 10_000
        assert not (await service.upkeep.mirrors.scrub(rate_bytes=None, restart=True, progress=quiet))["wrong_blocks"]


async def test_a_leg_that_was_stale_in_a_dump_lacks_everything(pool_home: Path) -> None:
    """Dumps have no bitmaps: a resilver after a restore copied nothing, and the leg counted as sound."""
    async with opened(pool_home, "python") as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, noise(100))
    (pool_home / "b.img").rename(pool_home / "away")
    async with opened(pool_home, "python") as service:
        await service.write(volume.map_id, 0, noise(50, seed=2))
        await service.commit()
        await service.inspection.dump(pool_home / "dump")
    (pool_home / "away").rename(pool_home / "b.img")
    with restore.open_dump(pool_home / "dump") as lines:
        restore.restore(lines, pool_home / "again")
    async with open_service(pool_home / "again", pools.tiny_options()) as service:
        assert leg_states(service) == ["online", "stale"]
        found = await service.upkeep.mirrors.resilver(TWO, rate_bytes=None, progress=quiet)
        assert (found.copied_blocks, found.lost_blocks) == (100, 0)
        assert leg_states(service) == ["online", "online"]
    assert blocks_of(pool_home / "a.img", 200) == blocks_of(pool_home / "b.img", 200)


async def test_a_dump_names_legs_so_that_they_are_found_from_elsewhere(pool_home: Path) -> None:
    pool = pools.make_pool(pool_home)
    async with open_service(pool, pools.tiny_options()) as service:
        await service.upkeep.add_storage(str(pool / "a.img"), mirrors=[str(pool / "b.img")], force=True)
        await service.inspection.dump(pool_home / "dump")
    with restore.open_dump(pool_home / "dump") as lines:
        restore.restore(lines, pool_home / "elsewhere")
    async with open_service(pool_home / "elsewhere", pools.tiny_options()) as service:
        assert [leg["state"] for leg in service.storages()[1]["legs"]] == ["online", "online"]


async def test_a_leg_that_a_flush_left_behind_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    """The data plane tells legs by their position among those it was given, before one of them was left."""
    if not HAS_NATIVE:
        pytest.skip("no C")
    async with opened(tmp_path, "native") as service:
        await service.create_volume("v", 64 * BLOCK)
        table = service.volume("v").map_id
        await service.write(table, 0, noise(2))
        store = service._store
        mirror = legs.mirror_of(store, TWO)
        lent, full = mirror.legs[0].fileno(), os.open("/dev/null", os.O_RDONLY)  # type: ignore[union-attr]
        os.dup2(full, lent)
        os.close(full)
        assert mirror.leave(0, "a flush failed")
        await service.write(table, 0, noise(4, seed=2))
        assert store.failure is None
        assert await service.read(table, 0, 4 * BLOCK) == noise(4, seed=2)
