"""The run: subjects brought up side by side, jobs taken in turn, samples kept."""

import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.access import FILE, POOL, Target, open_target
from bench.fio import FioJob, fill, run_fio
from bench.host import BenchError, Cleanup, drop_caches, forget_pages
from bench.jobs import Job, Stage
from bench.scenarios import Measure, postgres_programs, run_pgbench, settle
from bench.subjects import SUBJECTS, Subject


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    directories: dict[str, Path]
    """Place -> directory."""
    sizes: dict[str, int]
    """Place -> bytes of the file that fio works on."""
    rounds: int
    seconds: float
    file_count: int
    mapping_count: int
    subjects: tuple[str, ...] = ()
    """Keys; all when empty."""


@dataclass(slots=True)
class Session:
    """A subject that is up, as the jobs see it."""

    subject: Subject
    scratch: Path
    size_bytes: int
    settings: Settings
    shared: Target | None

    @property
    def seconds(self) -> float:
        """How long a timed job takes."""
        return self.settings.seconds

    @property
    def file_count(self) -> int:
        """Files in the tree of small ones."""
        return self.settings.file_count

    @property
    def mapping_count(self) -> int:
        """Mappings of the pool that is mounted."""
        return self.settings.mapping_count

    @property
    def target(self) -> Target:
        """The shared volume."""
        assert self.shared is not None, "only jobs that need nothing run without one"
        return self.shared

    @property
    def filesystem(self) -> Path:
        """The directory on the shared volume's filesystem."""
        assert self.target.directory is not None, "only with ext4 on it"
        return self.target.directory


@dataclass(slots=True)
class Run:
    """What was measured, and what could not be."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def skip(self, line: str) -> None:
        """Note what this machine cannot do."""
        if line not in self.skipped:
            say(f"skipped: {line}")
            self.skipped.append(line)

    def fail(self, line: str) -> None:
        """Note what went wrong."""
        say(f"FAILED: {line}")
        self.failures.append(line)


def say(line: str) -> None:
    """Tell the person who waits."""
    print(line, file=sys.stderr, flush=True)


def run_stage(stage: Stage, settings: Settings, scratch: Path, results: Run) -> None:
    """Bring the subjects up, take the jobs in turn, take everything down."""
    say(f"== {stage.place}, {stage.access}")
    with Cleanup() as cleanup:
        cleanup_failures = cleanup.failures
        sessions = _open_sessions(stage, settings, scratch, cleanup, results)
        for job in stage.jobs:
            _run_job(stage, job, [s for s in sessions if _suits(job, s.subject, results)], settings, results)
    for line in cleanup_failures:
        results.fail(f"clean-up: {line}")


def _open_sessions(stage: Stage, settings: Settings, scratch: Path, cleanup: Cleanup, results: Run) -> list[Session]:
    sessions = []
    for kind in SUBJECTS:
        if (settings.subjects and kind.key not in settings.subjects) or not _is_wanted(stage, kind):
            continue
        if why := kind.missing():
            results.skip(f"{kind.key}: {why}")
            continue
        try:
            sessions.append(_open_session(kind, stage, settings, scratch, cleanup))
        except BenchError as error:
            results.fail(f"{kind.key} at {stage.place}, {stage.access}: {error}")
    return sessions


def _is_wanted(stage: Stage, kind: type[Subject]) -> bool:
    return any(not job.only or kind.key.startswith(job.only) for job in stage.jobs)


def _open_session(kind: type[Subject], stage: Stage, settings: Settings, scratch: Path, cleanup: Cleanup) -> Session:
    size_bytes = settings.sizes[stage.place]
    directory = scratch / f"{stage.access}-{kind.key}"
    directory.mkdir(mode=0o711)
    subject = kind(directory, cleanup)
    shared = None
    if stage.access != POOL:
        subject.start()
        shared = open_target(stage.access, subject, size_bytes, cleanup)
    return Session(subject, scratch, size_bytes, settings, shared)


def _suits(job: Job, subject: Subject, results: Run) -> bool:
    if job.only and not subject.key.startswith(job.only):
        return False
    if job.needs_snapshots and not subject.has_snapshots:
        return False
    if job.work is run_pgbench and postgres_programs() is None:
        results.skip("pgbench: no PostgreSQL found")
        return False
    return True


def _run_job(stage: Stage, job: Job, sessions: list[Session], settings: Settings, results: Run) -> None:
    """Take the samples of a job: in each round one of each subject, another one first each time."""
    failed: set[str] = set()
    for number in range(settings.rounds):
        first = number % max(1, len(sessions))
        for session in sessions[first:] + sessions[:first]:
            key = session.subject.key
            if key in failed:
                continue
            where = {"place": stage.place, "access": stage.access, "job": job.key, "subject": key, "round": number}
            try:
                load = os.getloadavg()[0]
                measures = _take_sample(job, session)
            except (BenchError, OSError) as error:
                failed.add(key)
                results.fail(f"{key}, {job.key} at {stage.place}, {stage.access}: {error}")
                continue
            for measure in measures:
                results.samples.append({**where, **asdict(measure), "load": load, "at": round(time.time(), 1)})
                say(f"  {job.key:26} {number + 1} {key:14} {measure.metric:10} {measure.value:12,.1f} {measure.unit}")


def _take_sample(job: Job, session: Session) -> list[Measure]:
    if not isinstance(job.work, FioJob):
        return job.work(session)
    if job.needs in ("fresh", "snapshotted"):
        return _on_own_volume(job, job.work, session)
    target = session.target
    if job.needs == "sequential" and not target.is_sequential:
        target.fill()
    if job.is_cold:
        settle(target.path)
        drop_caches()
    measures = _measure(job.work, target.path, target.size_bytes, session.seconds)
    if "write" in job.work.mode:
        target.is_sequential = job.work.mode == "write" and target.is_sequential
        settle(target.path)
    return measures


def _on_own_volume(job: Job, work: FioJob, session: Session) -> list[Measure]:
    volume = session.subject.create("own", session.size_bytes)
    try:
        if job.needs != "snapshotted":
            return _measure(work, volume.path, volume.size_bytes, session.seconds)
        fill(volume.path, volume.size_bytes)
        session.subject.take_snapshot(volume, "before")
        forget_pages(volume.path)  # fio does it too, but while its clock runs
        try:
            return _measure(work, volume.path, volume.size_bytes, session.seconds)
        finally:
            if session.subject.removes_snapshots:
                session.subject.remove_snapshot(volume, "before")
    finally:
        volume.remove()


def _measure(work: FioJob, path: Path, size_bytes: int, seconds: float) -> list[Measure]:
    found = run_fio(work, path, size_bytes, seconds)
    return [Measure("rate", found.value, work.unit, latency_us=found.latency_us)]


def estimate_s(stages: list[Stage], settings: Settings) -> float:
    """Guess how long a run takes, for the person who waits."""
    subjects = [kind for kind in SUBJECTS if not settings.subjects or kind.key in settings.subjects]
    total = 0.0
    for stage in stages:
        for job in stage.jobs:
            count = sum(not job.only or kind.key.startswith(job.only) for kind in subjects if kind.missing() is None)
            each = settings.seconds + 0.6 if isinstance(job.work, FioJob) else settings.seconds * 4 + 5
            total += count * settings.rounds * each * (2 if job.needs == "snapshotted" else 1)
        total += len(subjects) * (2 if stage.access == FILE else 4)
    return total
