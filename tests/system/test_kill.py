"""``kill -9`` of the daemon at any moment: the volumes are exactly at a commit point, no older than the last fsync.

One writer writes stamped sectors to two volumes of one pool, discards, resizes, takes and removes snapshots, and
notes every fsync that returned.  The daemon is killed after 20 to 300 ms (in some rounds again while it recovers),
the pool is mounted again, and all that is found must be the state at *one* moment of the writer's history.

Without the kernel's write cache that moment is exact, over both volumes.  With it the kernel writes back in its own
order, as a disk with a volatile cache does: every sector then holds its acknowledged content or a later one, and
snapshots, which flush that cache, are exact still.

INCFS_KILL_ROUNDS sets the number of kills, INCFS_KILL_SEED the randomness.
"""

import os
import random
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from tests.support.fire import SECTOR_COUNTS, START_TIMEOUT_S, Setting, Target, committing, killing
from tests.support.spawner import Spawner
from tests.support.stamps import Model
from tests.support.writer import Writer

ROUNDS = int(os.environ.get("INCFS_KILL_ROUNDS", "108"))
SEED = int(os.environ.get("INCFS_KILL_SEED", "1"))
LAST_KILL_S = 0.3

SETTINGS = [
    Setting(4096, "none", 3),
    Setting(512, "none", 2),
    Setting(65536, "none", 1),
    Setting(4096, "writeback", 2),
    Setting(512, "writeback", 1),
]


def kill_while_recovering(target: Target, rng: random.Random) -> None:
    """Begin to mount and kill the daemon at a random moment before or soon after it is ready."""
    with target.begin_mount():
        time.sleep(rng.uniform(0, 0.15))
        target.kill()
    target.counts["kills"] += 1


def one_round(target: Target, model: Model, rng: random.Random) -> None:
    """Load, kill, mount again, compare."""
    beside = committing(target) if rng.random() < 0.6 else nullcontext()
    with killing(target, rng.uniform(0.02, LAST_KILL_S)), beside:
        Writer(target, model, rng).run()
    target.counts["kills"] += 1
    if rng.random() < 0.25:
        kill_while_recovering(target, rng)
    target.recover(model)


@pytest.mark.mount
@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.02, 0.05])
def test_killed_while_it_waits_for_its_own_mount(
    delay_s: float, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    """Snapshots flush the kernel's cache through the mount itself.

    When a thread of the daemon waited for that, SIGKILL could not end it: the mount hung and the pool stayed locked.
    """
    target = Target(pool_home, tmp_path / "mnt", Setting(4096, "writeback", 0), spawner)

    def take(number: int) -> None:
        volume = f"v{number}"
        with suppress(OSError), open(target.mountpoint / volume, "wb", buffering=0) as file:
            for _ in range(1000):
                file.write(b"x" * 100_000)
                (target.mountpoint / ".snapshots" / volume / f"s{time.monotonic_ns()}").touch()

    try:
        target.mount()
        threads = [threading.Thread(target=take, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.1 + delay_s)
        target.kill()
        for thread in threads:
            thread.join(START_TIMEOUT_S)
            assert not thread.is_alive(), "a write hangs on a mount whose daemon was killed"
        target.mount()
        target.check_pool()
    finally:
        target.take_down()


@pytest.mark.mount
def test_mounted_again_at_once(spawner: Spawner, pool_home: Path, tmp_path: Path) -> None:
    """The kernel answers ``stat`` of a dead mount from its cache for a while; it was taken for a live one."""
    target = Target(pool_home, tmp_path / "mnt", Setting(4096, "writeback", 0), spawner)
    try:
        for _ in range(3):
            target.mount()
            os.stat(target.mountpoint)
            target.kill()
        target.mount()
    finally:
        target.take_down()


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600 + 3 * ROUNDS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_killed_daemon_leaves_exactly_a_commit_point(
    setting: Setting, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    rng = random.Random(f"{SEED} {setting}")
    target = Target(pool_home, tmp_path / "mnt", setting, spawner)
    model = Model(SECTOR_COUNTS)
    try:
        target.mount()
        target.create_volumes()
        started = time.monotonic()
        for number in range(max(1, ROUNDS * setting.share // 9)):
            try:
                one_round(target, model, rng)
            except BaseException as error:
                error.add_note(f"in round {number} of {setting}, INCFS_KILL_SEED={SEED}")
                raise
        print(f"\n{time.monotonic() - started:.1f} s, {target.report()}")
    finally:
        target.take_down()
