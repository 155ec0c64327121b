"""What a daemon that was killed leaves: its socket, perhaps its mount.  A command that then works offline says so."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from incfs.lock import read_holder
from incfs.mount_table import FILESYSTEM_TYPE, is_dead, read_mounts
from incfs.protocol import SOCKET_NAME
from incfs.units import format_time


@dataclass(frozen=True, slots=True)
class Remains:
    """What was found before the pool was opened."""

    directory: Path
    holder: str
    """The process that had the pool last."""
    is_killed: bool
    """Whether a daemon ended without taking its socket away: before it had closed the pool."""
    written_ns: int
    """When the journal was written last."""

    def describe(self) -> list[str]:
        """Say what is to be known before somebody works on; call with the pool's lock held, so that nobody serves it.

        Cost: asks each dead mount of this pool.
        """
        said = []
        if self.is_killed:
            said.append(
                f"the daemon of {self.directory} (process {self.holder}) ended without closing it: what was written "
                f"and not committed is lost; going on from the last commit ({format_time(self.written_ns)})"
            )
        said += [
            f"{place} has no daemon any more, programs that use it fail; `incfs umount {place}`, or mount it again"
            for place in dead_mounts(self.directory)
        ]
        return said

    def forget(self) -> None:
        """Take the socket away: whoever comes next finds a pool that was closed.  With the pool's lock held."""
        if self.is_killed:
            with contextlib.suppress(OSError):  # read-only media
                (self.directory / SOCKET_NAME).unlink(missing_ok=True)


def find_remains(directory: Path) -> Remains:
    """Look what is there, before the pool is opened: that changes it."""
    written = [path.stat().st_mtime_ns for path in directory.glob("journal*")]
    is_killed = (directory / SOCKET_NAME).exists()
    return Remains(directory, read_holder(directory), is_killed, max(written, default=0))


def dead_mounts(directory: Path) -> list[Path]:
    """List where a pool is mounted without a daemon, as far as the mount table names it."""
    source = os.path.realpath(directory)
    return [
        mounted.mountpoint
        for mounted in read_mounts()
        if mounted.filesystem_type == FILESYSTEM_TYPE and mounted.source == source and is_dead(mounted.mountpoint)
    ]
