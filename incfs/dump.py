"""The metadata as text: ``pool dump``; ``copies`` lie beside the images.

A dump is a stream of lines, each one JSON document, described in ``docs/FORMAT.md``: a
header, the records, the map pages, an end with counts and a digest.  Writing one needs a
reader of the tables; ``restore`` makes a pool of one.
"""

import contextlib
import gzip
import json
import struct
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from incfs.backing import Backing, translated
from incfs.catalog import record_from
from incfs.codec import Entries, encode_record, encode_trail, entry_runs, unpack
from incfs.errors import UsageError
from incfs.model import HOLE, Storage
from incfs.store import Store
from incfs.superblock import FORMAT_VERSION, Superblock
from incfs.tables import Reader

DUMP_VERSION = 1
_PACKING = 1
"""Effort of compression: with the usual one a dump of scattered blocks takes twice as long, for a seventh less."""


def dump_lines(store: Store) -> Iterator[str]:
    """Yield a dump of a pool's last checkpoint, line by line.  Any thread.

    Raises:
        FormatError: Something in the tables is damaged; what came before is sound.
    """
    with store.tables.reading() as reader:
        yield from _lines(reader, store.superblock, store.pool.images.leg_paths)


def _lines(reader: Reader, superblock: Superblock, leg_paths: Callable[[Storage], list[Path]]) -> Iterator[str]:
    digest = blake2b(digest_size=16)
    counts = {"records": 0, "pages": 0}
    for kind, document in _documents(reader, superblock, leg_paths):
        if kind:
            counts[kind] += 1
        line = json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n"
        digest.update(line.encode())
        yield line
    yield json.dumps({"end": {**counts, "digest": digest.hexdigest()}}, sort_keys=True) + "\n"


def _documents(
    reader: Reader, superblock: Superblock, leg_paths: Callable[[Storage], list[Path]]
) -> Iterator[tuple[str, Any]]:
    sequence, _, last_volume = reader.checkpoint()
    head = {"dump": DUMP_VERSION, "format": FORMAT_VERSION, "pool": asdict(superblock), "created_ns": time.time_ns()}
    yield "", {**head, "sequence": sequence, "last_volume": last_volume}
    for kind in ("storage", "volume", "snapshot", "bookmark", "policy"):
        for body in reader.bodies(kind):
            record = record_from(kind, unpack(body))
            if isinstance(record, Storage):
                image, *mirrors = (str(path.resolve()) for path in leg_paths(record))
                record = replace(record, path=image, mirrors=tuple(mirrors))
            yield "records", {"record": kind, "value": _to_text(encode_record(record))}
    for table, page_index, entries in reader.all_pages():
        if table.is_trail:
            numbers = [table.volume_id, table.generation, page_index]
            yield "pages", {"trail": numbers, "blocks": encode_trail(entries).hex()}
            continue
        runs = [[first, count, address, _crcs(entries, first, count)] for first, count, address in entry_runs(entries)]
        yield "pages", {"page": [table.volume_id, table.generation, page_index], "runs": runs}


def _crcs(entries: Entries, first: int, count: int) -> str:
    if entries[first][0] <= HOLE:
        return ""
    return struct.pack(f">{count}I", *(entries[i][1] for i in range(first, first + count))).hex()


def _to_text(value: dict[str, Any]) -> dict[str, Any]:
    if "xattrs" in value:
        return {**value, "xattrs": {name: content.hex() for name, content in value["xattrs"].items()}}
    return value


def write_dump(store: Store, path: Path) -> int:
    """Write a dump of the last checkpoint to a file, compressed if it is named ``.gz``.  Any thread.

    Durability: durable on return.
    Atomicity: the file appears whole; one that was there is replaced.

    Returns:
        Its length in bytes.

    Raises:
        UsageError: There is a device or something else that must not be replaced.
    """
    _require_replaceable(path)
    writing = Writing(store.backing, path)
    lines = dump_lines(store)
    try:
        for piece in packed(lines) if path.suffix == ".gz" else joined(lines):
            writing.append(piece)
        writing.publish()
    finally:
        writing.abandon()
    return writing.length_bytes


def _require_replaceable(path: Path) -> None:
    with translated(path, "examine"):
        is_replaceable = path.name and (path.is_file() or not path.exists())
    if not is_replaceable:
        raise UsageError(f"{path} is not an ordinary file, which a dump may replace; name another one")


class Writing:
    """A file that is written beside its name, ``.new`` behind it, and appears whole.  Any thread."""

    def __init__(self, backing: Backing, path: Path) -> None:
        self.path = path
        """Where it will be."""
        self.length_bytes = 0
        """Written so far."""
        self._backing = backing
        self._scratch = path.with_name(path.name + ".new")
        self._is_under_way = True
        with translated(self._scratch, "replace"):
            self._scratch.unlink(missing_ok=True)
        self._file = backing.create(self._scratch)

    def append(self, piece: bytes) -> None:
        """Write on."""
        self._file.pwrite(self.length_bytes, piece)
        self.length_bytes += len(piece)

    def publish(self, *, kept_as: Path | None = None) -> None:
        """Give the file its name; what was there is replaced, or kept under another name.

        Durability: durable on return.
        """
        self._file.sync()
        if kept_as is not None and self.path.exists():
            self._backing.replace(self.path, kept_as)
        self._backing.replace(self._scratch, self.path)
        self._backing.sync_directory(self.path.parent)
        self._is_under_way = False
        self._file.close()

    def abandon(self) -> None:
        """Leave nothing behind, unless it is published."""
        if self._is_under_way:
            self._is_under_way = False
            self._file.close()
            with contextlib.suppress(OSError):
                self._scratch.unlink(missing_ok=True)


def joined(lines: Iterable[str]) -> Iterator[bytes]:
    """Give lines in larger pieces."""
    pieces: list[str] = []
    for line in lines:
        pieces.append(line)
        if len(pieces) >= 256:
            yield "".join(pieces).encode()
            pieces = []
    yield "".join(pieces).encode()


def packed(lines: Iterable[str]) -> Generator[bytes, None, None]:
    """Give lines in compressed pieces: each is a gzip member, and files of several are files like any other."""
    for piece in joined(lines):
        yield gzip.compress(piece, _PACKING)
