"""Every sequence of up to three operations on volumes and snapshots, with a cut at each persistence point."""

import contextlib
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random

import pytest

from incfs import bookmarks, ranges
from incfs import clone as clones
from incfs import snapshot as snapshots
from incfs import volume as volumes
from incfs.errors import IncfsError
from incfs.model import Volume
from incfs.recovery import IMAGES_NAME, make_storage
from incfs.store import Store
from tests.support import pools
from tests.support.media import Media, MemoryBacking
from tests.support.recorder import Recorder, make_media
from tests.support.simulator import Simulator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
LONG = os.environ.get("INCFS_TEST_PROFILE") == "long"
SAMPLED = 1 << 20 if LONG else 60
"""Sequences of three that are tried."""
LIMIT = 64 if LONG else 16
"""States of one cut."""

Operation = Callable[[Store], object]


def volume(store: Store, name: str) -> Volume:
    return store.catalog.volume_named(name)


def shrink(store: Store) -> None:
    pools.resize(store, volume(store, "a").id, 500)


def discard(store: Store) -> None:
    pools.discard(store, volume(store, "a").map_id, 64, 300)


def write(store: Store) -> None:
    pools.write(store, volume(store, "a").map_id, 200, Random(store.sequence).randbytes(300))


def create_and_write(store: Store) -> None:
    pools.write(store, pools.new_volume(store, "c", 640).map_id, 0, b"c" * 200)


def clone_and_write(store: Store) -> None:
    made = clones.create(store, store.catalog.snapshot(volume(store, "a").id, "two"), "k")
    pools.write(store, made.map_id, 250, b"k" * 200)


OPERATIONS: dict[str, Operation] = {
    "write": write,
    "create": create_and_write,
    "snapshot": lambda s: pools.take_snapshots(s, [(volume(s, "a").id, "new")]),
    "snapshot-group": lambda s: pools.take_snapshots(s, [(volume(s, name).id, "group") for name in "ab"]),
    "rename": lambda s: volumes.rename(s, volume(s, "a").id, "z"),
    "rename-over": lambda s: volumes.rename(s, volume(s, "a").id, "b", over=True),
    "exchange": lambda s: volumes.exchange(s, volume(s, "a").id, volume(s, "b").id),
    "grow": lambda s: pools.resize(s, volume(s, "a").id, 3000),
    "shrink": shrink,
    "shrink-half": lambda s: ranges.drive(s, lambda _: volumes.resize(s, volume(s, "a").id, 300, shrink=True)),
    "remove": lambda s: volumes.remove(s, volume(s, "a").id, snapshots=True),
    "remove-other": lambda s: volumes.remove(s, volume(s, "b").id, snapshots=False),
    "rename-snapshot": lambda s: snapshots.rename(s, volume(s, "a").id, "one", "uno"),
    "remove-snapshot": lambda s: pools.remove_snapshot(s, volume(s, "a").id, "one"),
    "remove-newest": lambda s: pools.remove_snapshot(s, volume(s, "a").id, "two"),
    "bookmark": lambda s: bookmarks.create(s, s.catalog.snapshot(volume(s, "a").id, "two"), "m"),
    "clone": clone_and_write,
    "rollback": lambda s: pools.roll_back(s, volume(s, "a").id, "one", force=True),
    "discard": discard,
    "attributes": lambda s: volumes.set_attributes(s, volume(s, "a").id, mode=0o640, uid=7),
    "xattrs": lambda s: volumes.set_xattrs(s, volume(s, "a").id, {"user.x": b"y" * 40}),
    "reclaim": pools.reclaim,
    "checkpoint": lambda s: s.checkpoint(),
}


def add_storage(store: Store) -> None:
    """As the service does it."""
    home = store.directory / IMAGES_NAME
    record = make_storage(store, home, capacity_bytes=None, storage_class="", redundancy="none")
    with store.step():
        store.pool.attach(record)
        store.add(record)
    store.commit()


OPERATIONS["add-storage"] = add_storage


def fill(store: Store) -> None:
    """Two volumes, the first with two snapshots and something written after each."""
    for name in "ab":
        pools.write(store, pools.new_volume(store, name, 1000).map_id, 0, Random(name).randbytes(900))
    for number, taken in enumerate(("one", "two")):
        snapshots.create(store, [(volume(store, "a").id, taken)])
        pools.write(store, volume(store, "a").map_id, 100, Random(number).randbytes(400))


def cut_sequence(home: Path, media: Media, simulator: Simulator, sequence: tuple[str, ...]) -> None:
    with Recorder(home / "real", media, pools.tiny_options()) as recorder:
        for name in sequence:
            with contextlib.suppress(IncfsError):  # what another operation has made impossible
                OPERATIONS[name](recorder.store)
            recorder.store.commit()
    try:
        simulator.try_all(recorder.cuts(), LIMIT)
    except AssertionError as error:
        raise AssertionError(f"{' '.join(sequence)}: {error}") from error


def chosen_sequences(length: int) -> list[tuple[str, ...]]:
    every = list(product(OPERATIONS, repeat=length))
    return every if len(every) <= SAMPLED or length < 3 else Random(3).sample(every, SAMPLED)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_cuts_of_control_operations_give_commit_points(pool_home: Path, length: int) -> None:
    media = make_media(pool_home / "real", fill)
    for number, sequence in enumerate(chosen_sequences(length)):
        if number % 500 == 0:  # what it remembers takes about 10 KB for each recovery
            simulator = Simulator(pool_home / "cut", pools.tiny_options())
        cut_sequence(pool_home, media, simulator, sequence)


def test_every_operation_does_something(pool_home: Path) -> None:
    media = make_media(pool_home / "real", fill)
    for name, operation in OPERATIONS.items():
        with Recorder(pool_home / "real", media, pools.tiny_options()) as recorder:
            done = len(recorder.backing.events)
            operation(recorder.store)
            recorder.store.commit()
            assert len(recorder.backing.events) > done or name == "reclaim", name  # nothing is removed yet


def test_a_storage_volume_whose_addition_was_cut_off_can_be_added_again(pool_home: Path) -> None:
    """Its image was in the way of every later one."""
    media = make_media(pool_home / "real", fill)
    with Recorder(pool_home / "real", media, pools.tiny_options()) as recorder:
        add_storage(recorder.store)
    backing = MemoryBacking(pool_home / "cut")
    found = set()
    for cut in recorder.cuts():
        for state in cut.machine.cuts(LIMIT, Random(cut.number)):
            backing.load(state)
            with pools.open_tiny(pool_home / "cut" / "pool", backing=backing) as store:
                found.add(len(store.catalog.storages))
                add_storage(store)
                pools.check_clean(store)
    assert found == {1, 2}
