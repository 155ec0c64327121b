"""What tasks wait for: pages fetched in worker threads, commits that several share, commits that fail."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing

from incfs import committer
from incfs import volume as volumes
from incfs.backing import File
from incfs.checkpoint import Checkpoint
from incfs.codec import Entries
from incfs.errors import BackingError, FormatError, NoSpace, PoolReadOnly
from incfs.log import IncrementalLog
from incfs.model import PAGE_BLOCKS, Volume, VolumeId
from incfs.overlay import Chain
from incfs.reclaimer import Reclaimer
from incfs.service import Service, open_service
from incfs.store import Store
from tests.support import pools

Result = TypeVar("Result")


async def test_a_page_fetched_while_a_checkpoint_ended_is_fetched_again(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fetched page lacks what was in memory then, and that is in the tables now."""
    offload = committer.offload
    fetched = 0
    async with open_service(pools.make_pool(pool_home), pools.tiny_options()) as service:
        volume = await service.create_volume("a", 640)
        await service.checkpoint()
        await service.write(volume.map_id, 0, b"x" * 640)
        service._store.evict(volume.map_id)

        async def fetch(work: Callable[[], Result]) -> Result:
            nonlocal fetched
            result = await offload(work)
            fetched += 1
            if fetched == 1:
                await service.checkpoint()
            return result

        monkeypatch.setattr("incfs.pageloader.offload", fetch)
        assert await service.read(volume.map_id, 0, 640) == b"x" * 640
    assert fetched == 2


PAGE_BYTES = PAGE_BLOCKS * pools.BLOCK


async def _make_volume(service: Service, page_count: int, written: Iterable[int]) -> Volume:
    """Make a volume with a block in some of its pages, in the tables."""
    volume = await service.create_volume("a", page_count * PAGE_BYTES)
    for page in written:
        await service.write(volume.map_id, page * PAGE_BYTES, b"x")
    await service.checkpoint()
    return volume


async def _resident_after(service: Service, volume: Volume, pages: list[int]) -> set[int]:
    """Read a block of each page, one after the other, with none resident before."""
    service._store.evict(volume.map_id)
    service._driver.pages._sequences.clear()
    for page in pages:
        await service.read(volume.map_id, page * PAGE_BYTES, 1)
    return {page for page in range(20) if service._store.plane.is_resident(volume.map_id, page)}


async def test_pages_that_are_read_in_sequence_are_loaded_ahead(pool_home: Path) -> None:
    async with open_service(pools.make_pool(pool_home), pools.tiny_options()) as service:
        volume = await _make_volume(service, 10, range(10))
        assert await _resident_after(service, volume, [0]) == {0}
        assert await _resident_after(service, volume, [3, 1]) == {1, 3}
        assert await _resident_after(service, volume, [0, 1]) == {0, 1, 2, 3, 4, 5}
        assert await _resident_after(service, volume, [0, 1, 6]) == {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}


async def test_empty_neighbours_of_an_empty_page_are_loaded_with_it(pool_home: Path) -> None:
    options = pools.tiny_options(page_cache_pages=64)  # so the neighbours of a page are 8
    async with open_service(pools.make_pool(pool_home), options) as service:
        volume = await _make_volume(service, 15, [2, 9])
        assert await _resident_after(service, volume, [4]) == {0, 1, 3, 4, 5, 6, 7}
        assert await _resident_after(service, volume, [14]) == {8, 10, 11, 12, 13, 14}
        assert await _resident_after(service, volume, [2]) == {2}
        assert await service.read(volume.map_id, 9 * PAGE_BYTES, 1) == b"x"


async def test_empty_neighbours_send_no_other_page_away(pool_home: Path) -> None:
    options = pools.tiny_options(page_cache_pages=16)  # so the neighbours of a page are 2
    async with open_service(pools.make_pool(pool_home), options) as service:
        volume = await _make_volume(service, 20, range(15))
        assert await _resident_after(service, volume, [*range(0, 15, 2), 16]) == {*range(0, 15, 2), 16, 17}
        assert await _resident_after(service, volume, [*range(14, -1, -1), 16]) == {*range(15), 16}


async def test_neighbours_that_are_written_in_memory_only_are_loaded_as_they_are(pool_home: Path) -> None:
    options = pools.tiny_options(page_cache_pages=64)
    async with open_service(pools.make_pool(pool_home), options) as service:
        volume = await _make_volume(service, 8, [])
        await service.write(volume.map_id, PAGE_BYTES, b"y")
        assert await _resident_after(service, volume, [0]) == set(range(8))
        assert await service.read(volume.map_id, PAGE_BYTES, 1) == b"y"


async def test_a_damaged_page_ahead_fails_only_who_asks_for_it(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = IncrementalLog.fetch

    def fail_at_third(log: IncrementalLog, chain: Chain, page_index: int) -> list[list[Entries]]:
        if page_index == 3:
            raise FormatError("damaged")
        return fetch(log, chain, page_index)

    async with open_service(pools.make_pool(pool_home), pools.tiny_options()) as service:
        volume = await _make_volume(service, 10, range(10))
        monkeypatch.setattr(IncrementalLog, "fetch", fail_at_third)
        assert await _resident_after(service, volume, [0, 1]) == {0, 1, 2}
        with pytest.raises(FormatError):
            await service.read(volume.map_id, 3 * PAGE_BYTES, 1)
        assert await _resident_after(service, volume, [4, 5]) == {4, 5, 6, 7, 8, 9}


async def test_who_asks_while_a_commit_runs_gets_the_next(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written meanwhile is not in the one that runs."""
    offload = committer.offload
    begun, may_go_on = trio.Event(), trio.Event()

    async def slowly(work: Callable[[], Result]) -> Result:
        begun.set()
        await may_go_on.wait()
        return await offload(work)

    async with (
        open_service(pools.make_pool(pool_home), pools.tiny_options()) as service,
        trio.open_nursery() as nursery,
    ):
        volume = await service.create_volume("a", 640)
        monkeypatch.setattr(committer, "offload", slowly)
        await service.write(volume.map_id, 0, b"x" * 64)
        nursery.start_soon(service.commit)
        await begun.wait()
        await service.write(volume.map_id, 64, b"y" * 64)
        asked = service._store.sequence
        async with trio.open_nursery() as second:
            second.start_soon(service.commit)
            await trio.testing.wait_all_tasks_blocked()
            may_go_on.set()
        assert service._store.durable_sequence > asked
        assert not service._store.has_uncommitted


async def test_a_failed_commit_is_told_to_all_who_wait_and_stops_writing(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def sync(file: File) -> None:
        raise BackingError(f"cannot sync {file.path}", path=str(file.path), action="sync")

    async with open_service(pools.make_pool(pool_home), pools.tiny_options()) as service:
        volume = await service.create_volume("a", 640)
        await service.write(volume.map_id, 0, b"x" * 64)

        async def commit() -> None:
            with pytest.raises(BackingError):
                await service.commit()
            told.append(True)

        with monkeypatch.context() as patched:
            patched.setattr(File, "sync", sync)
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(commit)
        assert len(told) == 3
        for attempt in (service.commit, lambda: service.write(volume.map_id, 0, b"y")):
            with pytest.raises(PoolReadOnly):
                await attempt()
        assert await service.read(volume.map_id, 0, 64) == b"x" * 64


async def test_a_checkpoint_waits_for_room_and_harms_nothing(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits go on meanwhile, in the journal."""
    refused = 0

    def no_room(checkpoint: Checkpoint) -> None:
        nonlocal refused
        refused += 1
        raise NoSpace("the host is full")

    monkeypatch.setattr(committer, "_NO_SPACE_RETRY_S", 0.001)
    async with open_service(pools.make_pool(pool_home), pools.tiny_options()) as service:
        volume = await service.create_volume("a", 640)
        with monkeypatch.context() as patched, trio.fail_after(60):
            patched.setattr(Checkpoint, "reserve", no_room)
            with pytest.raises(NoSpace):
                await service.checkpoint()
            while refused < 3:
                await trio.sleep(0.001)
            await service.write(volume.map_id, 0, b"x" * 64)
            await service.commit()
            assert service._store.is_checkpointing
        with trio.fail_after(60):
            while service._store.is_checkpointing:
                await trio.sleep(0.001)
            await service.checkpoint()
        assert not service._store.has_unfolded


async def test_who_waits_for_a_checkpoint_is_told_although_the_next_has_begun(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one may begin while the metadata is copied; whoever waited then waited for ever."""
    copied, go_on = [], threading.Event()

    def slow_copies(store: Store, goes_on: Callable[[], bool]) -> bool:
        copied.append(store)
        go_on.wait()
        return True

    async with (
        open_service(pools.make_pool(pool_home), pools.tiny_options()) as service,
        trio.open_nursery() as nursery,
    ):
        volume = await service.create_volume("a", 640)
        monkeypatch.setattr("incfs.copies.are_due", lambda *_: True)
        monkeypatch.setattr("incfs.copies.write", slow_copies)
        with trio.fail_after(60):
            try:
                nursery.start_soon(service.checkpoint)
                while not copied:
                    await trio.sleep(0.001)
                await service.write(volume.map_id, 0, b"x" * 64)
                service._committer.checkpoint_soon()
                while service._store.has_unfolded:
                    await trio.sleep(0.001)
            finally:
                go_on.set()
            while nursery.child_tasks:
                await trio.sleep(0.001)


async def test_what_is_being_removed_counts_as_space(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write waits until it is reclaimed, rather than fail."""
    is_waited_for = False
    reclaim, wait_idle = volumes.reclaim, Reclaimer.wait_idle

    def when_waited_for(store: Store, volume_id: VolumeId, page_count: int) -> bool:
        return is_waited_for and reclaim(store, volume_id, page_count)

    async def wait(reclaimer: Reclaimer) -> None:
        nonlocal is_waited_for
        is_waited_for = True
        await wait_idle(reclaimer)

    monkeypatch.setattr("incfs.reclaimer.volume.reclaim", when_waited_for)
    monkeypatch.setattr(Reclaimer, "wait_idle", wait)
    pool = pools.make_pool(pool_home, capacity_bytes=20 * 64)
    async with open_service(pool, pools.tiny_options()) as service:
        old, new = await service.create_volume("old"), await service.create_volume("new")
        await service.write(old.map_id, 0, b"x" * 15 * 64)
        await service.commit()
        await service.remove_volume(old.id)
        with trio.fail_after(60):
            await service.write(new.map_id, 0, b"y" * 15 * 64)
        assert await service.read(new.map_id, 0, 15 * 64) == b"y" * 15 * 64
