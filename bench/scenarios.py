"""The jobs that are not one fio run: databases, small files, snapshots, mounting."""

import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

from bench.fio import FioJob, fill, run_fio
from bench.host import Cleanup, end, run, spawn, sync_file, unmount, wait_until
from bench.subjects import Incfs

if TYPE_CHECKING:
    from bench.harness import Session

_SNAPSHOTS_TIMED: Final = 20
_MANY_SNAPSHOTS: Final = 1000
_READ_TURNS: Final = 5
"""So often both volumes are read in turn: what else the machine does changes faster than a thousand are taken."""
STALL_LIMIT_MS: Final = 20.0
"""What no request should wait longer for while a checkpoint runs."""
_CHECKPOINTED_TIMES: Final = 4
"""Longer than other jobs: one checkpoint follows each 64 MiB that were overwritten, or 30 s."""
_PG_USER: Final = "postgres"
_PG_SCALE: Final = 10
_PG_CLIENTS: Final = 4
_PG_SETTINGS: Final = ("listen_addresses=", "shared_buffers=64MB", "max_wal_size=512MB", "max_connections=20")


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure."""

    metric: str
    value: float
    unit: str
    is_rate: bool = True
    """Whether more is better."""
    latency_us: dict[str, float] = field(default_factory=dict)


def _elapsed_ms(started: float) -> float:
    return (time.perf_counter() - started) * 1000


# ------------------------------------------------------------------------------------ snapshots


def time_snapshots(session: "Session") -> list[Measure]:
    """Take and remove snapshots of an empty and of a full volume; each is durable before the clock stops."""
    measures = []
    for what in ("empty", "full"):
        volume = session.subject.create(f"timed-{what}", session.size_bytes)
        if what == "full":
            fill(volume.path, volume.size_bytes)
        made, removed = [], []
        for number in range(_SNAPSHOTS_TIMED):
            started = time.perf_counter()
            session.subject.take_snapshot(volume, f"s{number}")
            made.append(_elapsed_ms(started))
            _change_a_block(volume.path)
            if session.subject.removes_snapshots:
                started = time.perf_counter()
                session.subject.remove_snapshot(volume, f"s{number}")
                removed.append(_elapsed_ms(started))
        measures.append(Measure(f"make-{what}", round(median(made), 3), "ms", is_rate=False))
        if removed:
            measures.append(Measure(f"remove-{what}", round(median(removed), 3), "ms", is_rate=False))
        volume.remove()
    return measures


def _change_a_block(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, os.urandom(4096), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def with_thousand_snapshots(session: "Session") -> list[Measure]:
    """Read at random with none and with many snapshots, between which blocks were replaced: two volumes, in turn."""
    job = FioJob("randread", 4096, direct=True)
    volumes = {name: session.subject.create(name, session.size_bytes) for name in ("none", "thousand")}
    for volume in volumes.values():
        fill(volume.path, volume.size_bytes)
    for number in range(_MANY_SNAPSHOTS):
        session.subject.take_snapshot(volumes["thousand"], f"s{number}")
        _change_a_block(volumes["thousand"].path)
    found: dict[str, list[float]] = {name: [] for name in volumes}
    for _ in range(_READ_TURNS):
        for name, volume in volumes.items():
            found[name].append(run_fio(job, volume.path, volume.size_bytes, session.seconds / _READ_TURNS).value)
    for number in range(_MANY_SNAPSHOTS):
        session.subject.remove_snapshot(volumes["thousand"], f"s{number}")
    for volume in volumes.values():
        volume.remove()
    return [Measure(name, median(values), job.unit) for name, values in found.items()]


# ------------------------------------------------------------------------------------ checkpoints


def overwrite_through_checkpoints(session: "Session") -> list[Measure]:
    """Overwrite and read at random for so long that several checkpoints run meanwhile; latencies, beside the limit."""
    volume = session.subject.create("checkpointed", session.size_bytes)
    fill(volume.path, volume.size_bytes)
    measures = [Measure("limit", STALL_LIMIT_MS, "ms", is_rate=False)]
    for depth in (1, 16):
        for kind in ("write", "read"):
            settle(volume.path)
            mode = "randwrite" if kind == "write" else "randrw"
            job = FioJob(mode, 4096, direct=True, depth=depth)
            latency_us = run_fio(job, volume.path, volume.size_bytes, _CHECKPOINTED_TIMES * session.seconds).latency_us
            for name in ("p99", "p99.9", "max"):
                value = round(latency_us[name] / 1000, 3)
                measures.append(Measure(f"{kind}-qd{depth}-{name}", value, "ms", is_rate=False))
    volume.remove()
    return measures


# ------------------------------------------------------------------------------------ small files


def delete_and_unpack(session: "Session") -> list[Measure]:
    """Unpack a tree of small files, flush it, delete it, flush again; files for each second."""
    directory = session.filesystem
    archive, tree = make_archive(session.scratch, session.file_count), directory / "tree"
    tree.mkdir()
    started = time.perf_counter()
    run(["tar", "-xf", archive, "-C", tree])
    run(["sync", "-f", directory])
    unpacked_s = _elapsed_ms(started) / 1000
    started = time.perf_counter()
    run(["rm", "-r", tree])
    run(["sync", "-f", directory])
    deleted_s = _elapsed_ms(started) / 1000
    return [
        Measure("unpack", round(session.file_count / unpacked_s, 1), "files/s"),
        Measure("delete", round(session.file_count / deleted_s, 1), "files/s"),
    ]


def make_archive(scratch: Path, file_count: int) -> Path:
    """Make the archive once: the same files in every run, of 0 to 16 KiB, 100 in a directory."""
    path = scratch / f"tree-{file_count}.tar"
    if path.exists():
        return path
    generator = random.Random(20_000)
    with tarfile.open(path, "w") as archive:
        for number in range(file_count):
            content = generator.randbytes(min(16384, int(generator.expovariate(1 / 4096))))
            member = tarfile.TarInfo(f"{number // 100:04}/{number:06}")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return path


# ------------------------------------------------------------------------------------ PostgreSQL


def run_pgbench(session: "Session") -> list[Measure]:
    """Transactions for each second, of pgbench's own kind."""
    programs, data = postgres_programs(), session.filesystem / "pgdata"
    assert programs is not None, "looked at beforehand"
    if not data.exists():
        data.mkdir(mode=0o700)
        shutil.chown(data, _PG_USER, _PG_USER)
        _as_postgres([programs / "initdb", "-D", data, "--no-sync", "--auth=trust"])
    with _server(session, programs, data) as sockets:
        client: list[str | Path] = [programs / "pgbench", "-h", sockets, "-U", _PG_USER]
        if not (data / "filled").exists():
            _as_postgres([*client, "-i", "-q", "-s", str(_PG_SCALE), "postgres"])
            (data / "filled").touch()
        _as_postgres([programs / "psql", "-q", "-h", sockets, "-c", "CHECKPOINT", "postgres"])
        seconds = str(max(2, round(session.seconds * 3)))
        count = str(_PG_CLIENTS)
        out = _as_postgres([*client, "-n", "-M", "prepared", "-c", count, "-j", "2", "-T", seconds, "postgres"])
    tps = next(line.split()[2] for line in out.splitlines() if line.startswith("tps"))
    latency = next(line.split()[3] for line in out.splitlines() if line.startswith("latency average"))
    return [Measure("tps", float(tps), "tps", latency_us={"mean": float(latency) * 1000})]


@contextmanager
def _server(session: "Session", programs: Path, data: Path) -> Iterator[Path]:
    sockets = session.scratch / "pg"
    sockets.mkdir(exist_ok=True)
    shutil.chown(sockets, _PG_USER, _PG_USER)
    settings = [word for setting in _PG_SETTINGS for word in ("-c", setting)]
    with Cleanup() as cleanup:
        command: list[str | Path] = [programs / "postgres", "-D", data, "-k", sockets, *settings]
        log = session.scratch / "postgres.log"
        process = spawn(cleanup, command, log, user=_PG_USER, group=_PG_USER, extra_groups=[], cwd="/")
        ready = [str(programs / "pg_isready"), "-q", "-h", str(sockets)]
        wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, "PostgreSQL to be ready", 60)
        yield sockets
        end(process)


def _as_postgres(command: Sequence[str | Path]) -> str:
    return run(command, user=_PG_USER, group=_PG_USER, extra_groups=[], cwd="/")


def postgres_programs() -> Path | None:
    """Find the server's programs, of the newest version; None when there are none."""
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), Path("/usr/local/bin"), Path("/usr/local/pgsql/bin")]
    found = [place for place in places if (place / "initdb").exists() and (place / "pgbench").exists()]
    versions = [int(place.parent.name) if place.parent.name.isdigit() else 0 for place in found]
    return found[versions.index(max(versions))] if found else None


# ------------------------------------------------------------------------------------ mounting


def mount_many_mappings(session: "Session") -> list[Measure]:
    """Mount a pool with many fragmented mappings: until it answers, until the first byte, and memory."""
    directory, subject = session.subject.directory, session.subject
    assert isinstance(subject, Incfs), "the job names it"
    pool, mountpoint = directory / "many", directory / "many.mnt"
    if not pool.exists():
        run([sys.executable, "-m", "bench.mappings", pool, str(session.mapping_count)], cwd=Path(__file__).parents[1])
    started = time.perf_counter()
    daemon = subject.mount(pool, mountpoint)
    mounted_ms = _elapsed_ms(started)
    started = time.perf_counter()
    size = (mountpoint / "many").stat().st_size
    with (mountpoint / "many").open("rb", buffering=0) as stream:
        stream.seek(size // 2)
        stream.read(4096)
    first_read_ms = _elapsed_ms(started)
    memory_mb = _resident_mb(daemon.pid)
    started = time.perf_counter()
    unmount(mountpoint)
    daemon.wait(60)
    return [
        Measure("mount", round(mounted_ms, 1), "ms", is_rate=False),
        Measure("first-read", round(first_read_ms, 2), "ms", is_rate=False),
        Measure("resident", round(memory_mb, 1), "MB", is_rate=False),
        Measure("unmount", round(_elapsed_ms(started), 1), "ms", is_rate=False),
        Measure("tables", round((pool / "tables.mdb").stat().st_blocks * 512 / 1e6, 1), "MB", is_rate=False),
    ]


def _resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024 / 1e6


def settle(path: Path) -> None:
    """Flush what a sample left behind, so that nobody else pays for it."""
    sync_file(path)
