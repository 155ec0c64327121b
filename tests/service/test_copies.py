"""Copies of the metadata are written beside everything else, and never harm it."""

import gzip
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from incfs import copies, restore
from incfs.backing import File
from incfs.errors import BackingError, IncfsError
from incfs.model import StorageId
from incfs.options import Options
from incfs.recovery import create_pool, make_storage
from incfs.service import open_service
from incfs.store import Store
from tests.support import pools


def test_a_copy_that_is_being_replaced_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there when asked whether it is, and gone when asked for its age: the pool became read-only."""
    pools.make_pool(tmp_path)
    store = pools.open_tiny(tmp_path / "pool")
    monkeypatch.setattr(Path, "exists", lambda _: True)
    assert copies.are_due(store, 1000)
    store.abandon()


async def test_copies_are_not_written_by_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next checkpoint does not wait for them; two writers would publish each other's halves."""
    create_pool(tmp_path / "pool", journal_bytes=64 << 10)
    calls, writing, written = [], threading.Event(), threading.Event()

    def write_copies(store: Store, goes_on: Callable[[], bool]) -> bool:
        calls.append(store)
        writing.set()
        assert written.wait(60)
        return True

    monkeypatch.setattr(copies, "write", write_copies)
    async with open_service(tmp_path / "pool", Options(dump_interval_s=0.0)) as service:
        store, committer = service._store, service._committer
        for name in ("a", "b"):
            await service.create_volume(name)
            committer.checkpoint_soon()
            await service.commit()
            assert await trio.to_thread.run_sync(writing.wait, 60)
            while store.has_unfolded:
                await trio.sleep(0.001)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert len(calls) == 1
        written.set()
        assert store.failure is None


def copies_in(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*.dump.gz*"))


def volumes_in(copy: Path) -> int:
    return gzip.decompress(copy.read_bytes()).count(b'"record":"volume"')


async def create_volume(pool: Path, name: str, dump_interval_s: float | None = 86400.0) -> None:
    async with open_service(pool, pools.tiny_options(dump_interval_s=dump_interval_s)) as service:
        await service.create_volume(name, 640)


async def look(pool: Path) -> None:
    async with open_service(pool, pools.tiny_options()) as service:
        assert service.volumes() is not None


async def test_a_session_that_wrote_leaves_a_copy_and_one_that_looked_none(pool_home: Path) -> None:
    """A pool that is only used by commands, or mounted for moments, had none."""
    pool = pools.make_pool(pool_home)
    await look(pool)
    assert copies_in(pool_home) == []
    await create_volume(pool, "a", dump_interval_s=None)
    assert copies_in(pool_home) == []
    await create_volume(pool, "b")
    (found,) = copies_in(pool_home)
    assert volumes_in(pool_home / found) == 2
    (pool_home / found).unlink()
    await look(pool)
    assert copies_in(pool_home) == []


async def test_copies_at_the_end_of_a_session_are_an_hour_apart(pool_home: Path) -> None:
    """A command is not made slow by those that come before it, and a nightly one has its own copy each night."""
    pool = pools.make_pool(pool_home)
    await create_volume(pool, "a")
    (found,) = copies_in(pool_home)
    copy = pool_home / found
    await create_volume(pool, "b")
    assert (volumes_in(copy), copies_in(pool_home)) == (1, [found])
    for name, written, count in (("c", time.time() - 3601, 3), ("d", time.time() + 86400, 4)):
        os.utime(copy, (written, written))
        await create_volume(pool, name)
        assert (volumes_in(copy), copies_in(pool_home)) == (count, [found, f"{found}.1"])
        assert volumes_in(pool_home / f"{found}.1") < count


async def test_what_a_crashed_session_wrote_is_copied_by_the_next(pool_home: Path) -> None:
    pool = pools.make_pool(pool_home)
    store = pools.open_tiny(pool)
    pools.new_volume(store, "a")
    store.commit()
    store.abandon()
    await look(pool)
    assert volumes_in(pool_home / copies_in(pool_home)[0]) == 1


async def test_copies_that_take_long_are_given_up_at_the_end(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for ever until a pool is closed, whatever its size; what was there stays."""
    pool = pools.make_pool(pool_home)
    await create_volume(pool, "a")
    (found,) = copies_in(pool_home)
    os.utime(pool_home / found, (0, 0))
    monkeypatch.setattr(copies, "_END_LIMIT_WITHOUT_S", 0.0)
    await create_volume(pool, "b")
    assert "takes too long" in caplog.text
    assert (volumes_in(pool_home / found), copies_in(pool_home)) == (1, [found])


def test_a_pool_without_a_recent_copy_waits_longer_for_one(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        assert copies.end_limit_s(store, 0.1) == 60
        assert copies.write(store)
        assert [copies.end_limit_s(store, open_for_s) for open_for_s in (0.1, 5.0, 5000.0)] == [1, 5, 10]


@pytest.fixture
def mirrored(pool_home: Path) -> Store:
    disks = [pool_home / f"disk{number}" for number in (1, 2)]
    create_pool(pool_home / "pool", block_bytes=pools.BLOCK, directories=[pool_home / "first"])
    store = pools.open_tiny(pool_home / "pool")
    for disk in disks:
        disk.mkdir()
    record = make_storage(store, disks[0], mirrors=disks[1:], force=True)
    with store.step():
        store.pool.attach(record)
        store.add(record)
    store.checkpoint()
    store.close()
    return pools.open_tiny(pool_home / "pool")


def test_a_copy_lies_beside_every_leg(mirrored: Store, pool_home: Path) -> None:
    """It lay beside the first only: a mirror whose first leg and pool directory share a disk was lost with that."""
    pools.new_volume(mirrored, "a")
    mirrored.checkpoint()
    copies.write(mirrored)
    found = copies_in(pool_home)
    assert [path.partition("/")[0] for path in found] == ["disk1", "disk2", "first"]
    mirrored.close()
    shutil.rmtree(pool_home / "pool")
    for number, path in enumerate(found):
        with restore.open_dump(pool_home / path) as lines:
            facts = restore.restore(lines, pool_home / f"again{number}")
        assert facts["volume_count"] == 1


def test_a_copy_that_fails_does_not_keep_the_others(
    mirrored: Store, pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = File.pwrite

    def fail(file: File, offset_bytes: int, data: bytes) -> None:
        if file.path.parent.name == "disk1":
            raise BackingError(f"{file.path}: it is broken")
        write(file, offset_bytes, data)

    monkeypatch.setattr(File, "pwrite", fail)
    with pytest.raises(IncfsError, match="broken"):
        copies.write(mirrored)
    assert [path.partition("/")[0] for path in copies_in(pool_home)] == ["disk2", "first"]
    mirrored.abandon()


def test_a_leg_that_failed_is_left_alone(mirrored: Store, pool_home: Path) -> None:
    """Its disk may not answer."""
    mirror = mirrored.pool.volumes[StorageId(2)].mirror
    assert mirror is not None
    mirror.leave(0, "it is broken")
    assert copies.write(mirrored)
    assert [path.partition("/")[0] for path in copies_in(pool_home)] == ["disk2", "first"]
    mirrored.abandon()
