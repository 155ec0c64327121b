"""Bookmarks: increments start from them when their snapshots are gone, and have exactly what was written."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incfs import bookmarks, dump, removal
from incfs import volume as volumes
from incfs.errors import AlreadyExists, BookmarkNotFound, Busy, FormatError, InvalidName, LimitExceeded, UsageError
from incfs.model import PAGE_BLOCKS, Volume
from incfs.overlay import TableKey
from incfs.restore import open_dump, restore
from incfs.sender import plan_send
from incfs.store import Store
from incfs.stream.reader import Position
from tests.support import pools
from tests.support.pools import BLOCK, check_clean, crash, make_pool, new_volume, open_tiny, read, reclaim, write
from tests.support.transfers import contents, receive, resume, send

SPAN = 30 * BLOCK
FAR = PAGE_BLOCKS * BLOCK
"""Where the second map page begins."""


@pytest.fixture
def store(tmp_path):
    opened = [open_tiny(make_pool(tmp_path / "pool"))]
    yield opened[0]
    opened[0].abandon()


def bookmark(store, volume, snapshot_name, name):
    return bookmarks.create(store, store.catalog.snapshot(volume.id, snapshot_name), name)


def take(store, volume, name):
    (taken,) = pools.take_snapshots(store, [(volume.id, name)])
    return taken


def drop(store, volume, name):
    pools.remove_snapshot(store, volume.id, name)
    reclaim(store)


def changed(store, volume, base, name):
    """Give the blocks that changed between two points."""
    newer = store.catalog.snapshot(volume.id, name)
    found: set[int] = set()
    for extent in pools.diff(store, store.catalog.base(volume.id, base), newer):
        found.update(range(extent.offset_bytes // BLOCK, -(-(extent.offset_bytes + extent.length_bytes) // BLOCK)))
    return found


@dataclass
class History:
    """A volume, and what was written when: the model that bookmarks are held against."""

    here: Store
    volume: Volume
    points: dict[str, int] = field(default_factory=dict)
    """Bookmark -> generation."""
    written: dict[int, set[int]] = field(default_factory=dict)
    """Generation -> blocks written since."""
    cleared: dict[int, set[int]] = field(default_factory=dict)
    """The same of blocks that were discarded: those that were zeros are not written."""
    names: Iterator[int] = field(default_factory=itertools.count)

    @property
    def generation(self):
        return self.here.catalog.volume(self.volume.id).last_generation

    def write(self, offset, length):
        """Write what was never there."""
        data = bytes([next(self.names) % 255 + 1]) * length
        write(self.here, self.volume.map_id, offset, data)
        blocks = range(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
        self.written.setdefault(self.generation, set()).update(blocks)

    def discard(self, offset, length):
        size = self.here.catalog.volume(self.volume.id).size_bytes
        end = min(offset + length, size)
        if end > offset:
            pools.discard(self.here, self.volume.map_id, offset, offset + length)
            blocks = range(offset // BLOCK, (end - 1) // BLOCK + 1)
            self.cleared.setdefault(self.generation, set()).update(blocks)

    def take(self, *, is_marked):
        name = f"s{next(self.names)}"
        taken = take(self.here, self.volume, name)
        if is_marked:
            bookmarks.create(self.here, taken, f"b-{name}")
            self.points[f"b-{name}"] = taken.generation

    def roll_back(self, target):
        pools.roll_back(self.here, self.volume.id, target.name, force=True)
        self.points = {name: g for name, g in self.points.items() if g <= target.generation}
        for sets in (self.written, self.cleared):
            for generation in [g for g in sets if g >= target.generation]:
                del sets[generation]

    def prove(self):
        """From each bookmark to each newer snapshot: all that differs, and nothing that was not written."""
        for name, generation in self.points.items():
            for taken in self.here.catalog.snapshots(self.volume.id):
                if taken.generation <= generation:
                    continue
                written, cleared = (
                    set().union(*(blocks for g, blocks in sets.items() if generation <= g < taken.generation))
                    for sets in (self.written, self.cleared)
                )
                found = changed(self.here, self.volume, f"#{name}", taken.name)
                assert written <= found <= written | cleared, (name, taken.name)


writes = st.tuples(st.just("write"), st.sampled_from([0, FAR - 640]), st.integers(0, SPAN), st.integers(1, 3 * BLOCK))
steps = st.one_of(
    writes,
    writes,
    st.tuples(st.just("discard"), st.integers(0, SPAN), st.integers(1, 9 * BLOCK)),
    st.tuples(st.just("snapshot"), st.booleans()),
    st.tuples(st.just("snapshot"), st.just(True)),
    st.tuples(st.just("remove"), st.integers(0, 9)),
    st.tuples(st.just("remove"), st.just(None)),
    st.tuples(st.just("forget"), st.integers(0, 9)),
    st.tuples(st.just("reclaim"), st.integers(1, 3)),
    st.tuples(st.just("reclaim"), st.just(99)),
    st.tuples(st.just("roll back"), st.integers(0, 9)),
    st.tuples(st.just("crash")),
)
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def play(history, step):
    here, volume = history.here, history.volume
    snapshots = here.catalog.snapshots(volume.id)
    match step:
        case ("write", base, offset, length):
            history.write(base + offset, length)
        case ("discard", offset, length):
            history.discard(offset, length)
        case ("snapshot", is_marked):
            history.take(is_marked=is_marked)
        case ("remove", which) if snapshots:
            removal.remove(here, snapshots if which is None else [snapshots[which % len(snapshots)]])
        case ("forget", which) if history.points:
            name = sorted(history.points)[which % len(history.points)]
            bookmarks.remove(here, volume.id, name)
            del history.points[name]
        case ("reclaim", count):
            for _ in range(count):
                volumes.reclaim(here, volume.id, 1)
        case ("roll back", which) if snapshots:
            history.roll_back(snapshots[which % len(snapshots)])
        case ("crash",):
            here.commit()
            history.here = crash(here)


@given(story=st.lists(steps, min_size=15, max_size=40))
@quick
def test_a_bookmark_has_exactly_what_was_written_since(tmp_path_factory, story):
    """Whatever is removed in whichever order, rolled back, or cut off between."""
    here = open_tiny(make_pool(tmp_path_factory.mktemp("pool")))
    volume = new_volume(here, "vol")
    history = History(here, volume)
    try:
        for step in story:
            play(history, step)
            history.prove()
        pools.run_check(history.here)
        check_clean(history.here)
        take(history.here, volume, "last")
        history.prove()
        for name in list(history.points):
            bookmarks.remove(history.here, volume.id, name)
        reclaim(history.here)
        assert not history.here.catalog.bookmarks(volume.id, removed=True)
        history.here.checkpoint()
        with history.here.tables.reading() as reader:
            assert not [table for table, _, _ in reader.all_pages() if table.is_trail], "nothing is left of a trail"
        check_clean(history.here)
    finally:
        history.here.abandon()


def test_rules_of_names(store):
    volume = new_volume(store, "vol", 3000)
    first, second = take(store, volume, "a"), take(store, volume, "b")
    made = bookmark(store, volume, "a", "m")
    assert bookmark(store, volume, "a", "n").names.keys() == {"m", "n"}
    for name, error in (("m", AlreadyExists), ("n", AlreadyExists), ("x@y", InvalidName), ("", InvalidName)):
        with pytest.raises(error):
            bookmarks.create(store, second, name)
    assert store.catalog.base(volume.id, "#m").uuid == first.uuid == made.uuid
    assert store.catalog.base(volume.id, f"uuid:{first.uuid}") == first
    drop(store, volume, "a")
    assert store.catalog.base(volume.id, f"uuid:{first.uuid}") == store.catalog.bookmark(volume.id, "n")
    bookmarks.remove(store, volume.id, "m")
    for name in ("m", f"uuid:{first.uuid}"):
        with pytest.raises(BookmarkNotFound):
            bookmarks.remove(store, volume.id, name)
    bookmarks.remove(store, volume.id, "n")
    with pytest.raises(BookmarkNotFound):
        store.catalog.base(volume.id, "#n")
    check_clean(store)


def test_a_snapshot_has_so_many_bookmarks_at_the_most(store):
    volume = new_volume(store, "vol", 640)
    taken = take(store, volume, "a")
    for number in range(bookmarks.MAX_NAMES):
        bookmarks.create(store, taken, f"m{number}")
    with pytest.raises(LimitExceeded):
        bookmarks.create(store, taken, "more")


def test_a_bookmark_keeps_no_block_of_a_removed_snapshot(store):
    volume = new_volume(store, "vol")
    write(store, volume.map_id, 0, b"a" * SPAN)
    take(store, volume, "s")
    bookmark(store, volume, "s", "m")
    write(store, volume.map_id, 0, b"b" * SPAN)
    store.checkpoint()
    used = store.pool.used_blocks()
    drop(store, volume, "s")
    store.checkpoint()
    assert used - store.pool.used_blocks() == SPAN // BLOCK
    take(store, volume, "t")
    assert changed(store, volume, "#m", "t") == set(range(SPAN // BLOCK))


def test_a_rollback_takes_newer_bookmarks_if_it_is_told_to(store):
    volume = new_volume(store, "vol", 640)
    for name in ("a", "b"):
        write(store, volume.map_id, 0, name.encode() * 100)
        take(store, volume, name)
        bookmark(store, volume, name, f"m-{name}")
    drop(store, volume, "b")
    with pytest.raises(Busy, match="#m-b"):
        pools.roll_back(store, volume.id, "a")
    pools.roll_back(store, volume.id, "a", force=True)
    assert [known.names.keys() for known in store.catalog.bookmarks(volume.id)] == [{"m-a"}]
    reclaim(store)
    check_clean(store)


def test_a_removed_volume_takes_its_bookmarks_along(store):
    volume = new_volume(store, "vol", 640)
    take(store, volume, "a")
    bookmark(store, volume, "a", "m")
    drop(store, volume, "a")
    write(store, volume.map_id, 0, b"x" * 300)
    volumes.remove(store, volume.id, snapshots=False)
    reclaim(store)
    assert list(store.catalog.records()) == list(store.catalog.storages.values())
    check_clean(store)


def test_a_damaged_page_of_a_trail_counts_as_changed_and_harms_nothing(store, monkeypatch):
    volume = new_volume(store, "vol", SPAN)
    take(store, volume, "a")
    bookmark(store, volume, "a", "m")
    drop(store, volume, "a")
    write(store, volume.map_id, 0, b"x")
    store.absorb()
    trail = TableKey(volume.id, 1, is_trail=True)
    real = store.log.entries

    def entries(table, page_index):
        if table == trail:
            raise FormatError("damaged")
        return real(table, page_index)

    monkeypatch.setattr(store.log, "entries", entries)
    write(store, volume.map_id, 640, b"x")
    take(store, volume, "b")
    assert changed(store, volume, "#m", "b") == set(range(SPAN // BLOCK))
    store.checkpoint()


def test_a_stream_from_a_bookmark_brings_a_replica_up_to_date(tmp_path):
    here, there = (open_tiny(make_pool(tmp_path / name)) for name in ("here", "there"))
    volume = new_volume(here, "vol")
    write(here, volume.map_id, 0, b"a" * SPAN)
    taken = take(here, volume, "a")
    receive(there, send(here, plan_send(here, [(volume, taken)])))
    bookmark(here, volume, "a", "m")
    for number in range(3):
        write(here, volume.map_id, number * 640, bytes([number + 1]) * 500)
        take(here, volume, f"b{number}")
        drop(here, volume, "a" if not number else f"b{number - 1}")
    wanted = [(volume, here.catalog.snapshot(volume.id, "b2"))]
    for base in ("#m", f"uuid:{taken.uuid}"):
        stream = send(here, plan_send(here, wanted, base=base))
    with pytest.raises(UsageError, match="not older"):
        plan_send(here, wanted, base="b2")
    position = Position(plan_send(here, wanted, base="#m").position.begin)
    assert resume(here, position) == stream, "a token knows the base by its UUID"
    receive(there, stream)
    copy = there.catalog.volume_named("vol")
    assert contents(there, "vol").items() >= contents(here, "vol").items()
    assert read(there, copy.map_id) == read(here, volume.map_id)
    for opened in (here, there):
        check_clean(opened)
        opened.abandon()


def test_bookmarks_are_in_a_dump_and_come_back_from_it(tmp_path):
    store = open_tiny(make_pool(tmp_path / "pool"))
    volume = new_volume(store, "vol", 3000)
    take(store, volume, "a")
    bookmark(store, volume, "a", "m")
    drop(store, volume, "a")
    write(store, volume.map_id, 700, b"x" * 200)
    store.checkpoint()
    dump.write_dump(store, tmp_path / "dump")
    store.close()
    with open_dump(tmp_path / "dump") as lines:
        restore(lines, tmp_path / "again")
    again = open_tiny(tmp_path / "again")
    take(again, volume, "b")
    assert changed(again, volume, "#m", "b") == set(range(700 // BLOCK, 899 // BLOCK + 1))
    check_clean(again)
    again.abandon()


def test_a_trail_that_its_increments_contradict_is_damage(store):
    volume = new_volume(store, "vol", 3000)
    take(store, volume, "a")
    take(store, volume, "b")
    bookmark(store, volume, "b", "m")
    drop(store, volume, "b")
    store.log.note(TableKey(volume.id, 2, is_trail=True), 0, [3])
    store.checkpoint()
    report = pools.run_check(store)
    assert [problem.message for problem in report.problems] == ["increment 1 lacks blocks of the trail"]


def test_a_trail_survives_a_crash(tmp_path):
    """What a removed snapshot's increment knew, and what was written afterwards, is in the journal alone."""
    store = open_tiny(make_pool(tmp_path / "pool"))
    volume = new_volume(store, "vol", SPAN)
    take(store, volume, "a")
    bookmark(store, volume, "a", "m")
    write(store, volume.map_id, 0, b"x")
    drop(store, volume, "a")
    store.commit()
    store = crash(store)
    write(store, volume.map_id, 640, b"x")
    store.commit()
    store = crash(store)
    take(store, volume, "b")
    assert changed(store, volume, "#m", "b") == {0, 10}
    check_clean(store)
    store.abandon()


def test_an_older_bookmark_takes_over_what_a_removed_one_knew(store):
    volume = new_volume(store, "vol", SPAN)
    for number, name in enumerate("ab"):
        take(store, volume, name)
        bookmark(store, volume, name, f"m-{name}")
        write(store, volume.map_id, number * 640, b"x")
    drop(store, volume, "a")
    drop(store, volume, "b")
    bookmarks.remove(store, volume.id, "m-b")
    take(store, volume, "c")
    assert changed(store, volume, "#m-a", "c") == {0, 10}, "before it is carried out"
    reclaim(store)
    assert changed(store, volume, "#m-a", "c") == {0, 10}
    assert len(store.catalog.bookmarks(volume.id, removed=True)) == 1
    check_clean(store)
