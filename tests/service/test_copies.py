"""Copies of the metadata are written beside everything else, and never harm it."""

import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from incfs import dump
from incfs.options import Options
from incfs.recovery import create_pool
from incfs.service import open_service
from incfs.store import Store
from tests.support import pools


def test_a_copy_that_is_being_replaced_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there when asked whether it is, and gone when asked for its age: the pool became read-only."""
    pools.make_pool(tmp_path)
    store = pools.open_tiny(tmp_path / "pool")
    monkeypatch.setattr(Path, "exists", lambda _: True)
    assert dump.copies_are_due(store, 1000)
    store.abandon()


async def test_copies_are_not_written_by_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next checkpoint does not wait for them; two writers would publish each other's halves."""
    create_pool(tmp_path / "pool", journal_bytes=64 << 10)
    calls, writing, written = [], threading.Event(), threading.Event()

    def write_copies(store: Store) -> None:
        calls.append(store)
        writing.set()
        assert written.wait(60)

    monkeypatch.setattr(dump, "write_copies", write_copies)
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
        written.set()
        assert store.failure is None
    assert len(calls) == 1
