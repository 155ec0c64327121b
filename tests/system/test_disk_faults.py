"""The disk below the daemon fails: each read, write, flush and allocation of a small work once, in C and Python alike.

The pool lies on a filesystem of the tests' own (``faulty_fs``), the real daemon works on top, its native data plane and
lane included.  A fixed work on one volume is done beside a plain model of it; one operation of the disk fails (EIO,
ENOSPC, EDQUOT), is short, or hangs.  What is read is right or an error; after the first failed write or flush the pool
is read-only (I10), but a full disk harms nothing; what was acknowledged is there as soon as the cause is gone.

INCFS_KILL_ROUNDS sets how many faults are tried; a short run takes a spread of them.
"""

import ctypes
import errno
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio

from incfs import volume as volumes
from incfs.errors import IncfsError
from incfs.model import StorageId
from incfs.options import Options
from incfs.recovery import create_pool, open_store
from incfs.service import open_service
from tests.mount.test_fusext import KEEP_SIZE, PUNCH_HOLE, libc
from tests.support.beside import beside
from tests.support.faulty_fs import KINDS, LEG_NAME, Fault, Switch, faulty
from tests.support.fire import START_TIMEOUT_S, Setting, Target
from tests.support.spawner import Spawner

ROUNDS = int(os.environ.get("INCFS_KILL_ROUNDS", "32"))
SEED = int(os.environ.get("INCFS_KILL_SEED", "1"))
BLOCK = 4096
SECTOR = 512
SIZE = 48 * BLOCK
NAME = "v"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EIO, errno.EROFS, *NO_ROOM)
JOURNAL_BYTES = 256 << 10
LEG_ACTIONS = ("read", "write", "sync")
WORK = (
    *("write", "fsync", "write", "write", "fsync", "large", "read", "fsync", "write", "snapshot", "write", "read"),
    *("fsync", "punch", "write", "fsync", "checkpoint", "write", "fsync", "large", "read", "fsync", "large", "write"),
    *("read", "fsync", "write"),
)
"""About 50 operations of an image, 50 of the journal, 20 of the tables; the end of the daemon included."""


class Work:
    """Changes a volume, and a plain model of it in the same way.

    Args:
        target: The mounted pool.
        rng: What to write where.
    """

    def __init__(self, target: Target, rng: random.Random) -> None:
        self.target, self.rng = target, rng
        self.states = [bytes(SIZE)]
        """Content after each change."""
        self.acknowledged = 0
        """The state that is durable at least."""
        self.frozen: int | None = None
        """State of the snapshot, if it was asked for."""
        self.refusals: list[tuple[str, int]] = []
        self.is_unknown = False
        """A change was refused, and so was the reading of what it left."""

    @contextmanager
    def opened(self) -> Iterator[None]:
        self.fd = os.open(self.target.mountpoint / NAME, os.O_RDWR)
        try:
            yield
        finally:
            with suppress(OSError):  # what was refused may be told here again
                os.close(self.fd)

    def run(self) -> None:
        """Do all of it, whatever is refused."""
        for name in WORK:
            if self.is_unknown:
                return
            try:
                getattr(self, name)()
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                self.refusals.append((name, error.errno or 0))
            except (IncfsError, ExceptionGroup) as error:
                self.refusals.append((name, errno_of(error)))

    def write(self) -> None:
        """Write whole blocks, or any bytes."""
        length = self.rng.choice([BLOCK, 2 * BLOCK, self.rng.randrange(1, 5 * BLOCK)])
        offset = self.rng.randrange(SIZE - length)
        self.put(offset // BLOCK * BLOCK if length % BLOCK == 0 else offset, length)

    def large(self) -> None:
        self.put(BLOCK * self.rng.randrange(20), 24 * BLOCK)

    def put(self, offset: int, length: int) -> None:
        data = self.rng.randbytes(length)

        def write() -> None:
            done = 0
            while done < length:
                done += os.pwrite(self.fd, data[done:], offset + done)

        self.change(offset, data, write)

    def punch(self) -> None:
        offset, length = self.rng.randrange(10 * BLOCK), self.rng.randrange(BLOCK, 20 * BLOCK)

        def punch() -> None:
            if libc.fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))

        self.change(offset, bytes(length), punch)

    def change(self, offset: int, data: bytes, do: Callable[[], None]) -> None:
        """Make a change; one that was refused may have been made in part."""
        old = self.states[-1]
        new = old[:offset] + data + old[offset + len(data) :]
        try:
            do()
        except OSError:
            self.states.append(self.settle(old, new))
            raise
        self.states.append(new)

    def settle(self, old: bytes, new: bytes) -> bytes:
        try:
            found = self.read_all()
        except OSError:
            self.is_unknown = True
            return new
        for at in range(0, SIZE, SECTOR):
            assert found[at : at + SECTOR] in (old[at : at + SECTOR], new[at : at + SECTOR]), f"garbage at {at}"
        return found

    def fsync(self) -> None:
        os.fsync(self.fd)
        if self.is_sure:
            self.acknowledged = len(self.states) - 1

    @property
    def is_sure(self) -> bool:
        """Whether success covers all before: the kernel tells once of pages that it could not write."""
        return self.target.setting.cache == "none" or not self.refusals

    def snapshot(self) -> None:
        taken = len(self.states) - 1
        self.frozen = taken if self.is_sure else None
        (self.target.mountpoint / ".snapshots" / NAME / "s").touch()
        if self.is_sure:
            self.acknowledged = taken

    def checkpoint(self) -> None:
        self.target.call("debug.dump")

    def read(self) -> None:
        length = self.rng.randrange(1, 9 * BLOCK)
        offset = self.rng.randrange(SIZE - length)
        assert os.pread(self.fd, length, offset) == self.states[-1][offset : offset + length], "wrong data"

    def read_all(self) -> bytes:
        with open(self.target.mountpoint / NAME, "rb") as file:
            return file.read()


def all_faults(counts: dict[tuple[str, str], int]) -> Iterator[Fault]:
    """Yield what can happen to each operation of the work."""
    for (file, action), count in counts.items():
        if (file, action) == ("tables", "read"):
            continue  # LMDB maps them: a disk that does not give a page ends the daemon (SAFETY.md, "Not promised")
        for number in range(count):
            fault = Fault(file, action, number)
            codes = (errno.EIO,) if action == "read" else (errno.EIO, *NO_ROOM)
            for code in codes:
                yield replace(fault, host_errno=code)
                yield replace(fault, host_errno=code, lasts=True)
                if action == "write" and file != "tables":
                    yield replace(fault, host_errno=code, partly=True)
            if action in ("read", "write") and file != "tables":  # what is cached is whole
                yield replace(fault, way="short")
            if (file, action) in (("image", "read"), ("journal", "sync"), ("image", "sync")):
                yield replace(fault, way="hangs")


@dataclass
class Rig:
    """A pool on a disk that fails, made anew for each fault."""

    home: Path
    disk: Path
    mountpoint: Path
    cache: str
    spawner: Spawner
    switch: Switch
    counts: Counter[str] = field(default_factory=Counter)
    is_mirrored: bool = False

    def make_template(self) -> None:
        """Make the pool that each run gets a copy of."""
        create_pool(self.home / "template", journal_bytes=JOURNAL_BYTES)
        with open_store(self.home / "template", Options()) as store:
            volumes.create(store, NAME, SIZE, mode=0o600, uid=0, gid=0)

    def mirror_template(self) -> None:
        """Let it have a mirror, and nothing else."""
        images = self.home / "template" / "images"

        async def run() -> None:
            async with open_service(images.parent) as service:
                await service.upkeep.add_storage(str(images / "m.img"), mirrors=[str(images / LEG_NAME)], force=True)
                await service.upkeep.evacuate(StorageId(1), rate_bytes=None, progress=lambda *_: None)
                await service.upkeep.remove_storage(StorageId(1))

        trio.run(run)
        self.is_mirrored = True

    def run(self, fault: Fault | None) -> dict[tuple[str, str], int]:
        """Do the work under a fault, judge it, and count the operations."""
        shutil.rmtree(self.home / "disk/pool", ignore_errors=True)
        shutil.copytree(self.home / "template", self.home / "disk/pool")
        target = Target(self.home, self.mountpoint, Setting(BLOCK, self.cache), self.spawner, pool=self.disk / "pool")
        work = Work(target, random.Random(SEED))
        try:
            target.log.write_text("")
            target.mount()
            self.switch.arm(fault)
            with going_on(target, self.switch, fault):
                self.work(work, fault)
            counts = {kind: self.switch.counts[index] for index, kind in enumerate(KINDS)}
            self.come_back(work)
        except BaseException as error:
            error.add_note(f"{fault}, met {self.switch.met} times; refused {work.refusals}\n{target.log.read_text()}")
            raise
        finally:
            self.switch.heal()
            target.take_down()
        return counts

    def work(self, work: Work, fault: Fault | None) -> None:
        """Do the work, see what it did to the pool, and end the daemon."""
        target = work.target
        with work.opened():
            work.run()
        if self.is_mirrored:
            assert not target.call("pool.show")["pool"]["read_only"]
            assert not work.refusals, "the other leg is sound"
        elif fault is not None and self.switch.met:
            judge(target, fault, work.refusals)
        else:
            assert not target.call("pool.show")["pool"]["read_only"]
            assert not work.refusals
            self.counts["fsyncs past Python"] += target.call("pool.activity")["activity"]["data_plane"]["syncs"]
        if fault is None or fault.action != "read":
            assert work.read_all() == work.states[-1] or (self.cache != "none" and self.switch.met), "wrong data"
        target.signal(signal.SIGTERM)
        target.wait_for_end()

    def come_back(self, work: Work) -> None:
        """The cause is gone: what was acknowledged is there, and more can be written."""
        target = work.target
        told = target.log.read_text()
        has_failed = "read-only from now on" in told or "has no room for metadata" in told
        self.switch.heal()
        target.log.write_text("")
        target.mount()
        found = work.read_all()
        allowed = work.states[work.acknowledged :] if has_failed else work.states[-1 - work.is_unknown :]
        if self.cache == "none" or not self.switch.met:
            assert found in allowed, difference(found, allowed, work)
        else:
            assert is_made_of(found, work.states[work.acknowledged :]), "a block is of another time"
        snapshot = target.mountpoint / ".snapshots" / NAME / "s"
        if snapshot.exists() and work.frozen is not None:
            assert snapshot.read_bytes() == work.states[work.frozen], "the snapshot is another one"
        target.check_pool()
        with open(target.mountpoint / NAME, "r+b", buffering=0) as file:
            file.write(b"it goes on")
            os.fsync(file)
        target.kill()


def errno_of(error: Exception) -> int:
    """Give the errno of what a command was refused with; anything but that is raised."""
    cause: BaseException = error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if not isinstance(cause, IncfsError):
        raise error
    return cause.errno


def difference(found: bytes, allowed: list[bytes], work: Work) -> str:
    """Say in which blocks what was found differs from each state that may be."""
    starts = range(0, SIZE, BLOCK)
    differing = [
        [at // BLOCK for at in starts if found[at : at + BLOCK] != state[at : at + BLOCK]] for state in allowed
    ]
    known = [number for number, state in enumerate(work.states) if state == found]
    return f"{len(found)} bytes are state {known}, differ from those allowed in blocks {differing}"


def is_made_of(found: bytes, states: list[bytes]) -> bool:
    """Tell whether each block is as it was in one of the states: the kernel writes in an order of its own."""
    starts = range(0, SIZE, BLOCK)
    return all(any(found[at : at + BLOCK] == state[at : at + BLOCK] for state in states) for at in starts)


def judge(target: Target, fault: Fault, refusals: list[tuple[str, int]]) -> None:
    """Is the pool read-only exactly when it must be (I10)?"""

    def is_read_only() -> bool:
        return bool(target.call("pool.show")["pool"]["read_only"])

    if fault.way != "fails":
        assert not is_read_only()
        assert not refusals, "what was only late or in pieces was refused"
    elif fault.host_errno in NO_ROOM and (
        (fault.file == "image" and fault.action in ("write", "allocate"))
        or (fault.file == "journal" and fault.action in ("write", "allocate"))
    ):
        assert not is_read_only(), "a full disk harms nothing"
        assert {code for _, code in refusals} <= {*NO_ROOM}
    elif fault.host_errno in NO_ROOM and fault.file == "tables":
        pass  # LMDB gives a transaction up, but for its last write, after which it gives itself up
    elif fault.action in ("write", "sync"):
        deadline = time.monotonic() + START_TIMEOUT_S  # the owner thread hears of it after whoever waited
        while not is_read_only():
            assert time.monotonic() < deadline, "the pool goes on after a failed write or flush"


@contextmanager
def going_on(target: Target, switch: Switch, fault: Fault | None) -> Iterator[None]:
    """While an operation of the disk hangs others are served; then it goes on."""
    if fault is None or fault.way != "hangs":
        yield
        return
    stuck: list[bool] = []

    def ask() -> None:
        with suppress(OSError, IncfsError, ExceptionGroup):  # it may be ending
            (target.mountpoint / ".incfs" / "stats.json").read_bytes()
            target.call("pool.show")

    def watch(is_over: threading.Event) -> None:
        while not switch.met and not is_over.wait(0.002):
            pass
        asker = threading.Thread(target=ask, daemon=True)
        asker.start()
        asker.join(START_TIMEOUT_S)
        stuck.append(asker.is_alive())
        switch.heal()

    with beside(watch):
        yield
    assert not any(stuck), "others wait for an operation of the disk that hangs"


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600 + 3 * ROUNDS)
@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_each_operation_of_the_disk_below_the_daemon_fails(
    cache: str, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    (pool_home / "disk").mkdir()
    with faulty(pool_home / "disk", tmp_path / "disk", pool_home / "switch") as switch:
        rig = Rig(pool_home, tmp_path / "disk", tmp_path / "mnt", cache, spawner, switch)
        rig.make_template()
        faults = list(all_faults(rig.run(None)))
        assert rig.counts["fsyncs past Python"] > 0
        for fault in faults[:: max(1, 2 * len(faults) // ROUNDS)]:
            rig.run(fault)
            rig.counts["met" if switch.met else "not met"] += 1
    print(f"\n{cache}: {dict(rig.counts)} of {len(faults)} faults")
    assert rig.counts["met"] > 3 * rig.counts["not met"]


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600 + 3 * ROUNDS)
def test_each_operation_of_one_leg_fails_and_nobody_is_told(spawner: Spawner, pool_home: Path, tmp_path: Path) -> None:
    """The other leg has everything: nothing is refused, whichever of the two fails."""
    (pool_home / "disk").mkdir()
    with faulty(pool_home / "disk", tmp_path / "disk", pool_home / "switch") as switch:
        rig = Rig(pool_home, tmp_path / "disk", tmp_path / "mnt", "none", spawner, switch)
        rig.make_template()
        rig.mirror_template()
        faults = [
            fault
            for fault in all_faults(rig.run(None))
            if fault.file in ("image", "leg") and fault.host_errno == errno.EIO and fault.action in LEG_ACTIONS
        ]
        for fault in faults[1 :: max(1, 4 * len(faults) // ROUNDS)]:  # the second: no read of the first leg succeeds
            rig.run(fault)
            rig.counts["met" if switch.met else "not met"] += 1
    print(f"\nmirror: {dict(rig.counts)} of {len(faults)} faults")
    assert rig.counts["met"] > 3 * rig.counts["not met"]
