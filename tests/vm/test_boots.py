"""Whoever uses a mount ends before its daemon: a database on a filesystem on a volume, however the pool was mounted.

One machine, three pools with an ext4 on a loop device each: by hand from a login, from fstab, by incfs@.service.  Each
shutdown is judged by the console and by what the next boot finds.
"""

import re

import pytest

from tests.vm.judge import judge
from tests.vm.machine import BOOT_TIMEOUT_S

FSTAB = """
/srv/fstab /mnt/fstab fuse.incfs defaults,nofail 0 0
/mnt/fstab/volume /data/fstab ext4 loop,nofail,x-systemd.requires-mounts-for=/mnt/fstab 0 0
"""
UNIT = "POOL=/srv/unit\nMNT=/mnt/unit\nOPTIONS=rw"
WAYS = ("hand", "fstab", "unit")
LOSSES = re.compile(
    r"I/O error|lost async page write|Input/output error|daemon of \S+ had died|Couldn't clean up the journal|"
    r"database-\w+\.service: Failed|Transport endpoint",
)

pytestmark = pytest.mark.timeout(4 * BOOT_TIMEOUT_S)


def start_database(machine, way):
    machine.ok(
        f"systemd-run --unit=database-{way} -p RequiresMountsFor=/data/{way} -p SyslogLevel=notice "
        f"python3 /opt/incfs/tests/support/database.py /data/{way}/records"
    )


def daemon_pid(machine, way):
    return machine.ok(f"getfattr --absolute-names --only-values -n user.incfs.pid /mnt/{way}").strip()


def daemon_cgroup(machine, way):
    return machine.ok(f"cat /proc/{daemon_pid(machine, way)}/cgroup").strip()


def assert_nothing_was_lost(said, ways):
    losses = [line for line in said.splitlines() if LOSSES.search(line)]
    assert not losses, losses
    for way in ways:
        assert f"/data/{way}/records: checkpoint durable" in said, said[-5000:]


def assert_clean(machine, way):
    """The pool had been closed in order: its journal is folded, and its log says no more than that."""
    assert "clean" in machine.ok(f"incfs -p /srv/{way} pool check --data")


def records(machine, way):
    return machine.ok(f"tail -n 1 /data/{way}/records").strip()


@pytest.fixture(scope="module")
def made(machine):
    """The machine, booted, with an empty pool for each way."""
    machine.boot()
    for way in WAYS:
        machine.ok(f"mkdir -p /mnt/{way} /data/{way} && incfs pool create /srv/{way} --capacity 128M")
    machine.write("/etc/incfs/main.conf", UNIT)
    machine.ok("ln -s /opt/incfs/packaging/incfs@.service /etc/systemd/system/ && systemctl daemon-reload")
    return machine


@pytest.fixture(scope="module")
def first(made):
    """All three mounted the first time, with what uses them."""
    # A login, which is over at once: whatever it leaves behind belongs to its session.
    made.ok("su - root -c 'incfs mount /srv/hand /mnt/hand'")
    made.ok("systemctl start incfs@main")
    made.ok("incfs mount /srv/fstab /mnt/fstab")
    for way in WAYS:
        made.ok(f"truncate -s 32M /mnt/{way}/volume && mkfs.ext4 -q /mnt/{way}/volume")
        made.ok(f"mount -o loop /mnt/{way}/volume /data/{way}")
        start_database(made, way)
    made.write("/etc/fstab", made.ok("cat /etc/fstab") + FSTAB)
    return made


@pytest.mark.short
def test_daemon_that_was_started_from_a_login_has_a_unit_of_its_own(first):
    cgroup = daemon_cgroup(first, "hand")
    assert re.search(r"/system\.slice/incfs-mnt-hand-\d+\.scope$", cgroup), cgroup
    assert daemon_cgroup(first, "unit").endswith("incfs@main.service")
    outside = first.ok("for pid in $(pgrep -f '[i]ncfs mount /srv/hand'); do cat /proc/$pid/cgroup; done").split()
    assert set(outside) == {cgroup}


@pytest.mark.short
def test_a_shutdown_ends_databases_and_filesystems_before_the_daemons(first):
    said = first.power_off()
    assert_nothing_was_lost(said, WAYS)


@pytest.fixture(scope="module")
def second(first):
    """Booted again: what fstab names is mounted, the rest by hand."""
    if not first.is_on:
        first.boot()
        first.ok("systemctl is-system-running --wait || true", timeout_s=BOOT_TIMEOUT_S)
    return first


@pytest.mark.short
def test_fstab_mounts_the_pool_and_what_lies_on_it_at_boot(second):
    assert second.ok("systemctl is-active mnt-fstab.mount data-fstab.mount").split() == ["active", "active"]
    assert records(second, "fstab") == "checkpoint"


@pytest.mark.short
@pytest.mark.parametrize("way", ["hand", "unit"])
def test_a_databases_last_act_is_there_after_the_boot(second, way):
    assert_clean(second, way)
    second.ok(f"incfs mount /srv/{way} /mnt/{way} && mount -o loop /mnt/{way}/volume /data/{way}")
    assert records(second, way) == "checkpoint"


def test_a_logout_that_kills_everything_spares_the_daemon(second):
    second.write("/etc/systemd/logind.conf.d/kill.conf", "[Login]\nKillUserProcesses=yes\nKillExcludeUsers=")
    second.ok("umount /data/hand && incfs umount /mnt/hand && systemctl restart systemd-logind")
    # The other process shows that the session does end as it is told to.
    second.ok("su - root -c 'setsid sleep 12345 >/dev/null 2>&1 & incfs mount /srv/hand /mnt/hand'")
    second.ok("for i in $(seq 300); do pgrep -f '[s]leep 12345' || exit 0; sleep 0.1; done; exit 1")
    assert second.ok("ls /mnt/hand").split() == ["volume"]
    second.ok("mount -o loop /mnt/hand/volume /data/hand")


def test_sigterm_while_the_mount_is_busy_keeps_serving_and_says_for_whom(second):
    start_database(second, "hand")
    pid = daemon_pid(second, "hand")
    second.ok(f"kill {pid} && sleep 3 && systemctl is-active database-hand && touch /data/hand/more && sync")
    log = second.ok("tail -n 5 /srv/hand/daemon.log")
    assert re.search(r"in use by /dev/loop\d+ on /mnt/hand/volume; it is served until it is free", log), log
    second.ok("systemctl stop database-hand && umount /data/hand")
    second.ok(f"for i in $(seq 600); do [ -e /proc/{pid} ] || exit 0; sleep 0.1; done; exit 1")
    assert second.ok("ls /mnt/hand").split() == []
    assert_clean(second, "hand")


def test_a_shutdown_after_a_boot_from_fstab_is_in_order(second):
    start_database(second, "fstab")
    assert_nothing_was_lost(second.power_off(), ["fstab"])


@pytest.mark.short
def test_power_cut_under_fsync_writers_keeps_what_was_acknowledged(first, tmp_path):
    """Last: the machine is ended."""
    if not first.is_on:
        first.boot()
    first.ok("findmnt /mnt/fstab || mount /mnt/fstab")
    first.ok("systemd-run --unit=stamper python3 /opt/incfs/tests/vm/guest/stamper.py /mnt/fstab")
    first.await_stamps(200)
    first.cut()
    assert judge(first.disk, first.stamps(), "/srv/fstab") > 100
