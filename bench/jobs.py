"""The jobs, declared: what is done, on what, and how often it makes sense."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from bench.access import ACCESSES, FILE, LOOP_BUFFERED, LOOP_DIRECT, POOL
from bench.fio import FioJob
from bench.scenarios import (
    Measure,
    delete_and_unpack,
    mount_many_mappings,
    overwrite_through_checkpoints,
    run_pgbench,
    time_snapshots,
    with_thousand_snapshots,
)

if TYPE_CHECKING:
    from bench.harness import Session

Needs = Literal["shared", "sequential", "fresh", "snapshotted", "nothing"]
"""The shared volume, in whatever layout; the shared one after a sequential write; a new empty one; a new one that
was filled and has a snapshot; or none, because the job makes its own."""
KIB4: Final = 4096
MIB: Final = 1 << 20
_ON_LOOP: Final = (LOOP_DIRECT, LOOP_BUFFERED)
_EVERYWHERE: Final = (FILE, *_ON_LOOP)


@dataclass(frozen=True, slots=True)
class Job:
    """One line of the results."""

    key: str
    title: str
    work: "FioJob | Callable[[Session], list[Measure]]"
    needs: Needs = "shared"
    accesses: tuple[str, ...] = (FILE,)
    is_cold: bool = False
    """The machine's page cache is emptied before each sample; else the images stay in it."""
    only: tuple[str, ...] = ()
    """Prefixes of the subjects' keys; all when empty."""
    needs_snapshots: bool = False


# fmt: off
JOBS: Final = (
    Job("read-1m", "1 MiB sequential read, direct", FioJob("read", MIB, direct=True), "sequential", _EVERYWHERE),
    Job("read-1m-cold", "the same, cold", FioJob("read", MIB, direct=True), "sequential", is_cold=True),
    Job("read-1m-buffered", "1 MiB sequential read, buffered",
        FioJob("read", MIB, direct=False, passes=True), "sequential"),
    Job("write-1m", "1 MiB sequential write, direct", FioJob("write", MIB, direct=True), accesses=_EVERYWHERE),
    Job("write-1m-buffered", "1 MiB sequential write, buffered, flushed at the end",
        FioJob("write", MIB, direct=False, passes=True, end_fsync=True)),
    Job("randread-4k-qd1", "4 KiB random read, direct, depth 1", FioJob("randread", KIB4, direct=True)),
    Job("randread-4k-qd16", "4 KiB random read, direct, depth 16",
        FioJob("randread", KIB4, direct=True, depth=16), accesses=_EVERYWHERE),
    Job("randread-4k-qd16-cold", "the same, cold", FioJob("randread", KIB4, direct=True, depth=16), is_cold=True),
    Job("randwrite-4k-qd1", "4 KiB random write, direct, depth 1", FioJob("randwrite", KIB4, direct=True)),
    Job("randwrite-4k-qd16", "4 KiB random write, direct, depth 16",
        FioJob("randwrite", KIB4, direct=True, depth=16), accesses=_EVERYWHERE),
    Job("randwrite-4k-buffered", "4 KiB random write, buffered", FioJob("randwrite", KIB4, direct=False)),
    Job("randwrite-4k-flushed", "4 KiB random write, buffered, 1/4 of the file, flushed at the end",
        FioJob("randwrite", KIB4, direct=False, part=0.25, end_fsync=True)),
    Job("fsync-4k-1", "4 KiB random write + fsync, 1 job", FioJob("randwrite", KIB4, direct=False, fsync_every=1),
        accesses=_EVERYWHERE),
    Job("fsync-4k-8", "4 KiB random write + fsync, 8 jobs",
        FioJob("randwrite", KIB4, direct=False, fsync_every=1, processes=8)),
    Job("first-write-1m", "1 MiB sequential first write into a new volume, direct, flushed at the end",
        FioJob("write", MIB, direct=True, once=True, end_fsync=True), "fresh"),
    Job("first-write-4k", "4 KiB random first write into a new volume, direct, depth 16, 1/16 of the file",
        FioJob("randwrite", KIB4, direct=True, depth=16, part=1 / 16), "fresh"),
    Job("overwrite-snapshotted-qd1", "4 KiB random write right after a snapshot, direct, depth 1, 1/64 of the file",
        FioJob("randwrite", KIB4, direct=True, part=1 / 64), "snapshotted", needs_snapshots=True),
    Job("overwrite-snapshotted-qd16", "the same, depth 16",
        FioJob("randwrite", KIB4, direct=True, depth=16, part=1 / 64), "snapshotted", needs_snapshots=True),
    Job("snapshot", "snapshots: make and remove", time_snapshots, "nothing", needs_snapshots=True),
    Job("thousand-snapshots", "4 KiB random read, direct, depth 1, with 1,000 snapshots and with none",
        with_thousand_snapshots, "nothing", only=("incfs",)),
    Job("checkpoints", "4 KiB random overwrites, direct, while checkpoints run; reads among them",
        overwrite_through_checkpoints, "nothing", only=("incfs",)),
    Job("small-files", "20,000 small files", delete_and_unpack, accesses=_ON_LOOP),
    Job("pgbench", "PostgreSQL, pgbench -c 4", run_pgbench, accesses=_ON_LOOP),
    Job("mappings", "a pool with many mappings", mount_many_mappings, "nothing", (POOL,), only=("incfs",)),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Stage:
    """Jobs that are run in turn with the same subjects up."""

    place: str
    access: str
    jobs: tuple[Job, ...]


DISK: Final = "disk"
MEMORY: Final = "tmpfs"
PLACES: Final = (MEMORY, DISK)
_QUICK: Final = {
    MEMORY: ("read-1m", "write-1m", "randread-4k-qd1", "randread-4k-qd16", "randwrite-4k-qd1", "randwrite-4k-qd16"),
    DISK: ("randread-4k-qd16", "randwrite-4k-buffered", "fsync-4k-1", "fsync-4k-8", "overwrite-snapshotted-qd16"),
}


def full_plan() -> list[Stage]:
    """Everything; what empties the page cache, and mappings, on the disk only."""
    return [
        Stage(place, access, tuple(j for j in JOBS if access in j.accesses and (place == DISK or not _disk_only(j))))
        for place in PLACES
        for access in ACCESSES
        if place == DISK or access != POOL
    ]


def _disk_only(job: Job) -> bool:
    return job.is_cold or POOL in job.accesses


def quick_plan() -> list[Stage]:
    """The goals' most telling jobs, on the file."""
    return [Stage(place, FILE, tuple(j for j in JOBS if j.key in keys)) for place, keys in _QUICK.items()]
