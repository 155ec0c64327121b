"""Writers whose order is known, and the judge of whether a snapshot of what they wrote is one point in time.

Each writer is a process that does one write after another, each to a slot at random of any of its files, with the
number of the write in it; no two share a slot.  When a write began and when it had returned is noted in memory that is
shared with the judge.

A snapshot is one point in time when there is an instant such that it has every write that had returned by then, and
none that began later.  So of each writer it has the first n writes and nothing else, and no write that it has began
after one had returned that it lacks.
"""

import contextlib
import mmap
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.cli import environment

SLOT_BYTES: Final = 4096
MOST_WRITES: Final = 1_000_000
_NOTE: Final = struct.Struct("<qqq")
"""Of a write: when it began and had returned (monotonic ns; 0: not yet), and its slot, counted through all files."""


@dataclass(frozen=True)
class Writer:
    """What one writer writes to."""

    number: int
    files: Sequence[Path]
    """The volumes, or the loop devices on them, in the order of the volumes."""
    slots: range
    """Its slots of each file."""
    is_direct: bool = False
    pause_s: float = 0.001
    """After each burst, so that others get a turn."""
    burst: int = 1
    """Writes without a pause."""


class Notes:
    """What a writer has done, in a file that both sides map."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.truncate(self._fd, MOST_WRITES * _NOTE.size)
        self._memory = mmap.mmap(self._fd, MOST_WRITES * _NOTE.size)

    def begin(self, index: int, slot: int) -> None:
        """Note that a write begins."""
        _NOTE.pack_into(self._memory, index * _NOTE.size, time.monotonic_ns(), 0, slot)

    def end(self, index: int) -> None:
        """Note that it has returned."""
        struct.pack_into("<q", self._memory, index * _NOTE.size + 8, time.monotonic_ns())

    def get(self, index: int) -> tuple[int, int, int]:
        """Return when a write began, had returned, and its slot; zeros when there was none yet."""
        begun, ended, slot = _NOTE.unpack_from(self._memory, index * _NOTE.size)
        return begun, ended, slot


def write(notes: Notes, writer: Writer) -> None:
    """Write until the process is ended."""
    flags = os.O_RDWR | (os.O_DIRECT if writer.is_direct else 0)
    opened = [os.open(path, flags) for path in writer.files]
    rng = random.Random(writer.number)
    buffer = mmap.mmap(-1, SLOT_BYTES)  # O_DIRECT wants whole pages
    for index in range(MOST_WRITES):
        place, slot = rng.randrange(len(opened)), rng.choice(writer.slots)
        struct.pack_into("<q", buffer, 0, index + 1)
        notes.begin(index, place << 32 | slot)
        assert os.pwrite(opened[place], buffer, slot * SLOT_BYTES) == SLOT_BYTES
        notes.end(index)
        if index % writer.burst == 0:
            time.sleep(writer.pause_s)


@contextlib.contextmanager
def writing(directory: Path, writers: Sequence[Writer]) -> Iterator[list[Notes]]:
    """Let writers write while the body runs; it begins when all are under way."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, repr(writer), directory / f"{writer.number}"], env=environment()
        )
        for writer in writers
    ]
    try:
        notes = [Notes(directory / f"{writer.number}") for writer in writers]
        deadline = time.monotonic() + 60
        while any(not known.get(20)[1] for known in notes):
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield notes
        assert all(process.poll() is None for process in processes), "a writer ended by itself"
    finally:
        for process in processes:
            process.kill()
            process.wait()


_PROGRAM: Final = """
import sys
from pathlib import Path, PosixPath
from tests.support.instants import Notes, Writer, write
write(Notes(Path(sys.argv[2])), eval(sys.argv[1]))
"""


@dataclass(frozen=True)
class Judgement:
    """What is wrong with a snapshot."""

    writes: int
    """Of all writers in it."""
    wrong_slots: int
    """Those that hold another write than the last of the writer's that the snapshot has."""
    overlap_ns: int
    """How long before the last write that it has began one had returned that it lacks; not positive: never."""
    lacks_older: int
    """Writers of which a write is missing that had returned before the snapshot was asked for."""
    longest_write_ns: int
    """Of the writes that were under way while it was taken: how long one had to wait at most."""

    @property
    def is_instant(self) -> bool:
        """Whether it is one point in time, and not before it was asked for."""
        return not self.wrong_slots and self.overlap_ns <= 0 and not self.lacks_older


def judge(
    writers: Sequence[Writer], notes: Sequence[Notes], snapshots: Sequence[Path], asked_ns: int, taken_ns: int
) -> Judgement:
    """Judge a snapshot of all files of the writers, which was asked for and there at these times (monotonic ns)."""
    contents = [path.read_bytes() for path in snapshots]
    wrong = lacks = writes = 0
    last_begun_ns, first_returned_ns = 0, time.monotonic_ns()
    for writer, known in zip(writers, notes, strict=True):
        found = {
            place << 32 | slot: struct.unpack_from("<q", content, slot * SLOT_BYTES)[0]
            for place, content in enumerate(contents)
            for slot in writer.slots
        }
        count = max(found.values())
        writes += count
        expected = dict.fromkeys(found, 0)
        for index in range(count):
            expected[known.get(index)[2]] = index + 1
        wrong += sum(expected[slot] != stamp for slot, stamp in found.items())
        if count:
            last_begun_ns = max(last_begun_ns, known.get(count - 1)[0])
        next_returned_ns = known.get(count)[1]
        if next_returned_ns:
            first_returned_ns = min(first_returned_ns, next_returned_ns)
            lacks += next_returned_ns < asked_ns
    longest_ns = max(_longest_write_ns(known, asked_ns, taken_ns) for known in notes)
    return Judgement(writes, wrong, last_begun_ns - first_returned_ns, lacks, longest_ns)


def _longest_write_ns(notes: Notes, since_ns: int, until_ns: int) -> int:
    longest = index = 0
    while (note := notes.get(index))[0] and note[0] < until_ns:
        if note[1] > since_ns:
            longest = max(longest, note[1] - note[0])
        index += 1
    return longest
