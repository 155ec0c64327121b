"""A pool on media that nobody can write: read whole, and nothing of it touched."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from incfs import unwritable
from incfs.errors import EpochMismatch, PoolLocked, PoolReadOnly
from incfs.recovery import create_pool
from incfs.service import Service, open_service
from tests.service.test_mirrors import BLOCK, noise

DATA = noise(40, 1)


@pytest.fixture
def home(pool_home: Path) -> Path:
    create_pool(pool_home / "pool", block_bytes=BLOCK, journal_bytes=1 << 16)
    return pool_home


async def fill(service: Service) -> None:
    volume = await service.create_volume("db", 1 << 20)
    await service.write(volume.map_id, 0, DATA)
    await service.create_snapshots([(volume.id, "s")])


async def read(service: Service) -> bytes:
    return await service.read(service.volume("db").map_id, 0, len(DATA))


def content(pool: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in pool.rglob("*") if path.is_file()}


@contextlib.contextmanager
def archived(monkeypatch: pytest.MonkeyPatch, pool: Path) -> Iterator[None]:
    """Have the pool's disk be read-only; whatever is written to it all the same is found."""
    before = content(pool)
    with monkeypatch.context() as patch:
        patch.setattr("incfs.service.is_unwritable", lambda _: True)
        yield
    assert content(pool) == before


@pytest.mark.parametrize("was_closed", [True, False], ids=["closed", "as a crash leaves it"])
async def test_everything_is_read_and_nothing_written(
    home: Path, monkeypatch: pytest.MonkeyPatch, was_closed: bool
) -> None:
    """What only the journal has is read, too: the data in its records, which recovery would write to the image."""
    pool = home / ("pool" if was_closed else "copy")
    async with open_service(home / "pool") as service:
        await fill(service)
        await service.commit()
        shutil.copytree(home / "pool", home / "copy")
    with archived(monkeypatch, pool):
        async with open_service(pool) as service:
            assert await read(service) == DATA
            assert [found.name for found in service.snapshots(service.volume("db").id)] == ["s"]
            assert service.directory == pool
            assert (await service.inspection.check(data=True)).is_clean
            with pytest.raises(PoolReadOnly, match="mounted read-only"):
                await service.create_volume("new", 1 << 20)


async def test_several_look_at_once_and_nobody_beside_a_writer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk may be writable by another path."""
    async with open_service(home / "pool") as service:
        await fill(service)
        with monkeypatch.context() as patch:
            patch.setattr("incfs.service.is_unwritable", lambda _: True)
            with pytest.raises(PoolLocked):
                async with open_service(home / "pool"):
                    pass
    with archived(monkeypatch, home / "pool"):
        async with open_service(home / "pool") as one, open_service(home / "pool") as two:
            assert await read(one) == await read(two) == DATA


async def test_parts_of_different_times_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_service(home / "pool") as service:
        await fill(service)
    shutil.copytree(home / "pool" / "images", home / "images")
    async with open_service(home / "pool") as service:
        await service.write(service.volume("db").map_id, 0, noise(40, 2))
    shutil.rmtree(home / "pool" / "images")
    shutil.copytree(home / "images", home / "pool" / "images")
    with archived(monkeypatch, home / "pool"):
        with pytest.raises(EpochMismatch):
            async with open_service(home / "pool"):
                pass
        async with open_service(home / "pool", force_older=True) as service:
            assert service.volume("db").name == "db"


def test_an_ordinary_directory_can_be_written(tmp_path: Path) -> None:
    assert not unwritable.is_unwritable(tmp_path)
    assert not unwritable.is_unwritable(tmp_path / "missing")
