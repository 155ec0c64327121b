"""PostgreSQL on ext4 on a loop device on a volume that is mirrored, whose legs fail in turn; then the daemon is killed.

The books of pgbench balance only if no transaction that was acknowledged is lost and none is there in part.
Needs PostgreSQL (``make kill-long`` installs it); INCFS_POSTGRES_ROUNDS sets how often each leg fails.
"""

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from incfs.recovery import create_pool
from tests.mount.conftest import wait_for
from tests.support.faulty_fs import LEG_NAME, Fault, Switch, faulty
from tests.support.fire import Setting, Target
from tests.support.loop import filesystem, loop_device, run
from tests.support.spawner import Spawner

ROUNDS = int(os.environ.get("INCFS_POSTGRES_ROUNDS", "3"))
USER = "postgres"
MIRROR = 2
VOLUME_BYTES = 400 << 20
BOOKS = "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(bbalance) FROM pgbench_branches), \
(SELECT sum(tbalance) FROM pgbench_tellers), (SELECT sum(delta) FROM pgbench_history)"


def programs() -> Path:
    """Find PostgreSQL's programs; without them there is no test."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"))
    if not found:
        (pytest.fail if os.environ.get("INCFS_REQUIRE_POSTGRES") == "1" else pytest.skip)("needs PostgreSQL")
    return found[-1].parent


class Server:
    """A database in a directory."""

    def __init__(self, bin_: Path, data: Path, sockets: Path) -> None:
        self.bin, self.data, self.sockets = bin_, data, sockets

    def run(self, program: str, *words: object) -> str:
        command = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", self.bin / program, *words]
        return run(*command).stdout

    def client(self, program: str, *words: object) -> str:
        return self.run(program, "-h", self.sockets, "-U", USER, *words)

    @contextmanager
    def running(self) -> Iterator[None]:
        log = self.sockets / "log"
        self.run("pg_ctl", "-D", self.data, "-l", log, "-w", "-o", f"-k {self.sockets} -c listen_addresses=", "start")
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        try:
            yield
        finally:
            self.run("pg_ctl", "-D", self.data, "-m", "fast", "-w", "stop")
            # It has taken its file away then, but may still have its directory open.
            wait_for(lambda: not Path(f"/proc/{pid}").exists())

    def books(self) -> list[int]:
        return [int(word) for word in self.client("psql", "-AtF ", "-c", BOOKS, USER).split()]


def of_postgres(directory: Path) -> Path:
    directory.mkdir(mode=0o700)
    shutil.chown(directory, USER, USER)
    return directory


def make_mirror(target: Target, disk: Path) -> None:
    """All data lies on two legs of one mirror."""
    target.call("storage.add", path=str(disk / "one.img"), mirrors=[str(disk / LEG_NAME)], force=True)
    target.call("storage.evacuate", storage=1)
    target.call("storage.remove", storage=1)


def legs_are_sound(target: Target) -> bool:
    (mirror,) = target.call("storage.list")["storages"]
    return all(leg["state"] == "online" for leg in mirror["legs"])


@pytest.mark.loop
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_books_balance_on_a_mirror_whose_legs_fail_in_turn(spawner: Spawner, pool_home: Path) -> None:
    bin_, disk, home = programs(), pool_home / "disk", pool_home / "home"
    for directory in (disk, home):
        directory.mkdir()
    pool_home.chmod(0o755)
    create_pool(home / "pool", capacity_bytes=64 << 20)
    target = Target(home, pool_home / "mnt", Setting(4096, "writeback"), spawner)
    sockets = of_postgres(pool_home / "sockets")
    with faulty(disk, pool_home / "below", pool_home / "switch") as switch:
        try:
            target.mount()
            make_mirror(target, pool_home / "below")
            target.call("volume.create", name="db", size_bytes=VOLUME_BYTES)
            volume = target.mountpoint / "db"
            with loop_device(volume, "--direct-io=on") as device:
                run("mkfs.ext4", "-q", device)
                with filesystem(device, pool_home / "fs") as root:
                    server = Server(bin_, of_postgres(root / "data"), sockets)
                    server.run("initdb", "-D", server.data, "--no-sync", "--auth=trust")
                    with server.running():
                        server.client("pgbench", "-i", "-q", "-s", 1, USER)
                        for number in range(ROUNDS):
                            fail_a_leg(server, target, switch, ("image", "leg")[number % 2])
                        assert len(set(server.books())) == 1
            with (
                loop_device(volume, "--direct-io=on") as device,
                filesystem(device, pool_home / "fs"),
                server.running(),
            ):
                books = server.books()
                assert len(set(books)) == 1, books
            target.check_pool()
        finally:
            target.take_down()


def fail_a_leg(server: Server, target: Target, switch: Switch, file: str) -> None:
    """Let all writes of a leg fail under transactions; bring it back under further ones."""
    words = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", server.bin / "pgbench"]
    words += ["-h", server.sockets, "-U", USER, "-n", "-c", 4, "-T", 4, USER]
    with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as load:
        time.sleep(1)
        switch.arm(Fault(file, "write", 0, host_errno=errno.EIO, lasts=True))
        wait_for(lambda: not legs_are_sound(target))
        switch.heal()
        target.call("storage.resilver", storage=MIRROR)
        said, _ = load.communicate()
    assert not load.returncode, said
    assert legs_are_sound(target)
    assert len(set(server.books())) == 1
