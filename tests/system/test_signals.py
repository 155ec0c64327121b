"""SIGTERM and SIGINT are a clean end, at any moment: nothing that was written is lost, and the journal is folded.

With files open the mount stays in place, dead, and the daemon says so with its exit code; all that it had answered is
on disk.  INCFS_KILL_ROUNDS sets the number of ends.
"""

import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from incfs import recovery
from incfs.errors import Busy
from incfs.journal import JournalRecord
from incfs.mount_table import detach, find_mount
from incfs.options import Options
from incfs.store import Store
from tests.support.cli import environment
from tests.support.fire import SECTOR_COUNTS, START_TIMEOUT_S, VOLUMES, Setting, Target, committing
from tests.support.pools import read
from tests.support.spawner import Spawner
from tests.support.stamps import SECTOR, Model, read_sequences, stamps
from tests.support.writer import Writer

ROUNDS = max(2, int(os.environ.get("INCFS_KILL_ROUNDS", "108")) // 12)
SEED = int(os.environ.get("INCFS_KILL_SEED", "1"))
CONTENT = stamps(0, 0, 2000, 1)
BUSY = Busy.exit_code


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
    """Work, and send signals meanwhile; returns when the daemon has ended."""
    writer = Writer(target, model, rng)

    def send() -> None:
        for number in numbers:
            target.signal(number)
            if target.has_ended(rng.uniform(0, 0.02)):
                return

    timer = threading.Timer(rng.uniform(0.02, 0.3), send)
    timer.start()
    with committing(target):
        writer.run()
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
def test_daemon_ends_although_a_snapshot_waits_for_the_kernel(
    spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    """A snapshot has the mount flushed by another process: after the last request nobody answers that one.

    The daemon waited for it, and it for the daemon: mount and pool were stuck until somebody killed the daemon.
    """
    target = Target(pool_home, tmp_path / "mnt", Setting(4096, "none"), spawner)

    def snapshot() -> None:
        with suppress(OSError):
            (target.mountpoint / ".snapshots" / "v" / "s").touch()

    target.mount(("tests.support.mishaps:signal_in_the_first_flush", signal.SIGTERM))
    fd = os.open(target.mountpoint / "v", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, CONTENT, 0)
        thread = threading.Thread(target=snapshot, daemon=True)
        thread.start()
        target.wait_for_end()
        thread.join(START_TIMEOUT_S)
        assert not thread.is_alive()
        assert_folded(target.pool)
    finally:
        target.take_down()
        with suppress(OSError):  # last: a mount that hangs would keep this
            os.close(fd)


@pytest.mark.mount
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_exit_code_says_that_the_mount_was_busy(number: signal.Signals, pool_home: Path, tmp_path: Path) -> None:
    pool, mountpoint = pool_home / "pool", tmp_path / "mnt"
    mountpoint.mkdir()
    recovery.create_pool(pool, journal_bytes=64 << 10)
    process = start(pool, mountpoint)
    try:
        fd = os.open(mountpoint / "v", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, CONTENT, 0)
        process.send_signal(number)
        _, said = process.communicate(timeout=START_TIMEOUT_S)
        with pytest.raises(OSError, match=r"not connected"):
            os.close(fd)
        with pytest.raises(OSError, match=r"not connected"):
            os.stat(mountpoint / "other")
        assert process.returncode == BUSY, said
        assert_folded(pool)
        with recovery.open_store(pool, Options()) as store:
            found = read(store, store.catalog.volume_named("v").map_id)
        assert read_sequences(0, found) == [1] * (len(CONTENT) // SECTOR)
    finally:
        detach(mountpoint, lazy=True)


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
