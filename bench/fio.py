"""fio: one run of one job, and what it measured."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.host import run

IOPS: Final = "iops"
BANDWIDTH: Final = "MB/s"
_RAMP_S: Final = 0.3
MAX_PASSES: Final = 50


@dataclass(frozen=True, slots=True)
class FioJob:
    """What fio is told, and how long.

    ``passes`` jobs run over the whole file and are repeated until the seconds are used up; each pass begins with an
    empty kernel cache of the file.  The others run for the seconds, after a short run-in.
    """

    mode: str
    """fio's ``rw``."""
    block_bytes: int
    direct: bool
    depth: int = 1
    processes: int = 1
    fsync_every: int = 0
    end_fsync: bool = False
    passes: bool = False
    once: bool = False
    """One pass only: the volume is not fresh any more after it."""
    part: float = 1.0
    """Of the file's bytes, what is read or written at random places, each at most once; the job ends with it."""

    @property
    def unit(self) -> str:
        """What is counted."""
        return BANDWIDTH if self.block_bytes >= 1 << 20 else IOPS


@dataclass(frozen=True, slots=True)
class FioResult:
    """What one run measured."""

    value: float
    latency_us: dict[str, float]


def run_fio(job: FioJob, path: Path, size_bytes: int, seconds: float) -> FioResult:
    """Run a job on a file."""
    is_timed = not job.passes and not job.once and job.part == 1.0
    if is_timed:
        return _result(job, [_run_once(job, path, size_bytes, seconds)])
    runs = [_run_once(job, path, size_bytes, None)]
    while job.passes and _busy_s(runs) < seconds and len(runs) < MAX_PASSES:
        runs.append(_run_once(job, path, size_bytes, None))
    return _result(job, runs)


def fill(path: Path, size_bytes: int) -> None:
    """Write a whole file from its begin to its end, not with zeros, and flush it."""
    _run_once(FioJob("write", 1 << 20, direct=False, end_fsync=True, once=True), path, size_bytes, None)


def command(job: FioJob, path: Path, size_bytes: int, seconds: float | None) -> list[str]:
    """Return the command line of one run."""
    words = [
        "fio",
        "--name=bench",
        f"--filename={path}",
        f"--size={size_bytes}",
        f"--rw={job.mode}",
        f"--bs={job.block_bytes}",
        f"--direct={int(job.direct)}",
        f"--ioengine={'libaio' if job.depth > 1 else 'psync'}",
        f"--iodepth={job.depth}",
        f"--numjobs={job.processes}",
        "--group_reporting",
        "--randrepeat=0",
        "--allow_file_create=0",
        "--fallocate=none",
        "--thread",
        "--output-format=json",
    ]
    if seconds is not None:
        words += ["--time_based", f"--runtime={seconds}s", f"--ramp_time={_RAMP_S}s", "--norandommap"]
    if job.part != 1.0:
        words.append(f"--io_size={max(job.block_bytes, int(size_bytes * job.part))}")
    if job.fsync_every:
        words.append(f"--fsync={job.fsync_every}")
    if job.end_fsync:
        words.append("--end_fsync=1")
    return words


def _run_once(job: FioJob, path: Path, size_bytes: int, seconds: float | None) -> dict[str, Any]:
    text = run(command(job, path, size_bytes, seconds), timeout_s=600, cwd="/")
    document: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    side = "write" if "write" in job.mode else "read"  # of both, those that the other disturbs
    measured: dict[str, Any] = document[side]
    # Of synced writes it is the sync that somebody waits for.
    return {**measured, "clat_ns": document["sync"]["lat_ns"]} if job.fsync_every else measured


def _busy_s(runs: list[dict[str, Any]]) -> float:
    return sum(float(measured["runtime"]) for measured in runs) / 1000


def _result(job: FioJob, runs: list[dict[str, Any]]) -> FioResult:
    seconds = max(_busy_s(runs), 0.001)
    operations = sum(int(measured["total_ios"]) for measured in runs)
    octets = sum(int(measured["io_bytes"]) for measured in runs)
    value = octets / seconds / 1e6 if job.unit == BANDWIDTH else operations / seconds
    return FioResult(round(value, 3), _latency(runs[-1]))


def _latency(measured: dict[str, Any]) -> dict[str, float]:
    completion = measured["clat_ns"]
    percentiles = completion.get("percentile", {})
    names = {"p50": "50.000000", "p99": "99.000000", "p99.9": "99.900000"}
    found = {name: percentiles[key] / 1000 for name, key in names.items() if key in percentiles}
    return {"mean": round(completion["mean"] / 1000, 2), **found, "max": completion["max"] / 1000}
