"""The tables' file, read without LMDB: is it whole, and what can be saved of it.

LMDB trusts its file.  It has no checksums; a damaged page number makes it read outside of its
mapping, which kills the process, or lose a branch, which makes mappings vanish and data read
as zeros.  So before LMDB may have the file, every page of its trees is read here and proved:

    1. Each page is where it says it is, in one tree once or free, and none is missing.
    2. Keys ascend, and lie between the keys of the branches above them.
    3. Keys and checksums of values add up to the marks that the last transaction recorded:
       none is missing, none is of another time.

A value's own bytes are proved by its checksum when it is used.  ``docs/FORMAT.md`` has the rest.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from incfs.backing import File
from incfs.codec import open_value
from incfs.errors import BackingError, FormatError

MARK_MODULUS = 1 << 64
_META = struct.Struct("<QHHIIIQQ")
"""Page number, padding, flags, (unused); magic, version, address, map size."""
_TREE = struct.Struct("<IHHQQQQQ")
_META_TREES = _META.size
_META_END = struct.Struct("<QQ")
_PAGE = struct.Struct("<QHHHH")
_NODE = struct.Struct("<HHHH")
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _IS_META = 1, 2, 4, 8
_BIG, _SUBTREE = 1, 2
_NO_ROOT = (1 << 64) - 1
_CRC_BYTES = 4
_MAX_PAGE_BYTES = 65536
_MIN_PAGE_BYTES = 512


def key_mark(database: str, key: bytes) -> int:
    """Give a key's part of the sum over all keys."""
    return int.from_bytes(blake2b(key, digest_size=8, key=database.encode()).digest(), "little")


def value_mark(database: str, key: bytes, tail: bytes) -> int:
    """Give a value's part of the sum over all values; ``tail`` is the checksum at its end."""
    return int.from_bytes(blake2b(key + tail, digest_size=8, key=database.encode()).digest(), "little")


class Tree(NamedTuple):
    """What LMDB notes of one tree."""

    pad: int
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int


class Root(NamedTuple):
    """One of the two meta pages."""

    transaction: int
    page_bytes: int
    last_page: int
    free: Tree
    main: Tree


class Entry(NamedTuple):
    """One key, and where its value is in the file."""

    key: bytes
    flags: int
    offset_bytes: int
    length_bytes: int


@dataclass(slots=True)
class Survey:
    """What a whole file adds up to."""

    keys: int = 0
    values: int = 0


class TablesFile:
    """One LMDB 0.9 data file.

    Args:
        file: Opened; nothing is written to it.
        transaction: The state after this one; the newest by default.

    Raises:
        FormatError: No meta page of that transaction, or damaged ones.
    """

    def __init__(self, file: File, transaction: int | None = None) -> None:
        self._file = file
        self._length_bytes = file.length_bytes()
        self._seen = bytearray()
        self.root = self._choose_root(transaction)

    def _choose_root(self, transaction: int | None) -> Root:
        first = self._read_root(0, 0)
        roots = [first, self._read_root(1, first.page_bytes)]
        if transaction is not None:
            roots = [root for root in roots if root.transaction == transaction]
        if not roots:
            raise FormatError(f"{self._file.path} has no root of transaction {transaction}")
        return max(roots, key=lambda root: root.transaction)

    def _read_root(self, page: int, page_bytes: int) -> Root:
        data = self._read(page * page_bytes, _META_TREES + 2 * _TREE.size + _META_END.size)
        number, _, flags, _, magic, version, address, _ = _META.unpack_from(data)
        free = Tree(*_TREE.unpack_from(data, _META_TREES))
        main = Tree(*_TREE.unpack_from(data, _META_TREES + _TREE.size))
        last_page, transaction = _META_END.unpack_from(data, _META_TREES + 2 * _TREE.size)
        size = free.pad
        if (number, flags, magic, version, address) != (page, _IS_META, _MAGIC, _VERSION, 0):
            raise self._damage(f"meta page {page} is none")
        if not _MIN_PAGE_BYTES <= size <= _MAX_PAGE_BYTES or size & (size - 1) or page_bytes not in (0, size):
            raise self._damage(f"pages of {size} bytes")
        return Root(transaction, size, last_page, free, main)

    def _damage(self, what: str) -> FormatError:
        return FormatError(
            f"{self._file.path} is damaged: {what}; see `incfs pool repair` and `incfs pool restore`",
            path=str(self._file.path),
        )

    def _read(self, offset_bytes: int, length_bytes: int) -> bytes:
        if offset_bytes + length_bytes > self._length_bytes:
            raise self._damage(f"it ends at byte {self._length_bytes}, byte {offset_bytes + length_bytes} is missing")
        return self._file.pread(offset_bytes, length_bytes)

    def prove(self, databases: tuple[str, ...], *, later: tuple[str, ...] = ()) -> Survey:
        """Prove the structure of the whole file; give what its keys and values add up to.

        Args:
            databases: The names that there must be; the first is left out of the sums.
            later: Those of them that older pools lack.

        Raises:
            FormatError: Something is wrong; LMDB must not have this file.
            BackingError: The host failed.
        """
        root = self.root
        self._seen = bytearray(root.last_page + 1) if root.last_page * root.page_bytes < 1 << 48 else bytearray()
        if len(self._seen) < 2:
            raise self._damage(f"last page {root.last_page}")
        self._seen[0] = self._seen[1] = 1
        trees = self._trees()
        if not set(databases).difference(later) <= trees.keys() <= set(databases):
            raise self._damage(f"it has the tables {', '.join(sorted(trees))}")
        survey = Survey()
        for name, tree in trees.items():
            for entry in self._walk(tree):
                if name == databases[0]:
                    continue
                tail = self.value(entry, tail_only=True)
                survey.keys += key_mark(name, entry.key)
                survey.values += value_mark(name, entry.key, tail)
        self._prove_free()
        return Survey(survey.keys % MARK_MODULUS, survey.values % MARK_MODULUS)

    def _trees(self) -> dict[str, Tree]:
        trees = {}
        for entry in self._walk(self.root.main):
            if entry.flags != _SUBTREE or entry.length_bytes != _TREE.size:
                raise self._damage("a table that is none")
            tree = Tree(*_TREE.unpack(self.value(entry)))
            trees[entry.key.decode("ascii", "replace")] = tree
        return trees

    def _prove_free(self) -> None:
        previous = 0
        for entry in self._walk(self.root.free, is_free=True):
            numbers = self.value(entry)
            count = len(numbers) // 8 - 1
            transaction = int.from_bytes(entry.key, "little")
            if len(numbers) < 8 or int.from_bytes(numbers[:8], "little") > count or transaction <= previous:
                raise self._damage("a list of free pages that is none")
            previous = transaction
            for (number,) in struct.iter_unpack("<Q", numbers[8 : 8 + 8 * int.from_bytes(numbers[:8], "little")]):
                self._claim(number, 1)
        if 0 in self._seen:
            raise self._damage(f"page {self._seen.index(0)} is neither used nor free")

    def _claim(self, first: int, count: int) -> None:
        """Note that pages are used; each may be once."""
        if not (0 < count <= self.root.last_page and 2 <= first <= self.root.last_page + 1 - count):
            raise self._damage(f"page {first}+{count} does not exist")
        if any(self._seen[first : first + count]):
            raise self._damage(f"page {first} is used twice")
        self._seen[first : first + count] = b"\1" * count

    def databases(self) -> dict[str, Tree]:
        """List the tables, for saving what can be: without proof, as far as it can be read."""
        self._seen = bytearray()
        return self._trees()

    def entries(self, tree: Tree) -> Iterator[Entry]:
        """Yield the entries of a table, proved on the way."""
        self._seen = bytearray(self.root.last_page + 1)
        return self._walk(tree)

    def value(self, entry: Entry, *, tail_only: bool = False) -> bytes:
        """Read an entry's value, or the checksum at its end."""
        length = min(entry.length_bytes, _CRC_BYTES) if tail_only else entry.length_bytes
        return self._read(entry.offset_bytes + entry.length_bytes - length, length)

    def _walk(self, tree: Tree, *, is_free: bool = False) -> Iterator[Entry]:
        """Yield a tree's entries in order, proving its pages and counts."""
        if tree.root == _NO_ROOT:
            if (tree.depth, tree.entries) != (0, 0):
                raise self._damage("an empty tree with entries")
            return
        found = [0, 0, 0, 0]
        stack: list[tuple[int, int, bytes, bytes | None]] = [(tree.root, 1, b"", None)]
        while stack:
            number, depth, low, high = stack.pop()
            page = self._page(number)
            if depth < tree.depth:
                found[0] += 1
                stack += reversed(self._children(page, number, depth, low, high))
                continue
            found[1] += 1
            for entry in self._leaf(page, number, low, high, is_free=is_free):
                found[3] += 1
                if entry.flags & _BIG:
                    entry, pages = self._overflow(entry)  # noqa: PLW2901 - the same entry, where its value really is
                    found[2] += pages
                yield entry
        if tuple(found) != tree[3:7]:
            raise self._damage(f"a tree has {found} pages and entries, expected {list(tree[3:7])}")

    def _page(self, number: int) -> bytes:
        self._claim(number, 1)
        size = self.root.page_bytes
        page = self._read(number * size, size)
        own, _, _, lower, upper = _PAGE.unpack_from(page)
        if own != number or not _PAGE.size <= lower <= upper <= size or lower % 2:
            raise self._damage(f"page {number} is another one")
        return page

    def _nodes(self, page: bytes, number: int, kind: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield (low half, high half, flags, key length, offset of the key) of each node."""
        _, _, flags, lower, upper = _PAGE.unpack_from(page)
        if flags != kind or lower == _PAGE.size:
            raise self._damage(f"page {number} is of another kind")
        for (offset,) in struct.iter_unpack("<H", page[_PAGE.size : lower]):
            if not upper <= offset <= len(page) - _NODE.size:
                raise self._damage(f"page {number} has a node outside of it")
            low, high, node_flags, key_bytes = _NODE.unpack_from(page, offset)
            if offset + _NODE.size + key_bytes > len(page):
                raise self._damage(f"page {number} has a key that leaves it")
            yield low, high, node_flags, key_bytes, offset + _NODE.size

    def _children(
        self, page: bytes, number: int, depth: int, low: bytes, high: bytes | None
    ) -> list[tuple[int, int, bytes, bytes | None]]:
        children: list[tuple[int, int, bytes, bytes | None]] = []
        for node_low, node_high, flags, key_bytes, offset in self._nodes(page, number, _BRANCH):
            # The first key of a branch counts as lower than all: LMDB leaves it away.
            key = page[offset : offset + key_bytes] if children else low
            if children:
                before = children[-1]
                if not before[2] < key or not (high is None or key < high):
                    raise self._damage(f"page {number}: its keys do not ascend")
                children[-1] = (*before[:3], key)
            children.append((node_low | node_high << 16 | flags << 32, depth + 1, key, high))
        return children

    def _leaf(self, page: bytes, number: int, low: bytes, high: bytes | None, *, is_free: bool) -> Iterator[Entry]:
        before: bytes | None = None
        for node_low, node_high, flags, key_bytes, offset in self._nodes(page, number, _LEAF):
            key = page[offset : offset + key_bytes]
            if is_free:
                if key_bytes != 8:
                    raise self._damage(f"page {number}: a list of free pages under a bad key")
            elif key < low or not (before is None or before < key) or not (high is None or key < high):
                raise self._damage(f"page {number}: its keys do not ascend")
            before = key
            length = node_low | node_high << 16
            start = offset + key_bytes
            if flags & ~(_BIG | _SUBTREE) or start + (8 if flags & _BIG else length) > len(page):
                raise self._damage(f"page {number} has a value that leaves it")
            yield Entry(key, flags, number * self.root.page_bytes + start, length)

    def _overflow(self, entry: Entry) -> tuple[Entry, int]:
        size = self.root.page_bytes
        number = int.from_bytes(self._read(entry.offset_bytes, 8), "little")
        pages = (_PAGE.size + entry.length_bytes - 1) // size + 1
        self._claim(number, pages)
        own, _, flags, low, high = _PAGE.unpack(self._read(number * size, _PAGE.size))
        if (own, flags, low | high << 16) != (number, _OVERFLOW, pages):
            raise self._damage(f"page {number} is another one")
        return entry._replace(offset_bytes=number * size + _PAGE.size), pages


def damaged_values(tables: TablesFile, skipped: str) -> list[tuple[str, bytes]]:
    """List (table, key) of the values whose checksum is wrong; reads all of them but those of ``skipped``.

    Raises:
        FormatError: The structure is damaged.
    """
    found = []
    for name, tree in tables.databases().items():
        if name != skipped:
            for entry in tables.entries(tree):
                try:
                    open_value(entry.key, tables.value(entry))
                except FormatError:
                    found.append((name, entry.key))
    return found


def salvage(file: File, databases: tuple[str, ...]) -> Iterator[tuple[str, bytes, bytes | None]]:
    """Yield (table, key, body) of what can be read of a damaged file; None for a damaged value.

    A table is read up to its first damaged page.

    Raises:
        FormatError: Not even the list of tables can be read.
    """
    tables = TablesFile(file)
    for name, tree in tables.databases().items():
        if name not in databases:
            continue
        try:
            for entry in tables.entries(tree):
                try:
                    yield name, entry.key, open_value(entry.key, tables.value(entry))
                except FormatError:
                    yield name, entry.key, None
        except (FormatError, BackingError):
            continue  # so is the rest of this table
