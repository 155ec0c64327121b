"""The journal: what is read back after a torn tail, damage, and earlier uses of the files."""

from pathlib import Path
from uuid import UUID

import pytest

from incfs.backing import Backing
from incfs.errors import FormatError, JournalDamaged
from incfs.journal import SECTOR_BYTES, Journal, encode_record, journal_paths

POOL = UUID(int=7)
SEGMENT_BYTES = 65536


@pytest.fixture
def home(pool_home: Path) -> Path:
    Journal.create(Backing(), pool_home, POOL, segment_bytes=SEGMENT_BYTES, nonce=1)
    return pool_home


def opened(home: Path, segment: int = 1, sequence: int = 0) -> tuple[Journal, list[tuple[int, bytes]]]:
    journal = Journal.open(Backing(), home, POOL)
    try:
        return journal, [(record.sequence, record.body) for record in journal.replay(segment, sequence)]
    except BaseException:
        journal.close()
        raise


def found(home: Path, segment: int = 1, sequence: int = 0) -> list[tuple[int, bytes]]:
    journal, records = opened(home, segment, sequence)
    journal.close()
    return records


def append(home: Path, *bodies: bytes) -> list[int]:
    """Append records behind those that are there; give where each ends."""
    journal, records = opened(home)
    ends = []
    for sequence, body in enumerate(bodies, len(records) + 1):
        journal.append(sequence, body)
        ends.append(journal.used_bytes)
    journal.close()
    return ends


def damage(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_records_come_back_in_order(home: Path) -> None:
    append(home, b"a", b"b" * 3000, b"")
    assert found(home) == [(1, b"a"), (2, b"b" * 3000), (3, b"")]
    assert found(home, sequence=2) == [(3, b"")]


@pytest.mark.parametrize("position", [0, 5, 30, 100, 600, 1500])
def test_a_torn_last_record_is_cut_and_written_over(home: Path, position: int) -> None:
    start, _ = append(home, b"first", b"x" * 2000)
    damage(journal_paths(home)[1], start + position, b"\xff" * 2)
    with pytest.raises(JournalDamaged):
        found(home)  # it was acknowledged
    damage(journal_paths(home)[1], start + 2048, bytes(SECTOR_BYTES))
    assert found(home) == [(1, b"first")]
    append(home, b"again")
    assert found(home) == [(1, b"first"), (2, b"again")]


def test_a_damaged_record_before_the_tail_is_reported(home: Path) -> None:
    append(home, b"first", b"second", b"third")
    damage(journal_paths(home)[1], 2 * SECTOR_BYTES + 33, b"?")
    with pytest.raises(JournalDamaged):
        found(home)


def test_records_may_go_on_behind_the_segments_size(home: Path) -> None:
    append(home, b"x" * SEGMENT_BYTES, b"y")
    assert [sequence for sequence, _ in found(home)] == [1, 2]


def test_a_new_segment_is_read_after_the_old_one(home: Path) -> None:
    journal, _ = opened(home)
    journal.append(1, b"old")
    journal.start_segment(2, nonce=2)
    journal.append(2, b"new")
    journal.close()
    assert found(home, segment=1) == [(1, b"old"), (2, b"new")]
    assert found(home, segment=2, sequence=1) == [(2, b"new")]


def test_the_tail_of_an_old_segment_cannot_be_lost_unnoticed(home: Path) -> None:
    journal, _ = opened(home)
    journal.append(1, b"old")
    journal.start_segment(2, nonce=2)
    journal.close()
    damage(journal_paths(home)[1], SECTOR_BYTES + 3, b"?")
    with pytest.raises(JournalDamaged):
        found(home, segment=1)


def test_records_of_an_earlier_use_are_not_taken(home: Path) -> None:
    journal, _ = opened(home)
    for sequence in range(1, 4):
        journal.append(sequence, b"stale")
    journal.start_segment(4, nonce=2)
    journal.start_segment(4, nonce=3)
    journal.append(4, b"new")
    journal.close()
    assert found(home, segment=3, sequence=3) == [(4, b"new")]


def test_a_missing_segment_is_reported(home: Path) -> None:
    with pytest.raises(JournalDamaged):
        found(home, segment=2)
    damage(journal_paths(home)[1], 3, b"?")
    with pytest.raises(JournalDamaged):
        found(home)


def test_the_journal_of_another_pool_is_refused(home: Path) -> None:
    journal = Journal.open(Backing(), home, UUID(int=8))
    with pytest.raises(FormatError):
        list(journal.replay(1, 0))
    journal.close()


def test_a_record_in_the_wrong_place_is_not_taken(home: Path) -> None:
    """A disk that puts an earlier record where the last one belongs."""
    end, _ = append(home, b"first", b"second")
    path = journal_paths(home)[1]
    damage(path, end, path.read_bytes()[SECTOR_BYTES:end])
    with pytest.raises(JournalDamaged):
        found(home)


def test_a_record_of_another_segment_is_not_taken(home: Path) -> None:
    """Nor what a user's data makes look like one: nobody knows the nonce."""
    (end,) = append(home, b"first")
    damage(journal_paths(home)[1], end, encode_record(2, 77, b"forged"))
    assert found(home) == [(1, b"first")]


def test_nothing_is_appended_behind_a_damaged_record_that_is_folded(home: Path) -> None:
    """Replay would end before what is appended there."""
    start, _ = append(home, b"first", b"second")
    damage(journal_paths(home)[1], start, bytes(2 * SECTOR_BYTES))
    with pytest.raises(JournalDamaged, match="nothing can be appended"):
        found(home, sequence=2)
