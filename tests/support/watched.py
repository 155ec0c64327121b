"""A workload whose every step may fail, and what the pool must hold after each."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from random import Random
from typing import Protocol

from incfs import snapshot as snapshots
from incfs import volume as volumes
from incfs.errors import IncfsError
from incfs.model import MapId
from incfs.store import Store
from tests.support import pools


class Faults(Protocol):
    """What lets steps fail."""

    met: int
    """How often something has failed."""

    def undisturbed(self) -> AbstractContextManager[None]:
        """Let nothing fail for a while."""


class Watched:
    """A pool under faults, and what it must hold."""

    def __init__(self, store: Store, faults: Faults) -> None:
        self.store = store
        self.faults = faults
        self.expected: dict[str, bytes] = {}
        self.refusals: list[IncfsError] = []

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Do something that may fail, then compare everything."""
        try:
            yield
        except IncfsError as error:
            self._note(error)
        self.compare()

    def _note(self, refusal: IncfsError) -> None:
        assert self.faults.met, f"failed without a fault: {refusal}"
        self.refusals.append(refusal)

    def compare(self) -> None:
        with self.faults.undisturbed():
            for volume in [v for v in self.store.catalog.volumes.values() if v.name]:
                assert self._read(volume.map_id) == self.expected[volume.name], f"wrong bytes in {volume.name}"
                for taken in self.store.catalog.snapshots(volume.id):
                    name = f"{volume.name}@{taken.name}"
                    assert self._read(taken.map_id) == self.expected[name], f"wrong bytes in {name}"

    def _read(self, table: MapId) -> bytes:
        return pools.read(self.store, table)

    def create(self, name: str) -> None:
        with self.refusing():
            pools.new_volume(self.store, name)
            self.expected[name] = b""

    def write(self, name: str, offset: int, data: bytes) -> None:
        if not self.store.catalog.has_name(name):
            return
        volume = self.store.catalog.volume_named(name)
        before = self.expected[name]
        after = before.ljust(offset + len(data), b"\0")
        after = after[:offset] + data + after[offset + len(data) :]
        self.expected[name] = after
        try:
            pools.write(self.store, volume.map_id, offset, data)
        except IncfsError as error:
            self._note(error)
            with self.faults.undisturbed():
                self.expected[name] = self._mixture(self._read(volume.map_id), before, after)
        self.compare()

    @staticmethod
    def _mixture(found: bytes, before: bytes, after: bytes) -> bytes:
        """After a write that failed each block is the old or the new one; a part of a volume's end is zeros."""
        assert len(found) in (len(before), len(after))
        before = before.ljust(len(after), b"\0")
        for start in range(0, len(found), pools.BLOCK):
            end = min(len(found), start + pools.BLOCK)
            # A rewrite in place may have been cut off inside of a block: nothing of it was acknowledged.
            pairs = zip(found[start:end], before[start:end], after[start:end], strict=True)
            assert all(byte in either for byte, *either in pairs), f"wrong byte in the block at {start}"
        return found

    def snapshot(self, name: str) -> None:
        with self.refusing():
            live = [v for v in self.store.catalog.volumes.values() if v.name]
            if live:
                snapshots.create(self.store, [(v.id, name) for v in live])
                self.expected |= {f"{v.name}@{name}": self.expected[v.name] for v in live}

    def run(self, step: Callable[[Store], object]) -> None:
        with self.refusing():
            step(self.store)


def workload(watched: Watched) -> None:
    """Everything that the seam has: both kinds of commit, growth, checkpoints, folding, punching, reading back."""
    for number, name in enumerate("ab"):
        watched.create(name)
        watched.write(name, 100, Random(number).randbytes(1500))
        watched.run(Store.commit)
    watched.snapshot("s")
    watched.write("a", 130, Random(5).randbytes(300))
    watched.write("a", 150, Random(6).randbytes(100))
    watched.run(Store.commit)
    watched.write("b", 0, Random(7).randbytes(900))
    watched.run(Store.checkpoint)
    watched.run(lambda s: read_all(s, watched))
    watched.run(lambda s: pools.remove_snapshot(s, s.catalog.volume_named("a").id, "s"))
    watched.run(pools.reclaim)
    watched.run(Store.commit)
    watched.write("a", 0, Random(8).randbytes(1700))
    watched.run(Store.checkpoint)
    watched.run(pools.give_back)
    watched.write("b", 500, Random(9).randbytes(200))
    watched.run(lambda s: volumes.rename(s, s.catalog.volume_named("b").id, "b"))
    watched.run(Store.commit)


def read_all(store: Store, watched: Watched) -> None:
    for volume in [v for v in store.catalog.volumes.values() if v.name]:
        assert pools.read(store, volume.map_id) == watched.expected[volume.name]
