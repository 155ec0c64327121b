"""The metadata as text: ``pool dump``, and the copies of it that lie beside the images.

A dump is a stream of lines, each one JSON document, described in ``docs/FORMAT.md``: a
header, the records, the map pages, an end with counts and a digest.  Writing one needs a
reader of the tables; ``restore`` makes a pool of one.
"""

import gzip
import json
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from incfs.backing import translate, translated
from incfs.catalog import record_from
from incfs.codec import Entries, encode_record, encode_trail, entry_runs, unpack
from incfs.errors import IncfsError, UsageError
from incfs.model import HOLE, Storage
from incfs.store import Store
from incfs.superblock import FORMAT_VERSION, Superblock
from incfs.tables import Reader

DUMP_VERSION = 1
COPY_SUFFIX = ".dump.gz"
"""Behind the name of an image: the automatic copy beside it."""


def dump_lines(reader: Reader, superblock: Superblock, leg_paths: Callable[[Storage], list[Path]]) -> Iterator[str]:
    """Yield a dump of one checkpoint, line by line.

    Raises:
        FormatError: Something in the tables is damaged; what came before is sound.
    """
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
    temporary = path.with_name(path.name + ".new")
    with translated(temporary, "replace"):
        temporary.unlink(missing_ok=True)
    file = store.backing.create(temporary)
    try:
        position = 0
        with store.tables.reading() as reader:
            lines = dump_lines(reader, store.superblock, store.pool.images.leg_paths)
            for piece in _compressed(lines) if path.suffix == ".gz" else _joined(lines):
                file.pwrite(position, piece)
                position += len(piece)
        file.sync()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        file.close()
    store.backing.replace(temporary, path)
    store.backing.sync_directory(path.parent)
    return position


def _require_replaceable(path: Path) -> None:
    with translated(path, "examine"):
        is_replaceable = path.name and (path.is_file() or not path.exists())
    if not is_replaceable:
        raise UsageError(f"{path} is not an ordinary file, which a dump may replace; name another one")


def _joined(lines: Iterable[str]) -> Iterator[bytes]:
    pieces: list[str] = []
    for line in lines:
        pieces.append(line)
        if len(pieces) >= 256:
            yield "".join(pieces).encode()
            pieces = []
    yield "".join(pieces).encode()


def _compressed(lines: Iterable[str]) -> Iterator[bytes]:
    for piece in _joined(lines):
        # One gzip member for each piece: files of several are files like any other.
        yield gzip.compress(piece, 6)


def copy_path(store: Store, storage: Storage) -> Path:
    """Name the automatic copy beside an image."""
    image = store.pool.images.path(storage)
    return image.with_name(image.name + COPY_SUFFIX)


def copies_are_due(store: Store, interval_s: float) -> bool:
    """Tell whether an image has no copy that is younger than ``interval_s``.

    Raises:
        BackingError: The host does not tell.
    """
    oldest = time.time() - interval_s
    return any(_is_older(copy_path(store, storage), oldest) for storage in store.catalog.storages.values())


def _is_older(path: Path, oldest: float) -> bool:
    try:
        return path.stat().st_mtime < oldest
    except FileNotFoundError:
        return True
    except OSError as error:
        raise translate(error, path, "examine") from error


def write_copies(store: Store) -> None:
    """Write a dump beside each image; the one that was there is kept as ``.1``.  Any thread.

    Raises:
        IncfsError: A copy could not be written; the others were.
    """
    failure: IncfsError | None = None
    for storage in list(store.catalog.storages.values()):
        path = copy_path(store, storage)
        try:
            fresh = path.with_name("." + path.name)
            write_dump(store, fresh)
            if path.exists():
                store.backing.replace(path, path.with_name(path.name + ".1"))
            store.backing.replace(fresh, path)
        except IncfsError as error:
            failure = error
    if failure is not None:
        raise failure
