"""Commands on a mounted pool: through the daemon, with the kernel's view right afterwards."""

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import TIMEOUT_S, Cli, environment

pytestmark = pytest.mark.mount


def unmount_anyhow(mountpoint: Path) -> None:
    """Take away whatever a failed test left."""
    subprocess.run(["umount", "-l", str(mountpoint)], stderr=subprocess.DEVNULL, check=False)


@pytest.fixture
def mnt(offline: Cli, tmp_path: Path) -> Iterator[Path]:
    """The pool, mounted, and unmounted and checked at the end."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    offline.ok("mount", offline.pool, mountpoint)
    try:
        yield mountpoint
        if os.path.ismount(mountpoint):
            offline.ok("umount", mountpoint)
        assert offline.ok("pool", "check", "--data").startswith("clean")
    finally:
        unmount_anyhow(mountpoint)


def test_what_commands_do_is_seen_in_the_mount(offline: Cli, mnt: Path) -> None:
    assert offline.json("pool", "show")["pool"]["mounted"] is True
    offline.ok("volume", "create", "db", "1M")
    (mnt / "db").write_bytes(b"a" * 5000)
    offline.ok("volume", "resize", "db", "2M")
    assert (mnt / "db").stat().st_size == 2 << 20
    offline.ok("snapshot", "create", "db@s")
    assert (mnt / ".snapshots/db/s").read_bytes()[:5001] == b"a" * 5000 + b"\0"
    offline.ok("volume", "resize", "db", "4096", "--shrink")
    assert (mnt / "db").stat().st_size == 4096
    offline.ok("snapshot", "rename", "db@s", "t")
    assert os.listdir(mnt / ".snapshots/db") == ["t"]
    offline.ok("volume", "rename", "db", "data")
    assert (mnt / "data").read_bytes() == b"a" * 4096
    assert not (mnt / "db").exists()
    offline.fails(11, "volume", "remove", "data")
    offline.ok("volume", "remove", "data", "--snapshots")
    assert not (mnt / "data").exists()
    assert offline.json("snapshot", "list")["snapshots"] == []


def test_what_is_done_in_the_mount_is_seen_by_commands(offline: Cli, mnt: Path) -> None:
    with (mnt / "db").open("wb") as stream:
        stream.truncate(1 << 30)
        stream.write(b"x" * 8192)
    volume = offline.json("volume", "show", "db")["volume"]
    assert (volume["size_bytes"], volume["mapped_bytes"]) == (1 << 30, 8192)
    extent = offline.json("volume", "map", "db")["extents"][0]
    assert (extent["offset"], extent["length"], extent["kind"]) == (0, 8192, "data")


def test_open_volume_names_who_holds_it(offline: Cli, mnt: Path) -> None:
    offline.ok("volume", "create", "db", "1M")
    with (mnt / "db").open("rb"):
        for arguments in (("remove", "db"), ("remove", "-n", "db"), ("rename", "db", "x")):
            assert str(os.getpid()) in offline.fails(11, "volume", *arguments)
        assert str(os.getpid()) in " ".join(offline.json("volume", "show", "db")["volume"]["open_by"])
    offline.ok("volume", "remove", "db")


def test_rename_over_another_volume_is_refused(offline: Cli, mnt: Path) -> None:
    offline.ok("volume", "create", "a", "1M")
    offline.ok("volume", "create", "b", "1M")
    offline.fails(1, "volume", "rename", "a", "b")
    for name in ("x/y", ".hidden", "a@b"):
        offline.fails(2, "volume", "rename", "a", name)
    assert sorted(path.name for path in mnt.iterdir() if path.name[0] != ".") == ["a", "b"]


def test_same_answers_online_and_offline(offline: Cli, mnt: Path) -> None:
    (mnt / "db").write_bytes(os.urandom(1 << 20))
    offline.ok("snapshot", "create", "db@a")
    (mnt / "db").write_bytes(os.urandom(1 << 16))
    offline.ok("snapshot", "create", "db@b")
    asked = [
        ("volume", "list"), ("volume", "show", "db"), ("volume", "map", "db@a"), ("snapshot", "list"),
        ("snapshot", "diff", "--from", "a", "db@b"), ("snapshot", "remove", "-n", "db@a"),
    ]  # fmt: skip
    with (mnt / "db").open("r+b") as stream:
        os.fsync(stream.fileno())  # the times that the kernel keeps go to the daemon
    online = [offline.json(*arguments) for arguments in asked]
    offline.ok("umount", mnt)
    assert [offline.json(*arguments) for arguments in asked] == online


def test_mount_helper_form_and_second_mount(offline: Cli, tmp_path: Path) -> None:
    for name in ("m1", "m2"):
        (tmp_path / name).mkdir()
    try:
        Cli().ok(offline.pool, tmp_path / "m1", "-o", "rw,nofail,_netdev,x-systemd.automount", "-o", "dev,suid")
        assert os.path.ismount(tmp_path / "m1")
        Cli().fails(11, "mount", offline.pool, tmp_path / "m2")
        Cli().fails(11, "mount", offline.pool, tmp_path / "m1")
        with (tmp_path / "m1/held").open("w"):
            assert str(os.getpid()) in Cli().fails(11, "umount", tmp_path / "m1")
        Cli().ok("umount", tmp_path / "m1")
        assert not os.path.ismount(tmp_path / "m1")
        assert offline.ok("volume", "ls", "-H", "-o", "name") == "held\n"
    finally:
        unmount_anyhow(tmp_path / "m1")
        unmount_anyhow(tmp_path / "m2")


def test_what_cannot_be_mounted(offline: Cli, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "empty").mkdir()
    Cli().fails(10, "mount", tmp_path / "empty", tmp_path / "mnt")
    Cli().fails(10, "mount", tmp_path / "missing", tmp_path / "mnt")
    Cli().fails(10, tmp_path / "missing", tmp_path / "mnt")
    Cli().fails(2, "mount", offline.pool, tmp_path / "missing")
    Cli().fails(2, "mount", offline.pool, tmp_path / "mnt", "-o", "frobnicate")
    Cli().fails(10, "umount", tmp_path / "mnt")
    assert list((tmp_path / "empty").iterdir()) == []
    assert not os.path.ismount(tmp_path / "mnt")


def test_killed_daemon_then_offline_then_mount_again(offline: Cli, mnt: Path) -> None:
    offline.ok("volume", "create", "db", "1M")
    pid = int(os.getxattr(mnt, "user.incfs.pid"))
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    ended, _, _ = select.select([pidfd], [], [], TIMEOUT_S)
    os.close(pidfd)
    assert ended
    first, second = (offline.run("volume", "list", "-H", "-o", "name") for _ in range(2))
    assert first.stdout == second.stdout == "db\n"
    assert f"(process {pid}) ended without closing it: what was written and not committed is lost" in first.stderr
    assert second.stderr == f"incfs: {mnt} has no daemon any more, programs that use it fail; " + (
        f"`incfs umount {mnt}`, or mount it again\n"
    )
    offline.run("umount", mnt)
    assert offline.run("volume", "list").stderr == ""
    assert not os.path.ismount(mnt)
    offline.ok("mount", offline.pool, mnt)
    assert (mnt / "db").stat().st_size == 1 << 20


def test_foreground_ends_with_umount(offline: Cli, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    process = subprocess.Popen(
        offline.command("mount", "--foreground", offline.pool, mountpoint),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not os.path.ismount(mountpoint):
            assert process.poll() is None
            time.sleep(0.05)
        Cli().ok("umount", mountpoint)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0
        assert "Traceback" not in stderr
    finally:
        process.kill()
        process.wait()
        unmount_anyhow(mountpoint)
