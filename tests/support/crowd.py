"""A crowd of writers, and the judge of what they leave: python -m tests.support.crowd MOUNTPOINT BOARD RECORD KIND...

Each writer works alone on slots of its own in two volumes, in an order that follows from its number, so that what a
snapshot or a crash leaves can be explained without a log: the numbers found must be those of one *prefix* of each
writer's work.  A board in shared memory says how far each one is: asked for, answered, made durable.

RECORD is that of a recording filesystem below the pool, or "-": with one, each fsync that returned is noted behind the
board together with how many events there were by then.

Kinds: ``direct`` and ``buffered`` write with pwrite, ``mapped`` through shared mappings (whose order nobody promises).
"""

import mmap
import os
import struct
import sys
import threading
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

from tests.support.cli import environment
from tests.support.recording_fs import Record

VOLUMES = ("one", "two")
SLOTS = 192
"""Of one writer in each volume."""
SLOT_BYTES = 4096
_HEAD = struct.Struct("<8sIIIQ")
_MAGIC = b"incfs-cr"
_PLACE = struct.Struct("<3Q")
"""Asked for, answered, durable."""
_ACK = struct.Struct("<3Q")
"""Events of the record, writer, write."""
_FSYNC_EVERY = 16


def volume_bytes(writers: int) -> int:
    """Give the size of each volume."""
    return writers * SLOTS * SLOT_BYTES


def place_of(writer: int, number: int) -> tuple[int, int]:
    """Say where a writer's n-th write goes: (volume, slot)."""
    mixed = zlib.crc32(struct.pack("<IQ", writer, number))
    return mixed & 1, (mixed >> 1) % SLOTS


def content(writer: int, volume: int, slot: int, number: int) -> bytes:
    """Make what a write writes; number 0 is zeros."""
    if not number:
        return bytes(SLOT_BYTES)
    head = _HEAD.pack(_MAGIC, writer, volume, slot, number)
    return (head + struct.pack("<I", zlib.crc32(head))) * (SLOT_BYTES // 32)


def number_in(writer: int, volume: int, slot: int, data: bytes) -> int:
    """Tell which write a slot holds; anything but one whole write of this very place is an error."""
    if not any(data):
        return 0
    number = int(_HEAD.unpack_from(data)[4])
    assert data == content(writer, volume, slot, number), (
        f"writer {writer}, volume {volume}, slot {slot}: {data[:64]!r}"
    )
    return number


class Board:
    """How far each writer is.  One process writes a place, others read it."""

    def __init__(self, path: Path, writers: int) -> None:
        self.writers = writers
        with open(path, "a+b") as file:
            file.truncate(max(mmap.PAGESIZE, writers * _PLACE.size))
            self._shared = mmap.mmap(file.fileno(), 0)

    def note(self, writer: int, which: int, number: int) -> None:
        """Set one of a writer's three numbers."""
        struct.pack_into("<Q", self._shared, writer * _PLACE.size + 8 * which, number)

    def read(self) -> list[tuple[int, int, int]]:
        """Give (asked for, answered, durable) of each writer."""
        return [_PLACE.unpack_from(self._shared, writer * _PLACE.size) for writer in range(self.writers)]


# ------------------------------------------------------------------------------------------------- the writers


def _work(writer: int, kind: str, mountpoint: Path, board: Board, acknowledge: Callable[[int, int], None]) -> None:
    flags = os.O_RDWR | (os.O_DIRECT if kind == "direct" else 0)
    fds = [os.open(mountpoint / name, flags) for name in VOLUMES]
    maps = [mmap.mmap(fd, 0) for fd in fds] if kind == "mapped" else []
    page = mmap.mmap(-1, SLOT_BYTES)
    number = board.read()[writer][0]
    while True:
        number += 1
        volume, slot = place_of(writer, number)
        data, offset = content(writer, volume, slot, number), (writer * SLOTS + slot) * SLOT_BYTES
        board.note(writer, 0, number)
        if maps:
            maps[volume][offset : offset + SLOT_BYTES] = data
        else:
            page[:] = data
            os.pwrite(fds[volume], page, offset)
        board.note(writer, 1, number)
        if number % _FSYNC_EVERY == 0:
            for i, fd in enumerate(fds):
                maps[i].flush() if maps else os.fsync(fd)
            board.note(writer, 2, number)
            acknowledge(writer, number)


def _acknowledging(record: str, acks: Path) -> Callable[[int, int], None]:
    if record == "-":
        return lambda writer, number: None
    events, stream = Record(Path(record)), open(acks, "ab", buffering=0)  # noqa: SIM115 - for the life of the process

    def acknowledge(writer: int, number: int) -> None:
        stream.write(_ACK.pack(events.count, writer, number))

    return acknowledge


def read_acks(board: Path) -> list[tuple[int, int, int]]:
    """Give (events of the record by then, writer, write) of each fsync that returned."""
    return list(_ACK.iter_unpack(_acks_of(board).read_bytes()))


def _acks_of(board: Path) -> Path:
    return board.with_suffix(".acks")


def _look(mountpoint: Path) -> None:
    """Look for data as cp does, all the time: it goes through Python, beside the hot threads."""
    while True:
        for name in VOLUMES:
            fd, offset = os.open(mountpoint / name, os.O_RDONLY), 0
            try:
                while True:
                    offset = os.lseek(fd, os.lseek(fd, offset, os.SEEK_DATA), os.SEEK_HOLE)
            except OSError:
                os.close(fd)
            time.sleep(0.002)


def main() -> None:
    """Work until the mount fails or somebody ends us; say what failed."""
    mountpoint, kinds = Path(sys.argv[1]), sys.argv[4:]
    acknowledge = _acknowledging(sys.argv[3], _acks_of(Path(sys.argv[2])))
    board, failed = Board(Path(sys.argv[2]), len(kinds)), threading.Event()

    def guarded(work: object, *args: object) -> None:
        try:
            work(*args)  # type: ignore[operator]
        except OSError as error:
            print(error, flush=True)
        finally:
            failed.set()

    threads = [
        threading.Thread(target=guarded, args=(_work, i, k, mountpoint, board, acknowledge), daemon=True)
        for i, k in enumerate(kinds)
    ]
    threads.append(threading.Thread(target=guarded, args=(_look, mountpoint), daemon=True))
    for thread in threads:
        thread.start()
    print("at work", flush=True)
    failed.wait()
    os._exit(0)  # a thread may sit in a system call of a mount whose daemon is gone


# -------------------------------------------------------------------------------------------------- the judge


@contextmanager
def at_work(mountpoint: Path, board: Path, kinds: Sequence[str], *, record: Path | str = "-") -> Iterator[Popen[str]]:
    """Have a crowd work while the body runs."""
    command = [sys.executable, "-m", "tests.support.crowd", str(mountpoint), str(board), str(record), *kinds]
    with Popen(command, stdin=DEVNULL, stdout=PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "at work\n"
            yield process
        finally:
            process.kill()


@dataclass
class Judge:
    """Knows every write that was asked for, and what of it may be found.

    Args:
        kinds: Of the writers.
    """

    kinds: Sequence[str]
    _known: list[int] = field(init=False)
    """How many writes of each writer are in ``_history``."""
    _history: list[dict[tuple[int, int], list[int]]] = field(init=False)
    """Of each writer: place -> numbers of the writes there, ascending."""

    def __post_init__(self) -> None:
        self._known = [0] * len(self.kinds)
        self._history = [{(v, s): [0] for v in range(len(VOLUMES)) for s in range(SLOTS)} for _ in self.kinds]

    def _learn(self, writer: int, asked: int) -> None:
        for number in range(self._known[writer] + 1, asked + 1):
            self._history[writer][place_of(writer, number)].append(number)
        self._known[writer] = max(self._known[writer], asked)

    def found(self, writer: int, images: Sequence[bytes]) -> dict[tuple[int, int], int]:
        """Read a writer's slots of all volumes."""
        return {
            (volume, slot): number_in(writer, volume, slot, images[volume][at : at + SLOT_BYTES])
            for volume, slot in self._history[writer]
            for at in [(writer * SLOTS + slot) * SLOT_BYTES]
        }

    def explain(
        self, images: Sequence[bytes], least: Sequence[int], most: Sequence[int], *, exact: Sequence[str]
    ) -> None:
        """Explain what all volumes hold by one prefix of each writer's work.

        Args:
            images: The volumes' contents.
            least: Of each writer: how much must be there.
            most: Of each writer: how much may be there.
            exact: The kinds whose order is promised; of the others each slot holds what it must, or a later write.
        """
        for writer, kind in enumerate(self.kinds):
            self._learn(writer, most[writer])
            found = self.found(writer, images)
            last = max(found.values())
            floor = max(last, least[writer]) if kind in exact else least[writer]
            assert last <= most[writer], (
                f"writer {writer} ({kind}) had asked for {most[writer]} writes; {last} is there"
            )
            for place, number in found.items():
                numbers = self._history[writer][place]
                expected = numbers[bisect_right(numbers, floor) - 1]
                is_right = number == expected if kind in exact else number >= expected and number in numbers
                assert is_right, (
                    f"writer {writer} ({kind}), volume and slot {place}: write {number} is there, expected {expected}; "
                    f"the newest found is {last}, {least[writer]} to {most[writer]} may be"
                )

    def begin_anew(self, images: Sequence[bytes]) -> None:
        """Take what a crash left as the start of the writers' further work."""
        for writer in range(len(self.kinds)):
            for place, number in self.found(writer, images).items():
                self._history[writer][place] = [number]


if __name__ == "__main__":
    main()
