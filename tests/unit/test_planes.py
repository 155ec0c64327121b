"""The two data planes against each other: the same calls give the same answers, batches and files."""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incfs.backing import Backing, File
from incfs.dataplane import DataPlane, LeaseExhausted, NotResident, ReadWouldWait
from incfs.errors import ChecksumMismatch, IncfsError
from incfs.model import HOLE, INHERIT, MapId, StorageId

nativeplane = pytest.importorskip("incfs.nativeplane", reason="the C data plane was not built")
from incfs import _dataplane  # noqa: E402

BLOCK = 64
TABLES = (MapId(1 << 32), MapId(2 << 32), MapId(1 << 32 | 3))
HEADER = 4096
IMAGE_BLOCKS = 20_000


class Image:
    """A storage volume without a pool."""

    def __init__(self, file: File) -> None:
        self.file = file

    @property
    def path(self) -> Path:
        return self.file.path

    def descriptor(self) -> tuple[int, int]:
        return self.file.fileno(), HEADER

    def read_blocks(self, block_index: int, block_count: int) -> bytes:
        return self.file.pread(HEADER + block_index * BLOCK, block_count * BLOCK)

    def read_blocks_cached(self, block_index: int, block_count: int) -> bytes | None:
        return self.file.pread_cached(HEADER + block_index * BLOCK, block_count * BLOCK)

    def write_blocks(self, block_index: int, data: bytes | memoryview) -> None:
        self.file.pwrite(HEADER + block_index * BLOCK, data)


def make_images(directory: Path) -> dict[StorageId, Any]:
    images = {}
    for number in (1, 2):
        images[StorageId(number)] = Image(Backing().create(directory / f"image{number}"))
        images[StorageId(number)].file.truncate(HEADER + IMAGE_BLOCKS * BLOCK)
    return images


class Pair:
    """Both planes, each with images of its own."""

    def __init__(self, home: Path) -> None:
        self.images = []
        for name in ("python", "native"):
            (home / name).mkdir()
            self.images.append(make_images(home / name))
        self.planes: list[Any] = [DataPlane(BLOCK, self.images[0]), nativeplane.NativePlane(BLOCK, self.images[1])]
        self.next_block = {1: 1, 2: 1}

    def both(self, call: Callable[[Any], Any]) -> Any:
        outcomes = [outcome_of(partial(call, plane)) for plane in self.planes]
        assert outcomes[0] == outcomes[1]
        return outcomes[0]

    def check(self) -> None:
        self.both(lambda plane: (plane.fresh_count, plane.page_count))
        self.both(lambda plane: [plane.mapped_delta(table) for table in TABLES])
        self.both(lambda plane: plane.inspect())

    def close(self) -> None:
        for images in self.images:
            for image in images.values():
                image.file.close()


def outcome_of(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except NotResident as refusal:
        return "load", refusal.map_id, refusal.page_index
    except LeaseExhausted as refusal:
        return "grant", refusal.map_id, refusal.block_count
    except ReadWouldWait as refusal:
        return "wait", refusal._extent
    except IncfsError as error:
        return type(error), str(error).replace("/python", "/native"), {**error.facts, "path": None}


tables = st.sampled_from(TABLES)
blocks = st.one_of(st.integers(0, 40), st.integers(500, 530), st.integers(0, 1600))
counts = st.one_of(st.integers(1, 12), st.sampled_from([1, 1, 512, 700]))
contents = st.sampled_from([b"\0", b"\0", b"x", b"y", b"z"])


@st.composite
def data(draw: st.DrawFn) -> bytes:
    pieces = draw(st.lists(st.tuples(contents, st.integers(1, 5)), min_size=1, max_size=6))
    cut = draw(st.sampled_from([0, 0, 0, 1, 17, 63]))
    whole = b"".join(byte * BLOCK * count for byte, count in pieces)
    return whole[: len(whole) - cut]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), tables, blocks, st.sampled_from([0, 0, 0, 1, 40]), data(), st.booleans()),
        st.tuples(st.just("read"), tables, blocks, counts, st.booleans()),
        st.tuples(st.just("discard"), tables, blocks, counts),
        st.tuples(st.just("seal")),
        st.tuples(st.just("grant"), tables, st.integers(1, 30), st.sampled_from([1, 2])),
        st.tuples(st.just("revoke"), st.one_of(st.none(), tables)),
        st.tuples(st.just("shrink"), st.integers(0, 6)),
        st.tuples(st.just("damage"), st.integers(1, 200)),
        st.tuples(st.just("evict"), tables),
        st.tuples(st.just("move"), st.integers(0, 3)),
        st.tuples(st.just("stripe"), st.sampled_from(TABLES[:2]), st.sampled_from([1, 2, 5]), st.integers(1, 4)),
    ),
    max_size=60,
)


class Run:
    """One sequence of calls; pages come from what was sealed, as the store's would."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.sealed: dict[tuple[MapId, int], dict[int, tuple[int, int]]] = {}

    def drive(self, call: Callable[[Any], Any]) -> Any:
        """Repeat until nothing is refused."""
        while True:
            outcome = self.pair.both(call)
            match outcome:
                case ("load", table, page_index):
                    hole = HOLE if table == TABLES[1] else INHERIT
                    entries = self.sealed.get((table, page_index), {})
                    self.pair.both(lambda plane: plane.load(table, page_index, dict(entries), hole=hole))  # noqa: B023
                case ("grant", table, count):
                    self.grant(table, count, 1)
                case _:
                    return outcome

    def grant(self, table: MapId, count: int, storage: int) -> None:
        first = self.pair.next_block[storage]
        # Sometimes next to the last lease, sometimes not.
        self.pair.next_block[storage] = first + count + first % 2
        assert first + count < IMAGE_BLOCKS
        self.pair.both(lambda plane: plane.grant(table, storage << 48 | first, count))

    def seal(self) -> None:
        batch = self.pair.both(lambda plane: plane.seal())
        for table in batch.tables:
            new = list(zip(table.addresses, table.checksums, strict=True))
            old = list(zip(table.old_addresses, table.old_checksums, strict=True))
            for page_index, first, end in table.pages:
                entries = self.sealed.setdefault((table.map_id, page_index), {})
                slots = table.slots[first:end]
                assert [entries.get(slot, (0, 0)) for slot in slots] == old[first:end]
                entries.update(zip(slots, new[first:end], strict=True))

    def move(self, page_index: int) -> None:
        """Move each second sealed block of a page, as the store would, in all tables."""
        for (_, found), entries in self.sealed.items():
            stored = [(slot, entry) for slot, entry in sorted(entries.items()) if found == page_index and entry[0] > 1]
            moves = []
            for slot, (old, crc) in stored[::2]:
                new = self.pair.next_block[2]
                self.pair.next_block[2] += 1
                for images in self.pair.images:
                    data = images[StorageId(old >> 48)].read_blocks(old & (1 << 48) - 1, 1)
                    images[StorageId(2)].write_blocks(new, data)
                moves.append((slot, old, 2 << 48 | new))
                entries[slot] = 2 << 48 | new, crc
            self.pair.both(lambda plane: plane.move(list(TABLES), page_index, moves))  # noqa: B023

    def step(self, step: tuple[Any, ...]) -> None:  # noqa: C901 - one case for each call
        match step:
            case ("write", table, block, shift, content, keep_zeros):
                self.drive(lambda plane: plane.write(table, block * BLOCK + shift, content, keep_zeros=keep_zeros))
            case ("read", table, block, count, verify):
                self.drive(lambda plane: plane.read(table, block, count, verify=verify))
            case ("discard", table, block, count):
                self.drive(lambda plane: plane.discard(table, block, count))
            case ("seal",):
                self.seal()
            case ("grant", table, count, storage):
                self.grant(table, count, storage)
            case ("revoke", None):
                self.pair.both(lambda plane: sorted(plane.revoke()))
            case ("revoke", table):
                self.pair.both(lambda plane: plane.revoke(table))
            case ("shrink", count):
                self.pair.both(lambda plane: plane.shrink(count))
            case ("damage", block):
                for images in self.pair.images:
                    images[StorageId(1)].file.pwrite(HEADER + block * BLOCK + 5, b"!")
            case ("stripe", table, unit, columns):
                self.pair.both(lambda plane: plane.stripe(table, unit, columns))
            case ("move", index):
                self.move(index)
            case ("evict", table):
                self.seal()
                self.pair.both(lambda plane: plane.evict(table))


@settings(max_examples=150)
@given(steps)
def test_planes_agree(sequence: list[tuple[Any, ...]]) -> None:
    home = Path(tempfile.mkdtemp(prefix="incfs-test-"))
    pair = Pair(home)
    try:
        run = Run(pair)
        for step in sequence:
            run.step(step)
            pair.check()
        run.seal()
        pair.check()
        for storage in (StorageId(1), StorageId(2)):
            python, native = (images[storage].read_blocks(0, IMAGE_BLOCKS) for images in pair.images)
            assert python == native
    finally:
        pair.close()
        shutil.rmtree(home)


@pytest.fixture
def pair(pool_home):
    pair = Pair(pool_home)
    yield pair
    pair.close()


def test_damage_is_told_in_the_same_words(pair):
    run = Run(pair)
    run.grant(TABLES[0], 10, 1)
    run.drive(lambda plane: plane.write(TABLES[0], 0, b"a" * 3 * BLOCK))
    run.step(("damage", 2))
    outcome = run.drive(lambda plane: plane.read(TABLES[0], 0, 3))
    assert outcome[0] is ChecksumMismatch
    assert "virtual block 1 of table 1.0: block 2 of storage volume 1" in outcome[1]


def test_no_room_drops_the_new_blocks(pair, tmp_path):
    """/dev/full refuses every write: what the lease gave is handed back with the next batch."""
    run = Run(pair)
    full = os.open("/dev/full", os.O_RDWR)
    for images in pair.images:
        os.dup2(full, images[StorageId(2)].file.fileno())
    os.close(full)
    run.grant(TABLES[0], 10, 2)
    outcome = run.drive(lambda plane: plane.write(TABLES[0], 0, b"a" * 3 * BLOCK))
    assert outcome[0].__name__ == "NoSpace"
    pair.check()
    batch = pair.both(lambda plane: plane.seal())
    assert batch.tables == []
    assert len(batch.dropped) == 3


def test_a_write_that_fails_keeps_what_is_there(pair):
    run = Run(pair)
    run.grant(TABLES[0], 2, 1)
    run.drive(lambda plane: plane.write(TABLES[0], 0, b"a" * BLOCK))
    for images in pair.images:
        file = images[StorageId(1)].file
        read_only = os.open(file.path, os.O_RDONLY)
        os.dup2(read_only, file.fileno())
        os.close(read_only)
    outcome = run.drive(lambda plane: plane.write(TABLES[0], 0, b"b" * BLOCK))
    assert outcome[0].__name__ == "BackingError"
    assert run.drive(lambda plane: plane.read(TABLES[0], 0, 1)) == b"a" * BLOCK


def test_image_that_ends_early(pair):
    run = Run(pair)
    run.grant(TABLES[0], 1, 1)
    run.drive(lambda plane: plane.write(TABLES[0], 0, b"a" * BLOCK))
    for images in pair.images:
        images[StorageId(1)].file.truncate(HEADER)
    for plane in pair.planes:
        with pytest.raises(IncfsError, match=r"image1 ends"):
            plane.read(TABLES[0], 0, 1, wait=True)


def test_part_of_a_damaged_block_is_not_written(pair):
    """The rest of it would get a checksum that says that all is well."""
    run = Run(pair)
    run.grant(TABLES[0], 4, 1)
    run.drive(lambda plane: plane.write(TABLES[0], 0, b"a" * 2 * BLOCK))
    run.seal()
    run.step(("damage", 2))
    for offset, length in ((BLOCK + 10, 20), (0, BLOCK + 5), (BLOCK + 30, BLOCK)):
        outcome = run.drive(lambda plane: plane.write(TABLES[0], offset, b"b" * length))  # noqa: B023
        assert outcome[0] is ChecksumMismatch
    assert run.drive(lambda plane: plane.read(TABLES[0], 0, 1)) == b"a" * BLOCK


def test_pages_with_unsealed_mappings_stay_resident(pair):
    run = Run(pair)
    for page in range(4):
        run.drive(lambda plane: plane.read(TABLES[0], page * 512, 1))  # noqa: B023
    run.drive(lambda plane: plane.write(TABLES[0], 512 * BLOCK, b"a" * BLOCK))
    for _ in range(3):
        pair.both(lambda plane: sorted(plane.shrink(0)))
    assert pair.both(lambda plane: [plane.is_resident(TABLES[0], page) for page in range(4)]) == [
        False,
        True,
        False,
        False,
    ]
    assert len(pair.both(lambda plane: plane.seal()).tables) == 1


def test_a_write_over_leases_that_lie_apart(pair):
    """Further on, further back, and next to each other."""
    run = Run(pair)
    for first, count in ((20, 2), (30, 3), (10, 2), (12, 1), (11_000, 4)):
        pair.both(lambda plane: plane.grant(TABLES[0], 1 << 48 | first, count))  # noqa: B023
    content = b"".join(bytes([65 + i]) * BLOCK for i in range(12))
    run.drive(lambda plane: plane.write(TABLES[0], 0, content))
    assert run.drive(lambda plane: plane.read(TABLES[0], 0, 12)) == content
    pair.check()


def test_a_part_of_a_new_block_has_zeros_around_it(pair):
    """And not what memory, or the block on disk, held before."""
    run = Run(pair)
    for images in pair.images:
        images[StorageId(1)].file.pwrite(HEADER, b"?" * 200 * BLOCK)
    for block in range(0, 40, 4):
        run.drive(lambda plane: plane.write(TABLES[0], block * BLOCK + 1, b"a" * (2 * BLOCK - 2)))  # noqa: B023
        run.drive(lambda plane: plane.write(TABLES[0], (block + 2) * BLOCK + 30, b"b" * (BLOCK + 4)))  # noqa: B023
        expected = b"\0" + b"a" * (2 * BLOCK - 2) + bytes(31) + b"b" * (BLOCK + 4) + bytes(30)
        assert run.drive(lambda plane: plane.read(TABLES[0], block, 4)) == expected  # noqa: B023


def test_a_sealed_block_gets_a_new_place(pair):
    run = Run(pair)
    for letter in (b"a", b"b"):
        run.drive(lambda plane: plane.write(TABLES[0], 3 * BLOCK, letter * BLOCK))  # noqa: B023
        run.seal()
        pair.check()


def test_zeros_give_the_place_of_a_fresh_block_back(pair):
    run = Run(pair)
    run.drive(lambda plane: plane.write(TABLES[0], 0, b"a" * 3 * BLOCK))
    run.drive(lambda plane: plane.write(TABLES[0], BLOCK, bytes(BLOCK)))
    run.drive(lambda plane: plane.discard(TABLES[0], 2, 1))
    pair.check()
    run.seal()


def test_one_byte_makes_a_block_that_is_no_hole(pair):
    run = Run(pair)
    for index in range(BLOCK):
        content = bytes(index) + b"x" + bytes(BLOCK - 1 - index)
        run.drive(lambda plane: plane.write(TABLES[0], index * BLOCK, content))  # noqa: B023
        assert run.drive(lambda plane: plane.read(TABLES[0], index, 1)) == content  # noqa: B023
    assert pair.both(lambda plane: plane.mapped_delta(TABLES[0])) == BLOCK


@given(st.binary(max_size=5000))
def test_checksum_is_crc32c(content: bytes) -> None:
    assert set(_dataplane.crc32c(content)) == {crc32c.crc32c(content)}


@pytest.mark.parametrize("length", [255, 256, 257, 504, 511, 512, 4032, 4096, 65536, 1 << 20])
def test_checksum_of_long_data(length):
    content = os.urandom(length)
    assert set(_dataplane.crc32c(content)) == {crc32c.crc32c(content)}


def test_zeros_that_are_kept_are_blocks_like_others(pair):
    run = Run(pair)
    run.drive(lambda plane: plane.write(TABLES[0], 0, bytes(4 * BLOCK), keep_zeros=True))
    assert pair.both(lambda plane: plane.mapped_delta(TABLES[0])) == 4
    run.drive(lambda plane: plane.write(TABLES[0], BLOCK, bytes(BLOCK)))
    assert pair.both(lambda plane: plane.mapped_delta(TABLES[0])) == 3
    run.drive(lambda plane: plane.write(TABLES[0], BLOCK // 2, bytes(BLOCK), keep_zeros=True))
    assert pair.both(lambda plane: plane.mapped_delta(TABLES[0])) == 4
    pair.check()
    run.seal()
    assert run.drive(lambda plane: plane.read(TABLES[0], 0, 4)) == bytes(4 * BLOCK)


def test_a_read_that_does_not_verify_gives_what_is_there_and_nothing_is_made_of_it(pair):
    """A part of a block is still merged with verified bytes only: damage never gets a checksum of its own."""
    run = Run(pair)
    run.grant(TABLES[0], 4, 1)
    run.drive(lambda plane: plane.write(TABLES[0], 0, b"a" * 2 * BLOCK))
    run.seal()
    run.step(("damage", 2))
    damaged = b"a" * (BLOCK + 5) + b"!" + b"a" * (BLOCK - 6)
    assert run.drive(lambda plane: plane.read(TABLES[0], 0, 2, verify=False)) == damaged
    assert run.drive(lambda plane: plane.read(TABLES[0], 0, 2))[0] is ChecksumMismatch
    assert run.drive(lambda plane: plane.write(TABLES[0], BLOCK + 9, b"b"))[0] is ChecksumMismatch
