"""The daemon dies at each named point of its way to the disk, under load: what is found is exactly a commit point.

Beside the writer, whose history is compared sector by sector, another task makes, renames and removes volumes and adds
a storage volume: of those, what was acknowledged must be so.  INCFS_KILL_ROUNDS sets the number of kills.
"""

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from incfs.errors import Busy, IncfsError
from tests.support.failpoints import POINTS, Point, died_at
from tests.support.fire import SECTOR_COUNTS, START_TIMEOUT_S, Setting, Target, committing
from tests.support.spawner import Spawner
from tests.support.stamps import Model, stamps
from tests.support.writer import Writer

ROUNDS = int(os.environ.get("INCFS_KILL_ROUNDS", "108"))
SEED = int(os.environ.get("INCFS_KILL_SEED", "1"))
PLANES = ("python", "native")
BOTH_PLANES = len(POINTS) * len(PLANES) <= ROUNDS
CASES = [
    (point, plane)
    for number, point in enumerate(POINTS.values(), SEED)
    for index, plane in enumerate(PLANES)
    if BOTH_PLANES or index == number % 2
]
"""In a short run every other point has the other plane."""
ROUNDS_OF_A_CASE = max(1, ROUNDS // len(CASES))
MAX_TRIES = 20
"""Recovery, for one, has nothing to do when the kill came just after a checkpoint."""
WORK_S = 5
"""A point is reached by then, or another time."""
CONTENT = stamps(7, 0, 400, 1)


class Churn:
    """Makes, renames and removes volumes, and adds a storage volume, until the daemon has gone.

    Args:
        target: Where.
        rng: What to do next.
    """

    def __init__(self, target: Target, rng: random.Random) -> None:
        self.target, self.rng = target, rng
        self.device = 0
        """Of the mount; what is under it is another."""
        self.kept: set[str] = set()
        """Volumes that must be there, whole."""
        self.unsure: set[str] = set()
        """Volumes that may be there."""
        self.storage_path = target.home / f"further-{rng.randrange(1 << 30)}.img"
        self.has_storage = False
        self.failure: BaseException | None = None
        """What failed while the daemon lived."""

    def run(self) -> None:
        """Work; returns when the daemon has gone."""
        try:
            self.device = os.stat(self.target.mountpoint).st_dev
            for number in range(10_000):
                self.step(f"t{number}")
        except (OSError, AssertionError, IncfsError, BaseExceptionGroup) as error:
            if not self.target.has_ended(START_TIMEOUT_S):
                self.failure = error

    def step(self, name: str) -> None:
        if not self.has_storage and self.rng.random() < 0.3:
            self.target.call("storage.add", path=str(self.storage_path))
            self.has_storage = True
        renamed = name + "-renamed"
        path, renamed_path = self.target.mountpoint / name, self.target.mountpoint / renamed
        self.unsure |= {name, renamed}
        with open(path, "xb", buffering=0) as file:
            if os.fstat(file.fileno()).st_dev != self.device:
                raise OSError(errno.ENOTCONN, "the daemon has unmounted")
            file.write(CONTENT)
            os.fsync(file)
            self.kept.add(name)
        (self.target.mountpoint / ".snapshots" / name / "s").touch()
        with open(path, "r+b", buffering=0) as file:
            file.write(CONTENT)
        self.kept.discard(name)
        self.command("volume.rename", volume=name, name=renamed)
        self.unsure.discard(name)
        self.kept.add(renamed)
        if self.rng.random() < 0.8:
            self.kept.discard(renamed)
            self.command("volume.remove", volume=renamed, snapshots=True)
            self.unsure.discard(renamed)
        else:
            assert renamed_path.read_bytes() == CONTENT

    def command(self, verb: str, **arguments: Any) -> None:
        """Run a verb; the kernel tells of a file's close some time after it."""
        while True:
            with suppress(Busy):
                self.target.call(verb, **arguments)
                return

    def check(self) -> None:
        """Compare what is there now, and take it away."""
        found = {name for name in os.listdir(self.target.mountpoint) if name.startswith("t")}
        assert self.kept <= found <= self.kept | self.unsure, (self.kept, self.unsure, found)
        for name in found:
            if name in self.kept:
                assert (self.target.mountpoint / name).read_bytes() == CONTENT
            self.command("volume.remove", volume=name, snapshots=True)
        if self.has_storage:
            paths = [storage["path"] for storage in self.target.call("storage.list")["storages"]]
            assert str(self.storage_path) in paths


@contextmanager
def running(churn: Churn) -> Iterator[None]:
    """Work beside the body."""
    thread = threading.Thread(target=churn.run)
    thread.start()
    try:
        yield
    finally:
        thread.join(2 * START_TIMEOUT_S)
    assert not thread.is_alive(), "a call hangs whose daemon has gone"
    if churn.failure is not None:
        raise churn.failure


def die(point: Point, target: Target, model: Model, rng: random.Random) -> Churn:
    """Load the daemon until it dies at the point, or after a while, or when there was nothing to do there."""
    churn = Churn(target, rng)
    armed = point.armed(rng)
    deadline = time.monotonic() + WORK_S
    if point.load == "work":
        target.mount(armed)
        with committing(target), running(churn):
            Writer(target, model, rng).run(lambda: time.monotonic() > deadline)
            target.kill()
        return churn
    target.mount(*([armed] if point.load == "end" else []))
    with running(churn):
        writer = Writer(target, model, rng)
        writer.run(lambda: rng.random() < 0.02)
        target.signal(signal.SIGTERM if point.load == "end" else signal.SIGKILL)
        target.wait_for_end()
    if point.load == "start":
        with target.begin_mount(armed) as heard:
            target.answers(heard)  # every such point lies before that
            target.kill()
    return churn


@pytest.mark.mount
@pytest.mark.timeout(600 + 5 * ROUNDS_OF_A_CASE)
@pytest.mark.parametrize(("point", "plane"), CASES, ids=str)
def test_daemon_that_dies_at_a_named_point_leaves_a_commit_point(
    point: Point, plane: str, spawner: Spawner, pool_home: Path, tmp_path: Path
) -> None:
    rng = random.Random(f"{SEED} {point} {plane}")
    options = ",".join(filter(None, (f"data_plane={plane}", point.options)))
    target = Target(pool_home, tmp_path / "mnt", Setting(4096, "none", options=options), spawner)
    model = Model(SECTOR_COUNTS)
    try:
        target.mount()
        target.create_volumes()
        target.kill()
        for _ in range(ROUNDS_OF_A_CASE * MAX_TRIES):
            target.log.write_text("")
            churn = die(point, target, model, rng)
            target.counts["died there"] += died_at(point.name) in target.log.read_text()
            target.recover(model)
            churn.check()
            target.kill()
            if target.counts["died there"] >= ROUNDS_OF_A_CASE:
                break
        assert target.counts["died there"] >= ROUNDS_OF_A_CASE, f"{point} was not reached"
    except BaseException as error:
        error.add_note(target.log.read_text()[-3000:])
        raise
    finally:
        target.take_down()
