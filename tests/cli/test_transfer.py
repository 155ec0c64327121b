"""``incfs send`` and ``incfs receive``: between pools, offline and through daemons, cut off and gone on with."""

import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from incfs.recovery import create_pool
from incfs.service import open_service
from tests.cli.conftest import serving
from tests.support.cli import Cli, environment


async def _fill(directory: Path, rounds: int) -> None:
    async with open_service(directory) as service:
        names = {v.name: v for v in service.volumes()}
        for name in ("db", "log"):
            if name not in names:
                names[name] = await service.create_volume(name, 3 << 20)
        for number in range(rounds):
            for i, (name, volume) in enumerate(sorted(names.items())):
                await service.write(volume.map_id, number * 70_000 + i, f"{name} {number} ".encode() * 20_000)
            await service.create_snapshots([(v.id, f"s{number}") for v in names.values()])


async def _contents(directory: Path, name: str) -> dict[str, bytes]:
    async with open_service(directory) as service:
        volume = service.volume(name)
        return {
            f"{s.name} {s.uuid}": await service.read(s.map_id, 0, s.size_bytes) for s in service.snapshots(volume.id)
        }


def contents(cli: Cli, name: str) -> dict[str, bytes]:
    assert cli.pool is not None
    return trio.run(_contents, cli.pool, name)


@pytest.fixture
def source(tmp_path: Path) -> Cli:
    create_pool(tmp_path / "source", capacity_bytes=1 << 30)
    trio.run(_fill, tmp_path / "source", 3)
    return Cli(tmp_path / "source")


@pytest.fixture
def target(tmp_path: Path) -> Cli:
    create_pool(tmp_path / "target", capacity_bytes=1 << 30, block_bytes=16384)
    return Cli(tmp_path / "target")


@pytest.fixture(params=["offline", "online"])
def pair(source: Cli, target: Cli, request: pytest.FixtureRequest) -> Iterator[tuple[Cli, Cli]]:
    if request.param == "offline":
        yield source, target
        return
    assert source.pool is not None
    assert target.pool is not None
    with serving(source.pool), serving(target.pool):
        yield source, target


def send(cli: Cli, *arguments: object) -> bytes:
    done = subprocess.run(cli.command("send", *arguments), capture_output=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    return done.stdout


def receive(cli: Cli, stream: bytes, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        cli.command("receive", *arguments), input=stream, capture_output=True, env=environment(), check=False
    )


def test_a_chain_a_step_and_the_rest_of_a_cut_stream(pair: tuple[Cli, Cli]) -> None:
    source, target = pair
    full = send(source, "db@s0")
    assert source.json("send", "-n", "db@s0")["stream"]["stream_bytes"] == len(full)
    assert receive(target, full).returncode == 0
    chain = send(source, "-I", "s0", "db@s2", "--level", "0")
    cut = receive(target, chain[: len(chain) * 2 // 3])
    assert (cut.returncode, b"token" in cut.stderr) == (14, True)
    assert "receives a stream" in target.fails(11, "volume", "resize", "db", "1G")
    token = target.ok("receive", "--token", "db").strip()
    assert receive(target, send(source, "--token", token)).returncode == 0
    assert [s["name"] for s in target.json("snapshot", "list", "db")["snapshots"]] == ["db@s0", "db@s1", "db@s2"]
    assert target.fails(2, "receive", "--token", "db")
    assert source.fails(14, "send", "--token", token + "x")
    assert receive(target, send(source, "-i", "s0", "log@s1")).returncode == 12


def test_every_snapshot_is_the_same_in_both_pools(source: Cli, target: Cli) -> None:
    stream = send(source, "--all", "db@s2", "log@s2", "--rate", "100M")
    done = receive(target, stream, "one", "two", "--json")
    assert done.returncode == 0, done.stderr
    assert contents(target, "one") == contents(source, "db")
    assert contents(target, "two") == contents(source, "log")
    target.ok("pool", "check", "--data")


def damage(cli: Cli, content: bytes) -> None:
    """Change one byte in the middle of the stored blocks that hold this."""
    image = Path(cli.json("storage", "list")["storages"][0]["path"])
    place = image.read_bytes().index(content) + len(content) // 2
    with image.open("r+b") as file:
        file.seek(place)
        file.write(b"!")


def test_damaged_ranges_are_healed_by_a_stream_of_the_same_snapshots(pair: tuple[Cli, Cli]) -> None:
    source, target = pair
    stream = send(source, "--all", "db@s2")
    assert receive(target, stream).returncode == 0
    target.json("pool", "check", "--data")
    damage(target, b"db 1 " * 10_000)
    assert "damaged" in target.run("pool", "check", "--data").stdout
    # Another volume's stream heals nothing.
    assert receive(target, send(source, "log@s2"), "db", "--heal").returncode == 12
    healed = receive(target, stream, "db", "--heal")
    assert (healed.returncode, healed.stdout) == (0, b"healed 16.0 KiB\n"), healed.stderr
    assert target.ok("pool", "check", "--data").startswith("clean")
    assert receive(target, stream, "db", "--heal").stdout == b"healed 0 B\n"
    assert receive(target, stream[: len(stream) // 2], "db", "--heal").returncode == 14
    assert receive(target, stream, "--heal").returncode == 2


async def _progress_of_a_transfer(home: Path) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    sent: list[tuple[int, int]] = []
    received: list[tuple[int, int]] = []
    pieces: list[bytes] = []

    async def put(data: bytes) -> None:
        pieces.append(data)

    async def take() -> bytes:
        return pieces.pop(0) if pieces else b""

    async with open_service(home / "source") as source, open_service(home / "target") as target:
        volume = source.volume("db")
        plan = source.transfers.plan([(volume, source.snapshot(volume.id, "s1"))], every=True)
        await source.transfers.send(plan, put, level=0, progress=lambda *told: sent.append(told))
        await target.transfers.receive([], take, progress=lambda *told: received.append(told))
    return sent, received


def test_both_sides_tell_how_far_a_stream_has_come(source: Cli, target: Cli) -> None:
    """In the shape that the progress bar and SIGUSR1 show: from 0 to the size, for each snapshot."""
    assert source.pool is not None
    assert target.pool is not None
    for told in trio.run(_progress_of_a_transfer, source.pool.parent):
        assert {total for _, total in told} == {3 << 20}
        ends = [i + 1 for i, (done, _) in enumerate(told) if done == 3 << 20]
        assert len(ends) == 2
        assert ends[-1] == len(told)
        for part in told[: ends[0]], told[ends[0] :]:
            assert part == sorted(part)
            assert part[0][0] == 0


def test_abort_and_the_hidden_volume(pair: tuple[Cli, Cli]) -> None:
    source, target = pair
    full = send(source, "db@s0", "--level", "0")
    assert receive(target, full[:-100], "copy").returncode == 14
    assert target.json("volume", "list")["volumes"] == []
    listed = target.run("volume", "list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["NAME", "copy"]
    assert "receiving" in listed.stdout
    assert "`incfs receive --abort copy` gives it up" in listed.stderr
    target.fails(10, "volume", "show", "copy")
    target.fails(1, "volume", "create", "copy", "1M")
    target.ok("receive", "--abort", "copy")
    target.ok("volume", "create", "copy", "1M")


def test_a_replica_is_read_only(pair: tuple[Cli, Cli]) -> None:
    source, target = pair
    assert receive(target, send(source, "db@s0"), "--replica").returncode == 0
    assert "promote" in target.fails(11, "snapshot", "create", "db@mine")
    assert receive(target, send(source, "-i", "s0", "db@s1"), "--replica").returncode == 0


def test_a_stream_is_never_written_to_or_read_from_a_terminal(source: Cli) -> None:
    ours, theirs = pty.openpty()
    try:
        for verb, options in (("send", {"stdout": theirs}), ("receive", {"stdin": theirs})):
            done = subprocess.run(
                source.command(verb, "db@s0"),
                stderr=subprocess.PIPE,
                text=True,
                env=environment(),
                check=False,
                **options,
            )  # type: ignore[call-overload]
            assert (done.returncode, "terminal" in done.stderr) == (2, True)
    finally:
        os.close(ours)
        os.close(theirs)
