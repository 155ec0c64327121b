"""The admin socket before a real service: clients that leave, and clients that lie."""

import os
import random
import socket
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio

from incfs import protocol
from incfs.admin import VERBS
from incfs.client import connect_control
from incfs.control import serve_control
from incfs.errors import DaemonError, IncfsError, UsageError
from incfs.protocol import SOCKET_NAME
from incfs.service import Service, open_service
from tests.support.pools import check_memory, make_pool, tiny_options

BLOCK = 64
REQUESTS = 300
OPERATION_S = 60


@asynccontextmanager
async def serving(home: Path) -> AsyncIterator[Service]:
    async with open_service(make_pool(home), tiny_options()) as service, trio.open_nursery() as nursery:
        await nursery.start(serve_control, service)
        made = await service.create_volume("db", 100 * BLOCK)
        await service.write(made.map_id, 0, b"d" * 90 * BLOCK)
        await service.create_snapshots([(made.id, "s")])
        await service.write(made.map_id, 0, b"e" * 50 * BLOCK)
        yield service
        nursery.cancel_scope.cancel()


async def raw_connection(service: Service) -> trio.SocketStream:
    return await trio.open_unix_socket(str(service.directory / SOCKET_NAME))


def frame(verb: str, **arguments: Any) -> bytes:
    request = {"version": protocol.PROTOCOL_VERSION, "verb": verb, "arguments": arguments}
    return protocol.encode_frame(request, limit_bytes=protocol.MAX_REQUEST_BYTES)


async def prove(service: Service) -> None:
    """Another client is served, and nothing is held."""
    async with connect_control(service.directory, lambda *_: None) as client:
        assert client is not None
        assert (await client.call("pool.check", data=True))["check"]["is_clean"]
    store = service._store
    assert not service._driver.space_lock.locked()
    assert store.pool.reuse.held == 0
    assert not service.handles._holders
    assert store.failure is None
    check_memory(store)


def requests_of(number: int, home: Path) -> list[bytes]:
    """One request of each kind, with names of their own."""
    return [
        frame("volume.create", name=f"v{number}", size_bytes=BLOCK),
        frame("volume.resize", volume="db", size_bytes=(100 + number) * BLOCK),
        frame("volume.resize", volume="db", size_bytes=99 * BLOCK, shrink=True),
        frame("volume.list"),
        frame("volume.map", volume="db"),
        frame("snapshot.create", targets=[f"db@s{number}"]),
        frame("snapshot.diff", target="db@s"),
        frame("snapshot.remove", target=f"db@s{number}"),
        frame("volume.remove", volume=f"v{number}"),
        frame("storage.add", path=str(home / f"{number}.img"), capacity_bytes=1 << 16),
        frame("pool.check", data=True),
        frame("pool.show"),
        frame("debug.dump"),
    ]


async def test_clients_that_leave_at_any_moment(pool_home: Path) -> None:
    """After each number of turns of the scheduler since the request was sent."""
    async with serving(pool_home) as service:
        for turns in range(12):
            with trio.fail_after(OPERATION_S):
                for request in requests_of(turns, pool_home):
                    stream = await raw_connection(service)
                    await stream.send_all(request)
                    for _ in range(turns):
                        await trio.lowlevel.checkpoint()
                    await stream.aclose()
                await prove(service)


async def test_clients_that_leave_in_the_middle_of_a_request(pool_home: Path) -> None:
    request = frame("volume.create", name="torn", size_bytes=BLOCK)
    async with serving(pool_home) as service:
        for length in range(len(request)):
            async with await raw_connection(service) as stream:
                await stream.send_all(request[:length])
        with trio.fail_after(OPERATION_S):
            await prove(service)
        assert [v.name for v in service.volumes()] == ["db"]


async def test_a_client_that_never_reads_holds_up_nobody(pool_home: Path) -> None:
    async with serving(pool_home) as service, await raw_connection(service) as stream:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with trio.move_on_after(0.2):
            while True:
                await stream.send_all(frame("debug.dump"))
        with trio.fail_after(OPERATION_S):
            await prove(service)


PLACE = "@HOME@"
"""Stands for the test's own directory: what a path names must never be the machine's."""
HOSTILE_VALUES: list[Any] = [
    -1, 0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), True, None, 1.5, float("nan"),
    "", "db", "db@s", "db@x", "@", "uuid:", "uuid:@", "x\0y", "x" * 300, "\x1b[2J", "é" * 150, "fe" * 60000,
    "..", "../x", PLACE, f"{PLACE}/../x", f"{PLACE}/x\0y", f"{PLACE}/{'x' * 300}", f"{PLACE}/device", f"{PLACE}/fifo",
    f"{PLACE}/link", f"{PLACE}/missing/x", f"{PLACE}/pool/superblock", f"{PLACE}/x",
    b"", b"\xff", [], ["db@s"], [1], [[]], {}, {"a": 1},
]  # fmt: skip


def lay_traps(home: Path) -> dict[Path, int]:
    """Make what a path should better not name; give the inodes."""
    os.mknod(home / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(home / "fifo")
    (home / "target").write_bytes(b"precious")
    (home / "link").symlink_to(home / "target")
    return {path: path.lstat().st_ino for path in (home / "device", home / "fifo", home / "target")}


def at_home(value: Any, home: Path) -> Any:
    return value.replace(PLACE, str(home)) if isinstance(value, str) else value


ANSWERED = [verb for verb in VERBS if not verb.startswith("transfer.")]
"""Verbs with one request and one answer; those of streams wait for more (tests/cli/test_transfer.py)."""


def hostile_request(chance: random.Random, known: list[str], home: Path) -> bytes:
    verb = chance.choice([*ANSWERED, "x", ""])
    arguments = {
        chance.choice(known): at_home(chance.choice(HOSTILE_VALUES), home) for _ in range(chance.randint(0, 4))
    }
    return frame(verb, **arguments)


def argument_names() -> list[str]:
    """Every name that any verb takes."""
    names = {n for verb in VERBS.values() for n in verb.run.__code__.co_varnames[: verb.run.__code__.co_argcount]}
    kw = {n for verb in VERBS.values() for n in verb.run.__annotations__}
    return sorted((names | kw) - {"service", "progress", "return"})


def well_named_request(chance: random.Random, home: Path) -> bytes:
    """The right names of a verb's arguments, with senseless values of mostly the right type."""
    verb = chance.choice(ANSWERED)
    annotations = {
        n: a for n, a in VERBS[verb].run.__annotations__.items() if n not in ("service", "progress", "return")
    }
    arguments: dict[str, Any] = {}
    for name, annotation in annotations.items():
        fitting = [v for v in HOSTILE_VALUES if type(v).__name__ in str(annotation)] or HOSTILE_VALUES
        if name == "rate_bytes":  # a byte a second is obeyed, for hours
            fitting = [v for v in fitting if not isinstance(v, int) or v not in range(1, 1 << 20)]
        if chance.random() < 0.9:
            arguments[name] = at_home(chance.choice(fitting), home)
    return frame(verb, **arguments)


@pytest.mark.parametrize("seed", range(3))
async def test_senseless_requests_are_refused_with_typed_errors(
    seed: int, pool_home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, known = random.Random(seed), argument_names()
    traps = lay_traps(pool_home)
    (pool_home / "here").mkdir()
    monkeypatch.chdir(pool_home / "here")
    async with serving(pool_home) as service:
        stream = await raw_connection(service)
        for _ in range(REQUESTS):
            request = well_named_request(chance, pool_home)
            if chance.random() < 0.3:
                request = hostile_request(chance, known, pool_home)
            with trio.fail_after(OPERATION_S):
                await stream.send_all(request)
                reply: dict[str, Any] | None = {"progress": 1}
                while reply is not None and "progress" in reply:
                    reply = await protocol.receive_frame(stream, limit_bytes=protocol.MAX_REPLY_BYTES)
            assert reply is not None
            error = reply.get("error", {})
            assert "internal error" not in error.get("message", ""), (msgpack.unpackb(request[4:]), error)
        await stream.aclose()
        assert {path: path.lstat().st_ino for path in traps} == traps
        assert (pool_home / "target").read_bytes() == b"precious"
        with trio.fail_after(OPERATION_S):
            await prove(service)
    assert not [record for record in caplog.records if record.exc_info]


async def test_mutated_frames_are_refused_with_typed_errors(pool_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lengths that lie, broken msgpack, keys that cannot be keys: an answer or a closed connection, no traceback."""
    chance = random.Random(7)
    bases = [
        frame("volume.list"),
        frame("snapshot.create", targets=["db@q"]),
        struct.pack("<I", 9) + b"\x81\x81\x01\x02\x03",
    ]
    bases += [struct.pack("<I", 5) + b"\xdd\xff\xff\xff\xff", struct.pack("<I", 4000) + b"\x91" * 4000]
    async with serving(pool_home) as service:
        for number in range(400):
            data = bytearray(bases[number % len(bases)])
            for _ in range(chance.randint(0, 3)):
                data[chance.randrange(len(data))] = chance.choice([0, 1, 0x7F, 0x80, 0xC1, 0xDD, 0xDF, 0xFF])
            async with await raw_connection(service) as stream:
                with trio.fail_after(OPERATION_S), suppress(trio.BrokenResourceError, DaemonError, IncfsError):
                    await stream.send_all(bytes(data))
                    await stream.send_eof()
                    while await protocol.receive_frame(stream, limit_bytes=protocol.MAX_REPLY_BYTES) is not None:
                        pass
        with trio.fail_after(OPERATION_S):
            await prove(service)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("name", ["device", "fifo", "."])
async def test_a_dump_replaces_nothing_but_a_file(name: str, pool_home: Path) -> None:
    """``pool dump /dev/null`` put an ordinary file in the place of the device."""
    traps = lay_traps(pool_home)
    async with serving(pool_home) as service:
        with pytest.raises(UsageError, match="not an ordinary file"):
            await service.inspection.dump(pool_home / name)
        assert {path: path.lstat().st_ino for path in traps} == traps
        await service.inspection.dump(pool_home / "link")  # the link is replaced, not what it points to
        assert (pool_home / "target").read_bytes() == b"precious"
