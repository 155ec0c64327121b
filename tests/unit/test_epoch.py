"""Epochs: their bytes, how a part stands to a directory, and how they are raised."""

from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incfs.backing import Backing
from incfs.epoch import (
    EPOCH_NAME,
    SLOT_STEP_BYTES,
    Epoch,
    Fit,
    Point,
    Stamp,
    Standing,
    compare,
    decode_stamp,
    decode_standing,
    encode_stamp,
    encode_standing,
    is_within,
)
from incfs.errors import BackingError, EpochMismatch, FormatError, NoSpace
from incfs.image import read_stamp, write_stamp
from incfs.model import StorageId
from incfs.parts import Part, Raise, create_standing, next_epoch, read_standing, write_standing
from tests.support import pools

POOL = UUID(int=7)
OLD, NOW, NEXT, LATER = (Epoch(counter, counter * 11) for counter in (4, 5, 6, 7))
FORK = Epoch(5, 99)
numbers = st.integers(0, (1 << 64) - 1)
epochs = st.builds(Epoch, numbers, numbers)
standings = st.builds(Standing, epochs, st.none() | epochs, is_adopting=st.booleans(), is_unproved=st.booleans())


@given(standing=standings, serial=numbers)
def test_a_standing_is_read_as_it_was_written(standing: Standing, serial: int) -> None:
    assert decode_standing(POOL, encode_standing(POOL, standing, serial)) == (serial, standing)


@given(stamp=st.builds(Stamp, epochs, st.builds(Point, numbers, numbers)), serial=numbers)
def test_a_stamp_is_read_as_it_was_written(stamp: Stamp, serial: int) -> None:
    assert decode_stamp(encode_stamp(stamp, serial)) == (serial, stamp)


@given(junk=st.binary(max_size=200), at=st.integers(0, 75), bit=st.integers(0, 7))
def test_damaged_slots_are_none(junk: bytes, at: int, bit: int) -> None:
    assert decode_standing(POOL, junk) is None
    assert decode_stamp(junk) is None
    for slot, decode, size in (
        (encode_standing(POOL, Standing(NOW), 3), lambda data: decode_standing(POOL, data), 76),
        (encode_stamp(Stamp(NOW, Point(3, 9)), 3), decode_stamp, 60),
    ):
        flipped = bytearray(slot)
        flipped[at % size] ^= 1 << bit
        assert decode(bytes(flipped)) is None


def test_the_bytes_are_those_of_the_format() -> None:
    standing = encode_standing(POOL, Standing(Epoch(2, 3), Epoch(4, 5), is_unproved=True), 6)
    assert standing[:76].hex() == (
        "494e434653455000" "0100" "0500" "00000000" "00000000000000000000000000000007" "0600000000000000"
        "0200000000000000" "0300000000000000" "0400000000000000" "0500000000000000" "af9822fb"
    )  # fmt: skip
    assert encode_stamp(Stamp(Epoch(2, 3), Point(4, 6)), 5)[:60].hex() == (
        "494e434653535400" "0100" "0000" "00000000" "0500000000000000" "0200000000000000" "0300000000000000"
        "0400000000000000" "0600000000000000" "6d00ac7e"
    )  # fmt: skip
    assert len(standing) == 512


def test_another_pools_slot_is_refused() -> None:
    with pytest.raises(FormatError):
        decode_standing(UUID(int=8), encode_standing(POOL, Standing(NOW), 1))


@pytest.mark.parametrize(
    ("standing", "stamp", "fit"),
    [
        (Standing(NOW), Stamp(NOW, Point(3, 12)), Fit.FITS),
        (Standing(NOW), Stamp(NOW, Point(3, 10)), Fit.FITS),
        (Standing(NOW), Stamp(NOW, Point(3, 15)), Fit.FITS),
        (Standing(NOW), Stamp(NOW, Point(3, 9)), Fit.OLDER),
        (Standing(NOW), Stamp(NOW, Point(3, 16)), Fit.NEWER),
        (Standing(NOW), Stamp(NOW, Point(2, 12)), Fit.FITS),
        (Standing(NOW), Stamp(NOW, Point(4, 15)), Fit.NEWER),
        (Standing(NOW), Stamp(NOW, Point(1, 10)), Fit.OLDER),
        (Standing(NOW), Stamp(OLD, Point(3, 12)), Fit.OLDER),
        (Standing(NOW), Stamp(NEXT, Point(3, 12)), Fit.NEWER),
        (Standing(NOW), Stamp(FORK, Point(3, 12)), Fit.FORKED),
        (Standing(NOW), None, Fit.UNKNOWN),
        (Standing(NOW, NEXT), Stamp(NOW, Point(3, 12)), Fit.FITS),
        (Standing(NOW, NEXT), Stamp(NEXT, Point(3, 12)), Fit.FITS),
        (Standing(NOW, NEXT), Stamp(OLD, Point(3, 12)), Fit.OLDER),
        (Standing(NOW, NEXT), Stamp(LATER, Point(3, 12)), Fit.NEWER),
        (Standing(NOW, NEXT), Stamp(FORK, Point(3, 12)), Fit.FORKED),
    ],
)
def test_how_a_part_stands_to_a_directory(standing: Standing, stamp: Stamp | None, fit: Fit) -> None:
    assert compare(standing, stamp, folded=Point(2, 10), reached=Point(3, 15)) is fit


def test_a_journal_is_never_of_a_later_epoch_than_its_directory() -> None:
    assert [is_within(epoch, Standing(NOW, NEXT)) for epoch in (OLD, NOW, NEXT)] == [True] * 3
    assert not any(is_within(epoch, Standing(NOW, NEXT)) for epoch in (FORK, LATER))


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    pool = pools.make_pool(tmp_path, storages=2)
    images = sorted(pool.glob("disk*/*.img"))
    return [Part(StorageId(number), 0, Backing().open(path)) for number, path in enumerate(images, 1)]


def test_a_raise_leaves_all_at_the_next_epoch(tmp_path: Path, parts: list[Part]) -> None:
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
        create_standing(Backing(), home, POOL, Standing(NOW))
    after, failed = Raise(Backing(), POOL, homes, parts, Point(3, 44)).run(Standing(NOW), NEXT)
    assert after == Standing(NEXT)
    assert not failed
    assert [read_standing(Backing(), home, POOL) for home in homes] == [after, after]
    assert [read_stamp(part.file) for part in parts] == [Stamp(NEXT, Point(3, 44))] * 2


def test_a_torn_write_leaves_the_standing_that_was(tmp_path: Path) -> None:
    backing = Backing()
    create_standing(backing, tmp_path, POOL, Standing(NOW))
    for standing in (Standing(NOW, NEXT), Standing(NEXT)):
        before = (tmp_path / EPOCH_NAME).read_bytes()
        expected = read_standing(backing, tmp_path, POOL)
        write_standing(backing, tmp_path, POOL, standing)
        after = (tmp_path / EPOCH_NAME).read_bytes()
        offset = SLOT_STEP_BYTES if standing.raising else 0
        torn = bytearray(before)
        torn[offset : offset + 40] = after[offset : offset + 40]
        (tmp_path / EPOCH_NAME).write_bytes(torn)
        assert read_standing(backing, tmp_path, POOL) == expected
        (tmp_path / EPOCH_NAME).write_bytes(after)
        assert read_standing(backing, tmp_path, POOL) == standing


@pytest.mark.parametrize("offset", [0, SLOT_STEP_BYTES])
def test_damage_of_one_slot_of_a_settled_directory_is_harmless(tmp_path: Path, offset: int) -> None:
    create_standing(Backing(), tmp_path, POOL, Standing(OLD))
    for standing in (Standing(OLD, NOW), Standing(NOW)):
        write_standing(Backing(), tmp_path, POOL, standing)
    content = bytearray((tmp_path / EPOCH_NAME).read_bytes())
    content[offset : offset + 64] = bytes(64)
    (tmp_path / EPOCH_NAME).write_bytes(content)
    assert read_standing(Backing(), tmp_path, POOL) == Standing(NOW)


@pytest.mark.parametrize("content", [None, b"", bytes(2 * SLOT_STEP_BYTES)])
def test_a_lost_epoch_file_says_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / EPOCH_NAME).write_bytes(content)
    with pytest.raises(FormatError, match="force_older"):
        read_standing(Backing(), tmp_path, POOL)


def test_stamps_are_written_in_turn(parts: list[Part]) -> None:
    """Each stays until the next is durable."""
    file = parts[0].file
    for sequence in range(1, 6):
        before = file.pread(0, 65536)
        write_stamp(file, Stamp(NOW, Point(3, sequence)))
        after = file.pread(0, 65536)
        changed = [at for at in range(0, 65536, 4096) if before[at : at + 4096] != after[at : at + 4096]]
        assert len(changed) == 1
        file.pwrite(changed[0], bytes(4096))
        assert read_stamp(file) != Stamp(NOW, Point(3, sequence))
        file.pwrite(changed[0], after[changed[0] : changed[0] + 4096])
        assert read_stamp(file) == Stamp(NOW, Point(3, sequence))


class BadFile:
    """Stands for a leg that cannot be flushed."""

    def __init__(self, part: Part, error: Exception) -> None:
        self._part = part
        self._error = error
        self.waits = False

    def sync(self) -> None:
        raise self._error

    def __getattr__(self, name: str) -> object:
        return getattr(self._part.file, name)


def test_a_leg_that_cannot_be_stamped_is_told_as_long_as_another_is(tmp_path: Path, parts: list[Part]) -> None:
    create_standing(Backing(), tmp_path, POOL, Standing(NOW))
    bad = Part(StorageId(1), 1, BadFile(parts[1], BackingError("a bad disk")))  # type: ignore[arg-type]  # it is like one
    good = parts[0]
    after, failed = Raise(Backing(), POOL, [tmp_path], [good, bad], Point(1, 1)).run(Standing(NOW), NEXT)
    assert (after, list(failed)) == (Standing(NEXT), [bad])
    for lonely, error in ((replace(bad, storage_id=StorageId(2)), BackingError), (bad, NoSpace)):
        lonely.file._error = error("a bad disk")  # type: ignore[attr-defined]
        with pytest.raises(error):
            Raise(Backing(), POOL, [tmp_path], [good, lonely], Point(1, 1)).run(after, LATER)
        assert read_standing(Backing(), tmp_path, POOL) == Standing(NEXT, LATER), "it is not settled"


def test_every_epoch_is_above_all_that_were_seen() -> None:
    made = next_epoch(NOW, LATER, OLD)
    assert made.counter == 8
    assert made.nonce != next_epoch(NOW, LATER, OLD).nonce


def test_a_forced_opening_says_what_it_did_until_a_check_of_all_data(tmp_path: Path) -> None:
    pool = pools.make_pool(tmp_path)
    old = (pool / EPOCH_NAME).read_bytes()
    pools.open_tiny(pool).close()
    (pool / EPOCH_NAME).write_bytes(old)
    with pytest.raises(EpochMismatch, match="its epoch file is older"):
        pools.open_tiny(pool)
    options = replace(pools.tiny_options(), force_older=True)
    with pools.open_tiny(pool, options) as store:
        assert store.standing.is_unproved
        assert store.pool.reuse.is_withheld
    with pools.open_tiny(pool) as store:
        assert store.standing.is_unproved, "it is opened without insisting again, and still not proved"
        store.prove()
    with pools.open_tiny(pool) as store:
        assert not store.standing.is_unproved
        assert not store.pool.reuse.is_withheld
