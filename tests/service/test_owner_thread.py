"""The owner thread asks nothing of a host: a disk that does not answer would stop everything.

Every verb but those of transfers (which tests of the mount see) and every operation on files is done, and each call of
Python's that may wait for a host is noted with the thread that made it.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from incfs.admin import VERBS, run_verb
from incfs.channel import NO_CHANNEL, Channel
from incfs.service import Service, open_service
from tests.support import pools
from tests.support.owner_watch import OwnerWatch, owner_watch

pytest.importorskip("incfs._dataplane", reason="the plane in Python reads and writes on the owner thread")

BLOCK = 4096
ELSEWHERE = ("transfer.", "replica.", "pool.metadata.")
"""Verbs that have tests of their own; whether these ask a host on the owner thread is not looked at."""
POLICY = '[volume."db"]\nquota = "1G"\nbefore = ["/bin/true"]\n'


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    with owner_watch(monkeypatch) as made:
        yield made


@pytest.fixture
async def service(pool_home: Path, watch: OwnerWatch) -> AsyncIterator[Service]:
    pool = pools.make_pool(pool_home, block_bytes=BLOCK, storages=2)
    (pool_home / "raw").write_bytes(b"r" * 10 * BLOCK)
    async with open_service(pool, pools.tiny_options(extend_bytes=1 << 20)) as service:
        with watch.watching():
            yield service


def verbs(home: Path) -> list[tuple[str, dict[str, Any]]]:
    """Give one call of each verb at least, in an order in which they can be done."""
    return [
        ("volume.create", {"name": "on-raw", "origin": str(home / "raw"), "digest": True}),
        ("volume.verify", {"volume": "on-raw"}),
        ("volume.flatten", {"volume": "on-raw"}),
        ("volume.create", {"name": "other", "size_bytes": 1 << 20}),
        ("volume.list", {}),
        ("volume.show", {"volume": "db"}),
        ("volume.resize", {"volume": "other", "size_bytes": 2 << 20}),
        ("volume.resize", {"volume": "other", "size_bytes": BLOCK + 1, "shrink": True}),
        ("volume.rename", {"volume": "other", "name": "another"}),
        ("snapshot.create", {"targets": ["db@one", "another@one"]}),
        ("snapshot.create", {"targets": ["db@two"]}),
        ("snapshot.list", {}),
        ("snapshot.show", {"target": "db@one"}),
        ("snapshot.diff", {"target": "db@two", "from_snapshot": "one"}),
        ("snapshot.hold", {"tag": "kept", "targets": ["db@one"]}),
        ("snapshot.holds", {}),
        ("snapshot.release", {"tag": "kept", "targets": ["db@one"]}),
        ("snapshot.rename", {"target": "another@one", "name": "first"}),
        ("bookmark.create", {"target": "db@one", "name": "mark"}),
        ("bookmark.list", {}),
        ("bookmark.remove", {"targets": ["db#mark"]}),
        ("volume.clone", {"target": "db@one", "name": "clone"}),
        ("volume.rollback", {"target": "db@two"}),
        ("volume.map", {"target": "db"}),
        ("volume.restripe", {"volume": "db", "stripe_columns": 2, "stripe_unit_bytes": 16 * BLOCK}),
        ("volume.migrate", {"volume": "db"}),
        ("storage.add", {"path": str(home / "third.img")}),
        ("storage.add", {"path": str(home / "leg0.img"), "mirrors": [str(home / "leg1.img")], "force": True}),
        ("storage.replace", {"storage": 4, "leg": 1, "path": str(home / "leg2.img")}),
        ("storage.resilver", {"storage": 4}),
        ("storage.list", {}),
        ("storage.evacuate", {"storage": 3}),
        ("storage.keep", {"storage": 3}),
        ("storage.remove", {"storage": 3}),
        ("pool.balance", {}),
        ("pool.scrub", {}),
        ("pool.check", {"data": True}),
        ("pool.dump", {"path": str(home / "pool.dump")}),
        ("pool.show", {}),
        ("pool.status", {}),
        ("pool.activity", {}),
        ("pool.jobs", {}),
        ("policy.set", {"text": POLICY}),
        ("policy.show", {}),
        ("policy.run", {}),
        ("policy.explain", {"volume": "db"}),
        ("events.list", {}),
        ("debug.dump", {}),
        ("debug.map", {"target": "db", "page_index": 0}),
        ("debug.log", {}),
        ("raw.export", {"target": "db@two", "path": str(home / "exported")}),
        ("raw.stream", {"target": "db@two"}),
        ("raw.import", {"volume": "imported", "path": str(home / "raw")}),
        ("snapshot.remove", {"targets": ["db@two"]}),
        ("volume.remove", {"volume": "clone"}),
    ]


async def drop(data: bytes) -> None:
    """Take what a verb gives."""
    del data


async def test_no_verb_asks_the_host_on_the_owner_thread(service: Service, watch: OwnerWatch, pool_home: Path) -> None:
    volume = await service.create_volume("db", 1 << 20)
    await service.write(volume.map_id, 0, b"d" * 100 * BLOCK)
    done = {"pool.stop"}
    for verb, arguments in verbs(pool_home):
        seen = len(watch.calls)
        with trio.fail_after(60):
            await run_verb(service, verb, arguments, lambda done, total, unit: None, Channel(drop, NO_CHANNEL.take))
        watch.calls[seen:] = [f"{verb}: {call}" for call in watch.calls[seen:]]
        done.add(verb)
    assert not watch.calls, "\n".join(watch.calls)
    assert done == {verb for verb in VERBS if not verb.startswith(ELSEWHERE)}


async def test_no_operation_on_files_asks_the_host_on_the_owner_thread(service: Service, watch: OwnerWatch) -> None:
    volume = await service.create_volume("db", 1 << 20)
    service.handles.open(volume.map_id, "test")
    for turn in range(4):
        await service.write(volume.map_id, turn * 50 * BLOCK, bytes([turn + 1]) * 50 * BLOCK)
        await service.write(volume.map_id, 300 * BLOCK + turn * 100, b"part")
        assert await service.read_for_user(volume.map_id, turn * 50 * BLOCK, BLOCK) == bytes([turn + 1]) * BLOCK
        await service.commit()
        await service.create_snapshots([(volume.id, f"s{turn}")])
        await service.discard(volume.map_id, turn * 50 * BLOCK + 10, 20 * BLOCK)
        await service.checkpoint()
        service.facts(), service.storages(), service.stat(volume.map_id)
    await service.seek(volume.map_id, 0, data=True)
    await service.resize_volume(volume.id, 10 * BLOCK + 5, shrink=True)
    service.handles.close(volume.map_id)
    await service.remove_volume(volume.id, snapshots=True)
    await service.wait_reclaimed()
    await trio.sleep(0.1)
    assert not watch.calls, watch.calls
