"""Copies of the metadata while the pool is in use: added, lost, brought back, removed, beside commits."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from incfs import copykeeper
from incfs.errors import UsageError
from incfs.metadata import TABLES_NAME
from incfs.planes import HAS_NATIVE, PlaneKind
from incfs.service import Service, open_service
from incfs.tables import Tables
from tests.support import pools

BLOCK = pools.BLOCK


@pytest.fixture(params=["python", pytest.param("native", marks=pytest.mark.skipif(not HAS_NATIVE, reason="no C"))])
def plane(request: pytest.FixtureRequest) -> PlaneKind:
    kind: PlaneKind = request.param
    return kind


def opened(pool: Path, plane: PlaneKind) -> Any:
    return open_service(pool, replace(pools.tiny_options(small_commit_bytes=1000), data_plane=plane))


async def write_numbers(service: Service, written: list[int], until: trio.Event) -> None:
    """Write and commit, one number after the other, each 16 a checkpoint."""
    table = service.volume("a").map_id
    while not until.is_set():
        number = len(written) + 1
        await service.write(table, number % 64 * BLOCK, number.to_bytes(8, "little") * (BLOCK // 8))
        await service.commit()
        written.append(number)
        if number % 16 == 0:
            await service.checkpoint()


async def require(service: Service, written: list[int]) -> None:
    table = service.volume("a").map_id
    for number in written[-64:]:
        found = await service.read(table, number % 64 * BLOCK, BLOCK)
        assert found == number.to_bytes(8, "little") * (BLOCK // 8)


def lose(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize("survivor", ["pool", "other"])
async def test_a_copy_is_added_beside_commits(tmp_path: Path, plane: PlaneKind, survivor: str) -> None:
    pool, written, until = pools.make_pool(tmp_path), list[int](), trio.Event()
    async with opened(pool, plane) as service:
        await service.create_volume("a", 64 * BLOCK)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_numbers, service, written, until)
            while len(written) < 20:
                await trio.sleep(0.001)
            await service.copies.add(tmp_path / "other", force=True)
            known = len(written)
            while len(written) < known + 20:
                await trio.sleep(0.001)
            until.set()
        shutil.copytree(tmp_path, tmp_path.with_name("crashed"))
        await require(service, written)
    lose(tmp_path / ("other" if survivor == "pool" else "pool"))
    async with opened(tmp_path / survivor, plane) as service:
        await require(service, written)
        assert (await service.inspection.check(data=True)).is_clean
    shutil.rmtree(tmp_path.with_name("crashed"))


async def test_no_checkpoint_begins_while_a_copy_is_written(
    tmp_path: Path, plane: PlaneKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pools.make_pool(tmp_path)
    is_copying, may_end = trio.Event(), trio.Event()
    copy_to = Tables.copy_to

    def slow_copy_to(tables: Tables, path: Path) -> None:
        trio.from_thread.run_sync(is_copying.set)
        trio.from_thread.run(may_end.wait)
        copy_to(tables, path)

    monkeypatch.setattr(Tables, "copy_to", slow_copy_to)
    async with opened(pool, plane) as service:
        await service.create_volume("a", 64 * BLOCK)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: service.copies.add(tmp_path / "other", force=True))
            await is_copying.wait()
            written, until = list[int](), trio.Event()
            nursery.start_soon(write_numbers, service, written, until)
            while len(written) < 16:
                await trio.sleep(0.001)
            begun = service._committer._checkpoints_begun
            service._committer.checkpoint_soon()
            await trio.sleep(0.05)
            seen = len(written), service._committer._checkpoints_begun
            until.set()
            may_end.set()
        assert seen == (16, begun), "the checkpoint that was asked for waits"
        assert service._store.copies.current == [1, 2]
        await require(service, written)


async def test_a_copy_that_failed_comes_back_by_itself(
    tmp_path: Path, plane: PlaneKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copykeeper, "_LOOK_EVERY_S", 0.02)
    pool = pools.make_pool(tmp_path)
    async with opened(pool, plane) as service:
        await service.create_volume("a", 64 * BLOCK)
        await service.copies.add(tmp_path / "other", force=True)
        service._store.copies.leave(2, "a test")
        with trio.fail_after(30):
            while len(kinds := [event["kind"] for event in service.events()]) < 3:
                await service.write(service.volume("a").map_id, 0, b"x")
                await service.commit()
                await trio.sleep(0.01)
        assert kinds == ["metadata-added", "metadata-failed", "metadata-restored"]
        assert service._store.copies.current == [1, 2]


async def test_a_scrub_writes_a_damaged_copy_anew(tmp_path: Path, plane: PlaneKind) -> None:
    pool = pools.make_pool(tmp_path)
    async with opened(pool, plane) as service:
        await service.create_volume("a", 64 * BLOCK)
        await service.copies.add(tmp_path / "other", force=True)
        await service.checkpoint()
        with (tmp_path / "other" / TABLES_NAME).open("r+b") as file:
            damaged = file.read().replace(b"mapped_blocks", b"maqqed_blocks")
            file.seek(0)
            file.write(damaged)
        assert (await service.inspection.check(data=False)).is_damaged
        assert list(await service.copies.scrub()) == [str(tmp_path / "other")]
        assert (await service.inspection.check(data=False)).is_clean
        assert await service.copies.scrub() == {}


async def test_what_cannot_be_removed(tmp_path: Path, plane: PlaneKind) -> None:
    pool = pools.make_pool(tmp_path)
    async with opened(pool, plane) as service:
        await service.copies.add(tmp_path / "other", force=True)
        with pytest.raises(UsageError, match="is open by"):
            await service.copies.remove(pool)
    async with opened(tmp_path / "other", plane) as service:
        with pytest.raises(UsageError, match="images of the pool lie"):
            await service.copies.remove(pool)
