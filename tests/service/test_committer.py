"""Group commit and checkpoints: nobody who waits is forgotten, nobody is told too early."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from incfs.checkpoint import Checkpoint
from incfs.service import Service, open_service
from incfs.store import Store
from tests.support.pools import make_pool, tiny_options


class Gate:
    """Holds worker threads up until it is opened."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self._open = threading.Semaphore(0)

    def wrap(self, function: Callable[[Checkpoint], None]) -> Callable[[Checkpoint], None]:
        def held(checkpoint: Checkpoint) -> None:
            self.arrived.release()
            assert self._open.acquire(timeout=60)
            function(checkpoint)

        return held

    async def wait_arrived(self) -> None:
        await trio.to_thread.run_sync(self.arrived.acquire)

    def open(self) -> None:
        self._open.release()


def store_of(service: Service) -> Store:
    return service._store


async def test_a_checkpoint_begins_after_it_was_asked_for(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for while another one was committing, it returned when that one had ended: what had been freed meanwhile
    was not free, and a write into the full pool failed with ENOSPC; a close left changes to the next recovery.
    """
    gate = Gate()
    async with open_service(make_pool(pool_home), tiny_options()) as service, trio.open_nursery() as nursery:
        volume = await service.create_volume("v")
        await service.write(volume.map_id, 0, b"x" * 64 * 100)
        await service.commit()
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "run_commit", gate.wrap(Checkpoint.run_commit))
            nursery.start_soon(service.checkpoint)
            await gate.wait_arrived()  # the first one has frozen what it writes
            await service.discard(volume.map_id, 0, 64 * 100)
            done = trio.Event()

            async def second() -> None:
                await service.checkpoint()
                done.set()

            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked()
            gate.open()
            gate.open()
            await done.wait()
        assert store_of(service).pool.used_blocks() == 0
        assert store_of(service).freed_bytes == 0
        assert not store_of(service).has_unfolded


async def test_a_checkpoint_that_has_begun_is_waited_for_also_while_its_commit_is_written(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever saw it counted took the end of the one before for its own, and was told too early."""
    gate = Gate()
    async with open_service(make_pool(pool_home), tiny_options()) as service, trio.open_nursery() as nursery:
        await service.create_volume("v")
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "run_commit", gate.wrap(Checkpoint.run_commit))
            nursery.start_soon(service.checkpoint)
            await gate.wait_arrived()
            told = trio.Event()

            async def wait() -> None:
                await service._committer._wait_for_fold()
                told.set()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert not told.is_set()
            gate.open()
            await told.wait()
        assert not store_of(service).has_unfolded
