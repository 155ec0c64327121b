"""Copies of the metadata in several directories: kept alike, left behind, brought back, never opened when stale."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from incfs import copymaker
from incfs.backing import Backing, File
from incfs.errors import (
    AlreadyExists,
    BackingError,
    EpochMismatch,
    MetadataFull,
    MetadataStale,
    NoSpace,
    NotAPool,
    PoolLocked,
    UsageError,
)
from incfs.lock import PoolLock
from incfs.metadata import TABLES_NAME
from incfs.roster import ROSTER_NAME, decode_roster, encode_roster, first_roster, read_roster
from incfs.store import Store
from incfs.tables import Tables
from tests.support import pools

DATA = b"acknowledged" * 500


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A pool whose metadata is in ``pool`` and in ``other``."""
    made = pools.make_pool(tmp_path)
    with pools.open_tiny(made) as store:
        pools.new_volume(store, "a")
        add(store, tmp_path / "other")
    return made


def add(store: Store, directory: Path) -> int:
    number = copymaker.announce(store, directory, force=True)
    copymaker.bring_back(store, number)
    return number


def write(store: Store, data: bytes = DATA, offset: int = 0) -> None:
    pools.write(store, store.catalog.volume_named("a").map_id, offset, data)
    store.commit()


def content(store: Store, length: int = len(DATA)) -> bytes:
    return pools.read(store, store.catalog.volume_named("a").map_id, 0, length)


def lose(directory: Path) -> None:
    """The metadata is gone; images that are there stay."""
    for name in ("superblock", ROSTER_NAME, "journal.0", "journal.1", TABLES_NAME, f"{TABLES_NAME}-lock", "lock"):
        (directory / name).unlink(missing_ok=True)


def current(directory: Path) -> list[int]:
    own = read_roster(Backing(), directory)
    assert own is not None
    return own[0].current


def test_a_roster_is_read_as_it_was_written() -> None:
    roster = first_roster("5e0b9c7e-3f4e-4b8e-9a51-0d9c1c1f0b11", Path("/a")).with_place(Path("/b")).raised([1])
    text = encode_roster(roster, 2)
    assert text == (
        b"incfs-copies 1\n"
        b'{"generation": 2, "here": 2, "home": 1, "places": [{"number": 1, "path": "/a", "seen": 2}, '
        b'{"number": 2, "path": "/b", "seen": 0}], "uuid": "5e0b9c7e-3f4e-4b8e-9a51-0d9c1c1f0b11"}\n'
        b"crc32c e0546f66\n"
    )
    assert decode_roster(text, Path("x")) == (roster, 2)


def test_the_journals_are_alike_byte_for_byte_and_so_are_the_tables(pool: Path, tmp_path: Path) -> None:
    with pools.open_tiny(pool) as store:
        write(store)
        store.checkpoint()
        write(store, b"more", 70)
        for name in ("journal.0", "journal.1"):
            assert (pool / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
        first, second = store.table_copies._tables.values()
        assert first.facts() == second.facts()
        assert first._marks == second._marks


@pytest.mark.parametrize("is_folded", [False, True])
def test_the_pool_opens_by_either_copy_when_the_other_is_lost(pool: Path, tmp_path: Path, is_folded: bool) -> None:
    store = pools.open_tiny(pool)
    write(store)
    if is_folded:
        store.checkpoint()
    store.abandon()
    lose(pool)
    with pools.open_tiny(tmp_path / "other") as again:
        assert content(again) == DATA
        assert [event.kind for event in again.events.since()] == ["metadata-failed"]
        write(again, b"later")
        pools.check_clean(again)
    assert current(tmp_path / "other") == [2]


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, is_hit: Callable[[Path], bool]) -> None:
    original = getattr(owner, name)

    def fails(self: Any, *arguments: Any, **named: Any) -> Any:
        path = self.path if isinstance(self, File) else self._path
        if is_hit(path):
            raise BackingError(f"cannot {name} {path}: injected", action="write")
        return original(self, *arguments, **named)

    monkeypatch.setattr(owner, name, fails)


def test_who_was_left_behind_is_said_when_there_is_room(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool was read-only because the one copy that was left had no room for the roster."""
    store = pools.open_tiny(pool)
    write(store, b"before")
    with monkeypatch.context() as patched:
        failing(patched, File, "pwrite", lambda path: path.parent.name == "other" and path.name.startswith("journal"))

        def full(backing: Backing, path: Path, content: bytes) -> None:
            raise NoSpace(f"cannot write {path}: No space left on device")

        patched.setattr(Backing, "replace_content", full)
        for _ in range(2):
            with pytest.raises(MetadataFull):
                write(store, b"later")
            assert store.durable_sequence < store.sequence
    assert store.failure is None
    store.commit()
    write(store)
    assert store.copies.is_settled
    assert current(pool) == [1]
    store.abandon()
    with pools.open_tiny(pool) as again:
        assert content(again) == DATA
        pools.check_clean(again)


@pytest.mark.parametrize("lost", ["pool", "other"])
@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (File, "pwrite", "journal"),
        (File, "sync", "journal"),
        (Tables, "write", "tables"),
        (Tables, "reserve", "tables"),
    ],
    ids=["append", "flush", "fold", "reserve"],
)
def test_a_copy_that_fails_is_left_behind_before_anything_is_acknowledged(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, owner: Any, name: str, at: str
) -> None:
    store = pools.open_tiny(pool)
    write(store, b"before")
    with monkeypatch.context() as patched:
        failing(patched, owner, name, lambda path: path.parent.name == lost and path.name.startswith(at))
        write(store)
        store.checkpoint()
        write(store, b"end", len(DATA))
    assert store.failure is None
    assert store.copies.is_settled
    assert [event.kind for event in store.events.since()][-1] == "metadata-failed"
    survivor, number = (tmp_path / "other", 2) if lost == "pool" else (pool, 1)
    assert current(survivor) == [number]
    pools.check_memory(store)
    store.abandon()
    with pools.open_tiny(tmp_path / lost) as again:  # by the one that was left behind: it is brought up to date
        assert content(again, len(DATA) + 3) == DATA + b"end"
        assert sorted(again.copies.current) == [1, 2]
        assert [event.kind for event in again.events.since()][-1] == "metadata-restored"
        pools.check_clean(again)
    lose(survivor)
    with pools.open_tiny(tmp_path / lost) as again:
        assert content(again, len(DATA) + 3) == DATA + b"end"


def test_the_last_copy_that_fails_makes_the_pool_read_only(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = pools.open_tiny(pool)
    failing(monkeypatch, File, "sync", lambda path: path.name.startswith("journal"))
    with pytest.raises(BackingError):
        write(store)
    assert store.failure is not None
    store.abandon()


def test_a_failure_is_not_acknowledged_when_nobody_can_be_told(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy fails to flush, the other to write who was left behind."""
    store = pools.open_tiny(pool)
    failing(
        monkeypatch,
        File,
        "sync",
        lambda path: (path.parent.name, path.name.split(".")[0]) in {("other", "journal"), ("pool", ROSTER_NAME)},
    )
    with pytest.raises(BackingError):
        write(store)
    assert store.failure is not None
    store.abandon()


def test_a_copy_that_was_left_behind_leads_to_the_one_that_counts(pool: Path, tmp_path: Path) -> None:
    with pools.open_tiny(pool) as store:
        store.copies.leave(2, "a test")
        store.copies.settle()
        write(store)
    with pools.open_tiny(tmp_path / "other") as again:
        assert content(again) == DATA


def test_a_copy_that_was_left_behind_does_not_stand_in_for_a_damaged_one(pool: Path) -> None:
    with pools.open_tiny(pool) as store:
        store.copies.leave(2, "a test")
        store.copies.settle()
    (pool / "superblock").write_bytes(b"damaged")
    with pytest.raises(NotAPool):
        pools.open_tiny(pool)


def test_a_copy_that_was_left_behind_is_refused_alone_from_the_first_commit_on(pool: Path, tmp_path: Path) -> None:
    """Its own roster says that it is up to date: only the images know better."""
    store = pools.open_tiny(pool)
    assert store.copies.leave(2, "a test")
    write(store)
    store.abandon()
    lose(pool)
    with pytest.raises(EpochMismatch):
        pools.open_tiny(tmp_path / "other")


def test_two_copies_that_were_used_without_each_other_are_refused(pool: Path, tmp_path: Path) -> None:
    other, away = tmp_path / "other", tmp_path / "away"
    other.rename(away)
    with pools.open_tiny(pool) as store:
        write(store)
    pool.rename(tmp_path / "pool-away")
    away.rename(other)
    (tmp_path / "pool-away" / "images").rename(tmp_path / "images")
    pool.mkdir()
    (tmp_path / "images").rename(pool / "images")
    with pytest.raises(EpochMismatch):
        pools.open_tiny(other)
    pools.open_tiny(other, replace(pools.tiny_options(), force_older=True)).close()
    (pool / "images").rename(tmp_path / "images")
    pool.rmdir()
    (tmp_path / "pool-away").rename(pool)
    (tmp_path / "images").rename(pool / "images")
    for directory in (pool, other):
        with pytest.raises(MetadataStale, match="without the other"):
            pools.open_tiny(directory)


def test_both_locks_are_taken(pool: Path, tmp_path: Path) -> None:
    with pools.open_tiny(pool), pytest.raises(PoolLocked):
        pools.open_tiny(tmp_path / "other")
    lock = PoolLock(tmp_path / "other")
    with pytest.raises(PoolLocked):
        pools.open_tiny(pool)
    lock.release()


@pytest.mark.parametrize("lost", ["pool", "other"])
@pytest.mark.parametrize("name", [TABLES_NAME, "journal.1", "superblock", ROSTER_NAME])
def test_a_damaged_copy_is_made_anew_from_the_other(pool: Path, tmp_path: Path, lost: str, name: str) -> None:
    store = pools.open_tiny(pool)
    write(store, b"first")
    write(store)
    store.abandon()
    path = tmp_path / lost / name
    damaged = bytearray(path.read_bytes())
    damaged[: min(len(damaged), 12_000)] = bytes(min(len(damaged), 12_000))
    path.write_bytes(damaged)
    named = pool if lost == "other" or name != ROSTER_NAME else tmp_path / "other"
    with pools.open_tiny(named) as again:
        assert content(again) == DATA
        assert sorted(again.copies.current) == [1, 2]
        pools.check_clean(again)
    lose(pool if lost == "other" else tmp_path / "other")
    with pools.open_tiny(tmp_path / lost) as again:
        assert content(again) == DATA


def test_a_record_that_one_copy_lacks_is_taken_from_the_other(pool: Path, tmp_path: Path) -> None:
    for lacking in (pool, tmp_path / "other"):
        store = pools.open_tiny(pool)
        before = {name: (lacking / name).read_bytes() for name in ("journal.0", "journal.1")}
        write(store, lacking.name.encode())
        store.abandon()
        for name, data in before.items():
            (lacking / name).write_bytes(data)
        with pools.open_tiny(pool) as again:
            assert content(again, len(lacking.name)) == lacking.name.encode()
            assert sorted(again.copies.current) == [1, 2]


@pytest.mark.parametrize("lacking", ["pool", "other"])
def test_a_record_that_one_copy_lacked_is_in_it_from_the_opening_on(pool: Path, tmp_path: Path, lacking: str) -> None:
    """The power fails right after the opening, and takes the disk of the copy that had it."""
    behind, ahead = tmp_path / lacking, tmp_path / ("other" if lacking == "pool" else "pool")
    store = pools.open_tiny(pool)
    before = {name: (behind / name).read_bytes() for name in ("journal.0", "journal.1")}
    write(store)
    store.abandon()
    for name, data in before.items():
        (behind / name).write_bytes(data)
    pools.open_tiny(pool).abandon()
    lose(ahead)
    with pools.open_tiny(behind) as again:
        assert content(again) == DATA


def test_a_checkpoint_that_one_copy_lacks_is_folded_into_it(pool: Path, tmp_path: Path) -> None:
    for lacking in (pool, tmp_path / "other"):
        store = pools.open_tiny(pool)
        write(store, b"1" + lacking.name.encode())
        before = (lacking / TABLES_NAME).read_bytes()
        store.checkpoint()
        store.abandon()
        (lacking / TABLES_NAME).write_bytes(before)
        with pools.open_tiny(pool) as again:
            assert content(again, 1 + len(lacking.name)) == b"1" + lacking.name.encode()
            assert "metadata-failed" not in [event.kind for event in again.events.since()], "none had to be made anew"
            assert sorted(again.copies.current) == [1, 2]
            pools.check_clean(again)
            first, second = again.table_copies._tables.values()
            assert (first.facts(), first._marks) == (second.facts(), second._marks)


def test_a_copy_is_removed(pool: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with pools.open_tiny(pool) as store:
        with pytest.raises(UsageError, match="is open by"):
            copymaker.remove(store, 1)
        copymaker.delete(store, 2, copymaker.remove(store, 2))
        write(store)
        assert list(other.iterdir()) == []
    with pools.open_tiny(pool) as again:
        assert content(again) == DATA
        assert again.copies.current == [1]


def test_a_copy_that_was_removed_while_it_was_away_is_refused(pool: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.rename(tmp_path / "away")
    with pools.open_tiny(pool) as store:
        copymaker.remove(store, 2)
    (tmp_path / "away").rename(other)
    with pytest.raises(MetadataStale, match="any more"):
        pools.open_tiny(other)


def test_where_a_copy_may_be(pool: Path, tmp_path: Path) -> None:
    with pools.open_tiny(pool) as store:
        with pytest.raises(UsageError, match="filesystem"):
            copymaker.announce(store, tmp_path / "third")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        with pytest.raises(AlreadyExists):
            copymaker.announce(store, tmp_path / "full", force=True)


def test_the_home_of_images_is_found_by_another_copy(pool: Path, tmp_path: Path) -> None:
    with pools.open_tiny(tmp_path / "other") as store:
        assert store.home == pool
        assert store.pool.images.path(store.catalog.storages[1]).parent == pool / "images"  # type: ignore[index]


def test_the_last_copy_is_never_left(pool: Path) -> None:
    store = pools.open_tiny(pool)
    assert store.copies.leave(2, "a test")
    assert not store.copies.leave(1, "a test")
    assert store.copies.current == [1]
    store.abandon()


def test_a_flush_that_fails_in_one_copy_is_told_before_the_commit_ends(
    pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pools.open_tiny(pool)
    failing(monkeypatch, File, "sync", lambda path: path.parent.name == "other" and "journal" in path.name)
    write(store)
    assert current(pool) == [1]
    store.abandon()


def test_a_fold_that_fails_in_one_copy_is_told_at_once(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = pools.open_tiny(pool)
    write(store)
    failing(monkeypatch, Tables, "write", lambda path: path.parent.name == "other")
    store.checkpoint()
    assert store.copies.is_settled
    assert current(pool) == [1]
    store.abandon()
