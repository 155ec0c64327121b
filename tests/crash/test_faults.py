"""The host fails at every n-th operation: never a wrong byte, never a false success, and a way back (I10)."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest

from incfs.backing import Backing, File
from incfs.errors import BackingError, IncfsError, NoSpace, NotFound, PoolReadOnly
from incfs.store import Store
from tests.support import pools
from tests.support.faults import ACTIONS, NO_ROOM, Fault, FaultyBacking
from tests.support.figures import FIGURES
from tests.support.media import Media
from tests.support.power import Machine
from tests.support.recorder import Recorder, make_media
from tests.support.simulator import Simulator
from tests.support.watched import Watched, workload

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CUTS = 6
"""States of the power cut that follows each run."""


OPTIONS = {
    "flush-images": pools.tiny_options(small_commit_bytes=0, extend_bytes=1024),
    "both-ways": pools.tiny_options(small_commit_bytes=500, extend_bytes=1024),
}


class Faults:
    """Runs the workload under one fault after the other."""

    def __init__(self, home: Path, media: Media, kind: str) -> None:
        self._home = home
        self._media = media
        self._options = OPTIONS[kind]
        self._simulator = Simulator(home / "cut", self._options)
        self.counts = self.run(None)

    def run(self, fault: Fault | None) -> dict[str, int]:
        """Run it, judge it, and give how many operations of each kind there were."""
        root = self._home / "real"
        backing = FaultyBacking(root)
        with Recorder(root, self._media, self._options, backing) as recorder:
            watched = Watched(recorder.store, backing)
            backing.arm(fault)
            workload(watched)
            judge(watched, backing, fault)
            counts = dict(backing.counts)
            if watched.store.failure is None:
                go_on(watched)
        self._come_back(recorder)
        return counts

    def _come_back(self, recorder: Recorder) -> None:
        """The cause is gone: whatever is on the disk now, nothing that was acknowledged is lost."""
        machine, durable = Machine(recorder.media), 0
        for event in recorder.backing.events:
            machine.play(event)
            if event.kind == "mark" and event.note[0] == "durable":
                durable = event.note[1]
        allowed = frozenset(recorder.points[durable:])
        for media in machine.cuts(CUTS, Random(0)):
            outcome = self._simulator.judge(media)
            assert not outcome.problem, outcome.problem
            assert outcome.found in allowed, "what an fsync acknowledged is lost"


def judge(watched: Watched, backing: FaultyBacking, fault: Fault | None) -> None:
    """Is the pool read-only exactly when it must be?"""
    failure = watched.store.failure
    if fault is None or not backing.met:
        assert failure is None
        assert not watched.refusals
        return
    is_room = fault.host_errno in NO_ROOM
    if fault.action in ("punch", "reserve", "grow") or (fault.action in ("write", "commit") and is_room):
        assert failure is None, "nothing was harmed, but the pool is read-only"
    elif fault.action in ("write", "sync", "commit"):
        assert failure is not None, "the pool goes on after a failed write, sync or commit"
    if failure is not None:
        with pytest.raises(PoolReadOnly):
            watched.store.commit()
    for refusal in watched.refusals:
        assert isinstance(refusal, (NoSpace, BackingError, PoolReadOnly, NotFound)), repr(refusal)


def go_on(watched: Watched) -> None:
    """The cause is gone: the same pool takes everything again, without being opened anew."""
    with watched.faults.undisturbed():
        watched.store.checkpoint()
        assert watched.store.refused is None
        assert watched.store.no_room is None
        assert not watched.store.has_unfolded
        refusals = len(watched.refusals)
        if not watched.store.catalog.has_name("c"):
            watched.create("c")
        watched.write("c", 10, b"it goes on")
        watched.run(Store.commit)
        watched.run(Store.checkpoint)
        assert len(watched.refusals) == refusals
        pools.check_clean(watched.store)


@pytest.mark.parametrize("kind", OPTIONS)
def test_each_operation_fails_once(pool_home: Path, kind: str) -> None:
    faults = Faults(pool_home, make_media(pool_home / "real", storages=2), kind)
    assert set(ACTIONS) - {"resize"} <= faults.counts.keys()
    for action, count in faults.counts.items():
        for number in range(count):
            for fault in variants(action, number):
                try:
                    faults.run(fault)
                except AssertionError as error:
                    raise AssertionError(f"{fault}: {error}") from error
                FIGURES["faults injected"] += 1


def variants(action: str, number: int) -> Iterator[Fault]:
    for code in (errno.EIO, *NO_ROOM) if action != "read" else (errno.EIO,):
        for lasts in (False, True):
            yield Fault(action, number, code, lasts=lasts)
            if action == "write":
                yield Fault(action, number, code, lasts=lasts, partly=True)


def test_each_operation_of_a_recovery_fails(pool_home: Path) -> None:
    """It says so, and the next one ends as if nothing had been."""
    media = make_media(pool_home / "real")
    options = OPTIONS["both-ways"]
    with Recorder(pool_home / "real", media, options) as recorder:
        watched = Watched(recorder.store, FaultyBacking(pool_home / "unused"))
        watched.create("a")
        for number in range(3):
            watched.write("a", number * 200, Random(number).randbytes(150 * number + 100))
            watched.run(Store.commit)
    *_, last = recorder.cuts()
    _, media = islice(last.machine.cuts(4, Random(0)), 2)  # what was not synced is gone: recovery must write it
    simulator = Simulator(pool_home / "cut", options)
    expected = simulator.judge(media)
    backing = FaultyBacking(pool_home / "real")
    for action, count in operations_of_opening(backing, media).items():
        for fault in (fault for number in range(count) for fault in variants(action, number)):
            backing.load(media)
            backing.arm(fault)
            with backing.recording_tables():
                try_to_open(backing, fault)
            machine = Machine(media)
            for event in backing.events:
                machine.play(event)
            for found in machine.cuts(CUTS, Random(0)):
                assert simulator.judge(found) == expected, f"{fault}: recovered differently afterwards"
            FIGURES["faults injected"] += 1


def operations_of_opening(backing: FaultyBacking, media: Media) -> dict[str, int]:
    backing.load(media)
    backing.arm(None)
    pools.open_tiny(backing.root / "pool", OPTIONS["both-ways"], backing).abandon()
    return dict(backing.counts)


def try_to_open(backing: FaultyBacking, fault: Fault) -> None:
    try:
        pools.open_tiny(backing.root / "pool", OPTIONS["both-ways"], backing).abandon()
    except IncfsError:
        assert backing.met
    else:
        is_room = fault.action == "reserve" and fault.host_errno in NO_ROOM  # it stays in the journal
        is_ahead = fault.action == "grow" or (fault.action == "reserve" and fault.number)  # for what comes later
        assert fault.action == "punch" or is_room or is_ahead, f"{fault}: opened as if nothing had been"


class HalfFile(File):
    """A file whose host reads and writes half of what it is asked to, each time."""

    def _call(self, action: str, function: Callable[..., Any], *arguments: Any) -> Any:
        match action, arguments:
            case "write", (fd, data, offset):
                arguments = fd, memoryview(data)[: (len(data) + 1) // 2], offset
            case "read", (fd, length, offset):
                arguments = fd, (length + 1) // 2, offset
        return super()._call(action, function, *arguments)


class HalfBacking(Backing):
    """Hands them out."""

    met = 0

    def _open(self, path: Path, flags: int) -> File:
        plain = super()._open(path, flags)
        fd = os.dup(plain.fileno())
        plain.close()
        return HalfFile(path, fd)

    undisturbed = staticmethod(nullcontext)


@pytest.mark.parametrize("kind", OPTIONS)
def test_short_counts_are_made_whole(pool_home: Path, kind: str) -> None:
    backing = HalfBacking()
    pool = pools.make_pool(pool_home, storages=2, backing=backing)
    store = pools.open_tiny(pool, OPTIONS[kind], backing)
    watched = Watched(store, backing)
    workload(watched)
    assert store.failure is None
    watched.store = pools.crash(store)
    watched.compare()
    pools.check_clean(watched.store)
    watched.store.abandon()


def test_a_host_that_writes_nothing_ends_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Backing().create(tmp_path / "file")
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(BackingError):
        file.pwrite(0, b"x")
    file.close()
