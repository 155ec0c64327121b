"""What a machine is started from: a root with systemd, kernels, and this tree with its extension built there.

Everything lies below ``build/vm`` under the hash of what it is made of, so that only what changed is made anew:

    SUITE-HASH/root, root.img     Debian's packages, incfs's libraries, the guest's settings
    SUITE-HASH/tree-HASH.img      this tree, its extension and byte code, mounted read-only at /opt/incfs
    kernel-SUITE-VERSION/         vmlinuz, initrd, and the modules that root.img has, too

Nothing is ever mounted below it: `make clean` removes it.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.vm.initrd import make_initrd
from tests.vm.mirrors import Apt, sources

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "vm"
_GUEST = Path(__file__).parent / "guest"
_PACKAGES = (
    "systemd", "systemd-sysv", "udev", "dbus", "libpam-systemd", "login", "passwd",
    "kmod", "mount", "util-linux", "procps", "attr", "e2fsprogs", "xfsprogs", "fuse3", "busybox-static",
    "ca-certificates",
    "python3", "python3-venv", "python3-dev", "libfuse3-dev", "pkg-config", "gcc", "libc6-dev",
)  # fmt: skip
_TEST_LIBRARIES = ("hypothesis", "pytest", "setuptools")
"""Of those that tests need, what names begin with."""
_UNUSED = (
    "systemd-timesyncd.service", "systemd-update-utmp.service", "systemd-random-seed.service", "ldconfig.service",
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "man-db.timer", "systemd-pcrphase.service",
    "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer", "getty@tty1.service", "serial-getty@ttyS0.service",
    "systemd-udev-trigger.service", "systemd-journal-flush.service", "systemd-journal-catalog-update.service",
    "systemd-update-utmp-runlevel.service", "systemd-update-done.service", "systemd-sysusers.service",
    "modprobe@drm.service", "modprobe@configfs.service", "kmod-static-nodes.service", "systemd-tmpfiles-clean.timer",
    "systemd-tmpfiles-setup.service", "systemd-tmpfiles-setup-dev.service",
    "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "dev-hugepages.mount", "dev-mqueue.mount",
)  # fmt: skip
"""Units that only cost time."""
_SETTINGS = {
    "etc/fstab": "/dev/vda / ext4 defaults 0 0\n",
    "etc/hostname": "guest\n",
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "usr/local/bin/incfs": '#!/bin/sh\nPYTHONPATH=/opt/incfs exec /opt/venv/bin/python -m incfs "$@"\n',
    "etc/systemd/journald.conf.d/vm.conf": "[Journal]\nStorage=persistent\nForwardToConsole=yes\nMaxLevelConsole=info",
    # Of an emulated processor on a busy machine no more is asked than that it ends.
    "etc/systemd/system.conf.d/vm.conf": "[Manager]\nDefaultTimeoutStopSec=600s\nDefaultTimeoutStartSec=600s",
}
_LINKS = {
    "sbin/mount.fuse.incfs": "/opt/incfs/packaging/mount.fuse.incfs",
    "sbin/umount.fuse.incfs": "/opt/incfs/packaging/umount.fuse.incfs",
    "etc/systemd/system/agent.service": "/opt/incfs/tests/vm/guest/agent.service",
    "etc/systemd/system/multi-user.target.wants/agent.service": "/opt/incfs/tests/vm/guest/agent.service",
    "etc/systemd/system/default.target": "/usr/lib/systemd/system/multi-user.target",
}


@dataclass(frozen=True)
class Platform:
    """A Debian release and one of its kernels."""

    suite: str
    kernel: str
    """What the version begins with."""
    has_backports: bool = False

    def __str__(self) -> str:
        return f"{self.suite}-{self.kernel.rstrip('.')}"


BOOKWORM = Platform("bookworm", "6.1.", has_backports=True)
BOOKWORM_BACKPORTS = Platform("bookworm", "6.12.", has_backports=True)
TRIXIE = Platform("trixie", "6.12.")
PLATFORMS = (BOOKWORM, BOOKWORM_BACKPORTS, TRIXIE)


@dataclass(frozen=True)
class Image:
    """What QEMU is given."""

    root: Path
    tree: Path
    kernel: Path
    initrd: Path


def prepare(platform: Platform) -> Image:
    """Make what is not there yet, and return where it is."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernels = {p: _kernel(p) for p in PLATFORMS if p.suite == platform.suite}
        base = _base(platform, kernels)
        kernel = kernels[platform]
        return Image(base / "root.img", _tree(base), kernel / "vmlinuz", kernel / "initrd")


# --------------------------------------------------------------------------------------- kernels


def _kernel(platform: Platform) -> Path:
    """Download and unpack a kernel; nothing of it is installed."""
    place = CACHE / f"kernel-{platform}"
    with _made_whole(place) as new:
        if new is not None:
            apt = Apt(new / "apt", sources(platform.suite, backports=platform.has_backports))
            package = apt.download(apt.newest("linux-image-cloud-amd64", platform.kernel))
            _run("dpkg-deb", "-x", package, new)
            release = next((new / "lib/modules").iterdir()).name
            shutil.copy(new / f"boot/vmlinuz-{release}", new / "vmlinuz")
            shutil.rmtree(new / "apt")
    return place


# --------------------------------------------------------------------------------------- the root


def _base(platform: Platform, kernels: dict[Platform, Path]) -> Path:
    """Make the root of a release: packages, libraries, settings, the modules of its kernels."""
    libraries = _libraries()
    made_of = (_PACKAGES, libraries, _UNUSED, _SETTINGS, _LINKS, sorted(map(str, kernels)), Path(__file__).read_text())
    place = CACHE / f"{platform.suite}-{_digest(repr(made_of).encode())}"
    with _made_whole(place) as new:
        if new is not None:
            root = new / "root"
            _bootstrap(root, sources(platform.suite))
            _install_libraries(root, libraries)
            _set_up(root)
            for kernel in kernels.values():
                _add_modules(root, kernel)
            _make_filesystem(root, new / "root.img", "4G")
    return place


def _bootstrap(root: Path, lines: list[str]) -> None:
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale", "info")]
    # What it mounts there for the time goes with the namespace, also when it is killed.
    _run(
        "unshare", "--mount", "mmdebstrap", "--quiet", "--variant=minbase", "--mode=root", "--dpkgopt=force-unsafe-io",
        *left_out,
        f"--include={','.join(_PACKAGES)}", "", root, *lines,
    )  # fmt: skip


def _libraries() -> list[str]:
    """Return what pip is to install: what incfs and its tests need, but not what only looks at the code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tests = [name for name in project["optional-dependencies"]["test"] if name.startswith(_TEST_LIBRARIES)]
    return [*project["dependencies"], *tests]


def _install_libraries(root: Path, libraries: list[str]) -> None:
    """Use this machine's way to PyPI: its resolver, certificates, and settings of pip in the environment."""
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs/ca-certificates.crt")
    _chroot(root, "python3", "-m", "venv", "/opt/venv")
    _chroot(root, "/opt/venv/bin/pip", "-qq", "install", *libraries)


def _add_modules(root: Path, kernel: Path) -> None:
    """Copy a kernel's modules, and make its initrd of them."""
    release = next((kernel / "lib/modules").iterdir()).name
    shutil.copytree(kernel / "lib", root / "usr/lib", symlinks=True, dirs_exist_ok=True)
    _chroot(root, "depmod", release)
    (kernel / "initrd").write_bytes(make_initrd(root / "usr/lib/modules" / release, root / "bin/busybox"))


def _set_up(root: Path) -> None:
    for name, text in _SETTINGS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "usr/local/bin/incfs").chmod(0o755)
    for name, target in _LINKS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(target)
    for unit in _UNUSED:
        (root / "etc/systemd/system" / unit).unlink(missing_ok=True)
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")
    (root / "opt/incfs").mkdir(exist_ok=True)
    (root / "var/log/journal").mkdir(parents=True, exist_ok=True)
    _chroot(root, "passwd", "-d", "root")
    _chroot(root, "useradd", "--create-home", "--shell", "/bin/bash", "user")


# --------------------------------------------------------------------------------------- the tree


def _tree(base: Path) -> Path:
    """Make the disk with this tree; its extension and byte code are made with the root's compiler and Python."""
    files = _tree_files()
    digest = _digest(*(f"{name} ".encode() + (ROOT / name).read_bytes() for name in files))
    place = base / f"tree-{digest}.img"
    if not place.exists():
        for old in base.glob("tree-*.img"):
            old.unlink()
        stage = base / "root/opt/stage"
        shutil.rmtree(stage, ignore_errors=True)
        for name in files:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, stage / name)
        python = "/opt/venv/bin/python"
        _chroot(base / "root", "sh", "-c", f"cd /opt/stage && {python} setup.py -q build_ext --inplace && rm -r build")
        _chroot(base / "root", python, "-m", "compileall", "-q", "-s", "/opt/stage", "-p", "/opt/incfs", "/opt/stage")
        _make_filesystem(stage, place.with_suffix(".new"), "128M")
        place.with_suffix(".new").rename(place)
    return place


def _tree_files() -> list[str]:
    listed = _run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


# --------------------------------------------------------------------------------------- how


@contextmanager
def _made_whole(place: Path) -> Iterator[Path | None]:
    """Give a new directory that takes its place when it is whole; None if it is there already."""
    if place.exists():
        yield None
        return
    print(f"making {place.relative_to(ROOT)}", file=sys.__stderr__, flush=True)
    new = place.with_name(f"{place.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    yield new
    new.rename(place)


def _make_filesystem(source: Path, image: Path, size: str) -> None:
    _run("mkfs.ext4", "-q", "-F", "-d", source, "-E", "lazy_itable_init=1", image, size)


def _chroot(root: Path, *words: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.endswith("_proxy")}
    given = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8", "CFLAGS": "-O1"}
    _run("chroot", root, *words, env={**kept, **given})


def _run(*words: object, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


if __name__ == "__main__":
    for platform in PLATFORMS:
        if str(platform) in (sys.argv[1:] or map(str, PLATFORMS)):
            prepare(platform)
