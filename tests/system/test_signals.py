"""SIGTERM and SIGINT are a clean end, at any moment: nothing that was written is lost, and the journal is folded.

With files open the daemon serves them until they are closed.  INCFS_KILL_ROUNDS sets the number of ends.
"""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from incfs import recovery
from incfs.journal import JournalRecord
from incfs.mount_table import find_mount
from incfs.options import Options
from incfs.store import Store
from tests.support.cli import environment
from tests.support.fire import SECTOR_COUNTS, START_TIMEOUT_S, VOLUMES, Setting, Target, committing
from tests.support.pools import read
from tests.support.spawner import Spawner
from tests.support.stamps import Model, stamps
from tests.support.writer import Writer

ROUNDS = max(2, int(os.environ.get("INCFS_KILL_ROUNDS", "108")) // 12)
SEED = int(os.environ.get("INCFS_KILL_SEED", "1"))
CONTENT = stamps(0, 0, 2000, 1)


def assert_folded(pool: Path) -> None:
    """Open the pool; its journal must have nothing that the tables lack."""
    replayed = 0
    original = recovery.apply_record

    def count(store: Store, record: JournalRecord) -> None:
        nonlocal replayed
        replayed += 1
        original(store, record)

    recovery.apply_record = count
    try:
        recovery.open_store(pool, Options()).abandon()
    finally:
        recovery.apply_record = original
    assert not replayed, f"{replayed} journal records were not folded into the tables"


def start(pool: Path, mountpoint: Path, options: str = "") -> subprocess.Popen[bytes]:
    """Run the command in the foreground until the mount answers."""
    command = [sys.executable, "-m", "incfs", "mount", "--foreground", str(pool), str(mountpoint), "-o", options]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)
    assert process.stderr is not None
    while b": mounted" not in (line := process.stderr.readline()):
        assert line, "the daemon has ended"
    return process


@pytest.mark.mount
@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM)], ids=str)
def test_signal_to_an_idle_daemon_leaves_everything_on_disk_and_nothing_mounted(
    numbers: tuple[signal.Signals, ...], cache: str, pool_home: Path, tmp_path: Path
) -> None:
    pool, mountpoint = pool_home / "pool", tmp_path / "mnt"
    mountpoint.mkdir()
    recovery.create_pool(pool, journal_bytes=64 << 10)
    process = start(pool, mountpoint, f"cache={cache}")
    (mountpoint / "v").write_bytes(CONTENT)
    for number in numbers:
        process.send_signal(number)
    _, said = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 0, said
    assert find_mount(mountpoint) is None
    assert_folded(pool)
    with recovery.open_store(pool, Options()) as store:
        assert read(store, store.catalog.volume_named("v").map_id) == CONTENT


def end_under_load(target: Target, model: Model, rng: random.Random, numbers: list[int]) -> None:
    """Work, send signals meanwhile, and work on for a while; returns when the daemon has ended."""
    writer = Writer(target, model, rng)
    is_enough = threading.Event()

    def send() -> None:
        for number in numbers:
            target.signal(number)
            if target.has_ended(rng.uniform(0, 0.02)):
                break
        is_enough.wait(rng.uniform(0, 0.3))
        is_enough.set()

    timer = threading.Timer(rng.uniform(0.02, 0.3), send)
    timer.start()
    with committing(target):
        writer.run(until=is_enough.is_set)
    timer.join()
    target.wait_for_end()
    model.acknowledged = max(model.acknowledged, writer.completed)


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600 + 5 * ROUNDS)
@pytest.mark.parametrize("plane", ["python", "native"])
def test_signal_under_load_loses_nothing_that_was_answered(
    plane: str, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    target = Target(pool_home, tmp_path / "mnt", Setting(4096, "none", options=f"data_plane={plane}"), spawner)
    model, rng = Model(SECTOR_COUNTS), random.Random(f"{SEED} {plane}")
    try:
        target.mount()
        target.create_volumes()
        target.kill()
        for _ in range(ROUNDS):
            target.mount()
            numbers = rng.choices([signal.SIGTERM, signal.SIGINT], k=rng.choice([1, 1, 2, 5]))
            end_under_load(target, model, rng, list(numbers))
            target.counts["clean ends"] += 1
            assert_folded(target.pool)
            target.log.write_text("")
            target.recover(model)
            target.kill()
        print(f"\n{target.report()}")
    except BaseException as error:
        error.add_note(target.log.read_text()[-3000:])
        raise
    finally:
        target.take_down()


@pytest.mark.mount
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_while_the_pool_closes_cuts_nothing_off(
    number: signal.Signals, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    """It had its default effect then: what was written but not flushed was lost."""
    target = Target(pool_home, tmp_path / "mnt", Setting(4096, "none"), spawner)
    try:
        target.mount(("tests.support.mishaps:signal_at", "service:Service.close", number))
        (target.mountpoint / "v").write_bytes(CONTENT)
        target.signal(number)
        target.wait_for_end()
        assert_folded(target.pool)
        with recovery.open_store(target.pool, Options()) as store:
            assert read(store, store.catalog.volume_named("v").map_id) == CONTENT
    finally:
        target.take_down()


@pytest.mark.mount
def test_a_snapshot_under_way_is_taken_before_the_end(spawner: Spawner, pool_home: Path, tmp_path: Path) -> None:
    """The process that flushes the mount for it keeps the mount in use: so once did the daemon's own look at it.

    The signal had left a dead mount then, and a snapshot that waited for answers which nobody gave.
    """
    target = Target(pool_home, tmp_path / "mnt", Setting(4096, "none"), spawner)
    try:
        target.mount(("tests.support.mishaps:signal_in_the_first_flush", signal.SIGTERM))
        with open(target.mountpoint / "v", "wb", buffering=0) as stream:
            stream.write(CONTENT)
            (target.mountpoint / ".snapshots" / "v" / "s").touch()
        target.wait_for_end()
        assert find_mount(target.mountpoint) is None
        assert_folded(target.pool)
        with recovery.open_store(target.pool, Options()) as store:
            volume = store.catalog.volume_named("v")
            (snapshot,) = store.catalog.snapshots(volume.id)
            assert read(store, snapshot.map_id) == CONTENT
    finally:
        target.take_down()


@pytest.mark.mount
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signal_while_the_daemon_starts_leaves_nothing_in_the_way(
    number: signal.Signals, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    target = Target(pool_home, tmp_path / "mnt", Setting(4096, "writeback"), spawner)
    rng = random.Random(f"{SEED} {number}")
    try:
        target.mount()
        target.create_volumes()
        target.kill()
        for _ in range(ROUNDS):
            target.begin_mount().close()
            target.has_ended(rng.uniform(0, 0.06))
            target.signal(number)
            target.wait_for_end()
        target.mount()
        assert set(VOLUMES) <= set(os.listdir(target.mountpoint))
    finally:
        target.take_down()
