"""A file that a library has mapped: where, and whether a page of it could not be read.

Such a page ends the process, unless the range is guarded: then there is another page, and it is counted (``_guard.c``).
"""

import os
from collections.abc import Iterator
from pathlib import Path

from incfs._guard import faults, guard, release


class MappedFile:
    """Guards the mappings of one file of this process.

    Args:
        path: The file.
        head: What a page begins with that could not be read; the rest of it is zeros.  The same for all files.

    Concurrency: any thread; ``look`` only while nobody else maps or reads.
    """

    def __init__(self, path: Path, head: bytes) -> None:
        self._path = path
        self._head = head
        self._numbers: list[int] = []
        self._earlier = 0

    def look(self) -> None:
        """Guard the mappings that there are now: after the file was mapped, or anew."""
        self.close()
        inode = os.stat(self._path).st_ino
        self._numbers = [guard(start, end - start, self._head) for start, end in _mappings(inode, self._path.name)]

    @property
    def fault_count(self) -> int:
        """How many pages could not be read since the file was opened."""
        return self._earlier + sum(faults(number) for number in self._numbers)

    def close(self) -> None:
        """Guard nothing any more."""
        self._earlier = self.fault_count
        for number in self._numbers:
            release(number)
        self._numbers = []


def _mappings(inode: int, name: str) -> Iterator[tuple[int, int]]:
    """Find the mappings of a file; by number and name, as the device is not told alike everywhere."""
    end_of_line = os.fsencode(f"/{name}\n")
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            if line.endswith(end_of_line):
                addresses, _, _, _, number, _ = line.split(maxsplit=5)
                if int(number) == inode:
                    start, end = addresses.split(b"-")
                    yield int(start, 16), int(end, 16)
