"""Baselines: raw images and block devices that volumes lie on, read-only and in place.

A baseline has a storage id like a storage volume, so that its blocks have addresses; its map pages are not stored
but made, checksums included, when they are asked for.  It is never written, and its blocks are never free.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

from incfs.backing import File
from incfs.blocks import pack_address
from incfs.codec import Entries, checksum
from incfs.errors import FormatError, ImageMismatch, IncfsError
from incfs.model import PAGE_BLOCKS, StorageId
from incfs.rawsource import RawSource

_DIGEST = re.compile(r"(blake2b:[0-9a-f]{64})?")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BaselineFacts:
    """What a volume's record says of its baseline."""

    id: StorageId
    path: Path
    size_bytes: int
    modified_ns: int
    digest: str = ""
    """Of the content, as ``content_digest`` makes it; empty when none was recorded."""
    is_changed: bool = False
    """The content was found to be another one, although size and time are as they were."""

    @classmethod
    def decode(cls, value: Mapping[str, Any]) -> Self:
        """Read the facts.

        Raises:
            FormatError: They are none.
        """
        match dict(value):
            case {"id": int(number), "path": str(path), "size_bytes": int(size), "modified_ns": int(modified)}:
                digest, is_changed = value.get("digest", ""), value.get("is_changed", False)
                is_place = 1 <= number < 1 << 16 and size >= 0 and path.startswith("/") and "\0" not in path
                if is_place and type(is_changed) is bool and isinstance(digest, str) and _DIGEST.fullmatch(digest):
                    return cls(StorageId(number), Path(path), size, modified, digest, is_changed)
        raise FormatError(f"a record holds no baseline: {str(value)[:80]}")

    def encode(self) -> dict[str, Any]:
        """Undo ``decode``."""
        place = {"id": self.id, "path": str(self.path), "size_bytes": self.size_bytes, "modified_ns": self.modified_ns}
        digest = {"digest": self.digest} if self.digest else {}
        return place | digest | ({"is_changed": True} if self.is_changed else {})


class Baseline:
    """An open baseline, or one that cannot be used: then whatever needs it fails with the reason.

    Concurrency: any thread.
    """

    def __init__(self, facts: BaselineFacts, block_bytes: int) -> None:
        self.facts = facts
        """What the records say of it now."""
        self._block_bytes = block_bytes
        self._failure: IncfsError | None = None
        try:
            self._source = _open_source(facts)
        except ImageMismatch as error:
            self._failure = error
            return
        self._file = File(facts.path, self._source.duplicate())

    def require_unchanged(self) -> None:
        """Prove that the file is the one that volumes were based on, as far as size and time tell.

        Raises:
            ImageMismatch: It is missing or was changed.
        """
        if self._failure is not None:
            raise ImageMismatch(self._failure.message)
        _require_stamp(self.facts, self._source.stamp())
        if self.facts.is_changed:
            raise _changed(self.facts, f"its content is another one than that of digest {self.facts.digest}")

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.facts.path

    def descriptor(self) -> tuple[int, int]:
        """Give the file descriptor, and the offset of the first block's data."""
        return self._file.fileno(), 0

    def read_blocks(self, block_index: int, block_count: int) -> bytes:
        """Read whole blocks."""
        return self._file.pread(block_index * self._block_bytes, block_count * self._block_bytes)

    def read_blocks_cached(self, block_index: int, block_count: int) -> bytes | None:
        """Read whole blocks if nothing must be waited for."""
        return self._file.pread_cached(block_index * self._block_bytes, block_count * self._block_bytes)

    def write_blocks(self, block_index: int, data: bytes | memoryview) -> None:
        """Nobody does."""
        raise AssertionError("a baseline is never written")

    def page(self, page_index: int) -> Entries:
        """Make a map page: the blocks that are not zeros, and their checksums.

        Cost: reads the page's data, at most 512 blocks.

        Raises:
            ImageMismatch: The file was changed.
            BackingError: It cannot be read.
        """
        self.require_unchanged()
        size, first = self._block_bytes, page_index * PAGE_BLOCKS
        end = min((first + PAGE_BLOCKS) * size, self.facts.size_bytes // size * size)
        position, zeros = first * size, bytes(size)
        entries: Entries = {}
        while position < end:
            is_data, stop = self._source.stretch(position, end)
            position -= position % size
            stop = min(end, -(-stop // size) * size)
            data = self._source.read(position, stop - position) if is_data else b""
            for start in range(0, len(data), size):
                block = data[start : start + size]
                if block != zeros:
                    index = (position + start) // size
                    entries[index - first] = pack_address(self.facts.id, index), checksum(block)
            position = stop
        return entries

    def page_indexes(self, start: int, limit: int | None) -> list[int]:
        """List pages that may hold mappings, ascending from ``start``, at most ``limit`` of them."""
        self.require_unchanged()
        page_bytes, end = PAGE_BLOCKS * self._block_bytes, self.facts.size_bytes
        found: list[int] = []
        position = start * page_bytes
        while position < end and (limit is None or len(found) < limit):
            is_data, stop = self._source.stretch(position, end)
            if is_data:
                found.append(position // page_bytes)
                stop = (found[-1] + 1) * page_bytes
            position = stop
        return found

    def close(self) -> None:
        """Close the file."""
        if self._failure is None:
            self._source.close()
            self._file.close()


class Baselines(dict[StorageId, Baseline]):
    """The baselines of an open pool by their ids."""

    def __init__(self, block_bytes: int) -> None:
        super().__init__()
        self._block_bytes = block_bytes
        self._lowest_id = 1 << 16

    def new_id(self) -> StorageId:
        """Give an id that nothing of this pool has: from above, as storage volumes are numbered from below."""
        return StorageId(self._lowest_id - 1)

    def need(self, value: Mapping[str, Any]) -> None:
        """Open the baseline of a volume's record, unless it is open or there is none.

        Raises:
            FormatError: The record holds nothing like it.
        """
        if not value:
            return
        facts = BaselineFacts.decode(value)
        self._lowest_id = min(self._lowest_id, facts.id)
        if facts.id not in self:
            self[facts.id] = Baseline(facts, self._block_bytes)
        self[facts.id].facts = facts

    def close(self) -> None:
        """Close all."""
        for baseline in self.values():
            baseline.close()
        self.clear()


def _require_stamp(facts: BaselineFacts, found: tuple[int, int]) -> None:
    expected = facts.size_bytes, facts.modified_ns
    if found != expected:
        raise _changed(facts, f"size and time are {found}, expected {expected}")


def _changed(facts: BaselineFacts, why: str) -> ImageMismatch:
    return ImageMismatch(
        f"{facts.path} was changed since volumes were based on it: {why}; bring it back as it was (size, time and "
        f"content) and run `incfs volume verify`; the blocks that volumes inherit from it are not what they were",
        path=str(facts.path),
    )


def require_digest(facts: BaselineFacts, found: str) -> None:
    """Prove that a content is the one that was recorded.

    Raises:
        ImageMismatch: It is another one.
    """
    if facts.digest and found != facts.digest:
        raise _changed(facts, f"the digest of its content is {found}, expected {facts.digest}")


def content_digest(facts: BaselineFacts, progress: Callable[[int, int], None]) -> str:
    """Read a baseline to its end and give the digest of its content; the same whether holes or zeros are stored.

    BLAKE2b over the BLAKE2b of each MiB: holes need not be read.  Any thread.

    Cost: 1 s for each GiB of data, on one processor.

    Raises:
        ImageMismatch: It is missing, or size or time are not those of the facts.
        BackingError: It cannot be read.
    """
    source = _open_source(facts)
    try:
        _require_stamp(facts, source.stamp())
        whole, of_zeros = _hash(), _hash(bytes(_CHUNK_BYTES)).digest()
        for start in range(0, facts.size_bytes, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, facts.size_bytes)
            is_hole = end - start == _CHUNK_BYTES and source.stretch(start, end) == (False, end)
            whole.update(of_zeros if is_hole else _hash(source.read(start, end - start)).digest())
            progress(end, facts.size_bytes)
        _require_stamp(facts, source.stamp())
        return f"blake2b:{whole.hexdigest()}"
    finally:
        source.close()


def _hash(data: bytes = b"") -> Any:
    return blake2b(data, digest_size=32)


def _open_source(facts: BaselineFacts) -> RawSource:
    try:
        return RawSource(facts.path)
    except IncfsError as error:
        raise ImageMismatch(f"{error}; the volumes based on it cannot be read") from error


def describe(path: Path, storage_id: StorageId) -> BaselineFacts:
    """Look at a file that shall become a baseline.  Any thread.

    Raises:
        NotSupported, BackingError: It is none, or cannot be opened.
    """
    path = Path(os.path.realpath(path))
    source = RawSource(path)
    try:
        size, modified = source.stamp()
    finally:
        source.close()
    return BaselineFacts(storage_id, path, size, modified)
