"""How a job reaches a volume: the file itself, or ext4 on a loop device on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.fio import fill
from bench.host import Cleanup, attach_loop, mount, run
from bench.subjects import Subject, Volume, make_sparse

FILE: Final = "file"
LOOP_DIRECT: Final = "loop-direct"
LOOP_BUFFERED: Final = "loop-buffered"
POOL: Final = "pool"
"""Jobs that bring a subject up by themselves."""
ACCESSES: Final = (FILE, LOOP_DIRECT, LOOP_BUFFERED, POOL)
TITLES: Final = {
    FILE: "on the file",
    LOOP_DIRECT: "ext4 on a loop device, losetup --direct-io=on",
    LOOP_BUFFERED: "ext4 on a loop device, losetup --direct-io=off",
    POOL: "the pool itself",
}
_LOOP_ROOM_BYTES: Final = 3 << 30
"""What the filesystem has besides fio's file: for the database and the small files.  Sparse until used."""


@dataclass(slots=True)
class Target:
    """What a job works on.

    Attributes:
        path: The file that fio reads and writes.
        directory: A directory on the volume's filesystem; None when the file is the volume.
        is_sequential: Whether the file was written from begin to end and not changed since.
    """

    volume: Volume
    path: Path
    size_bytes: int
    directory: Path | None = None
    is_sequential: bool = False

    def fill(self) -> None:
        """Write it from begin to end."""
        fill(self.path, self.size_bytes)
        self.is_sequential = True


def open_target(access: str, subject: Subject, size_bytes: int, cleanup: Cleanup) -> Target:
    """Make the volume that most jobs of a stage share, filled."""
    if access == FILE:
        volume = subject.create("shared", size_bytes)
        target = Target(volume, volume.path, size_bytes)
    else:
        volume = subject.create("shared", size_bytes + _LOOP_ROOM_BYTES)
        directory = _make_filesystem(access, volume, cleanup)
        make_sparse(directory / "data", size_bytes)
        target = Target(volume, directory / "data", size_bytes, directory)
    target.fill()
    return target


def _make_filesystem(access: str, volume: Volume, cleanup: Cleanup) -> Path:
    # Made through the page cache: QEMU 7.2's export loses parts of concurrent direct writes, and mkfs sends such.
    device, _ = attach_loop(cleanup, volume.path, direct_io=False)
    # Nothing may be initialised in the background while others are measured.
    run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device])
    if access == LOOP_DIRECT:
        run(["losetup", "--direct-io=on", device])
    directory = Path(f"{volume.path.parent}.ext4")  # beside the subject's own mount, never in it
    mount(cleanup, device, directory)
    return directory
