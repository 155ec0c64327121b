"""What a power cut may leave: the media of a machine, for each choice of what was not synced.

What was synced is there.  Of each later write to a file any sectors (512 bytes) may be there,
independently of all others and of other files; a change of length, and the creation, renaming
or removal of a file whose directory was not synced, may have happened or not.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from random import Random

from tests.support.media import SECTOR, Event, Media, apply

Mask = tuple[bool, ...]


@dataclass(slots=True)
class Disk:
    """One file: what of it is durable, and what was done since."""

    durable: bytes = b""
    since: list[Event] = field(default_factory=list)
    cache: dict[tuple[object, ...], bytes] = field(default_factory=dict)

    def do(self, event: Event) -> None:
        """Let an event happen."""
        self.cache.clear()
        if event.kind != "sync":
            self.since += split_sectors(event)
            return
        content = bytearray(self.durable)
        for earlier in self.since:
            apply(content, earlier)
        self.durable, self.since = bytes(content), []

    def content(self, mask: Mask, order: int) -> bytes:
        """Give the file with only the chosen ones of the pieces since the last sync.

        Args:
            mask: One for each piece.
            order: 0 for the order in which they were written; else a seed.  Changes of length
                keep their place, so a file with one keeps the order.
        """
        found = self.cache.get((mask, order))
        if found is None:
            events = [event for event, kept in zip(self.since, mask, strict=True) if kept]
            if order and all(event.kind == "write" for event in events):
                Random(order).shuffle(events)
            content = bytearray(self.durable)
            for event in events:
                end = event.offset_bytes + event.length_bytes
                if event.kind == "write" and end <= len(content):
                    content[event.offset_bytes : end] = event.data  # most of them, a million times
                else:
                    apply(content, event)
            found = self.cache[mask, order] = bytes(content)
        return found


def split_sectors(event: Event) -> Iterator[Event]:
    """Cut a write at the disk's sector borders; everything else stays whole."""
    if event.kind != "write":
        yield event
        return
    position = 0
    while position < event.length_bytes:
        offset = event.offset_bytes + position
        size = min(SECTOR - offset % SECTOR, event.length_bytes - position)
        yield Event("write", event.name, offset, size, event.data[position : position + size])
        position += size


class Machine:
    """The disks of a machine, to which events happen until the power is cut."""

    def __init__(self, media: Media) -> None:
        self._durable = {name: Disk(content) for name, content in media.items()}
        self._names = dict(self._durable)
        self._renamed: list[tuple[Event, Disk | None]] = []

    def play(self, event: Event) -> None:
        """Let one event happen."""
        match event.kind:
            case "mark":
                pass
            case "create":
                self._names[event.name] = Disk()
                self._renamed.append((event, self._names[event.name]))
            case "replace":
                self._names[event.note] = self._names.pop(event.name)
                self._renamed.append((event, self._names[event.note]))
            case "remove":
                self._names.pop(event.name)
                self._renamed.append((event, None))
            case "sync-directory":
                self._sync_directory(event.name)
            case _:
                self._names[event.name].do(event)

    def _sync_directory(self, directory: str) -> None:
        inside = [entry for entry in self._renamed if entry[0].name.rpartition("/")[0] == directory]
        self._renamed = [entry for entry in self._renamed if entry not in inside]
        self._durable = _named(self._durable, inside)

    def cuts(self, limit: int, random: Random) -> Iterator[Media]:
        """Cut the power now: give every media that may be found, or ``limit`` chosen ones of very many."""
        disks = list({id(d): d for d in (*self._durable.values(), *self._names.values())}.values())
        dirty = [disk for disk in disks if disk.since]
        count = len(self._renamed) + sum(len(disk.since) for disk in dirty)
        for number, mask in enumerate(choose_masks(count, limit, random)):
            order = number if 1 << count > limit and number % 4 == 3 else 0
            names = _named(self._durable, [e for e, kept in zip(self._renamed, mask, strict=False) if kept])
            position, contents = len(self._renamed), {}
            for disk in dirty:
                part = mask[position : position + len(disk.since)]
                contents[id(disk)] = disk.content(part, order)
                position += len(disk.since)
            yield {name: contents.get(id(disk), disk.durable) for name, disk in names.items()}


def _named(names: dict[str, Disk], changes: list[tuple[Event, Disk | None]]) -> dict[str, Disk]:
    names = dict(names)
    for event, disk in changes:
        names.pop(event.name, None)
        if disk is not None:
            names[event.note if event.kind == "replace" else event.name] = disk
    return names


def choose_masks(count: int, limit: int, random: Random) -> Iterator[Mask]:
    """Say which of ``count`` pieces reach the disk: all possibilities, or ``limit`` of very many.

    The chosen ones begin with all, none, each one missing, each one alone and each beginning,
    as far as the limit goes; the rest is by chance.
    """
    if 1 << count <= limit:
        yield from product((True, False), repeat=count)
        return
    directed = [[True] * count, [False] * count]
    for i in range(count):
        directed += [[j != i for j in range(count)], [j == i for j in range(count)], [j < i for j in range(count)]]
    if len(directed) > limit // 2:
        directed = directed[:2] + random.sample(directed[2:], max(0, limit // 2 - 2))
    masks = dict.fromkeys(map(tuple, directed))
    for _ in range(limit - len(directed)):
        density = random.choice((0.15, 0.5, 0.85))
        masks[tuple(random.random() < density for _ in range(count))] = None
    yield from masks
