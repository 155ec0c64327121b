"""A daemon that gets no more memory: killed by the kernel, or told so in the middle of anything.

The kernel's kill is a kill like any other.  A refused allocation may end the daemon or make the pool read-only; what is
read is right or an error, a request is answered, and after a mount the volumes are exactly at a commit point.
INCFS_KILL_ROUNDS sets the number of rounds.
"""

import errno
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from incfs.errors import IncfsError
from incfs.mount_table import is_dead
from tests.support.fire import SECTOR_COUNTS, START_TIMEOUT_S, VOLUMES, Setting, Target, committing
from tests.support.memory import Group, control_group, give_address_space, join, sync_late, take_address_space
from tests.support.spawner import Spawner
from tests.support.stamps import SECTOR, Model, read_sequences
from tests.support.writer import Writer

ROUNDS = max(2, int(os.environ.get("INCFS_KILL_ROUNDS", "108")) // 18)
SEED = int(os.environ.get("INCFS_KILL_SEED", "1"))
PLANES = ("python", "native")
REFUSED = (errno.EIO, errno.EROFS, errno.ENOMEM, errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV)
"""What a system call may say to a daemon that lacks memory, or has died of it."""
LOAD_S = 1.5
SQUEEZE_S = 60
FILES = 60
SYNC_S = 0.5


def make_target(home: Path, mountpoint: Path, plane: str, spawner: Spawner) -> Target:
    return Target(home, mountpoint, Setting(4096, "none", options=f"data_plane={plane}"), spawner)


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600 + 10 * ROUNDS)
@pytest.mark.parametrize("plane", PLANES)
def test_daemon_that_the_kernel_kills_for_its_memory_leaves_a_commit_point(
    plane: str, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    target, model = make_target(pool_home, tmp_path / "mnt", plane, spawner), Model(SECTOR_COUNTS)
    rng = random.Random(f"{SEED} {plane}")
    with control_group(f"incfs-test-{os.getpid()}") as group:
        if group is None:
            pytest.skip("no control group for memory")
        try:
            target.mount()
            target.create_volumes()
            for _ in range(ROUNDS):
                target.kill()
                target.mount((f"{join.__module__}:join", str(group.processes)))
                starve(target, model, rng, group)
                target.recover(model)
        finally:
            target.take_down()
    print(f"\n{target.report()}")


def starve(target: Target, model: Model, rng: random.Random, group: Group) -> None:
    """Work while the daemon gets less and less memory, until the kernel kills it."""
    with committing(target):
        writer = Writer(target, model, rng)
        writer.run(lambda: rng.random() < 0.02)
        stop = threading.Event()
        squeeze = threading.Thread(target=squeeze_group, args=(target, group, stop))
        squeeze.start()
        writer.run(stop.is_set)
        squeeze.join()
    assert not stop.is_set(), "the kernel did not kill the daemon"
    target.wait_for_end()
    target.counts["killed by the kernel"] += 1
    group.limit(1 << 40)


def squeeze_group(target: Target, group: Group, stop: threading.Event) -> None:
    """Take what the group does not use at the moment, again and again."""
    deadline = time.monotonic() + SQUEEZE_S
    while not target.has_ended(0.002):
        with suppress(OSError):  # EBUSY: it uses more by now
            group.limit(group.used_bytes)
        if time.monotonic() > deadline:
            stop.set()
            return


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600 + 10 * ROUNDS)
@pytest.mark.parametrize("plane", PLANES)
def test_refused_memory_never_gives_wrong_data(plane: str, spawner: Spawner, pool_home: Path, tmp_path: Path) -> None:
    target, model = make_target(pool_home, tmp_path / "mnt", plane, spawner), Model(SECTOR_COUNTS)
    rng = random.Random(f"{SEED} {plane}")
    try:
        target.mount()
        target.create_volumes()
        for _ in range(ROUNDS):
            refuse(target, model, rng)
            target.kill()
            target.log.write_text("")
            target.recover(model)
    finally:
        target.take_down()
    print(f"\n{target.report()}")


@pytest.mark.mount
def test_requests_without_memory_to_receive_them_wait_for_some(
    spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    target = make_target(pool_home, tmp_path / "mnt", "python", spawner)
    try:
        target.mount((f"{sync_late.__module__}:keep_no_address_space",), (f"{sync_late.__module__}:sync_late", SYNC_S))
        for number in range(FILES):
            target.call("volume.create", name=f"v{number}", size_bytes=SECTOR)
        with ThreadPoolExecutor(FILES) as threads, ExitStack() as stack:
            files = [stack.enter_context((target.mountpoint / f"v{n}").open("r+b", buffering=0)) for n in range(FILES)]
            for file in files:
                file.write(b"x" * SECTOR)
            take_address_space(target.pid, 0)
            synced = [threads.submit(os.fsync, file.fileno()) for file in files]
            time.sleep(SYNC_S)
            assert not target.has_ended(0.5)
            assert not all(future.done() for future in synced), "there was memory"
            give_address_space(target.pid)
            assert [future.exception(START_TIMEOUT_S) for future in synced] == [None] * FILES
        assert not re.findall("allocate|ERROR", target.log.read_text())
    finally:
        target.take_down()


def refuse(target: Target, model: Model, rng: random.Random) -> None:
    """Work beside a limit of the address space; read what can be read; the pool or the daemon may fail."""
    writer = Writer(target, model, rng)
    writer.refusals = REFUSED
    stop = threading.Event()
    timer = threading.Timer(LOAD_S, stop.set)
    with committing(target):
        writer.run(lambda: rng.random() < 0.02)
        take_address_space(target.pid, rng.choice([0, 0, 1 << 16, 1 << 18, 1 << 20, 4 << 20]))
        timer.start()
        with asking(target):
            writer.run(stop.is_set)
        timer.cancel()
        read_again(target, model, writer.completed)
        ended = target.has_ended(START_TIMEOUT_S if is_dead(target.mountpoint) else 0)  # its mount goes first
        target.counts["ended" if ended else "lives on"] += 1
        if not ended:
            give_address_space(target.pid)
            refused = target.counts["reads refused"]
            read_again(target, model, writer.completed)
            assert target.counts["reads refused"] == refused, "reads are refused although there is memory again"
        target.kill()


@contextmanager
def asking(target: Target) -> Iterator[None]:
    """Beside the body have the daemon do what takes memory."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                target.call("debug.dump")
                target.call("pool.check", data=True)
            except (IncfsError, OSError, ExceptionGroup):
                target.counts["commands refused"] += 1
                if target.has_ended(0.01):
                    return

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(START_TIMEOUT_S)
    assert not thread.is_alive(), "a command hangs"


def read_again(target: Target, model: Model, completed: int) -> None:
    """What is read now is what was written last, or an error; a write that was refused may be there in part."""
    in_doubt = {cell for step in model.steps[completed:] for cell in step.cells}
    for number, name in enumerate(VOLUMES):
        try:
            data = (target.mountpoint / name).read_bytes()
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            target.counts["reads refused"] += 1
            continue
        for index, sequence in enumerate(read_sequences(number, data[: len(data) // SECTOR * SECTOR])):
            cell = "sector", number, index
            assert sequence == model.state.get(cell, 0) or cell in in_doubt, f"{cell} is {sequence}"
        target.counts["reads right"] += 1
