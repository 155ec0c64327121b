"""How far a scrub came, in ``POOL/scrub.json``: it goes on there when it was stopped.

The file is for the next scrub and for metrics only: one that is missing or damaged means from the beginning.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from incfs.legs import Scrubbed
from incfs.overlay import TableKey

SCRUB_NAME: Final = "scrub.json"


@dataclass
class ScrubState:
    """The scrub that is under way, or was stopped."""

    done: tuple[int, int, int] = (0, 0, 0)
    """(volume, generation, page) that comes next."""
    blocks: int = 0
    verified_blocks: int = 0
    wrong_blocks: int = 0
    healed_blocks: int = 0
    lost_blocks: int = 0

    @classmethod
    def load(cls, directory: Path) -> "ScrubState":
        """Read where the last one was stopped; a new one when it was not."""
        found = _read(directory)
        try:
            volume, generation, page = found["done"]
            counts = {key: int(found[key]) for key in _COUNTS}
            return cls(done=(int(volume), int(generation), int(page)), **counts)
        except (KeyError, TypeError, ValueError):
            return cls()

    def add(self, table: TableKey, page_index: int, blocks: int, found: Scrubbed) -> None:
        """Add a page's."""
        self.done = table.volume_id, table.generation, page_index + 1
        self.blocks += blocks
        self.verified_blocks += found.verified_blocks
        self.wrong_blocks += found.wrong_blocks
        self.healed_blocks += found.healed_blocks
        self.lost_blocks += found.lost_blocks

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {key: getattr(self, key) for key in _COUNTS}

    def summary(self) -> str:
        """Say what it came to."""
        return (
            f"{self.verified_blocks} copies verified, {self.wrong_blocks} wrong, "
            f"{self.healed_blocks} healed, {self.lost_blocks} blocks lost"
        )

    def save(self, directory: Path) -> None:
        """Note where it was stopped."""
        _write(directory, {**_read(directory), "done": list(self.done), **self.to_dict()})

    def finish(self, directory: Path, now_ns: int) -> None:
        """Note when it ended."""
        _write(directory, {"ended_ns": now_ns})


_COUNTS: Final = ("blocks", "verified_blocks", "wrong_blocks", "healed_blocks", "lost_blocks")


def last_end_ns(directory: Path) -> int | None:
    """Tell when the last whole scrub ended."""
    found = _read(directory).get("ended_ns")
    return found if isinstance(found, int) else None


def _read(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / SCRUB_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(directory: Path, value: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a scrub that cannot be resumed begins anew
        (directory / SCRUB_NAME).write_text(json.dumps(value))
