"""The power is cut at every write and sync of a pool with its metadata in two directories, and one of them is lost."""

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from incfs import copymaker
from incfs.model import MapId
from incfs.roster import ROSTER_NAME, decode_roster
from incfs.store import Store
from tests.crash.test_power_cut import pattern
from tests.support import pools
from tests.support.figures import FIGURES
from tests.support.media import Media
from tests.support.recorder import Cut, Recorder, make_media
from tests.support.simulator import Simulator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LONG = os.environ.get("INCFS_TEST_PROFILE") == "long"
LIMIT = 512 if LONG else 10
"""States of one cut."""
COPIES = ("pool", "other")


def add_copy(store: Store) -> None:
    number = copymaker.announce(store, store.directory.with_name("other"), force=True)
    copymaker.bring_back(store, number)


def work(recorder: Recorder) -> None:
    store = recorder.store
    volume = pools.new_volume(store, "a", 5000)
    pools.write(store, volume.map_id, 100, pattern(1, 700))
    store.commit()
    pools.write(store, volume.map_id, 130, pattern(2, 300))
    pools.take_snapshots(store, [(volume.id, "s")])

    def between() -> None:
        pools.write(store, volume.map_id, 64, pattern(len(recorder.points), 640))
        store.commit()

    recorder.checkpoint(between)
    pools.discard(store, volume.map_id, 0, 32_768)
    pools.remove_snapshot(store, volume.id, "s")
    store.commit()
    pools.reclaim(store)
    store.checkpoint()
    pools.write(store, volume.map_id, 0, pattern(9, 2000))
    store.commit()


def without(media: Media, lost: str) -> Media:
    """Take a copy's directory away; images have disks of their own."""
    return {name: data for name, data in media.items() if not name.startswith(f"{lost}/") or name.endswith(".img")}


class Judges:
    """Opens each state by either copy, with both there and with only that one."""

    def __init__(self, root: Path, recorder: Recorder) -> None:
        self._judges = {
            (named, lost): Simulator(root, recorder.options, named)
            for named in COPIES
            for lost in (None, *COPIES)
            if lost != named
        }

    def judge(self, cut: Cut, media: Media, lost: str | None, named: str) -> None:
        outcome = self._judges[named, lost].judge(without(media, lost) if lost is not None else media)
        where = f"event {cut.number} ({cut.event.kind} {cut.event.name}), opened by {named}, without {lost}"
        assert not outcome.problem, f"{where}: {outcome.problem}"
        assert outcome.found in cut.allowed, f"{where}: no allowed commit point"

    def is_refused(self, cut: Cut, media: Media, lost: str, named: str) -> bool:
        """Whether a state is refused for being older than the images; what is opened must be right."""
        outcome = self._judges[named, lost].judge(without(media, lost))
        if outcome.problem.startswith(("EpochMismatch", "MetadataStale")):
            return True
        self.judge(cut, media, lost, named)
        return False

    def judge_all(self, cut: Cut, media: Media) -> None:
        for named, lost in self._judges:
            self.judge(cut, media, lost, named)
            FIGURES["states of metadata copies"] += 1


def states(recorder: Recorder) -> Iterator[tuple[Cut, Media]]:
    for cut in recorder.cuts():
        for media in cut.machine.cuts(LIMIT, Random(cut.number)):
            yield cut, media


@pytest.mark.parametrize("small_commit_bytes", [0, 65536], ids=["flush-images", "data-in-record"])
def test_either_copy_alone_gives_a_commit_point_after_every_cut(pool_home: Path, small_commit_bytes: int) -> None:
    options = pools.tiny_options(small_commit_bytes=small_commit_bytes)
    root = pool_home / "real"
    with Recorder(root, make_media(root, add_copy), options) as recorder:
        work(recorder)
    judges = Judges(root, recorder)
    for cut, media in states(recorder):
        judges.judge_all(cut, media)


def work_with_failure(recorder: Recorder) -> None:
    """The second copy fails, lacks a checkpoint and more, and comes back while there are commits."""
    store = recorder.store
    volume = pools.new_volume(store, "a", 5000)
    write(store, volume.map_id, 100, 700)
    assert store.copies.leave(2, "a test")
    write(store, volume.map_id, 130, 300)
    recorder.checkpoint(lambda: write(store, volume.map_id, 64, 640))
    write(store, volume.map_id, 700, 300)
    begun = copymaker.begin(store, 2)
    write(store, volume.map_id, 900, 200)
    copymaker.finish(store, begun)
    write(store, volume.map_id, 1000, 100)
    store.checkpoint()
    write(store, volume.map_id, 1100, 100)


def write(store: Store, table: MapId, offset: int, length: int) -> None:
    pools.write(store, table, offset, pattern(offset, length))
    store.commit()


def says_up_to_date(media: Media) -> bool:
    """Whether the first copy says that the second is up to date."""
    roster, _ = decode_roster(media[f"pool/{ROSTER_NAME}"], Path(ROSTER_NAME))
    return 2 in roster.current


def test_every_cut_while_a_copy_is_left_behind_and_comes_back(pool_home: Path) -> None:
    """Alone, the copy that was left behind gives a commit point that nobody heard the end of, or is refused."""
    options, root = pools.tiny_options(), pool_home / "real"
    with Recorder(root, make_media(root, add_copy), options) as recorder:
        work_with_failure(recorder)
    judges, refused = Judges(root, recorder), 0
    for cut, media in states(recorder):
        judges.judge(cut, media, None, "pool")
        judges.judge(cut, media, None, "other")
        judges.judge(cut, media, "other", "pool")
        if says_up_to_date(media):
            judges.judge(cut, media, "pool", "other")
        else:
            refused += judges.is_refused(cut, media, "pool", "other")
    assert refused > 10
