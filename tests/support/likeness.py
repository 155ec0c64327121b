"""Media that are alike for recovery: equal in every byte that it reads.

Recovery is deterministic.  What it reads first depends on nothing, what it reads next on what
it has found so far.  So what was read forms a tree, and a media that finds its way through it
to an end would be recovered as the one that made that way.
"""

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, TypeVar

from incfs.backing import File
from incfs.codec import checksum
from incfs.errors import IncfsError
from incfs.metadata import TABLES_NAME
from incfs.tablesfile import TablesFile
from tests.support.media import PAGE, SECTOR, Media

Outcome = TypeVar("Outcome")


@dataclass(slots=True)
class _Node:
    """A read that recovery does, and what follows for each content that it may find."""

    read: tuple[str, int, int]
    following: dict[bytes, Any] = field(default_factory=dict)


class Likeness(Generic[Outcome]):
    """Outcomes by what was read to come to them."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self._live: dict[bytes, bytes] = {}

    def find(self, media: Media) -> Outcome | None:
        """Give the outcome of a media that is alike."""
        node: Any = self._known.get(self._key(media))
        while isinstance(node, _Node):
            name, offset, length = node.read
            node = node.following.get(_cut_out(media[name], offset, length))
        found: Outcome | None = node
        return found

    def remember(self, media: Media, reads: Iterable[tuple[str, int, bytes]], outcome: Outcome) -> None:
        """Note what was read, in that order, to come to an outcome."""
        following, key = self._known, self._key(media)
        for name, offset, data in reads:
            node = following.setdefault(key, _Node((name, offset, len(data))))
            assert node.read == (name, offset, len(data)), "recovery is not deterministic"
            following, key = node.following, _cut_out(media[name], offset, len(data))
        following[key] = outcome

    def _key(self, media: Media) -> Any:
        """What counts as read at once: names and lengths, and the tables, which LMDB maps."""
        tables = tuple(self._live_digest(media[name]) for name in sorted(media) if name.endswith(TABLES_NAME))
        lengths = tuple(sorted((name, len(content)) for name, content in media.items()))
        return tables, lengths

    def _live_digest(self, tables: bytes) -> bytes:
        """Digest what LMDB may look at: both roots, and every page that is not free."""
        whole = _cut_out(tables, 0, len(tables))
        found = self._live.get(whole)
        if found is None:
            found = self._live[whole] = _digest(memoryview(_live_pages(tables)))
        return found


class _Content(File):
    """A file's content, read as ``TablesFile`` does."""

    def __init__(self, content: bytes) -> None:
        super().__init__(Path(TABLES_NAME), -1)
        self._content = content

    def length_bytes(self) -> int:
        return len(self._content)

    def pread(self, offset_bytes: int, length_bytes: int) -> bytes:
        return self._content[offset_bytes : offset_bytes + length_bytes]


def _live_pages(tables: bytes) -> bytes:
    """Give the pages that are in use, and the roots; everything when it cannot be told."""
    try:
        file = TablesFile(_Content(tables))
        file._seen = bytearray(file.root.last_page + 1)
        lists = [file.value(entry) for entry in file._walk(file.root.free, is_free=True)]
    except IncfsError:
        return tables
    free = {number for numbers in lists for (number,) in struct.iter_unpack("<Q", numbers[8:])}
    return b"".join(tables[at * PAGE : (at + 1) * PAGE] for at in range(file.root.last_page + 1) if at not in free)


_digests: dict[tuple[int, int, int], tuple[bytes, bytes]] = {}


def _cut_out(content: bytes, offset: int, length: int) -> bytes:
    """Give a part of a file, digested if it is large; each is digested once."""
    if length <= SECTOR:
        return content[offset : offset + length]
    key = id(content), offset, length
    known = _digests.get(key)
    if known is None or known[0] is not content:
        if len(_digests) > 4096:
            _digests.clear()
        known = _digests[key] = content, _digest(memoryview(content)[offset : offset + length])
    return known[1]


def _digest(data: memoryview) -> bytes:
    """64 bits of two checksums: forty times as fast as a cryptographic digest."""
    return struct.pack("<II", checksum(data), zlib.crc32(data))


def digest_of(media: Media) -> bytes:
    """Digest every file."""
    parts = [(name, len(media[name]), _cut_out(media[name], 0, len(media[name]))) for name in sorted(media)]
    return blake2b(repr(parts).encode(), digest_size=16).digest()
