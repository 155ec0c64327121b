"""A machine of namespaces: systemd boots over this machine's root, runs units, logins and fstab, and shuts down.

The kernel is this one's, so nothing is learnt of others, and the power cannot fail; everything that systemd decides is
real and takes seconds.  What it changes of the root lies in memory and lasts over its boots, as /srv does on disk.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300
_TARGET = """[Unit]
Requires=sysinit.target dbus.socket systemd-logind.service
After=sysinit.target dbus.socket systemd-logind.service
AllowIsolate=yes
"""
_PROGRAM = """#!/bin/sh
PYTHONPATH={root} exec {python} -m incfs "$@"
"""


class Container:
    """One machine, from its first boot to its last.

    Args:
        memory: For what it changes of the root; no part of the root itself.
        disk: For its /srv.
    """

    def __init__(self, memory: Path, disk: Path) -> None:
        self._memory = memory
        self.srv = disk
        self._unshare: subprocess.Popen[bytes] | None = None
        for name in ("root", "upper", "work", "units", "etc", "srv"):
            (memory / name).mkdir()
        (memory / "srv").rmdir()
        (memory / "srv").symlink_to(disk)
        (memory / "fstab").write_text("")
        # At a boot nothing is taken from /tmp: this tree may lie there.
        (memory / "etc/tmpfiles.d").mkdir()
        (memory / "etc/tmpfiles.d/tmp.conf").write_text("")
        (memory / "units/guest.target").write_text(_TARGET)
        (memory / "units/tmp.mount").symlink_to("/dev/null")
        (memory / "incfs").write_text(_PROGRAM.format(root=ROOT, python=sys.executable))
        (memory / "incfs").chmod(0o755)
        self._cgroup = _cgroup_mount() / f"incfs-test-{os.getpid()}-{memory.name}"

    def add_unit(self, file: Path) -> None:
        """Install a unit, before the machine is booted."""
        shutil.copy(file, self._memory / "units" / file.name)

    def configure(self, name: str, text: str) -> None:
        """Make a file below /etc, before the machine is booted."""
        path = self._memory / ("fstab" if name == "fstab" else f"etc/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def boot(self) -> None:
        """Switch on, and wait until its units are started."""
        self._cgroup.mkdir()
        bound = [path for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix)) if not _is_on_the_root(path)]
        self._unshare = subprocess.Popen(
            [ROOT / "tests/support/container.sh", self._memory, self._cgroup, *bound],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + TIMEOUT_S
        while self._enter("systemctl", "is-active", "-q", "guest.target").returncode != 0:
            assert self._unshare.poll() is None, "the machine has ended"
            assert time.monotonic() < deadline, self.journal()
            time.sleep(0.2)

    def power_off(self) -> None:
        """Have it shut down in order."""
        self._enter("systemctl", "--no-block", "poweroff", "--no-wall")
        assert self._unshare is not None
        try:
            self._unshare.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not shut down: {self.ok('systemctl list-jobs')}{self.journal()}") from None
        self._clean()

    def end(self) -> None:
        """End it, whatever state it is in: in order if that works."""
        if self._unshare is None:
            return
        try:
            self.power_off()
        except (AssertionError, subprocess.TimeoutExpired):
            self._abort_mounts()
            self._unshare.kill()
            self._unshare.wait()
            self._clean()

    def _abort_mounts(self) -> None:
        """Give up its FUSE mounts: a process that dies with the last of its mounts would wait for itself."""
        init = self._init_pid()
        for line in Path(f"/proc/{init}/mountinfo").read_text().splitlines():
            if " - fuse.incfs " in line:
                number = line.split()[2].partition(":")[2]
                Path(f"/proc/{init}/root/sys/fs/fuse/connections/{number}/abort").write_text("1")

    def ok(self, command: str) -> str:
        """Run a shell command as root in a service of its own; it must work; returns what it said."""
        done = self._enter(
            "systemd-run", "--quiet", "--pipe", "--wait", "--collect", "-p", "KillMode=process", "bash", "-c", command
        )
        assert done.returncode == 0, (
            f"{command!r}: {done.returncode}: {done.stdout}{done.stderr}{self.journal()[-3000:]}"
        )
        return done.stdout

    def journal(self) -> str:
        """Return what systemd and its services have said since the boot."""
        return self._enter("journalctl", "--no-pager", "-b", "-o", "cat").stdout

    def _init_pid(self) -> str:
        """Return the process that is its first one; 0 before there is one."""
        assert self._unshare is not None, "it is off"
        own = self._unshare.pid
        children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        return children[0] if children else "0"

    def _enter(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the machine's namespaces."""
        command = ["nsenter", "-t", self._init_pid(), "-m", "-p", "-u", "-i", "-C", *words]
        environment = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)

    def _clean(self) -> None:
        """Wait until the last of its processes has gone; the cgroups go with them."""
        self._unshare = None
        (self._cgroup / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + TIMEOUT_S
        while "populated 1" in (self._cgroup / "cgroup.events").read_text():
            assert time.monotonic() < deadline, "processes of the machine do not end"
            time.sleep(0.05)
        for directory in sorted(self._cgroup.rglob("*"), reverse=True):
            if directory.is_dir():
                directory.rmdir()
        self._cgroup.rmdir()


def _cgroup_mount() -> Path:
    """Return where this machine has the second version of cgroups."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind = line.split()[:3]
        if kind == "cgroup2":
            return Path(place)
    raise AssertionError("no cgroup2 is mounted on this machine")


def _is_on_the_root(path: Path) -> bool:
    return os.stat(path).st_dev == os.stat("/").st_dev


def missing() -> Iterator[str]:
    """Name what this machine lacks to boot one."""
    if os.geteuid() != 0:
        yield "root"
    yield from (path for path in ("/lib/systemd/systemd", "/usr/bin/dbus-daemon") if not os.path.exists(path))
    if "cgroup2" not in Path("/proc/mounts").read_text():
        yield "cgroup2"
