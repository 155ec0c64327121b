"""The life of a mount: begin, readiness, refusals, unmount, signals, sudden death."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from incfs.backing_device import MAX_RATIO_PERCENT, READ_AHEAD_KIB, widen_page_cache
from incfs.errors import Busy
from incfs.mount import RETRY_S
from incfs.mount_table import FILESYSTEM_TYPE, find_mount
from incfs.patience import telling
from incfs.unmount import unmount
from tests.mount.conftest import (
    END_TIMEOUT_S,
    INCFS,
    START_TIMEOUT_S,
    incfs,
    incfs_here,
    mounted_pool,
    require_fuse,
    wait_for,
)
from tests.mount.test_names import errno_of
from tests.support.loop import filesystem

PACKAGING = Path(__file__).parents[2] / "packaging"
LATE_UNMOUNT_DAEMON = Path(__file__).parents[1] / "support" / "late_unmount_daemon.py"


@pytest.fixture
def places(tmp_path):
    """A pool and a mount point; whatever is mounted there goes away."""
    require_fuse()
    pool, mountpoint = tmp_path / "pool", tmp_path / "mnt"
    mountpoint.mkdir()
    incfs_here("pool", "create", pool)
    yield pool, mountpoint
    if find_mount(mountpoint) is not None:
        unmount(mountpoint)


def test_mount_returns_when_the_mount_answers_and_umount_when_the_pool_is_free(places):
    pool, mountpoint = places
    for number in range(5):
        done = incfs("mount", pool, mountpoint)
        assert done.stdout == done.stderr == ""
        (mountpoint / f"v{number}").write_bytes(b"x" * 100_000)
        incfs("umount", mountpoint)
        assert os.listdir(mountpoint) == []
        assert f"v{number}" in incfs("-p", pool, "volume", "list").stdout
    assert "clean" in incfs("-p", pool, "pool", "check", "--data").stdout
    assert " WARNING " not in (pool / "daemon.log").read_text()


def test_the_mount_table_names_type_and_pool(mounted):
    found = find_mount(mounted.path)
    assert found is not None
    assert (found.filesystem_type, found.source) == (FILESYSTEM_TYPE, str(mounted.pool))
    device = os.stat(mounted.path).st_dev
    assert found.device == f"{os.major(device)}:{os.minor(device)}"


def test_the_kernel_caches_more_of_a_mount_than_it_would_by_itself(mounted):
    device = os.stat(mounted.path).st_dev
    limits = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
    assert (limits / "max_ratio").read_text() == f"{MAX_RATIO_PERCENT}\n"
    assert (limits / "read_ahead_kb").read_text() == f"{READ_AHEAD_KIB}\n"


def test_who_may_not_change_the_kernels_limits_is_told_and_mounted(mounted, tmp_path, caplog):
    with caplog.at_level("INFO", "incfs.backing_device"):
        widen_page_cache(mounted.path, devices=tmp_path)
        widen_page_cache(tmp_path, devices=tmp_path)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert f"{mounted.path}: the kernel's limits for buffered reads and writes stay" in caplog.text


@pytest.mark.parametrize("name", ["with space", "with,comma", "with\\backslash", "größe"])
def test_strange_paths(tmp_path, name):
    directory = tmp_path / name
    directory.mkdir()
    with mounted_pool(directory) as pool:
        (pool / "db").write_bytes(b"x")
        assert find_mount(pool.path) is not None


def test_as_a_mount_helper(places):
    pool, mountpoint = places
    incfs(pool, mountpoint, "-o", "rw,nosuid,nodev,nofail,_netdev,x-systemd.automount,cache=writethrough,noatime")
    (mountpoint / "db").write_bytes(b"x")
    with open("/proc/self/mounts", encoding="utf-8") as stream:
        assert any("noatime" in line for line in stream if str(mountpoint) in line)


@pytest.mark.parametrize("helper", ["/sbin/mount.fuse3", f"{PACKAGING}/mount.fuse.incfs"])
def test_helpers_of_mount_and_umount(places, helper):
    """What mount(8) runs, with the arguments it gives; mount(8) itself would look for incfs in /usr/local/bin."""
    pool, mountpoint = places
    environment = {**os.environ, "PATH": f"{os.path.dirname(INCFS[0])}:{os.environ['PATH']}:/usr/sbin:/sbin"}
    command = [helper, pool, mountpoint, "-o", "rw,nodev,suid", "-t", FILESYSTEM_TYPE]
    subprocess.run(command, check=True, env=environment, timeout=START_TIMEOUT_S)
    (mountpoint / "db").write_bytes(b"x")
    subprocess.run(
        [f"{PACKAGING}/umount.fuse.incfs", mountpoint, "-v"], check=True, env=environment, timeout=START_TIMEOUT_S
    )
    assert "db" in incfs("-p", pool, "volume", "list").stdout


def test_umount_of_util_linux(places):
    pool, mountpoint = places
    incfs("mount", pool, mountpoint)
    (mountpoint / "db").write_bytes(b"x")
    pid = int(os.getxattr(mountpoint, "user.incfs.pid"))
    subprocess.run(["umount", "-i", mountpoint], check=True)
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    assert "db" in incfs("-p", pool, "volume", "list").stdout


def test_read_only_mounts_refuse_changes(tmp_path):
    with mounted_pool(tmp_path, "ro") as pool:
        assert errno_of((pool / "db").touch) == errno.EROFS
        assert os.listdir(pool / ".snapshots") == []


# refusals: one sentence, the documented exit code, nothing harmed


def refused(pool, mountpoint, *options, code):
    """Try both ways; returns the sentence."""
    background = incfs("mount", pool, mountpoint, *options, check=False)
    foreground = incfs("mount", "--foreground", pool, mountpoint, *options, check=False)
    assert background.returncode == foreground.returncode == code
    line = background.stderr.strip()
    assert line.count("\n") == 0
    assert line in foreground.stderr
    assert "Traceback" not in foreground.stderr
    assert find_mount(mountpoint) is None
    return line


def test_unknown_options_are_named(places):
    assert "'cahce=none'" in refused(*places, "-o", "cahce=none", code=2)
    assert "writeback" in refused(*places, "-o", "cache=fast", code=2)


def test_a_mount_point_that_is_no_directory(places):
    pool, mountpoint = places
    assert "not a directory" in refused(pool, mountpoint / "missing", code=2)
    (mountpoint / "file").touch()
    assert "not a directory" in refused(pool, mountpoint / "file", code=2)


def test_mounting_over_the_pool_itself(places):
    pool, _ = places
    assert "hide" in refused(pool, pool, code=2)
    assert "hide" in refused(pool, pool.parent, code=2)


def test_what_is_no_pool(places, tmp_path):
    refused(tmp_path / "nowhere", places[1], code=10)
    refused(tmp_path, places[1], code=10)


def test_a_pool_that_is_mounted_already(mounted, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    assert str(mounted.process.pid) in refused(mounted.pool, other, code=11)
    again = incfs("mount", mounted.pool, mounted.path, check=False)
    assert (again.returncode, "already" in again.stderr) == (11, True)
    assert os.listdir(mounted / ".snapshots") == []


def test_a_non_empty_mount_point_is_covered(places):
    pool, mountpoint = places
    (mountpoint / "file").touch()
    incfs("mount", pool, mountpoint)
    assert "file" not in os.listdir(mountpoint)
    incfs("umount", mountpoint)
    assert os.listdir(mountpoint) == ["file"]


def test_a_pool_on_read_only_media_is_mounted_read_only(places, tmp_path):
    pool, mountpoint = places
    incfs_here("-p", pool, "volume", "create", "db", "1M")
    (tmp_path / "media").mkdir()
    subprocess.run(["mount", "--bind", tmp_path, tmp_path / "media"], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", tmp_path / "media"], check=True)
        incfs("mount", tmp_path / "media" / "pool", mountpoint)
        assert (mountpoint / "db").read_bytes() == bytes(1 << 20)
        assert errno_of((mountpoint / "db").write_bytes, b"x") == errno.EROFS
        assert "db" in incfs("-p", tmp_path / "media" / "pool", "volume", "list").stdout
        unmount(mountpoint)
    finally:
        subprocess.run(["umount", tmp_path / "media"], check=True)


# umount


def test_umount_of_a_busy_mount_names_who_holds_it(mounted):
    with open(mounted / "db", "wb") as stream:
        stream.write(b"x")
        done = incfs("umount", mounted.path, check=False)
        assert done.returncode == 11
        assert f"pid {os.getpid()}" in done.stderr
        assert "db" in done.stderr
    assert (mounted / "db").read_bytes() == b"x"


@pytest.mark.parametrize("what", ["", "db"])
def test_umount_refuses_while_the_mount_is_bound_elsewhere(mounted, tmp_path, what):
    """It unmounted, and waited for ever for a daemon that served the other place."""
    (mounted / "db").write_bytes(b"x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch() if what else elsewhere.mkdir()
    subprocess.run(["mount", "--bind", mounted / what, elsewhere], check=True)
    try:
        with pytest.raises(Busy, match=str(elsewhere)):
            unmount(mounted.path)
        assert find_mount(mounted.path) is not None
    finally:
        subprocess.run(["umount", elsewhere], check=True)


def test_umount_refuses_while_another_namespace_has_the_mount(mounted):
    with subprocess.Popen(["unshare", "-m", "--propagation", "private", "cat"], stdin=subprocess.PIPE) as other:
        wait_for(lambda: os.readlink(f"/proc/{other.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"))
        with pytest.raises(Busy, match=f"namespace of pid {other.pid} "):
            unmount(mounted.path)
        assert find_mount(mounted.path) is not None


def test_umount_ends_though_somebody_unseen_has_the_mount(mounted, monkeypatch):
    monkeypatch.setattr("incfs.unmount.PATIENCE_S", 0.5)
    with subprocess.Popen(["unshare", "-m", "--propagation", "private", "cat"], stdin=subprocess.PIPE) as other:
        wait_for(lambda: os.readlink(f"/proc/{other.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"))
        monkeypatch.setattr("incfs.unmount.find_elsewhere", lambda _: [])
        with pytest.raises(Busy, match="cannot see it"):
            unmount(mounted.path)
    assert mounted.process.wait(END_TIMEOUT_S) == 0


def test_a_signal_while_the_mount_is_bound_elsewhere_is_obeyed_when_that_has_gone(mounted, tmp_path):
    mounted.expected_log = ["in use by"]
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(["mount", "--bind", mounted.path, tmp_path / "elsewhere"], check=True)
    mounted.process.send_signal(signal.SIGTERM)
    wait_for(lambda: f"in use by the mount {tmp_path}/elsewhere; it is served" in mounted.log())
    (mounted / "db").write_bytes(b"x")
    subprocess.run(["umount", tmp_path / "elsewhere"], check=True)
    assert mounted.process.wait(END_TIMEOUT_S) == 0


def test_umount_says_that_it_waits_for_a_stopped_daemon(mounted, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("incfs.unmount.telling", partial(telling, after_s=0.3))
    (tmp_path / "link").symlink_to(mounted.path)
    mounted.process.send_signal(signal.SIGSTOP)
    unmounting = threading.Thread(target=unmount, args=[tmp_path / "link"])
    unmounting.start()
    wait_for(lambda: f"process {mounted.process.pid}, which is stopped" in caplog.text)
    mounted.process.send_signal(signal.SIGCONT)
    unmounting.join(END_TIMEOUT_S)
    assert mounted.process.wait(END_TIMEOUT_S) == 0


def test_umount_of_nothing(tmp_path):
    done = incfs("umount", tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (10, 1)


# signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=["TERM", "INT", "HUP"])
def test_a_signal_unmounts_cleanly(mounted, number):
    (mounted / "db").write_bytes(b"x" * 1_000_000)
    mounted.process.send_signal(number)
    assert mounted.process.wait(END_TIMEOUT_S) == 0
    assert find_mount(mounted.path) is None
    mounted.start()
    assert (mounted / "db").read_bytes() == b"x" * 1_000_000


def test_an_end_waits_for_who_unmounts(mounted):
    """The daemon's call that unmounts waits for the mount, too, and is not given up when that ends."""
    mounted.stop()
    mounted.start(command=[sys.executable, LATE_UNMOUNT_DAEMON])
    (mounted / "db").write_bytes(b"x")
    mounted.process.send_signal(signal.SIGTERM)
    assert mounted.process.wait(END_TIMEOUT_S) == 0
    assert find_mount(mounted.path) is None


def test_a_signal_that_means_no_end_ends_nothing(mounted):
    """Each of these killed the daemon and left its mount dead."""
    stray = [signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPIPE]
    for number in [*stray, signal.SIGRTMIN, signal.SIGRTMAX]:
        mounted.process.send_signal(number)
        (mounted / "db").write_bytes(str(number).encode())
    mounted.process.send_signal(signal.SIGUSR1)
    wait_for(lambda: "under way: no long work" in mounted.log())
    assert (mounted / "db").read_bytes() == str(signal.SIGRTMAX).encode()


@pytest.mark.parametrize("start", [signal.SIG_DFL, signal.SIG_IGN], ids=["plain", "nohup"])
def test_a_hangup_has_a_daemon_in_the_background_open_its_log_anew(places, start):
    pool, mountpoint = places
    before = signal.signal(signal.SIGHUP, start)
    try:
        incfs("mount", pool, mountpoint)
    finally:
        signal.signal(signal.SIGHUP, before)
    (pool / "daemon.log").rename(pool / "daemon.log.moved")
    os.kill(int(os.getxattr(mountpoint, "user.incfs.pid")), signal.SIGHUP)
    unmount(mountpoint)
    assert "the pool is closed" in (pool / "daemon.log").read_text()


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)], ids=str)
def test_closed_descriptors_are_nobody_elses(places, closed):
    """The pipe to the waiting command became standard output and was closed with it: no mount, and no word why."""
    pool, mountpoint = places
    shell = " ".join(f"{fd}{'<' if fd == 0 else '>'}&-" for fd in closed)
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", *INCFS, "mount", str(pool), str(mountpoint)]
    assert subprocess.run(command, check=False, timeout=END_TIMEOUT_S).returncode == 0
    (mountpoint / "db").write_bytes(b"x")
    unmount(mountpoint)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_while_files_are_open_is_obeyed_when_they_are_closed(mounted, number):
    mounted.expected_log = ["in use by"]
    fd = os.open(mounted / "db", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"x" * 1_000_000, 0)
    mounted.process.send_signal(number)
    wait_for(lambda: "it is served until it is free" in mounted.log())
    assert re.search(rf"in use by pid {os.getpid()} \(.*\) on {mounted.path}/db", mounted.log())
    os.pwrite(fd, b"y" * 1_000_000, 1_000_000)
    os.fsync(fd)
    assert os.pread(fd, 2_000_000, 0) == b"x" * 1_000_000 + b"y" * 1_000_000
    (mounted / "more").write_bytes(b"z")
    mounted.process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        mounted.process.wait(3 * RETRY_S)
    os.close(fd)
    assert mounted.process.wait(END_TIMEOUT_S) == 0
    assert find_mount(mounted.path) is None
    mounted.start()
    assert (mounted / "db").read_bytes() == b"x" * 1_000_000 + b"y" * 1_000_000


def test_what_is_written_after_a_signal_goes_to_disk_without_being_asked(mounted):
    """SIGKILL may be next."""
    mounted.expected_log = ["in use by", "detaching the dead mount"]
    mounted.remount("commit=3600")
    fd = os.open(mounted / "db", os.O_CREAT | os.O_RDWR)
    mounted.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "it is served until it is free" in mounted.log())
    os.pwrite(fd, b"x" * 1_000_000, 0)
    time.sleep(4 * RETRY_S)
    mounted.kill()
    assert errno_of(os.close, fd) == errno.ENOTCONN
    mounted.start()
    assert (mounted / "db").read_bytes() == b"x" * 1_000_000


def test_a_signal_after_a_lazy_unmount_waits_for_the_last_who_uses_it(mounted):
    fd = os.open(mounted / "db", os.O_CREAT | os.O_RDWR)
    subprocess.run(["umount", "-i", "-l", mounted.path], check=True)
    mounted.process.send_signal(signal.SIGTERM)
    os.pwrite(fd, b"x" * 1_000_000, 0)
    os.fsync(fd)
    assert mounted.process.poll() is None
    os.close(fd)
    assert mounted.process.wait(END_TIMEOUT_S) == 0
    mounted.start()
    assert (mounted / "db").read_bytes() == b"x" * 1_000_000


# sudden death


def test_a_killed_daemon_leaves_an_error_not_an_empty_directory(mounted):
    mounted.expected_log = ["detaching the dead mount"]
    with open(mounted / "db", "wb", buffering=0) as stream:
        stream.write(b"x" * 100_000)
        os.fsync(stream.fileno())
    mounted.kill()
    assert errno_of(os.listdir, mounted.path) == errno.ENOTCONN
    assert find_mount(mounted.path) is not None
    mounted.log_path.write_text("")
    mounted.start()
    assert (mounted / "db").read_bytes() == b"x" * 100_000


def test_an_aborted_connection_ends_the_daemon_in_order(mounted, tmp_path):
    (mounted / "db").write_bytes(b"x" * 100_000)
    number = os.minor(os.stat(mounted.path).st_dev)
    with filesystem(Path("fusectl"), tmp_path / "connections", "-t", "fusectl") as connections:
        (connections / str(number) / "abort").write_text("1")
    assert mounted.process.wait(END_TIMEOUT_S) == 1
    assert "aborted" in mounted.log()
    assert "Traceback" not in mounted.log()
    mounted.expected_log = ["detaching the dead mount"]
    mounted.start()
    assert (mounted / "db").read_bytes() == b"x" * 100_000


def test_umount_takes_a_dead_mount_away(mounted):
    mounted.kill()
    incfs("umount", mounted.path)
    assert find_mount(mounted.path) is None


def test_a_background_daemon_can_be_killed_and_replaced(places):
    pool, mountpoint = places
    incfs("mount", pool, mountpoint)
    pid = int(os.getxattr(mountpoint, "user.incfs.pid"))
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    incfs("mount", pool, mountpoint)
    assert int(os.getxattr(mountpoint, "user.incfs.pid")) != pid


# service managers and inheritance


def test_a_service_manager_is_told(tmp_path, monkeypatch):
    require_fuse()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(START_TIMEOUT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with mounted_pool(tmp_path) as pool:
            assert receiver.recv(100) == b"READY=1"
            pool.stop()
            assert receiver.recv(100) == b"STOPPING=1"


def test_a_background_daemon_holds_nothing_of_its_parents(places):
    pool, mountpoint = places
    reader, writer = os.pipe()
    subprocess.run(
        [*INCFS, "mount", str(pool), str(mountpoint)], check=True, pass_fds=[writer], timeout=START_TIMEOUT_S
    )
    os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)
    pid = int(os.getxattr(mountpoint, "user.incfs.pid"))
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"


def test_stats_are_readable_while_mounted(mounted):
    assert json.loads((mounted / ".incfs/stats.json").read_text())["pool"]["read_only"] is False
