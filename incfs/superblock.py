"""The superblock: what identifies a pool, read before anything else of it.

``POOL/superblock`` is a short text file, written once: a line with the format version, a
line of JSON, a line with the CRC32C of both.  A person can read it.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from incfs.backing import Backing, translated
from incfs.codec import checksum
from incfs.errors import FormatError, NotAPool, UnsupportedFormat
from incfs.model import MAX_BLOCK_BYTES, MIN_BLOCK_BYTES

FORMAT_VERSION = 1
SUPERBLOCK_NAME = "superblock"
ANNOUNCED_NAME = "superblock.creating"
_NEW_NAME = "superblock.new"
_MAX_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Superblock:
    """Identity and format of a pool."""

    uuid: str
    block_bytes: int
    journal_bytes: int
    """Size of one journal segment."""
    lmdb_lib_version: int
    created_ns: int
    incompatible: tuple[str, ...] = ()
    """Features without which the pool must not be opened."""
    compatible: tuple[str, ...] = ()
    """Features that may be ignored."""
    autoclear: tuple[str, ...] = ()
    """Features that a writer which does not know them must clear."""


def is_block_size(value: int) -> bool:
    """Tell whether a pool can have blocks of that many bytes."""
    return MIN_BLOCK_BYTES <= value <= MAX_BLOCK_BYTES and not value & (value - 1)


def encode_superblock(superblock: Superblock) -> bytes:
    """Make the text of the file."""
    text = f"incfs-pool {FORMAT_VERSION}\n{json.dumps(asdict(superblock), sort_keys=True)}\n".encode()
    return text + f"crc32c {checksum(text):08x}\n".encode()


def decode_superblock(data: bytes, path: Path) -> Superblock:
    """Undo ``encode_superblock``.

    Raises:
        NotAPool: Not a superblock at all.
        UnsupportedFormat: Of a newer version, or with features that this one lacks.
        FormatError: Damaged.
    """
    head = re.match(rb"incfs-pool (\d{1,9})\n", data)
    if head is None:
        raise NotAPool(f"{path} is not the superblock of an incfs pool", path=str(path))
    version = int(head[1])
    if version > FORMAT_VERSION:
        raise UnsupportedFormat(
            f"{path}: the pool has format version {version}, this incfs knows up to {FORMAT_VERSION}; use a newer incfs"
        )
    body, _, tail = data.rpartition(b"crc32c ")
    if tail.strip() != f"{checksum(body):08x}".encode():
        raise FormatError(f"{path} is damaged: wrong checksum; restore it from a backup of the pool directory")
    return decode_fields(body.split(b"\n", 1)[1], path)


def decode_fields(text: bytes, path: Path) -> Superblock:
    """Make a superblock of the JSON that was read from ``path``.

    Raises:
        UnsupportedFormat: It has features that this incfs lacks.
        FormatError: A value is missing or impossible.
    """
    try:
        value: Any = json.loads(text)
        fields: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
        superblock = Superblock(**fields)
        UUID(superblock.uuid)
        numbers = superblock.block_bytes, superblock.journal_bytes, superblock.created_ns, superblock.lmdb_lib_version
        if not all(type(number) is int for number in numbers) or not is_block_size(superblock.block_bytes):
            raise ValueError(f"sizes {numbers}")
        features: tuple[Any, ...] = superblock.incompatible, superblock.compatible, superblock.autoclear
        if not all(isinstance(names, tuple) and all(isinstance(n, str) for n in names) for names in features):
            raise ValueError(f"features {features}")
    except (TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    if superblock.incompatible:
        raise UnsupportedFormat(
            f"{path}: the pool uses features that this incfs lacks: {', '.join(map(str, superblock.incompatible))}"
        )
    return superblock


def read_superblock(backing: Backing, directory: Path, name: str = SUPERBLOCK_NAME) -> Superblock:
    """Read the superblock of the pool in ``directory``, or what announces one.

    Raises:
        NotAPool: There is none.
        UnsupportedFormat, FormatError: As ``decode_superblock``.
    """
    path = directory / name
    with translated(path, "examine"):
        is_there = path.is_file()
    if not is_there:
        raise NotAPool(f"{directory} is not an incfs pool: it has no {SUPERBLOCK_NAME} file", path=str(directory))
    file = backing.open(path)
    try:
        return decode_superblock(file.pread(0, min(file.length_bytes(), _MAX_BYTES)), path)
    finally:
        file.close()


def write_superblock(backing: Backing, directory: Path, superblock: Superblock) -> None:
    """Write the superblock; a directory is a pool once this returned.

    Atomicity: the file appears whole or not at all, and not before the other files.
    """
    _write_file(backing, directory / _NEW_NAME, superblock)
    _publish(backing, directory, _NEW_NAME)


def announce_superblock(backing: Backing, directory: Path, superblock: Superblock) -> None:
    """Say that this pool is being created here, before anything of it is made.

    Durability: durable on return, so whatever a creation that is cut off leaves can be told
    from a pool that has lost its superblock.
    """
    _write_file(backing, directory / ANNOUNCED_NAME, superblock)
    backing.sync_directory(directory)


def publish_superblock(backing: Backing, directory: Path) -> None:
    """End what ``announce_superblock`` began: the directory is a pool once this returned."""
    _publish(backing, directory, ANNOUNCED_NAME)


def _write_file(backing: Backing, path: Path, superblock: Superblock) -> None:
    file = backing.create(path)
    try:
        file.pwrite(0, encode_superblock(superblock))
        file.sync()
    finally:
        file.close()


def _publish(backing: Backing, directory: Path, name: str) -> None:
    backing.sync_directory(directory)  # the names of the other files are durable before this one
    backing.replace(directory / name, directory / SUPERBLOCK_NAME)
    backing.sync_directory(directory)
