"""Clones and holds: short stories over the core."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incfs import clone as clones
from incfs import dump, extents, holds, ranges, removal, restore, rollback
from incfs import snapshot as snapshots
from incfs import volume as volumes
from incfs.builder import MetadataBuilder
from incfs.errors import Busy, FormatError, HoldNotFound
from incfs.model import HOLE, Snapshot, Volume
from incfs.ranges import TrimPending
from incfs.store import Store
from tests.conftest import fast_directory
from tests.support import pools


def origin_with(store: Store, data: bytes, name: str = "a") -> tuple[Volume, Snapshot]:
    """A volume with a snapshot that has the data."""
    volume = pools.new_volume(store, name)
    pools.write(store, volume.map_id, 0, data)
    (taken,) = pools.take_snapshots(store, [(volume.id, "s")])
    return volume, taken


def test_a_clone_reads_its_origin_and_keeps_its_own_writes(pool_home: Path) -> None:
    pool = pools.make_pool(pool_home)
    with pools.open_tiny(pool) as store:
        volume, taken = origin_with(store, b"x" * 1000)
        made = clones.create(store, taken, "c")
        assert store.catalog.volume(made.id).mapped_blocks == 0
        pools.write(store, volume.map_id, 0, b"y" * 500)
        pools.write(store, made.map_id, 100, b"z" * 50)
        pools.discard(store, made.map_id, 640, 704)
        expected = b"x" * 100 + b"z" * 50 + b"x" * 490 + bytes(64) + b"x" * 296
        assert pools.read(store, made.map_id) == expected
        (inner,) = pools.take_snapshots(store, [(made.id, "t")])
        pools.write(store, made.map_id, 0, b"w" * 1000)
        twice = clones.create(store, store.catalog.snapshot(made.id, "t"), "d")
        assert pools.read(store, inner.map_id) == pools.read(store, twice.map_id) == expected
        pools.check_clean(store)
    with pools.open_tiny(pool) as store:
        assert pools.read(store, twice.map_id) == expected
        pools.check_clean(store)


def test_a_clone_that_grows_beyond_its_origin_reads_zeros_there(pool_home: Path) -> None:
    """Behind the end of the origin there is its volume's newer data, or what a shrink has not dropped."""
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume = pools.new_volume(store, "a")
        pools.write(store, volume.map_id, 0, b"x" * 40_000)
        volumes.resize(store, volume.id, 100, shrink=True)
        with pytest.raises(TrimPending):
            snapshots.create(store, [(volume.id, "s")])
        (taken,) = pools.take_snapshots(store, [(volume.id, "s")])
        pools.write(store, volume.map_id, 100, b"y" * 40_000)
        made = clones.create(store, taken, "c")
        pools.resize(store, made.id, 50_000)
        assert pools.read(store, made.map_id) == b"x" * 100 + bytes(49_900)


def test_a_clone_has_the_size_of_its_origin(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume, taken = origin_with(store, b"x" * 10_000)
        pools.resize(store, volume.id, taken.size_bytes + 5000)
        assert clones.create(store, taken, "c").size_bytes == taken.size_bytes


def test_what_a_clone_gave_up_does_not_come_back_when_it_grows(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        _, taken = origin_with(store, b"x" * 70_000)
        made = clones.create(store, taken, "c")
        pools.resize(store, made.id, 10_000)
        pools.resize(store, made.id, 70_000)
        assert pools.read(store, made.map_id) == b"x" * 10_000 + bytes(60_000)
        found = [e for e in extents.extents(store, made.map_id) if e.address > HOLE]
        assert sum(e.length_bytes for e in found) <= 10_000 + 64
        pools.check_clean(store)


def test_an_origin_stays_while_a_clone_needs_it(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume, taken = origin_with(store, b"x" * 1000)
        made = clones.create(store, taken, "c")
        for remove in (
            lambda: pools.remove_snapshot(store, volume.id, "s"),
            lambda: volumes.remove(store, volume.id, snapshots=True),
        ):
            with pytest.raises(Busy, match="origin of c"):
                remove()
        volumes.remove(store, made.id, snapshots=False)
        volumes.remove(store, volume.id, snapshots=True)
        # An unlinked clone may still be open: what it reads is not freed before it is gone.
        assert volumes.reclaim(store, volume.id, 64)
        assert pools.read(store, made.map_id) == b"x" * 1000
        pools.reclaim(store)
        assert store.pool.used_blocks() == 0
        pools.check_clean(store)


def test_a_dump_of_a_clone_needs_its_origin(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        _, taken = origin_with(store, b"x" * 1000)
        made = clones.create(store, taken, "c")
        holds.hold(store, taken.volume_id, "s", "backup", expires_ns=5)
        store.checkpoint()
        lines = [line.encode() for line in dump.dump_lines(store)]
    restore.restore(lines, pool_home / "again")
    with pools.open_tiny(pool_home / "again") as store:
        assert pools.read(store, made.map_id) == b"x" * 1000
        assert store.catalog.snapshot(taken.volume_id, "s").holds == {"backup": 5}
        pools.check_clean(store)
    builder = MetadataBuilder(store.superblock, pool_home / "orphan", {}, store.backing)
    for record in store.catalog.records():
        if not isinstance(record, Snapshot):
            builder.add_record(record)
    with pytest.raises(FormatError, match="clone"):
        builder.finish(last_volume=9)


def test_a_held_snapshot_keeps_the_whole_set(pool_home: Path) -> None:
    """All of them or none: also when the held one comes last."""
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume, first = origin_with(store, b"x")
        (second,) = pools.take_snapshots(store, [(volume.id, "t")])
        holds.hold(store, volume.id, "t", "backup")
        with pytest.raises(Busy, match="held by backup"):
            removal.remove(store, [first, second])
        assert [taken.name for taken in store.catalog.snapshots(volume.id)] == ["s", "t"]


def test_a_held_snapshot_is_not_removed_until_it_is_released_or_the_lease_is_over(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume, _ = origin_with(store, b"x")
        now = store.clock()
        store.clock = lambda: now
        holds.hold(store, volume.id, "s", "backup")
        holds.hold(store, volume.id, "s", "lease", expires_ns=now + 10)
        with pytest.raises(Busy, match="held by backup, lease"):
            pools.remove_snapshot(store, volume.id, "s")
        holds.release(store, volume.id, "s", "backup")
        with pytest.raises(HoldNotFound, match="it has: lease"):
            holds.release(store, volume.id, "s", "backup")
        with pytest.raises(Busy, match="held by lease"):
            volumes.remove(store, volume.id, snapshots=True)
        holds.hold(store, volume.id, "s", "lease", expires_ns=now + 20)
        store.clock = lambda: now + 20
        holds.hold(store, volume.id, "s", "other", expires_ns=now + 21)
        assert list(store.catalog.snapshot(volume.id, "s").holds) == ["other"]
        store.clock = lambda: now + 21
        pools.remove_snapshot(store, volume.id, "s")


def test_trimming_a_clone_goes_on_after_a_crash(pool_home: Path) -> None:
    store = pools.open_tiny(pools.make_pool(pool_home))
    _, taken = origin_with(store, b"x" * 70_000)
    made = clones.create(store, taken, "c")
    volumes.resize(store, made.id, 100, shrink=True)
    ranges.drive(store, lambda wait: ranges.trim(store, made.id, wait=wait))
    store.commit()
    store = pools.crash(store)
    pools.resize(store, made.id, 70_000)
    assert pools.read(store, made.map_id) == b"x" * 100 + bytes(69_900)
    pools.check_clean(store)
    store.close()


def rolled_back(store: Store) -> tuple[Volume, bytes]:
    """A volume of three pages, rolled back over a newer snapshot; nothing is unrolled yet."""
    volume, _ = origin_with(store, b"x" * 80_000)
    pools.write(store, volume.map_id, 0, b"y" * 100_000)
    pools.take_snapshots(store, [(volume.id, "t")])
    pools.write(store, volume.map_id, 30_000, b"z" * 20_000)
    pools.roll_back(store, volume.id, "s", force=True)
    return store.catalog.volume(volume.id), b"x" * 80_000


def test_a_rollback_is_one_change_and_unrolls_later(pool_home: Path) -> None:
    pool = pools.make_pool(pool_home)
    with pools.open_tiny(pool) as store:
        volume, expected = rolled_back(store)
        assert (volume.size_bytes, len(store.catalog.snapshots(volume.id))) == (80_000, 1)
        assert pools.read(store, volume.map_id) == expected
        pools.write(store, volume.map_id, 70_000, b"w" * 20_000)
        expected = expected[:70_000] + b"w" * 20_000
        (taken,) = pools.take_snapshots(store, [(volume.id, "u")])
        pools.write(store, volume.map_id, 0, b"v")
    for _ in range(2):
        with pools.open_tiny(pool) as store:
            assert pools.read(store, taken.map_id) == expected
            assert pools.read(store, volume.map_id) == b"v" + expected[1:]
            assert pools.read(store, store.catalog.snapshot(volume.id, "s").map_id) == b"x" * 80_000
            pools.check_clean(store)
            pools.reclaim(store)
            assert not store.catalog.volume(volume.id).rollback_to
            pools.check_clean(store)


def test_a_crash_in_the_middle_of_unrolling_goes_on(pool_home: Path) -> None:
    store = pools.open_tiny(pools.make_pool(pool_home))
    volume, expected = rolled_back(store)
    store.commit()
    while True:
        store = pools.crash(store)
        pools.check_clean(store)
        assert pools.read(store, volume.map_id) == expected
        if volumes.reclaim(store, volume.id, 1):
            break
        store.commit()
    pools.check_clean(store)
    store.close()


def test_unrolling_goes_back_to_the_oldest_and_to_the_last_page(pool_home: Path) -> None:
    """Page by page in the background: nobody reads or writes meanwhile, which would unroll them, too."""
    store = pools.open_tiny(pools.make_pool(pool_home))
    volume, expected = rolled_back(store)
    while not volumes.reclaim(store, volume.id, 1):
        store.commit()
    store.commit()
    store = pools.crash(store)
    assert not store.catalog.volume(volume.id).rollback_to
    assert pools.read(store, volume.map_id) == expected
    pools.check_clean(store)
    store.close()


def test_rolling_back_twice_before_anything_is_unrolled(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume, expected = rolled_back(store)
        pools.write(store, volume.map_id, 0, b"a" * 1000)
        pools.take_snapshots(store, [(volume.id, "u")])
        pools.write(store, volume.map_id, 0, b"b" * 60_000)
        pools.roll_back(store, volume.id, "u")
        assert pools.read(store, volume.map_id) == b"a" * 1000 + expected[1000:]
        pools.roll_back(store, volume.id, "s", force=True)
        pools.roll_back(store, volume.id, "s")
        assert pools.read(store, volume.map_id) == expected
        pools.reclaim(store)
        assert pools.read(store, volume.map_id) == expected
        assert store.pool.used_blocks() == 80_000 // 64
        pools.check_clean(store)


def test_a_rollback_names_what_stands_in_its_way(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume, _ = origin_with(store, b"x" * 100)
        (newer,) = pools.take_snapshots(store, [(volume.id, "t")])
        with pytest.raises(Busy, match=r"newer than s \(t\)"):
            pools.roll_back(store, volume.id, "s")
        clones.create(store, newer, "c")
        with pytest.raises(Busy, match="origin of c"):
            pools.roll_back(store, volume.id, "s", force=True)
        pools.roll_back(store, volume.id, "t")


def test_what_a_rollback_says_it_frees_is_what_it_frees(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume, taken = origin_with(store, b"x" * 80_000)
        pools.write(store, volume.map_id, 0, b"y" * 100_000)
        pools.take_snapshots(store, [(volume.id, "t")])
        pools.write(store, volume.map_id, 30_000, b"z" * 20_000)
        promised, used = sum(rollback.freed_blocks(store, taken)), store.pool.used_blocks()
        pools.roll_back(store, volume.id, "s", force=True)
        pools.reclaim(store)
        assert used - store.pool.used_blocks() == promised > 0


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_a_removal_says_it_frees_is_what_it_frees(data: st.DataObject) -> None:
    """Random histories; some snapshots were removed before and are not reclaimed, a rollback may not be unrolled."""
    random = data.draw(st.randoms(use_true_random=False))
    with TemporaryDirectory(dir=fast_directory()) as home:
        store = pools.open_tiny(pools.make_pool(Path(home)))
        volume = pools.new_volume(store, "a")
        for step in range(random.randrange(2, 9)):
            for _ in range(random.randrange(4)):
                pools.write(store, volume.map_id, random.randrange(40_000), b"x" * random.randrange(1, 2000))
            pools.take_snapshots(store, [(volume.id, f"s{step}")])
        pools.write(store, volume.map_id, random.randrange(40_000), b"y" * 3000)
        if random.random() < 0.3:
            pools.roll_back(store, volume.id, random.choice(store.catalog.snapshots(volume.id)).name, force=True)
        taken = store.catalog.snapshots(volume.id)
        removal.remove(store, earlier := random.sample(taken, random.randrange(len(taken))))
        doomed = [s for s in taken if s not in earlier and random.random() < 0.6]
        promised = removal.Freed()
        for promised in removal.plan(store, volume.id, {s.generation for s in doomed}):  # noqa: B007
            pass
        store.commit()
        store.abandon()
        used: list[int] = []
        for case in ([], doomed, *([one] for one in doomed)):
            copied = Path(home) / f"copy{len(used)}"
            shutil.copytree(store.directory, copied)
            with pools.open_tiny(copied) as other:
                removal.remove(other, [other.catalog.snapshot(volume.id, s.name) for s in case])
                pools.reclaim(other)
                used.append(other.pool.used_blocks())
                pools.check_clean(other)
        assert promised.together == used[0] - used[1]
        assert [promised.alone.get(s.generation, 0) for s in doomed] == [used[0] - alone for alone in used[2:]]


def test_a_diff_lists_more_pages_than_one_step(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "_LISTED_PAGES", 2)
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume, first = origin_with(store, b"")
        for page in (0, 1, 4, 5, 6):
            pools.write(store, volume.map_id, page * 32_768, b"x")
        pools.take_snapshots(store, [(volume.id, "t")])
        for page in (2, 5, 9):
            pools.write(store, volume.map_id, page * 32_768, b"y")
        (last,) = pools.take_snapshots(store, [(volume.id, "u")])
        assert list(snapshots.changed_pages(store, first, last)) == [0, 1, 2, 4, 5, 6, 9]
        assert list(snapshots.changed_pages(store, first, last, 5)) == [5, 6, 9]
        assert list(snapshots.changed_pages(store, None, last)) == [0, 1, 2, 4, 5, 6, 9]


def test_a_flattened_clone_needs_its_origin_no_more(pool_home: Path) -> None:
    pool = pools.make_pool(pool_home)
    with pools.open_tiny(pool) as store:
        volume, taken = origin_with(store, b"x" * 70_000)
        made = clones.create(store, taken, "c")
        pools.write(store, made.map_id, 100, b"z" * 50)
        pools.discard(store, made.map_id, 640, 1280)
        expected = pools.read(store, made.map_id)
        pools.flatten(store, made.id)
        assert not store.catalog.volume(made.id).origin
        pools.remove_snapshot(store, volume.id, "s")
        volumes.remove(store, volume.id, snapshots=False)
        pools.reclaim(store)
        pools.check_clean(store)
    with pools.open_tiny(pool) as store:
        assert pools.read(store, made.map_id) == expected
        assert len(store.catalog.volumes) == 1


def test_the_origin_stays_for_snapshots_that_were_taken_before_the_clone_was_flat(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume, taken = origin_with(store, b"x" * 40_000)
        made = clones.create(store, taken, "c")
        (before,) = pools.take_snapshots(store, [(made.id, "before")])
        pools.write(store, made.map_id, 0, b"y" * 100)
        pools.flatten(store, made.id)
        assert store.catalog.volume(made.id).origin
        (after,) = pools.take_snapshots(store, [(made.id, "after")])
        pools.discard(store, made.map_id, 0, 40_000)
        with pytest.raises(Busy, match="origin of c"):
            pools.remove_snapshot(store, volume.id, "s")
        pools.remove_snapshot(store, made.id, "before")
        pools.reclaim(store)
        assert not store.catalog.volume(made.id).origin
        assert pools.read(store, after.map_id) == b"y" * 100 + b"x" * 39_900
        pools.remove_snapshot(store, volume.id, "s")
        assert before.generation < after.generation


def test_going_back_to_before_a_clone_was_flat_inherits_again(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        _, taken = origin_with(store, b"x" * 40_000)
        made = clones.create(store, taken, "c")
        pools.take_snapshots(store, [(made.id, "before")])
        pools.flatten(store, made.id)
        pools.roll_back(store, made.id, "before")
        pools.remove_snapshot(store, made.id, "before")
        pools.reclaim(store)
        assert store.catalog.volume(made.id).origin
        assert pools.read(store, made.map_id) == b"x" * 40_000
        pools.flatten(store, made.id)
        pools.reclaim(store)
        assert not store.catalog.volume(made.id).origin
        pools.check_clean(store)


def test_a_shrunk_clone_covers_only_what_it_inherited(pool_home: Path) -> None:
    """The whole map page became holes: a diff then listed blocks that nobody had written."""
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        _, taken = origin_with(store, b"x" * 64)
        made = clones.create(store, taken, "c")
        (before,) = pools.take_snapshots(store, [(made.id, "before")])
        pools.resize(store, made.id, 0)
        pools.write(store, made.map_id, 64 * 64, b"y")
        (after,) = pools.take_snapshots(store, [(made.id, "after")])
        found = [(extent.offset_bytes, extent.length_bytes) for extent in pools.diff(store, before, after)]
        assert found == [(0, 64), (64 * 64, 1)]
        assert pools.read(store, made.map_id) == bytes(64 * 64) + b"y"
        pools.check_clean(store)


def test_a_flattened_clone_is_resident_as_a_volume_of_its_own(pool_home: Path) -> None:
    """Its pages kept the holes that they had from the origin, which the log has no more."""
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        _, taken = origin_with(store, b"x" * 192)
        branch = clones.create(store, taken, "b")
        pools.discard(store, branch.map_id, 0, 64)
        (inner,) = pools.take_snapshots(store, [(branch.id, "t")])
        made = clones.create(store, inner, "c")
        expected = pools.read(store, made.map_id)
        pools.flatten(store, made.id)
        assert not store.catalog.volume(made.id).origin
        pools.check_memory(store)
        assert pools.read(store, made.map_id) == expected == bytes(64) + b"x" * 128
        pools.check_memory(store)
        pools.check_clean(store)
