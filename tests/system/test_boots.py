"""Whoever uses a mount ends before its daemon, however the pool was mounted: by hand from a login, by fstab, by unit.

A database lies on an ext4 on a loop device on a volume of each.  It takes its time to end, and its last act counts.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import fast_directory
from tests.support.cli import Cli
from tests.support.container import ROOT, Container, missing

WAYS = ("hand", "fstab", "unit")
FSTAB = """
/srv/fstab /mnt/fstab fuse.incfs defaults,nofail 0 0
/mnt/fstab/volume /data/fstab ext4 loop,nofail,x-systemd.requires-mounts-for=/mnt/fstab 0 0
"""
MAIN = "POOL=/srv/unit\nMNT=/mnt/unit\nOPTIONS=rw\n"
DATABASE = f"python3 {ROOT}/tests/support/database.py"
CLOSED = "the pool is closed"
LOSSES = re.compile(r"I/O error|Input/output error|not connected|had died|database-\w+\.service: Failed")

pytestmark = [pytest.mark.mount, pytest.mark.loop, pytest.mark.slow]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    lacking = list(missing())
    if lacking:
        refuse = pytest.fail if os.environ.get("INCFS_REQUIRE_MOUNT") == "1" else pytest.skip
        refuse(f"this machine lacks {', '.join(lacking)}")
    memory = Path(tmp_path_factory.mktemp("container")).name
    home = fast_directory() / f"incfs-{os.getpid()}-{memory}"
    home.mkdir()
    machine = Container(home, tmp_path_factory.mktemp("srv"))
    machine.add_unit(ROOT / "packaging/incfs@.service")
    machine.configure("incfs/main.conf", MAIN)
    machine.configure("systemd/logind.conf.d/kill.conf", "[Login]\nKillUserProcesses=yes\nKillExcludeUsers=nobody\n")
    yield machine
    machine.end()
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def first(machine: Container) -> Container:
    """Booted, with a volume and a filesystem on it for each way, and nothing mounted."""
    machine.boot()
    for way in WAYS:
        place = f"/mnt/{way}"
        machine.ok(f"mkdir -p {place} /data/{way} && incfs pool create /srv/{way} --capacity 128M")
        machine.ok(f"incfs mount /srv/{way} {place} && truncate -s 32M {place}/volume && mkfs.ext4 -q {place}/volume")
        machine.ok(f"incfs umount {place}")
    machine.configure("fstab", FSTAB)
    return machine


@pytest.fixture(scope="module")
def second(first: Container) -> Container:
    """Booted again, from fstab; the others are mounted by hand and by unit, and a database is on each."""
    first.power_off()
    first.boot()
    # The sleeping process shows that a login's end is the end of what it began.
    first.ok("su - root -c 'setsid sleep 4711 >/dev/null 2>&1 & incfs mount /srv/hand /mnt/hand'")
    first.ok("systemctl start incfs@main")
    for way in ("hand", "unit"):
        first.ok(f"mount -o loop /mnt/{way}/volume /data/{way}")
    for way in WAYS:
        first.ok(f"systemd-run -u database-{way} -p RequiresMountsFor=/data/{way} {DATABASE} /data/{way}/records")
    return first


def daemon_of(machine: Container, way: str) -> int:
    return int(machine.ok(f"getfattr --absolute-names --only-values -n user.incfs.pid /mnt/{way}"))


def cgroup_of(machine: Container, way: str) -> str:
    return machine.ok(f"cat /proc/{daemon_of(machine, way)}/cgroup").strip().rsplit("::", 1)[1]


def log_of(machine: Container, way: str) -> str:
    return (machine.srv / way / "daemon.log").read_text()


def test_fstab_mounts_the_pool_and_what_lies_on_it(second: Container) -> None:
    assert second.ok("systemctl is-active mnt-fstab.mount data-fstab.mount").split() == ["active", "active"]


def test_each_daemon_has_a_unit_of_its_own(second: Container) -> None:
    assert re.fullmatch(r"/system\.slice/incfs-mnt-hand-\d+\.scope", cgroup_of(second, "hand"))
    assert re.fullmatch(r"/system\.slice/incfs-mnt-fstab-\d+\.scope", cgroup_of(second, "fstab"))
    assert cgroup_of(second, "unit") == "/system.slice/incfs@main.service"


def test_a_logout_that_kills_everything_spares_the_daemon(second: Container) -> None:
    second.ok("for i in $(seq 300); do pgrep -fx 'sleep 4711' || exit 0; sleep 0.1; done; exit 1")
    assert second.ok("ls /mnt/hand").split() == ["volume"]
    assert second.ok("systemctl is-active database-hand").strip() == "active"


def test_sigterm_while_the_mount_is_busy_keeps_serving_and_says_for_whom(second: Container) -> None:
    second.ok(f"kill {daemon_of(second, 'unit')}")
    wait_for(lambda: "served until it is free" in second.journal())
    status = second.ok("systemctl status incfs@main")
    assert re.search(r"/mnt/unit is in use by /dev/loop\d+ on /mnt/unit/volume; it is served", status), status
    second.ok("systemctl stop database-unit && test $(tail -n 1 /data/unit/records) = checkpoint")
    second.ok("umount /data/unit && while systemctl is-active -q incfs@main; do sleep 0.1; done")
    second.ok("systemctl start incfs@main && mount -o loop /mnt/unit/volume /data/unit")
    second.ok(f"systemd-run -u database-unit -p RequiresMountsFor=/data/unit {DATABASE} /data/unit/records")


def test_a_shutdown_ends_databases_and_filesystems_before_the_daemons(second: Container) -> None:
    """The database's last fsync is after all that systemd tells to end at once."""
    begun = {way: len(log_of(second, way)) for way in ("hand", "fstab")}
    journal = second.journal()
    second.power_off()
    for way, start in begun.items():
        said = log_of(second, way)[start:]
        assert CLOSED in said
        assert not LOSSES.search(said), said
    second.boot()
    said = second.ok("journalctl --no-pager -o cat -b -1 || true")
    assert not [line for line in said[len(journal) :].splitlines() if LOSSES.search(line)]
    second.ok("incfs mount /srv/hand /mnt/hand && systemctl start incfs@main")
    for way in WAYS:
        if way != "fstab":
            second.ok(f"mount -o loop /mnt/{way}/volume /data/{way}")
        assert second.ok(f"tail -n 1 /data/{way}/records").strip() == "checkpoint"


def test_what_nobody_unmounts_before_the_last_call_is_unmounted_by_the_daemon(second: Container) -> None:
    """A device that was attached by hand stays when its filesystem goes: the mount below would stay busy to the end."""
    begun = len(log_of(second, "hand"))
    second.ok("umount /data/hand && losetup /dev/loop60 /mnt/hand/volume && mount /dev/loop60 /data/hand")
    second.ok("echo last >>/data/hand/records")
    started = time.monotonic()
    second.power_off()
    assert time.monotonic() - started < 60, "systemd waited for a process until it killed it"
    assert CLOSED in log_of(second, "hand")[begun:]
    for way in WAYS:
        assert "clean" in Cli(second.srv / way).ok("pool", "check", "--data")


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
