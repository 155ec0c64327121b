"""The roster: which directories hold a pool's metadata, and which of them are up to date.

``DIRECTORY/copies`` is a short text file like the superblock, in each of them.  A pool whose
metadata is in one directory only has none.

Its generation is raised whenever the set of copies that are up to date changes, on all that
still are, before anything is acknowledged that the others lack.  So of several rosters the one
of the highest generation is right, and names every copy that may be opened.
"""

import contextlib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from incfs.backing import Backing, translated
from incfs.codec import checksum
from incfs.errors import FormatError, IncfsError

ROSTER_NAME = "copies"
ROSTER_VERSION = 1
MAX_COPIES = 4
_MAX_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Place:
    """One directory."""

    number: int
    """Names the copy for the pool's whole life."""
    path: str
    """Absolute."""
    seen: int
    """The last generation in which it was up to date; 0 for one that never was."""


@dataclass(frozen=True, slots=True)
class Roster:
    """All copies of one pool's metadata."""

    uuid: str
    """Of the pool."""
    generation: int
    home: int
    """The copy from whose directory relative paths of images start."""
    places: tuple[Place, ...]

    @property
    def current(self) -> list[int]:
        """The numbers of the copies that are up to date."""
        return [place.number for place in self.places if place.seen == self.generation]

    def place(self, number: int) -> Place | None:
        """Look up a copy."""
        return next((place for place in self.places if place.number == number), None)

    def raised(self, current: Collection[int]) -> "Roster":
        """Make the next generation, in which these copies are up to date and no others."""
        generation = self.generation + 1
        places = (replace(p, seen=generation) if p.number in current else p for p in self.places)
        return replace(self, generation=generation, places=tuple(places))

    def moved(self, number: int, path: Path) -> "Roster":
        """Say where a copy is now."""
        places = (replace(p, path=str(path)) if p.number == number else p for p in self.places)
        return replace(self, places=tuple(places))

    def with_place(self, path: Path) -> "Roster":
        """Add a directory that holds nothing yet."""
        number = max(place.number for place in self.places) + 1
        return replace(self, places=(*self.places, Place(number, str(path), 0)))

    def without(self, number: int) -> "Roster":
        """Leave a copy out; if it was the home, the first that is left is."""
        places = tuple(place for place in self.places if place.number != number)
        return replace(self, places=places, home=places[0].number if self.home == number else self.home)


def first_roster(uuid: str, path: Path) -> Roster:
    """Make the roster of a pool whose metadata is in one directory."""
    return Roster(uuid, 1, 1, (Place(1, str(path), 1),))


def encode_roster(roster: Roster, here: int) -> bytes:
    """Make the text of the file in the directory of copy ``here``."""
    fields = json.dumps({**asdict(roster), "here": here}, sort_keys=True)
    text = f"incfs-copies {ROSTER_VERSION}\n{fields}\n".encode()
    return text + f"crc32c {checksum(text):08x}\n".encode()


def decode_roster(data: bytes, path: Path) -> tuple[Roster, int]:
    """Undo ``encode_roster``: the roster, and which copy's directory it was in.

    Raises:
        FormatError: Damaged, or of a newer version.
    """
    head = re.match(rb"incfs-copies (\d{1,9})\n", data)
    if head is None or int(head[1]) != ROSTER_VERSION:
        raise FormatError(f"{path} is no list of metadata copies that this incfs knows", path=str(path))
    body, _, tail = data.rpartition(b"crc32c ")
    if tail.strip() != f"{checksum(body):08x}".encode():
        raise FormatError(f"{path} is damaged: wrong checksum", path=str(path))
    try:
        return _decode_fields(json.loads(body.split(b"\n", 1)[1]))
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: {error}", path=str(path)) from error


def _decode_fields(value: Any) -> tuple[Roster, int]:
    here = value.pop("here")
    places = tuple(Place(**place) for place in value.pop("places"))
    roster = Roster(**value, places=places)
    UUID(roster.uuid)
    numbers = [place.number for place in places]
    integers = [here, roster.generation, roster.home, *numbers, *(place.seen for place in places)]
    if not all(type(number) is int and number >= 0 for number in integers):
        raise ValueError(f"numbers {integers}")
    if not all(Path(place.path).is_absolute() for place in places):
        raise ValueError("a path that is not absolute")
    if len(set(numbers)) < len(numbers) or not {here, roster.home} <= set(numbers) or not roster.current:
        raise ValueError(f"copies {numbers}, here {here}, home {roster.home}")
    return roster, here


def read_roster(backing: Backing, directory: Path) -> tuple[Roster, int] | None:
    """Read the roster in a directory, and which copy's it is; None where there is none.

    Raises:
        FormatError: As ``decode_roster``.
        BackingError: The host failed.
    """
    path = directory / ROSTER_NAME
    with translated(path, "examine"):
        if not path.is_file():
            return None
    file = backing.open(path)
    try:
        return decode_roster(file.pread(0, min(file.length_bytes(), _MAX_BYTES)), path)
    finally:
        file.close()


def write_roster(backing: Backing, directory: Path, roster: Roster, here: int) -> None:
    """Replace the roster in a copy's directory.

    Durability: durable on return.
    Atomicity: after a crash it is the one before or this one.
    """
    path = directory / ROSTER_NAME
    with translated(path, "replace"):
        backing.replace_content(path, encode_roster(roster, here))


def other_directories(backing: Backing, directory: Path) -> Iterator[Path]:
    """Yield where else copies of a pool may be, as the roster in one of them says."""
    with contextlib.suppress(IncfsError):
        own = read_roster(backing, directory)
        if own is not None:
            yield from (Path(place.path) for place in own[0].places if place.number != own[1])
