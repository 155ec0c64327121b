"""The power fails under a real filesystem: ext4 and xfs on a disk that is copied, at one instant, under load.

The pool lies on a filesystem on a loop device, whose file lies on an xfs that can clone it: a clone holds what the disk
had been told at one moment, and nothing of what the kernel still kept for it.  Each clone is mounted, which replays the
filesystem's journal, and the pool in it is recovered: it must be at one moment of the writer's history, no older than
the last fsync that had returned when the clone was begun.

INCFS_CUT_CLONES sets how many clones are made of each filesystem, INCFS_KILL_SEED the randomness.
"""

import os
import random
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import pytest

from incfs.recovery import create_pool
from tests.support.fire import SECTOR_COUNTS, Setting, Target, committing
from tests.support.loop import clone, filesystem, loop_device, run
from tests.support.moments import Diary, Moments, recover_twice
from tests.support.spawner import Spawner
from tests.support.writer import Writer

CLONES = int(os.environ.get("INCFS_CUT_CLONES", "5"))
SEED = int(os.environ.get("INCFS_KILL_SEED", "1"))
BETWEEN_S = 0.5
"""Most between two clones."""
MIB = 1 << 20
KINDS = {
    "ext4": ("mkfs.ext4", "-q", "-E", "nodiscard"),
    "xfs": ("mkfs.xfs", "-q", "-K"),
}
MOUNT_OPTIONS = {"ext4": (), "xfs": ("-o", "nouuid")}
"""A clone has its original's UUID."""


@dataclass
class Cloner:
    """Clones a disk at random moments."""

    disk: Path
    rng: random.Random
    clones: list[tuple[float, float, Path]] = field(default_factory=list)
    """(begun, ended, where)."""

    def run(self) -> None:
        """Make all of them."""
        for number in range(CLONES):
            time.sleep(self.rng.uniform(0, BETWEEN_S))
            path = self.disk.with_name(f"clone{number}")
            begun = time.monotonic()
            clone(self.disk, path)
            self.clones.append((begun, time.monotonic(), path))


@pytest.mark.mount
@pytest.mark.loop
@pytest.mark.slow
@pytest.mark.timeout(600 + 5 * CLONES)
@pytest.mark.parametrize("kind", KINDS)
def test_power_loss_under_a_filesystem_leaves_a_commit_point(
    kind: str, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    rng = random.Random(f"{SEED} {kind}")
    with ExitStack() as stack:
        outer = make_filesystem(stack, "xfs", tmp_path / "outer.img", 3000 * MIB, tmp_path / "outer")
        disk = outer / "disk"
        inner = make_filesystem(stack, kind, disk, 400 * MIB, tmp_path / "inner")
        create_pool(inner / "pool", journal_bytes=64 << 10, capacity_bytes=64 * MIB)
        options = f"data_plane={rng.choice(['native', 'python'])}"
        setting = Setting(4096, "none", options=options)
        target = Target(pool_home, tmp_path / "mnt", setting, spawner, pool=inner / "pool")
        diary, cloner = Diary(SECTOR_COUNTS, time.monotonic), Cloner(disk, rng)
        load(target, diary, cloner, rng)
        kept = judge(kind, diary, cloner, tmp_path / "found")
    print(
        f"\n{kind} {options}: {len(diary.steps)} steps, {len(diary.acks)} acknowledgements, "
        f"{len(cloner.clones)} clones, {kept} steps kept without fsync"
    )


def make_filesystem(stack: ExitStack, kind: str, path: Path, length_bytes: int, directory: Path) -> Path:
    """Make a filesystem in a sparse file and mount it."""
    path.touch()
    os.truncate(path, length_bytes)
    device = stack.enter_context(loop_device(path))
    run(*KINDS[kind], device)
    return stack.enter_context(filesystem(device, directory))


def load(target: Target, diary: Diary, cloner: Cloner, rng: random.Random) -> None:
    """Work until all clones are made."""
    try:
        target.mount()
        target.create_volumes()
        thread = Thread(target=cloner.run)
        with committing(target):
            writer = Writer(target, diary, rng)
            writer.run(lambda: bool(diary.acks))
            thread.start()
            writer.run(lambda: not thread.is_alive())
            target.kill()
        thread.join()
    finally:
        target.take_down()
    assert len(cloner.clones) == CLONES


def judge(kind: str, diary: Diary, cloner: Cloner, directory: Path) -> int:
    """Mount each clone and recover the pool in it; give how many steps after the acknowledged ones were found."""
    moments, kept = Moments(diary), 0
    for begun, ended, path in cloner.clones:
        with loop_device(path) as device, filesystem(device, directory, *MOUNT_OPTIONS[kind]) as found:
            kept += moments.explain(recover_twice(found / "pool", diary), begun, ended)
        path.unlink()
    return kept
