"""The core against a plain model: a dict of byte arrays, compared after every step."""

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from incfs import bookmarks, extents, groups, holds, ranges, relocation, removal, reuse, stripes
from incfs import clone as clones
from incfs import memory as memory_module
from incfs import snapshot as snapshots
from incfs import space as space_module
from incfs import volume as volumes
from incfs.checkpoint import Checkpoint, Commit
from incfs.dataplane import DataPlane
from incfs.errors import AlreadyExists, Busy, HoldNotFound, NoData, NoSpace
from incfs.model import HOLE, NO_ORIGIN, Base, MapId, Snapshot, StorageId, Volume, VolumeId, split_map_id
from incfs.options import Options
from incfs.reuse import PunchPlan
from incfs.store import Store, new_nonce
from tests.conftest import fast_directory
from tests.support import pools

NAMES = ("a", "b", "c", "d")
SNAPSHOT_NAMES = ("s", "t", "u")
BOOKMARK_NAMES = ("m", "n")
LARGEST = 80_000


@dataclass
class SnapshotModel:
    """A snapshot's bytes, and the blocks written after it and before the next one."""

    name: str
    data: bytes
    table: MapId
    touched: set[int] = field(default_factory=set)
    holds: set[str] = field(default_factory=set)


@dataclass
class BookmarkModel:
    """A bookmarked point: its generation, and the bytes then."""

    generation: int
    data: bytes


@dataclass
class VolumeModel:
    """A volume's bytes and its snapshots, oldest first."""

    name: str
    data: bytearray
    snapshots: list[SnapshotModel] = field(default_factory=list)
    origin: MapId = NO_ORIGIN
    bookmarks: dict[str, BookmarkModel] = field(default_factory=dict)
    generation: int = 0
    """Of the last snapshot, or rollback."""
    touched: dict[int, set[int]] = field(default_factory=dict)
    """Generation -> blocks written since, until the next one."""

    def touch(self, start: int, end: int, block: int) -> None:
        if end <= start:
            return
        blocks = range(start // block, -(-end // block))
        self.touched.setdefault(self.generation, set()).update(blocks)
        if self.snapshots:
            self.snapshots[-1].touched.update(blocks)

    def named(self, name: str) -> SnapshotModel | None:
        return next((s for s in self.snapshots if s.name == name), None)


State = dict[VolumeId, VolumeModel]


@dataclass(frozen=True)
class Setup:
    """One kind of pool."""

    block_bytes: int
    capacity_bytes: int | None
    storages: int
    options: Options
    seal_at: int
    lease_blocks: int
    group_blocks: int
    """Blocks of one bitmap: small ones make allocation cross from one to the next."""


setups = st.builds(
    Setup,
    block_bytes=st.sampled_from([64, 128]),
    capacity_bytes=st.sampled_from([None, None, 6_400, 25_600, 64_000]),
    storages=st.sampled_from([1, 1, 2, 3]),
    options=st.builds(
        pools.tiny_options,
        extend_bytes=st.sampled_from([640, 4096, 65536]),
        page_cache_pages=st.sampled_from([2, 4, 64]),
        small_commit_bytes=st.sampled_from([0, 1000, 65536]),
        overlay_pages=st.just(8),
    ),
    seal_at=st.sampled_from([7, 100, 1024]),
    lease_blocks=st.sampled_from([1, 16, 2048]),
    group_blocks=st.sampled_from([24, 32768]),
)
borders = st.sampled_from([0, 63, 64, 128, 4096, 32_704, 32_768, 32_800, 65_536])
offsets = st.one_of(borders, st.integers(0, 2000), st.integers(0, LARGEST // 2))
lengths = st.one_of(st.integers(1, 300), st.sampled_from([64, 128, 640, 4096]), st.integers(1, 12_000))
sizes = st.one_of(borders, st.integers(0, LARGEST))


def content(seed: int, length: int) -> bytes:
    """Bytes of a write: random, zeros, or random with zero blocks in it."""
    if seed == 0:
        return bytes(length)
    data = bytearray(Random(seed).randbytes(length))
    if seed % 3 == 0:
        data[length // 3 : length // 2] = bytes(length // 2 - length // 3)
    return bytes(data)


class CoreMachine(RuleBasedStateMachine):
    """Drives the store; ``committed`` is the state that a crash must bring back."""

    @initialize(setup=setups)
    def begin(self, setup: Setup) -> None:
        self.setup = setup
        self.home = Path(tempfile.mkdtemp(prefix="incfs-model-", dir=fast_directory()))
        self.constants = memory_module._SEAL_AT, space_module.MAX_LEASE_BLOCKS
        self.sizes = groups.GROUP_BLOCKS, reuse.CHUNK_BYTES
        groups.GROUP_BLOCKS, reuse.CHUNK_BYTES = setup.group_blocks, 256
        memory_module._SEAL_AT, space_module.MAX_LEASE_BLOCKS = setup.seal_at, setup.lease_blocks
        self.pool = pools.make_pool(
            self.home,
            block_bytes=setup.block_bytes,
            capacity_bytes=setup.capacity_bytes,
            storages=setup.storages,
        )
        self.state: State = {}
        self.committed: State = {}
        self.given_out: set[VolumeId] = set()
        self.open()

    def open(self) -> None:
        self.begun: State | None = None
        self.commit_begun: Commit | None = None
        self.checkpoint_begun: Checkpoint | None = None
        self.checkpoint_phase = ""
        self.punching: PunchPlan | None = None
        self.store: Store = pools.open_tiny(self.pool, self.setup.options)
        self.store.watch()
        self._watch_commits(self.store)

    def _watch_commits(self, store: Store) -> None:
        """Commits happen inside other operations too, to make space."""
        begin_commit, end_commit, checkpoint = store.begin_commit, store.end_commit, store.checkpoint

        def begin() -> Commit | None:
            commit = begin_commit()
            self.begun = copy.deepcopy(self.state)
            return commit

        def end(commit: Commit) -> None:
            end_commit(commit)
            assert self.begun is not None
            self.committed = self.begun
            self.given_out |= set(self.committed)

        def run_checkpoint() -> None:
            self.finish_phases()
            checkpoint()

        store.begin_commit = begin  # type: ignore[method-assign]
        store.end_commit = end  # type: ignore[method-assign]
        store.checkpoint = run_checkpoint  # type: ignore[method-assign]

    def teardown(self) -> None:
        if not hasattr(self, "home"):
            return
        try:
            self.finish_phases()
            self.compare()
            pools.check_clean(self.store)
        finally:
            memory_module._SEAL_AT, space_module.MAX_LEASE_BLOCKS = self.constants
            groups.GROUP_BLOCKS, reuse.CHUNK_BYTES = self.sizes
            self.store.abandon()
            shutil.rmtree(self.home)

    # Helpers

    @property
    def block(self) -> int:
        return self.setup.block_bytes

    def pick(self, choice: int) -> tuple[VolumeId, VolumeModel]:
        ids = sorted(self.state)
        volume_id = ids[choice % len(ids)]
        return volume_id, self.state[volume_id]

    def table(self, volume_id: VolumeId) -> MapId:
        return self.store.catalog.volume(volume_id).map_id

    def attempt(self, needed_blocks: int, work: Callable[[], None]) -> bool:
        """Do it; if there was no space, prove that there really was none."""
        try:
            work()
        except NoSpace:
            self.store.checkpoint()
            self.store.reclaim_leases()
            free = sum(s.record.capacity_blocks - s.given_blocks for s in self.store.pool.volumes.values())
            assert free < needed_blocks + self.setup.options.reserve_blocks, (
                f"NoSpace for {needed_blocks} blocks, but {free} are free"
            )
            return False
        return True

    def compare(self) -> None:
        catalog = self.store.catalog
        assert {v.id: v.name for v in catalog.volumes.values() if v.name} == {i: m.name for i, m in self.state.items()}
        for volume_id, model in self.state.items():
            assert catalog.volume(volume_id).size_bytes == len(model.data)
            self.compare_bytes(self.table(volume_id), bytes(model.data))
            real = catalog.snapshots(volume_id)
            assert [s.name for s in real] == [s.name for s in model.snapshots]
            for snapshot, snapshot_model in zip(real, model.snapshots, strict=True):
                assert snapshot.size_bytes == len(snapshot_model.data)
                self.compare_bytes(snapshot.map_id, snapshot_model.data)
            self.compare_bookmarks(volume_id, model)

    def compare_bytes(self, table: MapId, expected: bytes) -> None:
        found = pools.read(self.store, table)
        if found != expected:
            at = next((i for i, (x, y) in enumerate(zip(found, expected, strict=False)) if x != y), -1)
            raise AssertionError(f"table {table >> 32}.{table & 0xFFFFFFFF}: {len(found)} bytes, differs at byte {at}")

    # Volumes

    @rule(name=st.sampled_from(NAMES), size=sizes)
    def create(self, name: str, size: int) -> None:
        if any(model.name == name for model in self.state.values()):
            with pytest.raises(AlreadyExists):
                pools.new_volume(self.store, name, size)
            return
        volume = pools.new_volume(self.store, name, size)
        assert volume.id not in self.given_out, "a volume id was used twice"
        self.state[volume.id] = VolumeModel(name, bytearray(size))

    @rule(name=st.sampled_from(NAMES), blocks=st.integers(0, 600), seed=st.integers(0, 50))
    def create_on_baseline(self, name: str, blocks: int, seed: int) -> None:
        if any(model.name == name for model in self.state.values()) or len(self.store.baselines) > 3:
            return
        data = content(seed, blocks * self.block)
        made = pools.new_volume_on(self.store, name, self.home, data)
        self.state[made.id] = VolumeModel(name, bytearray(data), origin=made.origin)

    @precondition(lambda self: self.state)
    @rule(choice=st.integers(0, 9), offset=offsets, length=lengths, seed=st.integers(0, 50))
    def write(self, choice: int, offset: int, length: int, seed: int) -> None:
        volume_id, model = self.pick(choice)
        data = content(seed, length)
        blocks = (offset + length - 1) // self.block - offset // self.block + 1
        trim_blocks = 1 if self.store.catalog.volume(volume_id).trim_from_bytes is not None else 0
        if self.attempt(blocks + trim_blocks, lambda: pools.write(self.store, self.table(volume_id), offset, data)):
            if offset + length > len(model.data):
                model.data.extend(bytes(offset + length - len(model.data)))
            model.data[offset : offset + length] = data
            model.touch(offset, offset + length, self.block)

    @precondition(lambda self: self.state)
    @rule(choice=st.integers(0, 9), offset=offsets, length=st.one_of(lengths, st.just(LARGEST)))
    def discard(self, choice: int, offset: int, length: int) -> None:
        volume_id, model = self.pick(choice)

        def work() -> None:
            done = offset
            for reached in pools.discard_steps(self.store, self.table(volume_id), offset, offset + length):
                end = min(reached, len(model.data))
                if end > done:
                    model.data[done:end] = bytes(end - done)
                    model.touch(done, end, self.block)
                done = reached

        self.attempt(2, work)

    @precondition(lambda self: self.state)
    @rule(choice=st.integers(0, 9), size=sizes)
    def resize(self, choice: int, size: int) -> None:
        self._resize(choice, size, finish=True)

    @precondition(lambda self: self.state)
    @rule(choice=st.integers(0, 9), size=sizes, steps=st.integers(0, 2))
    def shrink_in_part(self, choice: int, size: int, steps: int) -> None:
        """Leave a trim unfinished, as a crash would."""
        volume_id = self._resize(choice, size, finish=False)

        def work() -> None:
            for _ in range(steps):
                ranges.drive(self.store, lambda wait: ranges.trim(self.store, volume_id, wait=wait))

        self.attempt(1, work)

    def _resize(self, choice: int, size: int, *, finish: bool) -> VolumeId:
        volume_id, model = self.pick(choice)
        store = self.store

        def work() -> None:
            ranges.drive(store, lambda wait: volumes.resize(store, volume_id, size, shrink=True))
            model.touch(size, len(model.data), self.block)
            model.data[size:] = b""
            model.data.extend(bytes(size - len(model.data)))
            if finish:
                ranges.finish_trim(store, volume_id)

        self.attempt(1, work)
        return volume_id

    @precondition(lambda self: self.state)
    @rule(choice=st.integers(0, 9), name=st.sampled_from(NAMES), over=st.booleans())
    def rename(self, choice: int, name: str, over: bool) -> None:
        volume_id, model = self.pick(choice)
        taken = next((i for i, m in self.state.items() if m.name == name and i != volume_id), None)
        if taken is not None and (not over or self.state[taken].snapshots):
            with pytest.raises((AlreadyExists, Busy)):
                volumes.rename(self.store, volume_id, name, over=over)
            return
        volumes.rename(self.store, volume_id, name, over=over)
        model.name = name
        if taken is not None:
            del self.state[taken]

    @precondition(lambda self: self.state)
    @rule(first=st.integers(0, 9), second=st.integers(0, 9))
    def exchange(self, first: int, second: int) -> None:
        first_id, first_model = self.pick(first)
        second_id, second_model = self.pick(second)
        volumes.exchange(self.store, first_id, second_id)
        first_model.name, second_model.name = second_model.name, first_model.name

    @precondition(lambda self: self.state)
    @rule(choice=st.integers(0, 9), with_snapshots=st.booleans())
    def remove(self, choice: int, with_snapshots: bool) -> None:
        volume_id, model = self.pick(choice)
        if model.snapshots and (not with_snapshots or any(self.is_needed(s) for s in model.snapshots)):
            with pytest.raises(Busy):
                volumes.remove(self.store, volume_id, snapshots=with_snapshots)
            return
        volumes.remove(self.store, volume_id, snapshots=with_snapshots)
        del self.state[volume_id]

    @rule(steps=st.integers(1, 12), pages=st.integers(1, 2))
    def reclaim_in_part(self, steps: int, pages: int) -> None:
        for volume_id in sorted(self.store.catalog.volumes, reverse=True):
            for _ in range(steps):
                if volumes.reclaim(self.store, volume_id, pages):
                    break

    # Snapshots

    @precondition(lambda self: self.state)
    @rule(choices=st.lists(st.integers(0, 9), min_size=1, max_size=3), name=st.sampled_from(SNAPSHOT_NAMES))
    def take_snapshots(self, choices: list[int], name: str) -> None:
        wanted = dict(self.pick(choice) for choice in choices)
        if any(model.named(name) for model in wanted.values()):
            with pytest.raises(AlreadyExists):
                pools.take_snapshots(self.store, [(volume_id, name) for volume_id in wanted])
            return

        def work() -> None:
            taken = pools.take_snapshots(self.store, [(volume_id, name) for volume_id in wanted])
            for snapshot, model in zip(taken, wanted.values(), strict=True):
                model.snapshots.append(SnapshotModel(name, bytes(model.data), snapshot.map_id))
                model.generation = snapshot.generation

        self.attempt(len(wanted), work)  # to finish a trim may take a block

    def is_needed(self, model: SnapshotModel) -> bool:
        """Whether it is held or read from: a flattened clone does not read, once its old snapshots are gone."""
        return bool(model.holds) or any(
            other.origin == model.table and self.store.catalog.volume(i).origin for i, other in self.state.items()
        )

    @precondition(lambda self: any(m.snapshots for m in self.state.values()))
    @rule(choice=st.integers(0, 9), which=st.integers(0, 9), name=st.sampled_from(NAMES))
    def clone(self, choice: int, which: int, name: str) -> None:
        _, model = self.pick_with_snapshots(choice)
        origin = model.snapshots[which % len(model.snapshots)]
        real = self.store.catalog.snapshot_by_generation(*split_map_id(origin.table))
        if any(other.name == name for other in self.state.values()):
            with pytest.raises(AlreadyExists):
                clones.create(self.store, real, name)
            return
        made = clones.create(self.store, real, name)
        self.state[made.id] = VolumeModel(name, bytearray(origin.data), origin=origin.table)

    @precondition(lambda self: any(m.snapshots for m in self.state.values()))
    @rule(choice=st.integers(0, 9), which=st.integers(0, 9))
    def remove_snapshot(self, choice: int, which: int) -> None:
        volume_id, model = self.pick_with_snapshots(choice)
        index = which % len(model.snapshots)
        if self.is_needed(model.snapshots[index]):
            with pytest.raises(Busy):
                pools.remove_snapshot(self.store, volume_id, model.snapshots[index].name)
            return
        removed = model.snapshots.pop(index)
        if index:
            model.snapshots[index - 1].touched |= removed.touched
        pools.remove_snapshot(self.store, volume_id, removed.name)

    @precondition(lambda self: any(len(m.snapshots) > 1 for m in self.state.values()))
    @rule(choice=st.integers(0, 9), chosen=st.sets(st.integers(0, 3), min_size=1))
    def remove_a_set_of_snapshots(self, choice: int, chosen: set[int]) -> None:
        """All of them or none; what that frees is known before."""
        volume_id, model = self.pick_with_snapshots(choice)
        doomed = [snapshot for index, snapshot in enumerate(model.snapshots) if index in chosen]
        real = [self.store.catalog.snapshot(volume_id, snapshot.name) for snapshot in doomed]
        if any(self.is_needed(snapshot) for snapshot in doomed):
            with pytest.raises(Busy):
                removal.remove(self.store, real)
            return
        pools.reclaim(self.store)  # what was removed before is counted with that
        planned = removal.Freed()
        for planned in removal.plan(self.store, volume_id, {taken.generation for taken in real}):  # noqa: B007
            pass
        before = self.live_blocks()
        removal.remove(self.store, real)
        pools.reclaim(self.store)
        assert before - self.live_blocks() == planned.together
        for snapshot in doomed:
            index = model.snapshots.index(snapshot)
            if index:
                model.snapshots[index - 1].touched |= snapshot.touched
            del model.snapshots[index]

    def live_blocks(self) -> int:
        self.store.absorb()
        return sum(storage.live_blocks for storage in self.store.pool.volumes.values())

    @precondition(lambda self: any(m.snapshots for m in self.state.values()))
    @rule(choice=st.integers(0, 9), which=st.integers(0, 9), tag=st.sampled_from(["x", "y"]))
    def hold_or_release(self, choice: int, which: int, tag: str) -> None:
        volume_id, model = self.pick_with_snapshots(choice)
        snapshot = model.snapshots[which % len(model.snapshots)]
        if tag in snapshot.holds:
            holds.release(self.store, volume_id, snapshot.name, tag)
        else:
            with pytest.raises(HoldNotFound):
                holds.release(self.store, volume_id, snapshot.name, tag)
            holds.hold(self.store, volume_id, snapshot.name, tag)
        snapshot.holds ^= {tag}

    @precondition(lambda self: any(m.snapshots for m in self.state.values()))
    @rule(choice=st.integers(0, 9), which=st.integers(0, 9), since=st.integers(0, 9))
    def export(self, choice: int, which: int, since: int) -> None:
        """An older snapshot, made what a newer one is by what changed, is the newer one."""
        volume_id, model = self.pick_with_snapshots(choice)
        first, last = sorted((since % len(model.snapshots), which % len(model.snapshots)))
        real = self.store.catalog.snapshots(volume_id)
        held = bytearray(model.snapshots[first].data)
        size = len(model.snapshots[last].data)
        held[size:] = bytes(max(0, size - len(held)))
        for extent in pools.diff(self.store, real[first], real[last]):
            start, length = extent.offset_bytes, extent.length_bytes
            is_data = extent.address > HOLE
            held[start : start + length] = (
                pools.read(self.store, real[last].map_id, start, length) if is_data else bytes(length)
            )
        assert held == model.snapshots[last].data

    @precondition(lambda self: any(m.snapshots for m in self.state.values()))
    @rule(choice=st.integers(0, 9), which=st.integers(0, 9), name=st.sampled_from(SNAPSHOT_NAMES))
    def rename_snapshot(self, choice: int, which: int, name: str) -> None:
        volume_id, model = self.pick_with_snapshots(choice)
        renamed = model.snapshots[which % len(model.snapshots)]
        if model.named(name) not in (None, renamed):
            with pytest.raises(AlreadyExists):
                snapshots.rename(self.store, volume_id, renamed.name, name)
            return
        snapshots.rename(self.store, volume_id, renamed.name, name)
        renamed.name = name

    @precondition(lambda self: any(m.origin for m in self.state.values()))
    @rule(choice=st.integers(0, 9), steps=st.integers(0, 3), whole=st.booleans())
    def flatten(self, choice: int, steps: int | None, whole: bool) -> None:
        ids = sorted(i for i, m in self.state.items() if m.origin)
        volume_id = ids[choice % len(ids)]
        before = pools.read(self.store, self.table(volume_id))

        steps = None if whole else steps
        done = self.attempt(64, lambda: pools.flatten(self.store, volume_id, steps=steps))
        self.state[volume_id].touch(0, len(before), self.block)  # copies count as written
        if done and whole:
            origin = self.store.catalog.volume(volume_id).origin
            assert not origin or self.store.catalog.snapshots(volume_id, removed=True)
        assert pools.read(self.store, self.table(volume_id)) == before

    @precondition(lambda self: any(m.snapshots for m in self.state.values()))
    @rule(choice=st.integers(0, 9), which=st.integers(0, 9), force=st.booleans())
    def roll_back(self, choice: int, which: int, force: bool) -> None:
        volume_id, model = self.pick_with_snapshots(choice)
        index = which % len(model.snapshots)
        target, newer = model.snapshots[index], model.snapshots[index + 1 :]
        generation = split_map_id(target.table)[1]
        marks = [name for name, marked in model.bookmarks.items() if marked.generation > generation]
        try:
            pools.roll_back(self.store, volume_id, target.name, force=force)
        except Busy:
            gone = [v for v in self.store.catalog.volumes.values() if v.origin and not v.name]
            assert ((newer or marks) and not force) or any(self.is_needed(s) for s in newer) or gone
            return
        assert force or not (newer or marks)
        assert not any(self.is_needed(s) for s in newer)
        del model.snapshots[index + 1 :]
        model.data = bytearray(target.data)
        model.generation = self.store.catalog.volume(volume_id).last_generation
        for name in marks:
            del model.bookmarks[name]
        target.touched.update(*(s.touched for s in newer))

    def pick_with_snapshots(self, choice: int) -> tuple[VolumeId, VolumeModel]:
        ids = sorted(i for i, m in self.state.items() if m.snapshots)
        return ids[choice % len(ids)], self.state[ids[choice % len(ids)]]

    @precondition(lambda self: any(m.snapshots for m in self.state.values()))
    @rule(choice=st.integers(0, 9), older=st.integers(0, 9), newer=st.integers(0, 9))
    def diff(self, choice: int, older: int, newer: int) -> None:
        volume_id, model = self.pick_with_snapshots(choice)
        first, last = sorted((older % len(model.snapshots), newer % len(model.snapshots)))
        from_model, to_model = model.snapshots[first], model.snapshots[last]
        real = self.store.catalog.snapshots(volume_id)
        found = self.changed_blocks(real[first], real[last], to_model)
        touched = set().union(*(s.touched for s in model.snapshots[first:last]))
        assert found <= touched, f"blocks that nobody wrote: {sorted(found - touched)}"
        assert self.different(from_model.data, to_model.data) <= found

    def changed_blocks(self, older: Base, newer: Snapshot, to_model: SnapshotModel) -> set[int]:
        """Give the blocks that the log says were written between two points."""
        found: set[int] = set()
        position = 0
        for extent in pools.diff(self.store, older, newer):
            assert extent.offset_bytes >= position
            assert extent.length_bytes > 0
            position = extent.offset_bytes + extent.length_bytes
            found.update(range(extent.offset_bytes // self.block, -(-position // self.block)))
            if extent.address <= HOLE:
                assert not any(to_model.data[extent.offset_bytes : position])
        assert position <= len(to_model.data)
        return found

    # Bookmarks

    @precondition(lambda self: any(m.snapshots for m in self.state.values()))
    @rule(choice=st.integers(0, 9), which=st.integers(0, 9), name=st.sampled_from(BOOKMARK_NAMES))
    def bookmark(self, choice: int, which: int, name: str) -> None:
        volume_id, model = self.pick_with_snapshots(choice)
        marked = model.snapshots[which % len(model.snapshots)]
        real = self.store.catalog.snapshot(volume_id, marked.name)
        if name in model.bookmarks:
            with pytest.raises(AlreadyExists):
                bookmarks.create(self.store, real, name)
            return
        bookmarks.create(self.store, real, name)
        model.bookmarks[name] = BookmarkModel(real.generation, marked.data)

    @precondition(lambda self: any(m.bookmarks for m in self.state.values()))
    @rule(choice=st.integers(0, 9), which=st.integers(0, 9))
    def remove_bookmark(self, choice: int, which: int) -> None:
        ids = sorted(i for i, m in self.state.items() if m.bookmarks)
        volume_id = ids[choice % len(ids)]
        model = self.state[volume_id]
        name = sorted(model.bookmarks)[which % len(model.bookmarks)]
        bookmarks.remove(self.store, volume_id, name)
        del model.bookmarks[name]

    def compare_bookmarks(self, volume_id: VolumeId, model: VolumeModel) -> None:
        """From each bookmark to each newer snapshot: exactly what was written, whatever was removed."""
        catalog = self.store.catalog
        assert {n: b.generation for b in catalog.bookmarks(volume_id) for n in b.names} == {
            name: marked.generation for name, marked in model.bookmarks.items()
        }
        for name, marked in model.bookmarks.items():
            for real, to_model in zip(catalog.snapshots(volume_id), model.snapshots, strict=True):
                if real.generation < marked.generation:
                    continue
                found = self.changed_blocks(catalog.base(volume_id, f"#{name}"), real, to_model)
                between = [b for g, b in model.touched.items() if marked.generation <= g < real.generation]
                unwritten = found.difference(*between)
                assert not unwritten, f"from {name}: blocks that nobody wrote: {sorted(unwritten)}"
                assert self.different(marked.data, to_model.data) <= found

    def different(self, old: bytes, new: bytes) -> set[int]:
        blocks = range(-(-len(new) // self.block))
        old = old[: len(new)].ljust(len(new), b"\0")
        return {i for i in blocks if old[i * self.block :][: self.block] != new[i * self.block :][: self.block]}

    # Where data lies

    @precondition(lambda self: self.state and self.setup.storages > 1)
    @rule(choice=st.integers(0, 9), columns=st.integers(1, 3), unit=st.sampled_from([1, 2, 16]))
    def stripe(self, choice: int, columns: int, unit: int) -> None:
        volume_id, _ = self.pick(choice)
        count = min(columns, self.setup.storages)
        stripes.set_count(self.store, volume_id, count, unit_bytes=unit * self.block)

    @precondition(lambda self: self.state and self.setup.storages > 1)
    @rule(source=st.integers(1, 3), slots=st.integers(1, 20))
    def move_blocks(self, source: int, slots: int) -> None:
        """Move some of what lies on a storage volume, wherever it is seen."""
        self.finish_phases()
        left = slots

        def wish(volume: Volume, virtual_block: int, storage_id: StorageId) -> int | None:
            nonlocal left
            column = relocation.leave(StorageId(source))(volume, virtual_block, storage_id)
            left -= column is not None
            return column if left >= 0 else None

        pools.relocate(self.store, wish)

    @precondition(lambda self: self.state and not isinstance(self.store.plane, DataPlane))
    @rule(choice=st.integers(0, 9))
    def sync_past_python(self, choice: int) -> None:
        """Do what a hot thread does at an fsync."""
        volume_id, _ = self.pick(choice)
        self.store.serve(self.table(volume_id))
        self.store.lend_journal()
        plane = self.store.plane
        assert not isinstance(plane, DataPlane)
        if plane._sync(self.table(volume_id)):
            self.committed = copy.deepcopy(self.state)
            self.given_out |= set(self.committed)

    # Looking

    @rule()
    def read_everything(self) -> None:
        self.compare()

    @precondition(lambda self: self.state)
    @rule(choice=st.integers(0, 9), offset=offsets, length=lengths)
    def read_part(self, choice: int, offset: int, length: int) -> None:
        volume_id, model = self.pick(choice)
        found = pools.read(self.store, self.table(volume_id), offset, length)
        assert found == bytes(model.data[offset : offset + length])

    @precondition(lambda self: self.state)
    @rule(choice=st.integers(0, 9), which=st.integers(0, 3), start=offsets)
    def look_for_holes(self, choice: int, which: int, start: int) -> None:
        volume_id, model = self.pick(choice)
        table, data = self.table(volume_id), bytes(model.data)
        if which < len(model.snapshots):
            table, data = self.store.catalog.snapshots(volume_id)[which].map_id, model.snapshots[which].data
        position, stored = 0, bytearray(len(data))
        for extent in extents.extents(self.store, table):
            assert extent.offset_bytes == position
            assert extent.length_bytes > 0
            position += extent.length_bytes
            if extent.address > HOLE:
                stored[extent.offset_bytes : position] = b"\1" * extent.length_bytes
            else:
                assert not any(data[extent.offset_bytes : position]), "a hole that is not zeros"
        assert position == len(data)
        for wanted in (True, False):
            at = stored.find(b"\1" if wanted else b"\0", start)
            if at < 0 and not wanted and start < len(data):
                at = len(data)
            assert self.seek(table, start, data=wanted) == at

    def seek(self, table: MapId, offset: int, *, data: bool) -> int:
        found = False
        try:
            while not found:
                found, offset = extents.seek(self.store, table, offset, data=data)
        except NoData:
            return -1
        return offset

    # Commits, whole and in parts

    @rule()
    def seal(self) -> None:
        self.store.absorb()

    @rule()
    def commit(self) -> None:
        self.finish_phases()
        self.store.commit()
        self.committed = copy.deepcopy(self.state)

    @rule()
    def checkpoint(self) -> None:
        self.store.checkpoint()
        self.committed = copy.deepcopy(self.state)
        report = pools.run_check(self.store)
        assert report.is_clean, report.problems

    @precondition(lambda self: self.commit_begun is None and self.checkpoint_phase in ("", "folding"))
    @rule()
    def begin_commit(self) -> None:
        self.commit_begun = self.store.begin_commit()

    @precondition(lambda self: self.commit_begun is not None)
    @rule()
    def end_commit(self) -> None:
        assert self.commit_begun is not None
        self.commit_begun.run()
        self.store.end_commit(self.commit_begun)
        self.commit_begun = None

    @precondition(lambda self: self.commit_begun is None and not self.checkpoint_phase)
    @rule()
    def begin_checkpoint(self) -> None:
        self.checkpoint_begun = self.store.begin_checkpoint(new_nonce())
        self.checkpoint_phase = "committing"

    @precondition(lambda self: self.checkpoint_phase)
    @rule()
    def go_on_with_checkpoint(self) -> None:
        self._next_phase()

    def _next_phase(self) -> None:
        checkpoint, store = self.checkpoint_begun, self.store
        assert checkpoint is not None
        if self.checkpoint_phase == "committing":
            checkpoint.run_commit()
            store.end_checkpoint_commit(checkpoint)
            self.checkpoint_phase = "folding"
        else:
            checkpoint.reserve()
            checkpoint.run_fold()
            store.end_checkpoint(checkpoint)
            self.checkpoint_phase = ""

    def finish_phases(self) -> None:
        if self.commit_begun is not None:
            self.end_commit()
        while self.checkpoint_phase:
            self._next_phase()
        if self.punching is not None:
            self.end_giving_back()

    # Free blocks go back to the host

    @precondition(lambda self: self.punching is None)
    @rule(is_settled=st.booleans(), runs=st.integers(1, 4), blocks=st.integers(4, 40))
    def begin_giving_back(self, is_settled: bool, runs: int, blocks: int) -> None:
        if is_settled:
            self.store.pool.reuse.settle()
        else:
            self.store.pool.reuse.hurry(self.store.pool.volumes)
        self.punching = self.store.pool.reuse.plan(runs, blocks)
        assert len(self.punching.runs) <= runs
        assert sum(count for _, _, count in self.punching.runs) <= blocks

    @precondition(lambda self: self.punching is not None)
    @rule()
    def end_giving_back(self) -> None:
        assert self.punching is not None
        self.store.pool.reuse.punch(self.punching)
        self.store.pool.reuse.punched(self.punching)
        self.punching = None

    # Crashes

    @rule(late=st.booleans())
    def crash(self, late: bool) -> None:
        """Die; ``late`` is after a running commit or fold reached the disk but before it was noted."""
        if late and self.commit_begun is not None:
            self.commit_begun.run()
            assert self.begun is not None
            self.committed = self.begun
        elif late and self.checkpoint_phase == "committing":
            assert self.checkpoint_begun is not None
            if self.checkpoint_begun.commit is not None:
                self.checkpoint_begun.commit.run()
                assert self.begun is not None
                self.committed = self.begun
        elif late and self.checkpoint_phase == "folding":
            assert self.checkpoint_begun is not None
            self.checkpoint_begun.run_fold()
        self.store.abandon()
        self.state = copy.deepcopy(self.committed)
        self.open()
        self.after_open()

    @rule()
    def reopen(self) -> None:
        self.finish_phases()
        self.store.close()
        self.committed = copy.deepcopy(self.state)
        self.open()
        self.after_open()

    def after_open(self) -> None:
        report = pools.run_check(self.store)
        assert report.is_clean, report.problems
        self.compare()

    # Always

    @invariant()
    def memory_is_consistent(self) -> None:
        if hasattr(self, "store"):
            pools.check_memory(self.store, self.punching)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # shrinking a failure takes minutes
def test_core_behaves_like_the_model() -> None:
    """INCFS_TEST_PROFILE=long tries more, and other, stories."""
    is_long = os.environ.get("INCFS_TEST_PROFILE") == "long"
    run_state_machine_as_test(
        CoreMachine,
        settings=settings(max_examples=5000 if is_long else 500, stateful_step_count=60 if is_long else 40),
    )
