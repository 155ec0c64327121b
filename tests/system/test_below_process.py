"""The power is cut below the process: whatever the daemon, its C code and LMDB did to the disk is known and cut off.

The pool lies on a filesystem of the tests' own that records every write, flush, length and hole in the order in which
they were answered.  The real daemon works on top, under load.  Then, for points of that record, the disks are made that
a power cut could have left: what was flushed, and of the rest each write there, gone, torn at 512 bytes or reordered.
What is recovered must be the state at one moment, no older than the last fsync that had been acknowledged.

INCFS_CUT_STATES sets how many states are tried with each data plane, INCFS_KILL_SEED the randomness.
"""

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from incfs.errors import IncfsError
from incfs.recovery import create_pool
from tests.support.fire import SECTOR_COUNTS, Setting, Target, committing
from tests.support.moments import Diary, Moments, recover_twice
from tests.support.recording import CHOICES, Choice, PowerCut
from tests.support.recording_fs import Record, recording
from tests.support.spawner import Preparation, Spawner
from tests.support.writer import Writer

STATES = int(os.environ.get("INCFS_CUT_STATES", "24"))
SEED = int(os.environ.get("INCFS_KILL_SEED", "1"))
CAPACITY_BYTES = 16 << 20
STATES_OF_A_LOAD = 600
LOAD_S = 3


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600 + STATES)
@pytest.mark.parametrize("plane", ["native", "python"])
def test_power_cut_below_the_daemon_leaves_a_commit_point(
    plane: str, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    rng = random.Random(f"{SEED} {plane}")
    for number in range(-(-STATES // STATES_OF_A_LOAD)):
        home = pool_home / str(number)
        home.mkdir()
        setting = Setting(rng.choice([4096, 4096, 512]), "none", options=f"data_plane={plane}")
        try_load(setting, home, tmp_path, spawner, rng)
        shutil.rmtree(home)


@pytest.mark.mount
def test_a_forgotten_flush_is_noticed(spawner: Spawner, pool_home: Path, tmp_path: Path) -> None:
    """The test of the test: a daemon that does not flush loses what it acknowledged."""
    forget: Preparation = ("tests.support.mishaps:forget_flushes",)
    with pytest.raises((AssertionError, IncfsError)):
        try_load(Setting(4096, "none"), pool_home, tmp_path, spawner, random.Random(SEED), forget)


def try_load(
    setting: Setting, home: Path, tmp_path: Path, spawner: Spawner, rng: random.Random, *preparations: Preparation
) -> None:
    disk = home / "disk"
    disk.mkdir()
    create_pool(disk / "pool", block_bytes=setting.block_bytes, journal_bytes=64 << 10, capacity_bytes=CAPACITY_BYTES)
    cut = PowerCut(disk)
    with recording(disk, tmp_path / "disk", home / "record") as record:
        target = Target(home, tmp_path / "mnt", setting, spawner, pool=tmp_path / "disk" / "pool")
        diary = Diary(SECTOR_COUNTS, lambda: record.count)
        try:
            target.mount(*preparations)
            target.create_volumes()
            first = record.count
            deadline = time.monotonic() + LOAD_S
            with committing(target):
                Writer(target, diary, rng).run(lambda: time.monotonic() > deadline)
                target.kill()
        except BaseException as error:
            error.add_note(target.log.read_text()[-3000:])
            raise
        finally:
            target.take_down()
    judge(record, first, cut, diary, home / "cut", rng)


def judge(record: Record, first: int, cut: PowerCut, diary: Diary, made: Path, rng: random.Random) -> None:
    """Cut the power at points of the record, and look at what is recovered."""
    moments, kept = Moments(diary), 0
    points = sorted(rng.choices(range(first, record.count), k=min(STATES, STATES_OF_A_LOAD)))
    started, done = time.monotonic(), 0
    for number, event in enumerate(record.events(), 1):
        cut.play(event)
        while points and points[0] == number:
            points.pop(0)
            choice = Choice(rng.choice([*CHOICES, "mixed", "mixed"]), rng.randrange(1 << 30))
            cut.make(made, choice)
            try:
                kept += moments.explain(recover_twice(made / "pool", diary), number)
            except BaseException as error:
                error.add_note(f"after event {number} of {record.count}, unsynced writes {choice.kind}, seed {SEED}")
                raise
            done += 1
    print(
        f"\n{record.count} events, {len(diary.steps)} steps, {len(diary.acks)} acknowledgements; {done} states, "
        f"{done / (time.monotonic() - started):.0f} a second, {kept / max(1, done):.1f} steps kept without fsync"
    )
