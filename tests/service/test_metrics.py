"""Metrics: what they say, and that only /metrics is served."""

import re
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio

from incfs import metrics
from incfs.errors import BackingError, Busy
from incfs.exporter import MAX_HEAD_BYTES, serve_metrics
from incfs.histogram import Histogram
from incfs.recovery import create_pool
from incfs.service import Service, open_service

LINE = re.compile(r'[a-z_]+(\{[a-z]+="([^"\\]|\\.)*"(,[a-z]+="[^"]*")*\})? (-?[0-9.e+-]+|NaN)')


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    create_pool(tmp_path / "pool")
    async with open_service(tmp_path / "pool") as opened:
        await opened.create_volume('a "quoted" \\ name', 1 << 20)
        yield opened


async def test_every_line_is_prometheus_text(service: Service) -> None:
    volume = service.volumes()[0]
    await service.write(volume.map_id, 0, b"x" * 4096)
    await service.create_snapshots([(volume.id, "s")])
    durations = {"read": Histogram()}
    durations["read"].add(0.02)
    service.durations = durations
    await service.policies.set('[volume."*"]\nschedule = "hourly"\n')
    await service.policies.note_runs({"snapshot hourly": 1_800_000_000 * 10**9})
    lines = metrics.render(service).splitlines()
    names: dict[str, str] = {}
    for line in lines:
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in names
            names[name] = kind
        elif not line.startswith("# HELP "):
            assert LINE.fullmatch(line), line
            assert any(line.startswith(name) for name in names)
    text = "\n".join(lines)
    for wanted in (
        'incfs_volume_mapped_bytes{volume="a \\"quoted\\" \\\\ name"} 4096',
        'incfs_fuse_op_duration_seconds_bucket{op="read",le="0.067108864"} 1',
        'incfs_policy_run_timestamp_seconds{task="snapshot hourly"} 1800000000.000',
        'incfs_storage_is_online{storage="1"} 1',
        "incfs_pool_read_only 0",
    ):
        assert wanted in text
    for wanted in ("incfs_metadata_map_size_bytes ", "incfs_metadata_map_used_bytes ", "incfs_pool_free_bytes "):
        assert f"\n{wanted}" in text


async def ask(stream: trio.SocketStream, request: bytes) -> bytes:
    """Send a request; give all that comes back."""
    async with stream:
        await stream.send_all(request)
        return b"".join([part async for part in stream])


@pytest.mark.parametrize("kind", ["unix", "port"])
async def test_it_is_served(tmp_path: Path, nursery: trio.Nursery, kind: str) -> None:
    path = str(tmp_path / "metrics.sock")
    port = await nursery.start(partial(serve_metrics, path if kind == "unix" else "0", lambda: "m 1\n"))

    async def connect() -> trio.SocketStream:
        return await (trio.open_unix_socket(path) if kind == "unix" else trio.open_tcp_stream("127.0.0.1", port))

    reply = await ask(await connect(), b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 200 OK\r\n")
    assert reply.endswith(b"Content-Length: 4\r\nConnection: close\r\n\r\nm 1\n")
    assert b" 404 " in await ask(await connect(), b"GET / HTTP/1.1\r\n\r\n")
    assert b" 400 " in await ask(await connect(), b"POST /metrics HTTP/1.1\r\n\r\n")
    assert b" 400 " in await ask(await connect(), b"x" * MAX_HEAD_BYTES)
    silent = await connect()
    assert b" 200 " in await ask(await connect(), b"GET /metrics HTTP/1.0\r\n\r\n")
    await silent.aclose()


async def test_a_stale_socket_is_replaced_and_nothing_else(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    await nursery.start(serve_metrics, str(path), lambda: "")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(Busy):
        await serve_metrics(str(file), lambda: "")
    assert file.read_text() == "mine"
    with pytest.raises(BackingError):
        await serve_metrics(str(tmp_path / "none/there"), lambda: "")
