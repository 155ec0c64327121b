"""A dozen of the breakages, another dozen for each commit: what continuous integration has the time for."""

import subprocess
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from tests.teeth.breakage import Breakage

DOZEN = 12


def sample(rooms: Sequence[Sequence[Breakage]], count: int, seed: str) -> list[Breakage]:
    """Pick so many breakages, as evenly from all rooms as their sizes allow; the same for the same seed."""

    def draw(breakage: Breakage) -> bytes:
        return blake2b(f"{seed} {breakage.name}".encode(), digest_size=8).digest()

    drawn = [sorted(room, key=draw) for room in rooms]
    turns = max((len(room) for room in drawn), default=0)
    return [room[turn] for turn in range(turns) for room in drawn if turn < len(room)][:count]


def commit_seed(root: Path) -> str:
    """Name the commit whose tree this is; what is not committed yet changes nothing.

    Raises:
        CalledProcessError: It is not in a repository.
    """
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    return found.stdout.strip()
