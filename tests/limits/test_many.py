"""Ten thousand volumes, ten thousand snapshots of one: no operation costs more than it does among a hundred.

Costs are counted in instructions (``tests.support.work``), so that a quadratic step shows on any machine.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from incfs import removal
from incfs import snapshot as snapshots
from incfs import volume as volumes
from incfs.model import Volume
from incfs.options import Options
from incfs.recovery import create_pool, open_store
from incfs.store import Store
from tests.support.pools import check_clean, new_volume, read, write
from tests.support.work import count_work

FEW, MANY = 100, 10_000
BLOCK = 4096
BLOCKS = 64
COMMIT_EVERY = 100
OPTIONS = Options(dump_interval_s=None)
NOT_MORE = 1.5
"""Times the work among few: trees are a level deeper, a cache has to make room."""


class Opened:
    """A pool that a test closes and opens again."""

    def __init__(self, directory: Path) -> None:
        self.store = open_store(directory, OPTIONS)

    def reopen(self) -> Store:
        directory = self.store.directory
        self.store.close()
        self.store = open_store(directory, OPTIONS)
        return self.store


@pytest.fixture
def opened(pool_home: Path) -> Iterator[Opened]:
    create_pool(pool_home / "pool", block_bytes=BLOCK)
    opened = Opened(pool_home / "pool")
    yield opened
    opened.store.abandon()


@dataclass
class Costs:
    """What each operation cost among few and among many."""

    found: dict[str, list[int]] = field(default_factory=dict)

    def measure(self, **operations: Callable[[], object]) -> None:
        for name, operation in operations.items():
            self.found.setdefault(name, []).append(count_work(operation))

    def require_flat(self) -> None:
        grown = {name: costs for name, costs in self.found.items() if costs[1] > costs[0] * NOT_MORE}
        assert not grown, f"(among {FEW}, among {MANY}): {grown}"


def settle(store: Store) -> None:
    """Commit, and checkpoint when the daemon would."""
    store.commit()
    if store.wants_checkpoint:
        store.checkpoint()


def reclaim_all(store: Store) -> None:
    for steps in itertools.count():
        waiting = store.catalog.volumes_to_reclaim()
        if not waiting:
            return
        volumes.reclaim(store, waiting[0], 2)
        if steps % COMMIT_EVERY == 0:
            settle(store)


class Snapshots:
    """One volume; a snapshot before each write of one of its blocks."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.volume = new_volume(store, "v", BLOCKS * BLOCK)
        self.count = 0
        write(store, self.volume.map_id, 0, b"." * BLOCKS * BLOCK)

    def take(self) -> None:
        snapshots.create(self.store, [(self.volume.id, f"s{self.count}")])
        write(self.store, self.volume.map_id, self.count % BLOCKS * BLOCK, b"%08d" % self.count * (BLOCK // 8))
        self.count += 1

    def content(self, number: int) -> bytes:
        """What snapshot ``number`` holds: each block as last written before it."""
        newest = (max((n for n in range(number) if n % BLOCKS == i), default=-1) for i in range(BLOCKS))
        return b"".join(b"." * BLOCK if n < 0 else b"%08d" % n * (BLOCK // 8) for n in newest)

    def read(self, number: int) -> bytes:
        return read(self.store, self.store.catalog.snapshot(self.volume.id, f"s{number}").map_id)

    def remove(self, number: int) -> None:
        removal.remove(self.store, [self.store.catalog.snapshot(self.volume.id, f"s{number}")])

    def take_until(self, count: int) -> None:
        while self.count < count:
            self.take()
            if self.count % COMMIT_EVERY == 0:
                settle(self.store)

    def measure(self, costs: Costs) -> None:
        """Measure at ``self.count`` snapshots; one is added and one removed."""
        store, volume = self.store, self.volume
        store.checkpoint()
        store.evict(volume.map_id)
        uuid = store.catalog.snapshot(volume.id, "s7").uuid
        doomed = f"s{self.count // 2}"
        costs.measure(
            live_read_of_the_tables=lambda: read(store, volume.map_id),
            live_read=lambda: read(store, volume.map_id),
            live_write=lambda: write(store, volume.map_id, 0, b"x" * BLOCK),
            commit=store.commit,
            create=lambda: snapshots.create(store, [(volume.id, f"x{self.count}")]),
            look_up=lambda: store.catalog.snapshot(volume.id, doomed),
            look_up_by_uuid=lambda: store.catalog.snapshot(volume.id, f"uuid:{uuid}"),
            rename=lambda: snapshots.rename(store, volume.id, doomed, "y"),
            remove=lambda: removal.remove(store, [store.catalog.snapshot(volume.id, "y")]),
            find_removed=store.catalog.volumes_to_reclaim,
            reclaim_step=lambda: volumes.reclaim(store, volume.id, 2),
            wants_checkpoint=lambda: store.wants_checkpoint,
        )
        snapshots.rename(store, volume.id, f"x{self.count}", doomed)
        reclaim_all(store)
        write(store, volume.map_id, 0, self.content(self.count)[:BLOCK])


@pytest.mark.slow
def test_ten_thousand_snapshots_of_one_volume(opened: Opened) -> None:
    """Creating, finding by name, removing and reclaiming one looked at all the others: 10,000 took 40 s."""
    taken, costs = Snapshots(opened.store), Costs()
    taken.take_until(FEW)
    taken.measure(costs)
    taken.take_until(MANY)
    taken.measure(costs)
    costs.require_flat()
    store = taken.store = opened.reopen()
    assert read(store, taken.volume.map_id) == taken.content(MANY)
    numbers = (1, 2, MANY // 3, MANY - 2, MANY - 1)
    assert len(store.catalog.snapshots(taken.volume.id)) == MANY
    for number in numbers:
        assert taken.read(number) == taken.content(number), number
    for number in range(0, MANY, 2):  # every second one goes; what is between them stays
        taken.remove(number)
    reclaim_all(store)
    for number in (1, MANY // 3 | 1, MANY - 1):
        assert taken.read(number) == taken.content(number), number
    for number in range(1, MANY, 2):
        taken.remove(number)
    reclaim_all(store)
    store.checkpoint()
    assert store.pool.used_blocks() == BLOCKS
    check_clean(store)


@pytest.mark.slow
def test_ten_thousand_volumes(opened: Opened) -> None:
    """Finding a removed one, and whether a checkpoint is due, looked at all the others; so did a look-up by uuid."""
    store, costs, made = opened.store, Costs(), list[Volume]()
    for count in (FEW, MANY):
        while len(made) < count:
            made.append(new_volume(store, f"v{len(made)}", 1 << 30))
            write(store, made[-1].map_id, 0, b"%08d" % len(made) * (BLOCK // 8))
            if len(made) % COMMIT_EVERY == 0:
                settle(store)
        store.checkpoint()
        last = made[-1]
        costs.measure(
            create=lambda: new_volume(store, "extra", 1 << 30),
            commit=store.commit,
            look_up=lambda last=last: store.catalog.volume_named(last.name),  # type: ignore[misc]
            look_up_by_uuid=lambda last=last: store.catalog.volume_named(f"uuid:{last.uuid}"),  # type: ignore[misc]
            read=lambda last=last: read(store, last.map_id, 0, BLOCK),  # type: ignore[misc]
            overwrite=lambda last=last: write(store, last.map_id, 0, b"y" * BLOCK),  # type: ignore[misc]
            remove=lambda: volumes.remove(store, store.catalog.volume_named("extra").id, snapshots=False),
            find_removed=store.catalog.volumes_to_reclaim,
            reclaim=lambda: volumes.reclaim(store, store.catalog.volumes_to_reclaim()[0], 2),
            wants_checkpoint=lambda: store.wants_checkpoint,
        )
    costs.require_flat()
    store = opened.reopen()
    for number in (1, MANY // 2, MANY - 1):
        assert read(store, made[number - 1].map_id, 0, 8) == (b"y" * 8 if number == FEW else b"%08d" % number)
    for volume in made:
        volumes.remove(store, volume.id, snapshots=False)
    reclaim_all(store)
    store.checkpoint()
    assert store.pool.used_blocks() == 0
    check_clean(store)
