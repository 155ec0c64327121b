"""Parts of a pool that are of different times: opened with exactly what the directory has, or refused (I14)."""

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incfs import legs, relocation
from incfs.errors import BackingError, ChecksumMismatch, EpochMismatch, ImageMismatch
from incfs.model import StorageId
from incfs.store import Store
from tests.crash.test_mirror_cut import MIRROR, add_mirror
from tests.support import pools
from tests.support.figures import FIGURES
from tests.support.media import Media, MemoryBacking
from tests.support.recorder import Recorder, make_media
from tests.support.simulator import Simulator

pytestmark = pytest.mark.timeout(600)
LONG = os.environ.get("INCFS_TEST_PROFILE") == "long"
OPTIONS = pools.tiny_options(small_commit_bytes=300)
SIZE = 6400
PARTS = ("directory", "image", "leg0", "leg1")


def part_of(name: str) -> str:
    """Tell which part of the pool a file belongs to."""
    for leg in ("leg0", "leg1"):
        if name.endswith(f"{leg}.img"):
            return leg
    return "image" if name.endswith(".img") else "directory"


@dataclass
class Moment:
    """The pool's files at some time, and what the directory must bring back from them."""

    media: Media
    content: bytes
    interval: int
    """Rises whenever parts are stamped."""
    number: int


class Story:
    """A pool's life: two storage volumes, one of them a mirror, and copies of all files at every moment."""

    def __init__(self, home: Path, seed: int) -> None:
        self.backing = MemoryBacking(home)
        self.random = Random(seed)
        self.moments: list[Moment] = []
        pools.make_pool(home, backing=self.backing)
        self.store = self._open()
        add_mirror(self.store)
        with self.store.step():
            self.store.amend(self.store.catalog.storage(StorageId(1)), is_evacuating=False)
        self.volume = pools.new_volume(self.store, "a", SIZE)
        self.content = bytearray(SIZE)
        self.interval = 0
        self.checkpoint()

    def _open(self) -> Store:
        return pools.open_tiny(self.backing.root / "pool", OPTIONS, self.backing)

    def note(self, *, stamped: bool) -> None:
        self.interval += stamped
        self.moments.append(Moment(self.backing.media(), bytes(self.content), self.interval, len(self.moments)))

    def write(self) -> None:
        """Write somewhere, and commit."""
        length = self.random.choice([64, 200, 2000])
        offset = self.random.randrange(SIZE - length)
        data = self.random.randbytes(length)
        pools.write(self.store, self.volume.map_id, offset, data)
        self.content[offset : offset + length] = data
        self.store.commit()
        self.note(stamped=False)

    def checkpoint(self) -> None:
        self.store.checkpoint()
        pools.give_back(self.store)
        self.note(stamped=True)

    def reopen(self) -> None:
        self.store.close()
        self.note(stamped=True)
        self.store = self._open()
        self.note(stamped=True)

    def crash(self) -> None:
        self.store.abandon()
        self.store = self._open()
        self.note(stamped=True)


steps = st.lists(st.sampled_from(["write", "write", "write", "checkpoint", "reopen", "crash"]), min_size=3, max_size=9)
mixes = st.lists(st.tuples(*[st.integers(0, 99)] * len(PARTS)), min_size=4, max_size=8)


@settings(
    max_examples=1000 if LONG else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 1 << 16), actions=steps, chosen=mixes)
def test_parts_of_different_times_are_refused_or_stale_and_never_wrong(
    pool_home: Path, seed: int, actions: list[str], chosen: list[tuple[int, ...]]
) -> None:
    with TemporaryDirectory(dir=pool_home) as home:
        story = Story(Path(home) / "real", seed)
        for action in actions:
            getattr(story, action)()
        story.store.abandon()
        for numbers in chosen:
            taken = {part: story.moments[n % len(story.moments)] for part, n in zip(PARTS, numbers, strict=True)}
            judge(Path(home) / "mixed", taken)


def judge(home: Path, taken: dict[str, Moment]) -> None:
    """Open a pool of parts of these moments: what must become of it follows from when they were taken."""
    FIGURES["mixtures of parts of different times"] += 1
    directory = taken["directory"]
    ages = {part: moment.interval - directory.interval for part, moment in taken.items()}
    legs_that_fit = [leg for leg in ("leg0", "leg1") if not ages[leg]]
    must_refuse = ages["image"] or max(ages.values()) > 0 or not legs_that_fit
    backing = MemoryBacking(home)
    backing.load({n: data for part, moment in taken.items() for n, data in moment.media.items() if part_of(n) == part})
    before = backing.media()
    try:
        store = pools.open_tiny(home / "pool", OPTIONS, backing)
    except (EpochMismatch, ImageMismatch):
        FIGURES["of them refused"] += 1
        assert is_ahead(taken) or must_refuse
        assert backing.media() == before, "it was refused after something was written"
        return
    assert not must_refuse, "parts of different times were taken for ones that belong together"
    sound = {f"leg{number}" for number, _ in legs.mirror_of(store, MIRROR).sound_legs()}
    assert sound == set(legs_that_fit)
    examine(store, taken, directory, sound)
    store.abandon()


def is_ahead(taken: dict[str, Moment]) -> bool:
    """Whether an image is newer than the directory in a way that is not marked: it has grown since, for instance."""
    return any(moment.number != taken["directory"].number for moment in taken.values())


def examine(store: Store, taken: dict[str, Moment], directory: Moment, sound: set[str]) -> None:
    volume = store.catalog.volume_named("a")
    exact = all(taken[part].number == directory.number for part in {"image", *sound})
    for offset in range(0, SIZE, 64):
        try:
            found = pools.read(store, volume.map_id, offset, 64)
        except (ChecksumMismatch, BackingError):
            assert not exact, "what fits cannot be read"
        else:
            assert found == directory.content[offset : offset + 64], "wrong data"
    stale = legs.mirror_of(store, MIRROR).stale
    if not exact or not stale:
        return
    (number,) = stale
    resilver(store, number)
    assert legs.mirror_of(store, MIRROR).leave(1 - number, "the other disk dies")
    assert pools.read(store, volume.map_id) == directory.content, "the resilvered leg lacks something"


def resilver(store: Store, number: int) -> int:
    """Bring a leg up to date; give the blocks copied."""
    store.commit()
    legs.open_leg(store, MIRROR, number)
    legs.attach_leg(store, MIRROR, number)
    copied, bits = 0, dict(store.pool.volumes[MIRROR].changed)
    for table in relocation.tables(store):
        for page_index in store.log.page_indexes(table):
            lacks = legs.lacking(store, table, page_index, MIRROR, bits)
            assert not legs.copy_lacking(store, MIRROR, number, lacks)
            copied += len(lacks)
    legs.sync_leg(store, MIRROR, number)
    legs.finish_resilver(store, MIRROR, number)
    store.commit()
    return copied


def test_every_cut_of_a_clean_end_gives_the_pool_back(pool_home: Path) -> None:
    """The next opening ends a raise that was cut off.  Recoveries begin with one: all others try these."""
    with Recorder(pool_home / "real", make_media(pool_home / "real"), OPTIONS) as recorder:
        add_mirror(recorder.store)
        recorder.store.commit()
        volume = pools.new_volume(recorder.store, "a")
        pools.write(recorder.store, volume.map_id, 0, bytes(range(1, 251)) * 8)
        recorder.store.checkpoint()
        recorder.store.raise_epoch()
    Simulator(pool_home / "cut", OPTIONS).try_all(recorder.cuts(), 48, second_cut_every=400)
