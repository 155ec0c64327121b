"""The power is cut while a pool is created: there is a pool, or one can be created in its place."""

import shutil
from pathlib import Path
from random import Random

import pytest

from incfs.backing import Backing
from incfs.errors import AlreadyExists, NotAPool
from incfs.recovery import open_store
from incfs.superblock import ANNOUNCED_NAME, SUPERBLOCK_NAME
from tests.support import pools
from tests.support.figures import FIGURES
from tests.support.likeness import digest_of
from tests.support.media import Event, Media, MemoryBacking, seeded_randomness
from tests.support.power import Machine

pytestmark = pytest.mark.timeout(600)
LIMIT = 24


@pytest.mark.parametrize("storages", [1, 2])
def test_a_creation_that_was_cut_off_leaves_a_pool_or_can_be_repeated(pool_home: Path, storages: int) -> None:
    with seeded_randomness(0):
        backing = MemoryBacking(pool_home / "real")
        with backing.recording_tables():
            pools.make_pool(backing.root, storages=storages, backing=backing)
    judge = Creations(pool_home / "cut", storages)
    judge.cut_everywhere({}, backing.events, LIMIT)
    assert 0 < judge.finished < len(judge.half_made)
    for media in Random(1).sample(judge.half_made, 5):
        judge.cut_everywhere(media, judge.create_again(media), 4)


class Creations:
    """Judges what creations leave that were cut off."""

    def __init__(self, home: Path, storages: int) -> None:
        self.half_made: list[Media] = []
        self.finished = 0
        self._judged: set[bytes] = set()
        self._home = home
        self._storages = storages

    def cut_everywhere(self, media: Media, events: list[Event], limit: int) -> None:
        machine = Machine(media)
        for number, event in enumerate(events):
            machine.play(event)
            for found in machine.cuts(limit, Random(number)):
                self._judge(found)

    def _judge(self, media: Media) -> None:
        digest = digest_of(media)
        if digest in self._judged:
            return
        self._judged.add(digest)
        FIGURES.count_once("states of a creation", digest)
        try:
            self._open(media)
            self.finished += 1
        except NotAPool:
            self.half_made.append(media)
            self.create_again(media)

    def _open(self, media: Media) -> None:
        backing = self._machine(media)
        open_store(backing.root / "pool", backing=backing).close()

    def create_again(self, media: Media) -> list[Event]:
        """Create a pool over what is there, and open it; give what that did."""
        backing = self._machine(media)
        with backing.recording_tables():
            pools.make_pool(backing.root, storages=self._storages, backing=backing)
        events = list(backing.events)
        open_store(backing.root / "pool", backing=backing).close()
        return events

    def _machine(self, media: Media) -> MemoryBacking:
        shutil.rmtree(self._home, ignore_errors=True)
        backing = MemoryBacking(self._home)
        backing.load(media)
        (self._home / "pool").mkdir(parents=True, exist_ok=True)
        return backing


def test_what_is_not_left_by_a_creation_is_never_removed(tmp_path: Path) -> None:
    """A pool whose superblock was lost is no half-made pool: its data can still be saved."""
    pool = pools.make_pool(tmp_path)
    (pool / SUPERBLOCK_NAME).rename(tmp_path / "lost")
    before = {path: path.read_bytes() for path in pool.rglob("*") if path.is_file()}
    with pytest.raises(AlreadyExists):
        pools.make_pool(tmp_path)
    assert {path: path.read_bytes() for path in pool.rglob("*") if path.is_file()} == before


def test_a_strange_file_beside_a_half_made_pool_is_kept(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    Backing().create(tmp_path / "pool" / ANNOUNCED_NAME).close()
    (tmp_path / "pool" / "letter").write_text("dear")
    with pytest.raises(AlreadyExists):
        pools.make_pool(tmp_path)
    assert (tmp_path / "pool" / "letter").read_text() == "dear"
