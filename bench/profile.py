"""What incfs spends its time on while a job runs: samples of the daemon's stacks, as three tables.

usage: python -m bench.profile JOB [--plane python|native] [--dir DIR] [--native] [--output STACKS]

Needs py-spy (`pip install py-spy`).  The stacks are "collapsed", which any flame graph program reads.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.access import FILE, open_target
from bench.fio import FioJob, fill, run_fio
from bench.host import BenchError, Cleanup, make_scratch, run
from bench.jobs import JOBS
from bench.subjects import Incfs, IncfsNative, IncfsPython, Volume

_LINES = 25
_RATE = 500


ROOMS: Final = (
    ("worker threads: commits, checkpoints", ("WorkerThread",)),
    ("waiting for requests (epoll)", ("EpollIOManager",)),
    ("incfs: getxattr", ("getxattr (",)),
    ("incfs: seal, absorb, begin of a commit", ("absorb (", "begin_commit (")),
    ("incfs: reads and writes of the images", ("incfs/backing.py",)),
    ("incfs: handlers, service, store, data plane", ("incfs/boundary.py",)),
    ("incfs: other tasks", ("incfs/committer.py", "incfs/reclaimer.py", "incfs/control.py")),
    ("pyfuse3: scheduling and locks", ("trio/",)),
    ("pyfuse3 and libfuse: /dev/fuse", ("async_wrapper",)),
)
"""The first room that one of whose words is in a stack has it; of pyfuse3's the innermost frame decides."""


def room_of(frames: list[str]) -> str:
    """Name the room that a stack belongs to."""
    for room, words in ROOMS:
        looked_at = [frames[-1]] if room.startswith("pyfuse3") else frames
        if any(word in frame for word in words for frame in looked_at):
            return room
    return "the rest"


def read_stacks(path: Path) -> Iterator[tuple[list[str], int]]:
    """Yield each stack, outermost first, and its samples."""
    for line in path.read_text().splitlines():
        frames, _, count = line.rpartition(" ")
        yield frames.split(";"), int(count)


def _tables(path: Path) -> str:
    own: Counter[str] = Counter()
    rooms: Counter[str] = Counter()
    with_callees: Counter[str] = Counter()
    for frames, count in read_stacks(path):
        if frames[-1].startswith("WorkerThread._work"):
            continue  # an idle worker, which py-spy takes for a busy one
        own[frames[-1]] += count
        rooms[room_of(frames)] += count
        for function in {frame.rpartition(":")[0] or frame for frame in frames}:
            with_callees[function] += count
    total = max(1, own.total())
    parts = []
    for title, counter in (("by room", rooms), ("own time, by line", own), ("with callees, by function", with_callees)):
        rows = [f"{count / total:6.1%}  {name}" for name, count in counter.most_common(_LINES)]
        parts.append(f"{title}\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _volume(subject: Incfs, needs: str, size_bytes: int, cleanup: Cleanup) -> Volume:
    if needs not in ("fresh", "snapshotted"):
        return open_target(FILE, subject, size_bytes, cleanup).volume
    volume = subject.create("own", size_bytes)
    if needs == "snapshotted":
        fill(volume.path, size_bytes)
        subject.take_snapshot(volume, "before")
    return volume


def profile(arguments: argparse.Namespace, cleanup: Cleanup, stacks: Path) -> str:
    """Run the job and sample the daemon; give the tables."""
    job = next((job for job in JOBS if job.key == arguments.job and isinstance(job.work, FioJob)), None)
    if job is None:
        raise BenchError(f"no fio job {arguments.job}; see python -m bench --list")
    scratch = make_scratch(cleanup, arguments.dir)
    directory = scratch / "incfs"
    directory.mkdir()
    kind = IncfsNative if arguments.plane == "native" else IncfsPython
    subject = kind(directory, cleanup)
    subject.start()
    volume = _volume(subject, job.needs, arguments.size << 20, cleanup)
    assert isinstance(job.work, FioJob), "looked at above"
    load = threading.Thread(target=run_fio, args=(job.work, volume.path, volume.size_bytes, arguments.seconds + 3))
    load.start()
    options = ["--native"] if arguments.native else ["--gil"] if arguments.gil else []
    try:
        sampling = ["-d", str(arguments.seconds), "-r", str(_RATE), "-f", "raw", "-o", str(stacks), *options]
        run([Path(sys.executable).parent / "py-spy", "record", "-p", str(subject.daemon.pid), *sampling])
    finally:
        load.join()
    return _tables(stacks)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description="Sample incfs while a job runs.")
    parser.add_argument("job")
    parser.add_argument("--plane", choices=("python", "native"), default="python")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="for the images (default %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="MiB (default %(default)s)")
    parser.add_argument("--seconds", type=int, default=5, help="of sampling (default %(default)s)")
    parser.add_argument("--native", action="store_true", help="also C functions (needs symbols)")
    parser.add_argument("--gil", action="store_true", help="only while the GIL is held: leaves out what waits")
    parser.add_argument("--output", type=Path, help="where the collapsed stacks go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, Cleanup() as cleanup:
        print(profile(arguments, cleanup, arguments.output or Path(temporary) / "stacks"))


if __name__ == "__main__":
    try:
        main()
    except (BenchError, subprocess.SubprocessError) as error:
        sys.exit(f"profile: {error}")
