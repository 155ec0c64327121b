"""The admin socket: every request is answered once, and no client can hurt the server."""

import socket
import stat
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from incfs import client, control, errors, protocol
from incfs.client import ControlClient, connect_control
from incfs.control import serve_control
from incfs.errors import DaemonError, IncfsError, PermissionRefused, VolumeNotFound
from incfs.protocol import SOCKET_NAME, Peer
from tests.support.fake_admin import FakeAdminService
from tests.support.loop import run

PATIENCE_S = 60


def ignore_progress(done: int, total: int, unit: str) -> None:
    pass


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[FakeAdminService]:
    service = FakeAdminService(directory)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, service)
        yield service
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(directory: Path, progress: Any = ignore_progress) -> AsyncIterator[ControlClient]:
    async with connect_control(directory, progress) as client:
        assert client is not None
        yield client


async def raw_connection(directory: Path) -> trio.SocketStream:
    return await trio.open_unix_socket(str(directory / SOCKET_NAME))


async def test_calls_follow_each_other_on_one_connection(tmp_path: Path) -> None:
    async with serving(tmp_path), connected(tmp_path) as client:
        made = await client.call("volume.create", name="db", size_bytes=1 << 30)
        listed = await client.call("volume.list")
    assert listed["volumes"] == [made["volume"]]
    assert made["volume"]["size_bytes"] == 1 << 30


async def test_socket_is_private_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / SOCKET_NAME
    async with serving(tmp_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_ISSOCK(path.stat().st_mode)
    assert not path.exists()


async def test_error_comes_back_as_its_class(tmp_path: Path) -> None:
    async with serving(tmp_path), connected(tmp_path) as client:
        with pytest.raises(VolumeNotFound) as caught:
            await client.call("volume.show", volume="nothing")
        assert caught.value.exit_code == 10
        assert caught.value.facts == {"name": "nothing"}
        await client.call("volume.list")


async def test_stale_socket_file_counts_as_no_daemon_and_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / SOCKET_NAME))
    async with connect_control(tmp_path, ignore_progress) as client:
        assert client is None
    async with serving(tmp_path), connected(tmp_path) as client:
        await client.call("volume.list")


async def test_no_socket_is_no_daemon(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        async with connect_control(directory, ignore_progress) as client:
            assert client is None


async def test_directory_longer_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    async with serving(deep), connected(deep) as client:
        await client.call("volume.list")


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",
        struct.pack("<I", protocol.MAX_REQUEST_BYTES + 1) + b"x" * 100,
        struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1",
        struct.pack("<I", 3) + b"\x92\x01\x02",
        struct.pack("<I", 1) + b"\x01",
    ],
)
async def test_server_outlives_a_bad_client(tmp_path: Path, sent: bytes) -> None:
    async with serving(tmp_path):
        async with await raw_connection(tmp_path) as stream:
            await stream.send_all(sent)
            await stream.send_eof()
            answer = b""
            # Bytes that the server did not read make its close a reset.
            with trio.fail_after(PATIENCE_S), suppress(trio.BrokenResourceError):
                async for chunk in stream:
                    answer += chunk
        assert b"daemon.unreachable" in answer
        async with connected(tmp_path) as client:
            await client.call("volume.list")


@pytest.mark.parametrize("sent", [b"", b"\x01", struct.pack("<I", 100), struct.pack("<I", 100) + b"torn"])
async def test_client_that_goes_away_within_a_message_is_nothing_to_warn_of(
    tmp_path: Path, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A command whose request has failed stops in the middle of the data that it sent meanwhile."""
    async with serving(tmp_path):
        async with await raw_connection(tmp_path) as stream:
            await stream.send_all(sent)
            await stream.send_eof()
            with trio.fail_after(PATIENCE_S), suppress(trio.BrokenResourceError):
                assert await stream.receive_some() == b""
        async with connected(tmp_path) as client:
            await client.call("volume.list")
    assert not caplog.records


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"version": 99, "verb": "volume.list", "arguments": {}},
        {"version": 1, "verb": "volume.explode", "arguments": {}},
        {"version": 1, "verb": ["volume.list"], "arguments": {}},
        {"version": 1, "verb": "volume.list", "arguments": []},
        {"version": 1, "verb": "volume.list", "arguments": {"service": 1}},
        {"version": 1, "verb": "volume.create", "arguments": {"name": "a"}},
        {"version": 1, "verb": "volume.create", "arguments": {"name": "a", "size_bytes": "1"}},
        {"version": 1, "verb": "volume.create", "arguments": {"name": "a", "size_bytes": True}},
        {"version": 1, "verb": "snapshot.create", "arguments": {"targets": [1]}},
        {"version": 1, "verb": "volume.list", "arguments": {1: 2}},
    ],
)
async def test_senseless_request_is_a_usage_error(tmp_path: Path, request_: dict[str, Any]) -> None:
    async with serving(tmp_path):
        stream = await raw_connection(tmp_path)
        await stream.send_all(protocol.encode_frame(request_, limit_bytes=1 << 20))
        reply = await protocol.receive_frame(stream, limit_bytes=1 << 20)
        await stream.aclose()
    assert reply is not None
    assert reply["error"]["code"] == "usage.invalid"
    assert reply["error"]["exit_code"] == 2


async def test_bug_in_a_verb_is_answered_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path), connected(tmp_path) as client:
        with pytest.raises(IncfsError, match="internal error"):
            await client.call("debug.log")
        await client.call("volume.list")
    assert "ZeroDivisionError" in caplog.text


async def test_progress_arrives_before_the_result(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    async with serving(tmp_path) as service:

        def on_progress(done: int, total: int, unit: str) -> None:
            seen.append((done, total, unit))
            service.may_finish.set()

        async with connected(tmp_path, on_progress) as client:
            with trio.fail_after(PATIENCE_S):
                document = await client.call("pool.check", data=True)
    assert seen == [(40, 100, "blocks"), (100, 100, "blocks")]
    assert document == {"check": {"is_clean": True}}


async def ask_and_leave(directory: Path, begun: trio.Event, verb: str, **arguments: Any) -> None:
    """Have a client ask for something, and go as soon as that has begun."""

    async def ask() -> None:
        async with connected(directory) as client:
            await client.call(verb, **arguments)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await begun.wait()
        nursery.cancel_scope.cancel()


async def test_gone_client_cancels_what_only_reads(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        with trio.fail_after(PATIENCE_S):
            await ask_and_leave(tmp_path, service.check_begun, "pool.check")
            await service.check_cancelled.wait()


async def test_gone_client_does_not_stop_a_change(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        with trio.fail_after(PATIENCE_S):
            await ask_and_leave(tmp_path, service.addition_begun, "storage.add", path="/x")
            await trio.testing.wait_all_tasks_blocked(0.01)  # the server has had its chance to see that
            service.may_finish.set()
            while not service.calls:
                await trio.lowlevel.checkpoint()


async def test_other_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "peer_of", lambda _: Peer(1, 12345, 0))
    async with serving(tmp_path), connected(tmp_path) as client:
        with pytest.raises(PermissionRefused):
            await client.call("volume.list")


@pytest.fixture
def nameless(tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk that has no room for another name."""
    directory = tmp_path / "disk"
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", "nr_inodes=2", "tmpfs", directory)
    (directory / "last").touch()
    yield directory
    run("umount", directory)


@pytest.mark.loop
async def test_a_disk_without_room_for_the_sockets_name_is_served_without_one(nameless: Path) -> None:
    """A pool on a full XFS or btrfs could not be mounted."""
    async with serving(nameless):
        assert not (nameless / SOCKET_NAME).exists()
        async with connected(nameless) as client:
            await client.call("volume.list")
    async with connect_control(nameless, ignore_progress) as gone:
        assert gone is None


@pytest.mark.loop
async def test_whoever_else_listens_at_the_address_without_a_name_is_no_daemon(
    nameless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such an address is nobody's: another user may have taken it, to hear what administrators ask."""
    monkeypatch.setattr(client, "peer_of", lambda _: Peer(1, 12345, 0))
    async with serving(nameless), connect_control(nameless, ignore_progress) as found:
        assert found is None


async def test_many_clients_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:

        async def create(number: int) -> None:
            async with connected(tmp_path) as client:
                await client.call("volume.create", name=f"v{number}", size_bytes=0)

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(create, number)
        assert len(service.volumes()) == 100


async def test_daemon_that_goes_away_is_a_daemon_error(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(tmp_path / SOCKET_NAME))
        listener.listen()

        async def accept_and_close() -> None:
            peer, _ = await listener.accept()
            await peer.recv(1)
            peer.close()

        nursery.start_soon(accept_and_close)
        async with connected(tmp_path) as client:
            with pytest.raises(DaemonError):
                await client.call("volume.list")
    listener.close()


def all_error_classes() -> list[type[IncfsError]]:
    return [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, IncfsError)]


@pytest.mark.parametrize("cls", all_error_classes())
def test_every_error_survives_the_way(cls: type[IncfsError]) -> None:
    error = cls("what and where", path=Path("/x"), blocks=[1, 2])
    packed = msgpack.unpackb(msgpack.packb(protocol.error_document(error)))
    back = protocol.rebuild_error(packed)
    assert type(back) is cls
    assert str(back) == "what and where"
    assert back.facts == {"path": "/x", "blocks": [1, 2]}


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in all_error_classes()]
    assert len(codes) == len(set(codes))


def test_error_of_a_newer_daemon_keeps_its_exit_code() -> None:
    error = protocol.rebuild_error({"code": "policy.new", "message": "no", "facts": None, "exit_code": 13})
    assert (error.exit_code, error.code, str(error)) == (13, "policy.new", "no")


@given(st.binary(max_size=64))
def test_any_bytes_give_a_frame_or_an_error_of_their_own(data: bytes) -> None:
    async def feed() -> None:
        send, receive = trio.testing.memory_stream_one_way_pair()
        await send.send_all(data)
        await send.aclose()
        try:
            message = await protocol.receive_frame(receive, limit_bytes=1 << 20)
        except (DaemonError, trio.BrokenResourceError):
            return
        assert message is None or isinstance(message, dict)

    trio.run(feed)


def test_too_long_message_is_not_sent() -> None:
    with pytest.raises(DaemonError, match="too long"):
        protocol.encode_frame({"a": "x" * 100}, limit_bytes=50)


async def test_too_long_message_is_refused_at_its_head() -> None:
    """Its body is not waited for, still less kept."""
    send, receive = trio.testing.memory_stream_one_way_pair()
    await send.send_all(struct.pack("<I", 51) + b"x" * 10)
    with trio.fail_after(PATIENCE_S), pytest.raises(DaemonError, match="too long"):
        await protocol.receive_frame(receive, limit_bytes=50)
