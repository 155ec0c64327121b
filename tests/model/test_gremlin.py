"""The core against a model while hot threads act between any two calls that the owner thread makes.

Each rule is what the owner thread does, with a plan of what hot threads do meanwhile.  What they write is *on its way*
until the owner thread seals; a rule's own change comes behind what was sealed and before what still is on its way.
``versions`` are the states that a power cut may bring back: all since the last fsync that somebody was told is done.
"""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

pytest.importorskip("incfs._dataplane", reason="the C data plane was not built")

from incfs import clone as clones
from incfs import ranges, relocation
from incfs import volume as volumes
from incfs.checkpoint import Checkpoint, Commit
from incfs.dataplane import LeaseExhausted
from incfs.errors import BackingError, Busy, IncfsError, PoolReadOnly
from incfs.model import MapId, StorageId, VolumeId
from incfs.store import Store, new_nonce
from tests.conftest import fast_directory
from tests.support import pools
from tests.support.figures import FIGURES
from tests.support.gremlin import (
    Act,
    Cut,
    GoOn,
    Gremlin,
    HotRead,
    HotSync,
    HotWrite,
    Listener,
    Plan,
    Stage,
    open_haunted,
    pattern,
)
from tests.support.likeness import digest_of
from tests.support.media import Media
from tests.support.outage import OutageBacking, place_media
from tests.support.served import Sync

BLOCK = pools.BLOCK
NAMES = ("a", "b", "c")
SNAPSHOT_NAMES = ("s", "t", "u")
SIZES = (4 * BLOCK, 20 * BLOCK, 520 * BLOCK)
LARGEST = max(SIZES)
LEASE_BLOCKS = 48
LONG = os.environ.get("INCFS_TEST_PROFILE") == "long"


@dataclass
class SnapshotModel:
    """A snapshot's bytes."""

    name: str
    data: bytes
    table: MapId


@dataclass
class VolumeModel:
    """A volume's bytes and its snapshots, oldest first."""

    name: str
    data: bytearray
    snapshots: list[SnapshotModel] = field(default_factory=list)
    origin: MapId | None = None

    def put(self, offset_bytes: int, data: bytes) -> None:
        """Write, as far as it lies in the volume."""
        end = min(offset_bytes + len(data), len(self.data))
        if offset_bytes < end:
            self.data[offset_bytes:end] = data[: end - offset_bytes]


class Written(NamedTuple):
    """What a hot thread wrote and nobody has sealed since."""

    volume_id: VolumeId
    offset_bytes: int
    data: bytes


Version = dict[str, tuple[bytes, tuple[tuple[str, bytes], ...]]]
"""Name of a volume -> its bytes, and those of its snapshots by name."""


@dataclass(frozen=True)
class Around:
    """What is around a rule."""

    is_at_rest: bool = True
    """The daemon had time before: leases are full, pages resident, everything committed, the journal lent."""
    plan: Plan = ()
    looks: bool = True
    """Whether everything is compared afterwards; that takes notice of what hot threads committed, too."""


blocks = st.one_of(st.integers(0, 3), st.sampled_from([19, 511, 512]))
counts = st.sampled_from([1, 1, 1, 2, 5])
choices = st.integers(0, 3)
hot_writes = st.builds(HotWrite, choices, blocks, counts, st.integers(0, 9))
acts: st.SearchStrategy[Act] = st.one_of(
    hot_writes,
    hot_writes,
    hot_writes,
    st.builds(
        HotSync,
        choices,
        blocks,
        st.integers(0, 9),
        st.sampled_from([None, Stage.WRITTEN, Stage.WRITTEN, Stage.QUEUED, Stage.FLUSHED]),
    ),
    st.builds(GoOn, st.sampled_from([False, False, False, True]), st.sampled_from([False, True])),
    st.builds(HotRead, choices, blocks, counts),
    st.builds(Cut, st.integers(0, 9)),
)
calls = st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 20), st.integers(0, 20))
"""The first call comes before the lane is closed; most rules make fewer than twenty."""
plans = st.lists(st.tuples(calls, acts), min_size=1, max_size=6).map(tuple)
arounds = st.builds(Around, st.sampled_from([True, True, False]), plans, st.sampled_from([True, True, False]))
options = st.builds(
    pools.tiny_options,
    extend_bytes=st.sampled_from([4096, 65536]),
    page_cache_pages=st.sampled_from([2, 4, 64]),
    small_commit_bytes=st.sampled_from([1000, 65536]),
    overlay_pages=st.just(8),
)


class GremlinMachine(RuleBasedStateMachine, Listener):
    """Drives the store, haunted."""

    @initialize(options=options, storages=st.sampled_from([1, 1, 2]), taken=st.sampled_from([0, 2]))
    def begin(self, options=None, storages: int = 1, taken: int = 0) -> None:
        self.options = replace(options or pools.tiny_options(), data_plane="native")
        self.home = Path(tempfile.mkdtemp(prefix="incfs-gremlin-", dir=fast_directory()))
        self.root, self.elsewhere = self.home / "here", self.home / "elsewhere"
        self.pool = pools.make_pool(self.root, storages=storages)
        self.backing = OutageBacking(self.root)
        self.state: dict[VolumeId, VolumeModel] = {}
        self.stack = ExitStack()
        self.stack.enter_context(self.backing.watching_tables())
        self.stack.callback(shutil.rmtree, self.home)
        self.open()
        self.versions: list[Version] = [self.version()]
        self.known: dict[bytes, Version] = {}
        """Digest of what a power cut left -> what was found."""
        self.create(Around(), "a", SIZES[1])
        for name in SNAPSHOT_NAMES[:taken]:
            self.take_snapshots(Around(), {0}, name)

    def open(self) -> None:
        self.on_its_way: list[Written] = []
        self.unanswered: dict[int, int] = {}
        self.begun = 0
        self.commit_begun: Commit | None = None
        self.checkpoint_begun: Checkpoint | None = None
        self.is_folding = False
        self.gremlin = Gremlin(self, self.backing)
        self.store: Store = open_haunted(self.pool, self.options, self.backing, self.gremlin)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self.gremlin.go_on(fails=False)
            if not self.gremlin.has_failed:
                self.power_fails(0)
                self.finish_phases()
                pools.check_clean(self.store)
                self.look()
        finally:
            self.end()
            self.stack.close()
            gc.collect()  # each plane has half a megabyte of which the collector knows nothing

    def end(self) -> None:
        self.gremlin.go_on(fails=False)
        self.store.abandon()
        self.gremlin.leave()

    # The model

    def version(self) -> Version:
        """Freeze what the pool holds now, with what is on its way."""
        found: Version = {}
        for volume_id, model in self.state.items():
            now = VolumeModel(model.name, bytearray(model.data))
            for written in self.on_its_way:
                if written.volume_id == volume_id:
                    now.put(written.offset_bytes, written.data)
            found[model.name] = bytes(now.data), tuple((s.name, s.data) for s in model.snapshots)
        return found

    def note_version(self) -> None:
        if (now := self.version()) != self.versions[-1]:
            self.versions.append(now)

    def acknowledge(self, number: int) -> None:
        """Somebody was told that this version is durable."""
        FIGURES["fsyncs answered between two calls"] += 1
        FIGURES["of them while another was held"] += self.gremlin.is_held
        self.floor = max(self.floor, number)

    @property
    def floor(self) -> int:
        return getattr(self, "_floor", 0)

    @floor.setter
    def floor(self, number: int) -> None:
        self._floor = number

    # What the gremlin tells and asks

    def sealed(self) -> None:
        for written in self.on_its_way:
            if written.volume_id in self.state:
                self.state[written.volume_id].put(written.offset_bytes, written.data)
        self.on_its_way = []

    def written(self, table: MapId, offset_bytes: int, data: bytes) -> None:
        self.sealed()
        if (model := self.state.get(VolumeId(table >> 32))) is not None:
            model.put(offset_bytes, data)
            self.note_version()

    def synced(self, sync: Sync, error: int | None) -> None:
        number = self.unanswered.pop(id(sync))
        if error == 0:
            self.acknowledge(number)

    def act(self, act: Act) -> None:
        FIGURES["acts of hot threads between two calls"] += 1
        match act:
            case HotWrite():
                self.hot_write(act)
            case HotRead():
                self.hot_read(act)
            case HotSync():
                self.hot_sync(act)
            case GoOn():
                self.gremlin.go_on(fails=act.fails, is_full=act.is_full)
            case Cut():
                self.power_fails(act.seed)

    def chosen(self, choice: int) -> VolumeId | None:
        ids = sorted(self.state)
        return ids[choice % len(ids)] if ids else None

    def hot_write(self, act: HotWrite) -> None:
        volume_id = self.chosen(act.choice)
        if volume_id is None:
            return
        data = pattern(act.seed, act.count * BLOCK)
        if self.gremlin.write(MapId(volume_id << 32), act.block * BLOCK, data):
            FIGURES["of them writes that were served"] += 1
            self.on_its_way.append(Written(volume_id, act.block * BLOCK, data))
            self.note_version()

    def hot_read(self, act: HotRead) -> None:
        expected: list[tuple[MapId, bytes]] = []
        now = self.version()
        for volume_id, model in sorted(self.state.items()):
            expected.append((MapId(volume_id << 32), now[model.name][0]))
            expected += [(taken.table, taken.data) for taken in model.snapshots]
        if not expected:
            return
        table, data = expected[act.choice % len(expected)]
        found = self.gremlin.read(table, act.block * BLOCK, act.count * BLOCK)
        if found is not None:  # of a volume that is being resized: as much as there is
            wanted = data[act.block * BLOCK :][: len(found)]
            assert found[: len(wanted)] == wanted, f"a hot read of table {table >> 32}.{table & 0xFFFFFFFF}"

    def hot_sync(self, act: HotSync) -> None:
        volume_id = self.chosen(act.choice)
        if volume_id is None:
            return
        if act.seed:
            self.hot_write(HotWrite(act.choice, act.block, 1, act.seed))
        number = len(self.versions) - 1
        sync = self.gremlin.sync(MapId(volume_id << 32), act.held_at)
        self.unanswered[id(sync)] = number
        FIGURES["of them fsyncs that were held"] += self.gremlin.is_held
        self.gremlin.hear()

    # Power cuts

    def power_fails(self, seed: int) -> None:
        """Look at what would be found: one of the versions since the last one that is durable."""
        allowed = self.versions[self.floor :]
        for media in self.backing.cuts(3, Random(seed)):
            FIGURES["power cuts between two calls"] += 1
            found = self.recover(media)
            assert found in allowed, self.lost(found)

    def lost(self, found: Version) -> str:
        known = found in self.versions
        return (
            "a power cut loses what was acknowledged" if known else f"a power cut brings back what never was: {found}"
        )

    def recover(self, media: Media) -> Version:
        digest = digest_of(media)
        if digest not in self.known:
            self.known[digest] = self.recover_anew(media)
        return self.known[digest]

    def recover_anew(self, media: Media) -> Version:
        FIGURES["of them recovered and checked"] += 1
        place_media(self.elsewhere, media)
        store = pools.open_tiny(self.elsewhere / "pool", self.options)
        try:
            report = pools.run_check(store)
            assert report.is_clean, report.problems
            return found_in(store)
        finally:
            store.abandon()

    # Around each rule

    @contextmanager
    def step(self, around: Around) -> Iterator[None]:
        if around.is_at_rest:
            self.come_to_rest()
        try:
            with self.gremlin.awake(around.plan):
                yield
        except (PoolReadOnly, BackingError):
            if not self.gremlin.has_failed:
                raise
        self.note_change()
        self.serve()
        if self.gremlin.has_failed:
            self.end_after_failure()
        elif around.looks:
            self.look()

    def note_change(self) -> None:
        """The rule's change came before what is on its way."""
        on_its_way, self.on_its_way = self.on_its_way, []
        self.note_version()
        for written in on_its_way:
            self.on_its_way.append(written)
            self.note_version()

    def serve(self) -> None:
        """Let everything that has a name, and nothing else, be open."""
        tables = set()
        for volume in self.store.catalog.volumes.values():
            if volume.name:
                tables |= {volume.map_id, *(s.map_id for s in self.store.catalog.snapshots(volume.id))}
        for table in list(self.store._served):
            if table not in tables:
                self.store.unserve(table)
        if self.store.failure is None:
            for table in sorted(tables):
                self.store.serve(table)

    def come_to_rest(self) -> None:
        """What the daemon does while nothing happens."""
        if self.gremlin.is_held:
            return
        self.finish_phases(folds=False)
        store = self.store
        for volume_id, model in self.state.items():
            table = MapId(volume_id << 32)

            def need(_wait: bool, table: MapId = table) -> None:
                if store.plane.leased_blocks(table) < LEASE_BLOCKS:
                    raise LeaseExhausted(table, LEASE_BLOCKS)

            ranges.drive(store, need)
            pools.read(store, table, 0, len(model.data))
        store.attend()
        self.commit_all()
        store.lend_journal()

    def end_after_failure(self) -> None:
        """A flush failed: nobody hears "durable" any more, and what was acknowledged before is there."""
        self.gremlin.go_on(fails=False)
        for _ in range(2):
            before = len(self.versions) - 1
            try:
                self.finish_phases()
                self.store.commit()
            except IncfsError:
                self.store.attend()
            else:
                self.acknowledge(before)
                self.power_fails(0)
        self.restart(1)

    def look(self) -> None:
        """Compare everything."""
        now = self.version()
        assert found_in(self.store) == now
        self.compare_changes()
        pools.check_memory(self.store)

    def compare_changes(self) -> None:
        """Between two snapshots differs only what the log says that it does: an incremental stream has all of it."""
        for volume_id, model in self.state.items():
            real = self.store.catalog.snapshots(volume_id)
            for position, newer in enumerate(model.snapshots[1:], 1):
                older = model.snapshots[position - 1]
                made = bytearray(older.data[: len(newer.data)].ljust(len(newer.data), b"\0"))
                for extent in pools.diff(self.store, real[position - 1], real[position]):
                    start, end = extent.offset_bytes, extent.offset_bytes + extent.length_bytes
                    made[start:end] = newer.data[start:end]
                assert made == newer.data, f"what changed from {older.name} to {newer.name} is not known"

    # Rules

    def pick(self, choice: int) -> tuple[VolumeId, VolumeModel]:
        volume_id = self.chosen(choice)
        assert volume_id is not None
        return volume_id, self.state[volume_id]

    def pick_snapshot(self, choice: int, which: int) -> tuple[VolumeId, VolumeModel, int]:
        ids = sorted(i for i, m in self.state.items() if m.snapshots)
        volume_id = ids[choice % len(ids)]
        return volume_id, self.state[volume_id], which % len(self.state[volume_id].snapshots)

    @rule(around=arounds, name=st.sampled_from(NAMES), size=st.sampled_from(SIZES))
    def create(self, around: Around, name: str, size: int) -> None:
        if any(model.name == name for model in self.state.values()):
            return
        with self.step(around):
            made = pools.new_volume(self.store, name, size)
            self.state[made.id] = VolumeModel(name, bytearray(size))

    @precondition(lambda self: self.state)
    @rule(around=arounds, choice=choices, block=blocks, count=counts, seed=st.integers(0, 9), part=st.booleans())
    def write(self, around: Around, choice: int, block: int, count: int, seed: int, part: bool = False) -> None:
        volume_id, model = self.pick(choice)
        offset, data = block * BLOCK + 7 * part, pattern(seed, count * BLOCK)
        with self.step(around):
            pools.write(self.store, MapId(volume_id << 32), offset, data)
            if offset + len(data) > len(model.data):
                known = len(model.data)
                model.data.extend(bytes(offset + len(data) - known))
                model.put(max(offset, known), data[max(0, known - offset) :])

    @precondition(lambda self: self.state)
    @rule(around=arounds, choice=choices, block=blocks, count=st.integers(1, 600))
    def discard(self, around: Around, choice: int, block: int, count: int) -> None:
        volume_id, _ = self.pick(choice)
        with self.step(around):
            pools.discard(self.store, MapId(volume_id << 32), block * BLOCK, (block + count) * BLOCK)

    @precondition(lambda self: self.state)
    @rule(around=arounds, choice=choices, size=st.sampled_from(SIZES))
    def resize(self, around: Around, choice: int, size: int) -> None:
        volume_id, model = self.pick(choice)
        with self.step(around):
            ranges.drive(self.store, lambda _: volumes.resize(self.store, volume_id, size, shrink=True))
            model.data[size:] = b""
            model.data.extend(bytes(size - len(model.data)))
            ranges.finish_trim(self.store, volume_id)

    @precondition(lambda self: self.state)
    @rule(around=arounds, chosen=st.sets(choices, min_size=1), name=st.sampled_from(SNAPSHOT_NAMES))
    def take_snapshots(self, around: Around, chosen: set[int], name: str) -> None:
        wanted = dict(self.pick(choice) for choice in chosen)
        if any(taken.name == name for model in wanted.values() for taken in model.snapshots):
            return
        with self.step(around):
            taken = pools.take_snapshots(self.store, [(volume_id, name) for volume_id in wanted])
            for snapshot, model in zip(taken, wanted.values(), strict=True):
                model.snapshots.append(SnapshotModel(name, bytes(model.data), snapshot.map_id))

    @precondition(lambda self: any(m.snapshots for m in self.state.values()))
    @rule(around=arounds, choice=choices, which=choices, reclaims=st.booleans())
    def remove_snapshot(self, around: Around, choice: int, which: int, reclaims: bool = True) -> None:
        volume_id, model, index = self.pick_snapshot(choice, which)
        with self.step(around):
            try:
                pools.remove_snapshot(self.store, volume_id, model.snapshots[index].name)
            except Busy:
                assert self.is_needed(model.snapshots[index])
                return
            del model.snapshots[index]
            self.serve()
            while reclaims and not volumes.reclaim(self.store, volume_id, 2):
                self.note_change()

    def is_needed(self, taken: SnapshotModel) -> bool:
        return any(model.origin == taken.table for model in self.state.values())

    @precondition(lambda self: any(m.snapshots for m in self.state.values()))
    @rule(around=arounds, choice=choices, which=choices)
    def roll_back(self, around: Around, choice: int, which: int) -> None:
        volume_id, model, index = self.pick_snapshot(choice, which)
        with self.step(around):
            try:
                pools.roll_back(self.store, volume_id, model.snapshots[index].name, force=True)
            except Busy:
                return
            del model.snapshots[index + 1 :]
            model.data = bytearray(model.snapshots[index].data)

    @precondition(lambda self: any(m.snapshots for m in self.state.values()))
    @rule(around=arounds, choice=choices, which=choices, name=st.sampled_from(NAMES))
    def clone(self, around: Around, choice: int, which: int, name: str) -> None:
        volume_id, model, index = self.pick_snapshot(choice, which)
        if any(other.name == name for other in self.state.values()):
            return
        origin = model.snapshots[index]
        with self.step(around):
            made = clones.create(self.store, self.store.catalog.snapshot(volume_id, origin.name), name)
            self.state[made.id] = VolumeModel(name, bytearray(origin.data), origin=origin.table)

    @precondition(lambda self: any(m.origin for m in self.state.values()))
    @rule(around=arounds, choice=choices)
    def flatten(self, around: Around, choice: int) -> None:
        ids = sorted(i for i, m in self.state.items() if m.origin)
        volume_id = ids[choice % len(ids)]
        with self.step(around):
            pools.flatten(self.store, volume_id)
            if not self.store.catalog.volume(volume_id).origin:
                self.state[volume_id].origin = None

    @precondition(lambda self: self.state)
    @rule(around=arounds, choice=choices, name=st.sampled_from(NAMES))
    def rename(self, around: Around, choice: int, name: str) -> None:
        volume_id, model = self.pick(choice)
        if any(other.name == name for other in self.state.values()):
            return
        with self.step(around):
            volumes.rename(self.store, volume_id, name)
            model.name = name

    @precondition(lambda self: self.state)
    @rule(around=arounds, choice=choices)
    def remove(self, around: Around, choice: int) -> None:
        volume_id, model = self.pick(choice)
        if any(self.is_needed(taken) for taken in model.snapshots):
            return
        with self.step(around):
            volumes.remove(self.store, volume_id, snapshots=True)
            del self.state[volume_id]

    @rule(around=arounds, steps=st.integers(1, 6), pages=st.integers(1, 2))
    def reclaim(self, around: Around, steps: int = 6, pages: int = 2) -> None:
        with self.step(around):
            for volume_id in sorted(self.store.catalog.volumes, reverse=True):
                for _ in range(steps):
                    if volumes.reclaim(self.store, volume_id, pages):
                        break

    @precondition(lambda self: len(self.store.pool.volumes) > 1)
    @rule(around=arounds, source=st.integers(1, 2))
    def move_blocks(self, around: Around, source: int) -> None:
        with self.step(around):
            pools.relocate(self.store, relocation.leave(StorageId(source)))

    @rule(around=arounds)
    def attend(self, around: Around) -> None:
        with self.step(around):
            self.store.attend()

    @rule(around=arounds)
    def lend(self, around: Around) -> None:
        with self.step(around):
            self.store.lend_journal()

    # Commits, whole and in parts, as the committer makes them

    def finish_phases(self, *, folds: bool = True) -> None:
        if self.commit_begun is not None:
            self._end_commit()
        while self.checkpoint_begun is not None and (folds or not self.is_folding):
            self._go_on_with_checkpoint()

    def commit_all(self) -> None:
        number = len(self.versions) - 1
        self.store.commit()
        self.acknowledge(number)

    @rule(around=arounds, then_cut=st.booleans(), lends=st.booleans())
    def commit(self, around: Around, then_cut: bool = True, lends: bool = False) -> None:
        """What an fsync does that goes through Python."""
        self.finish_phases()
        with self.step(around):
            self.commit_all()
            if then_cut:
                self.power_fails(1)
            if lends:
                self.store.lend_journal()

    @precondition(lambda self: self.commit_begun is None and (self.checkpoint_begun is None or self.is_folding))
    @rule(around=arounds)
    def begin_commit(self, around: Around) -> None:
        with self.step(around):
            self.begun = len(self.versions) - 1
            self.commit_begun = self.store.begin_commit()
            if self.commit_begun is None:
                self.acknowledge(self.begun)

    @precondition(lambda self: self.commit_begun is not None)
    @rule(around=arounds, lends=st.booleans())
    def end_commit(self, around: Around, lends: bool = True) -> None:
        with self.step(replace(around, is_at_rest=False)):
            self._end_commit()
            if lends:
                self.store.lend_journal()

    def _end_commit(self) -> None:
        assert self.commit_begun is not None
        commit, self.commit_begun = self.commit_begun, None
        self.store._guard(commit.run)  # as the committer does
        self.store.end_commit(commit)
        self.acknowledge(self.begun)

    @rule(around=arounds)
    def checkpoint(self, around: Around) -> None:
        self.finish_phases()
        with self.step(around):
            number = len(self.versions) - 1
            self.store.checkpoint()
            self.acknowledge(number)
            report = pools.run_check(self.store)
            assert report.is_clean, report.problems

    @precondition(lambda self: self.commit_begun is None and self.checkpoint_begun is None)
    @rule(around=arounds)
    def begin_checkpoint(self, around: Around) -> None:
        with self.step(around):
            self.begun = len(self.versions) - 1
            self.checkpoint_begun = self.store.begin_checkpoint(new_nonce())
            self.is_folding = False

    @precondition(lambda self: self.checkpoint_begun is not None)
    @rule(around=arounds)
    def go_on_with_checkpoint(self, around: Around) -> None:
        with self.step(replace(around, is_at_rest=False)):
            self._go_on_with_checkpoint()

    def _go_on_with_checkpoint(self) -> None:
        checkpoint = self.checkpoint_begun
        assert checkpoint is not None
        if not self.is_folding:
            self.store._guard(checkpoint.run_commit)
            self.store.end_checkpoint_commit(checkpoint)
            self.acknowledge(self.begun)
            self.is_folding = True
        else:
            self.checkpoint_begun = None
            checkpoint.reserve()
            self.store._guard(checkpoint.run_fold)
            self.store.end_checkpoint(checkpoint)

    # Ends

    @rule(around=arounds, seed=st.integers(0, 9))
    def restart(self, seed: int, around: Around | None = None) -> None:
        """The power fails, here."""
        media = list(self.backing.cuts(4, Random(seed)))[-1]
        allowed = self.versions[self.floor :]
        self.end()
        place_media(self.root, media)
        self.backing.restart()
        self.open()
        found = found_in(self.store)
        assert found in allowed, self.lost(found)
        self.adopt(found)
        report = pools.run_check(self.store)
        assert report.is_clean, report.problems

    def adopt(self, found: Version) -> None:
        self.state = {}
        for volume in self.store.catalog.volumes.values():
            if volume.name:
                data, taken = found[volume.name]
                real = self.store.catalog.snapshots(volume.id)
                models = [SnapshotModel(n, d, s.map_id) for (n, d), s in zip(taken, real, strict=True)]
                self.state[volume.id] = VolumeModel(volume.name, bytearray(data), models, volume.origin or None)
        self.versions, self.floor = [found], 0
        self.serve()


def found_in(store: Store) -> Version:
    """Read everything that is in a pool."""
    found: Version = {}
    for volume in sorted(store.catalog.volumes.values(), key=lambda volume: volume.id):
        if volume.name:
            taken = tuple((s.name, pools.read(store, s.map_id)) for s in store.catalog.snapshots(volume.id))
            found[volume.name] = pools.read(store, volume.map_id), taken
    return found


# Faults that it found, each as its shortest story


@contextmanager
def story(**named: int) -> Iterator[GremlinMachine]:
    """A machine that is told what to do."""
    machine = GremlinMachine()
    machine.begin(**named)
    try:
        yield machine
        machine.teardown()
    finally:
        machine.stack.close()


def during(*plan: tuple[int, Act]) -> Around:
    """A rule during which this happens."""
    return Around(plan=plan)


@pytest.mark.parametrize("call", range(12))
def test_what_is_written_while_the_newest_snapshot_goes_stays_out_of_the_older_one(call: int) -> None:
    """It was sealed a second time within the step, into the increment that the step dropped."""
    with story(taken=2) as machine:
        machine.remove_snapshot(during((call, HotWrite(0, 0, 1, 1))), 0, 1)


@pytest.mark.parametrize("call", range(16))
def test_what_is_written_while_a_volume_is_rolled_back_is_before_or_behind_that(call: int) -> None:
    with story(taken=1) as machine:
        machine.write(Around(), 0, 0, 2, 2)
        machine.roll_back(during((call, HotWrite(0, 1, 2, 1))), 0, 0)
        machine.reclaim(Around())


@pytest.mark.parametrize("stage", [Stage.QUEUED, Stage.WRITTEN])
def test_an_fsync_waits_for_the_round_that_has_its_data(stage: Stage) -> None:
    """What hot threads had sealed was taken for durable while its record was being flushed."""
    with story() as machine:
        machine.commit(during((0, HotSync(0, 0, 1, stage))))


@pytest.mark.parametrize("stage", [Stage.QUEUED, Stage.WRITTEN])
def test_an_fsync_fails_when_the_round_that_has_its_data_failed(stage: Stage) -> None:
    """It found nothing left to do, and reported success."""
    with story() as machine:
        machine.commit(during((0, HotSync(0, 0, 1, stage)), (0, GoOn(fails=True))))


@pytest.mark.parametrize("call", range(6))
def test_a_round_that_found_no_room_is_written_by_the_next_commit(call: int) -> None:
    """Its mappings may have been taken for committed by then."""
    full = GoOn(is_full=True)
    with story() as machine:
        machine.write(during((0, HotSync(0, 0, 1, Stage.QUEUED)), (call, full), (call + 1, Cut(1))), 0, 4, 2, 3)
        machine.commit(Around(is_at_rest=False))
        machine.power_fails(1)
        machine.write(during((0, HotSync(0, 2, 1))), 0, 6, 2, 3)
        machine.restart(0)


@pytest.mark.parametrize("call", range(6))
def test_an_fsync_while_a_volume_grows_has_no_blocks_behind_its_end(call: int) -> None:
    """A hot thread's commit had the blocks and not the size: after a power cut they came to light as it grew again."""
    with story() as machine:
        machine.write(during((call, HotSync(0, 0, 1))), 0, 20, 2, 3)
        machine.restart(0)
        machine.resize(Around(), 0, SIZES[2])


@pytest.mark.slow
@pytest.mark.timeout(3600)  # shrinking a failure takes minutes
def test_hot_threads_between_any_two_calls() -> None:
    """INCFS_TEST_PROFILE=long tries more, and other, stories."""
    run_state_machine_as_test(
        GremlinMachine,
        settings=settings(max_examples=5000 if LONG else 150, stateful_step_count=40 if LONG else 15),
    )
