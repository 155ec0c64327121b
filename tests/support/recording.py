"""The files that a power cut may leave, made from a record of what was done to them (recording_fs).

``PowerCut`` takes events, a point among them and a choice for what was not synced yet, and makes
the files that a machine would find after the cut:

    what was synced is there; each later write to a file may be there, absent, or torn at 512
    bytes, independently of the others; a length may be as short as the last sync left it.

Events are those of ``tests/support/media.py``, and one more: flushed-write, a write through O_DSYNC.

Simplification: names are durable at once; ``tests/support/power.py`` chooses among these, too.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

from tests.support.media import Event, apply
from tests.support.power import split_sectors


class Disk:
    """One file as a disk has it: what is durable, and what was done since."""

    def __init__(self, content: bytes) -> None:
        self._durable = bytearray(content)
        self._since: list[Event] = []

    def do(self, event: Event) -> None:
        """Note one event."""
        if event.kind == "flushed-write":
            apply(self._durable, replace(event, kind="write"))
        elif event.kind == "sync":
            for earlier in self._since:
                apply(self._durable, earlier)
            self._since = []
        else:
            self._since.append(event)

    def after_cut(self, choose: "Choice") -> bytes:
        """Give the file that is found after the power was cut now."""
        content = bytearray(self._durable)
        for event in choose.order(self._since):
            for part in choose.parts(event):
                apply(content, part)
        return bytes(content)


class Choice:
    """What a power cut does to unsynced writes: kept, dropped, torn, or each by chance."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.kind = kind
        self._random = Random(f"{kind}{seed}")

    def order(self, events: list[Event]) -> list[Event]:
        """Say in which order the writes reach the disk; changes of length keep their place."""
        if self.kind != "mixed" or any(event.kind != "write" for event in events):
            return events
        return self._random.sample(events, len(events))

    def parts(self, event: Event) -> list[Event]:
        """Say which parts of one unsynced event reach the disk."""
        if self.kind == "kept":
            return [event]
        if self.kind == "dropped":
            return []
        if event.kind != "write":
            return [event] if self._random.random() < 0.5 else []
        sectors = list(split_sectors(event))
        if self.kind == "torn-head":
            return sectors[: len(sectors) // 2]
        if self.kind == "torn-tail":
            return sectors[len(sectors) // 2 :]
        whole = self._random.random()
        return sectors if whole < 0.3 else [s for s in sectors if self._random.random() < 0.5] if whole < 0.7 else []


CHOICES = ("kept", "dropped", "torn-head", "torn-tail", "mixed")


class PowerCut:
    """Plays events into the disks of a pool, and makes copies of it as after a power cut.

    Args:
        root: The directory that holds everything; its files now are durable.
    """

    def __init__(self, root: Path) -> None:
        self._disks = {
            str(path.relative_to(root)): Disk(path.read_bytes()) for path in root.rglob("*") if path.is_file()
        }

    def play(self, event: Event) -> None:
        """Let one event happen."""
        if event.kind == "replace":
            self._disks[event.note] = self._disks.pop(event.name)
        elif event.kind == "remove":
            self._disks.pop(event.name, None)
        else:
            self._disks.setdefault(event.name, Disk(b"")).do(event)

    def make(self, target: Path, choice: Choice) -> None:
        """Cut the power now: make ``target`` a copy of the root as it is found afterwards."""
        shutil.rmtree(target, ignore_errors=True)
        for name, disk in self._disks.items():
            copied = target / name
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(disk.after_cut(choice))
