"""Another user before the admin socket: a real process that gave up its rights."""

import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from incfs.client import connect_control
from incfs.control import serve_control
from incfs.errors import PermissionRefused
from incfs.options import Options
from incfs.protocol import SOCKET_NAME
from incfs.service import open_service
from tests.support.pools import make_pool
from tests.support.users import as_nobody

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


async def ask(directory: Path) -> None:
    async with connect_control(directory, lambda *_: None) as client:
        assert client is not None
        await client.call("volume.create", name="mine", size_bytes=1)


def refused(directory: Path) -> None:
    try:
        trio.run(ask, directory)
    except PermissionRefused:
        return
    raise AssertionError("served")


def raw_refused(directory: Path) -> None:
    """Whoever gets past the mode of the socket is asked who it is: a request is not even read."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(directory / SOCKET_NAME))
        answer = client.recv(1 << 16)
    assert b"may not administer" in answer


@pytest.mark.parametrize(("mode", "attempt"), [(0o600, refused), (0o666, refused), (0o666, raw_refused)])
def test_another_user_is_refused(mode: int, attempt: Callable[[Path], None], pool_home: Path) -> None:
    pool = make_pool(pool_home)
    listening, finished = threading.Event(), threading.Event()

    async def serve() -> None:
        async with open_service(pool) as service, trio.open_nursery() as nursery:
            await nursery.start(serve_control, service)
            listening.set()
            await trio.to_thread.run_sync(finished.wait)
            assert not service.volumes()
            nursery.cancel_scope.cancel()

    server = threading.Thread(target=trio.run, args=(serve,))
    server.start()
    try:
        assert listening.wait(60)
        for directory in (pool_home, pool):
            os.chmod(directory, 0o755)  # as an administrator should not
        os.chmod(pool / SOCKET_NAME, mode)
        assert as_nobody(attempt, pool) == 0
    finally:
        finished.set()
        server.join()


def test_nothing_of_a_pool_is_for_others_whatever_the_umask(pool_home: Path) -> None:
    """With umask 0 the directories above a new pool could be written by everybody."""
    before = os.umask(0)
    try:
        pool = make_pool(pool_home / "a" / "b", storages=2)

        async def work() -> None:
            async with open_service(pool, Options(dump_interval_s=0.0)) as service, trio.open_nursery() as nursery:
                await nursery.start(serve_control, service)
                made = await service.create_volume("v")
                await service.write(made.map_id, 0, b"x" * 10_000)
                await service.checkpoint()
                await service.inspection.dump(pool_home / "a" / "dump")
                await service.upkeep.add_storage(str(pool / "more.img"), capacity_bytes=1 << 20)
                await service.checkpoint()
                _require_private(pool_home / "a")
                nursery.cancel_scope.cancel()

        trio.run(work)
        _require_private(pool_home / "a")
    finally:
        os.umask(before)


def _require_private(directory: Path) -> None:
    found = [directory, *directory.rglob("*")]
    assert len(found) > 8
    for path in found:
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:  # a dump has taken its name
            continue
        assert stat.S_IMODE(mode) == (0o700 if stat.S_ISDIR(mode) else 0o600), path
