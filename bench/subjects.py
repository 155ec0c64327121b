"""What is measured: each subject turns a directory into files that can be read and written.

A subject is brought up once for a stage of the run and asked for volumes: the long-lived one that most jobs share,
and fresh ones for the jobs that need them.
"""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from bench.host import (
    BenchError,
    Cleanup,
    attach_loop,
    end,
    is_mounted,
    mount,
    run,
    spawn,
    sync_file,
    unmount,
    wait_until,
)
from bench.qemu import StorageDaemon

ROOT: Final = Path(__file__).parent.parent
INCFS: Final = Path(sys.executable).parent / "incfs"
_FICLONE: Final = 0x40049409
_FILESYSTEM_SPARE_BYTES: Final = 2 << 30


@dataclass(frozen=True, slots=True)
class Volume:
    """A file of a subject."""

    name: str
    path: Path
    size_bytes: int
    remove: Callable[[], None]


class Subject(ABC):
    """One way to keep a volume.

    Args:
        directory: Empty; on the filesystem that the stage is about.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    has_snapshots: ClassVar[bool] = False
    removes_snapshots: ClassVar[bool] = True
    """False: they go with their volume only."""

    def __init__(self, directory: Path, cleanup: Cleanup) -> None:
        self.directory = directory
        self.cleanup = cleanup

    @classmethod
    def missing(cls) -> str | None:
        """Say why it cannot be measured on this machine; None when it can."""
        return None

    def start(self) -> None:
        """Bring up what all its volumes share; most have nothing of the kind."""
        return

    @abstractmethod
    def create(self, name: str, size_bytes: int) -> Volume:
        """Make an empty volume."""

    def take_snapshot(self, volume: Volume, name: str) -> None:
        """Take a snapshot that is durable on return."""
        raise NotImplementedError

    def remove_snapshot(self, volume: Volume, name: str) -> None:
        """Remove a snapshot; the volume stays as it is."""
        raise NotImplementedError


class Plain(Subject):
    """The plain file on the same filesystem."""

    key = "plain"
    title = "plain file"

    def create(self, name: str, size_bytes: int) -> Volume:
        """Make a sparse file."""
        path = self.directory / name
        make_sparse(path, size_bytes)
        return Volume(name, path, size_bytes, path.unlink)


class _Reflink(Plain):
    """A file on a filesystem that can share blocks; the filesystem is in an image on a loop device."""

    has_snapshots = True
    filesystem: ClassVar[str]
    make: ClassVar[tuple[str, ...]]

    @classmethod
    def missing(cls) -> str | None:
        """Need root and the kernel's module."""
        if os.geteuid():
            return "needs root"
        if shutil.which("modprobe"):
            subprocess.run(["modprobe", "--quiet", cls.filesystem], check=False, capture_output=True)
        known = Path("/proc/filesystems").read_text().split()
        return None if cls.filesystem in known else f"this kernel has no {cls.filesystem}"

    def start(self) -> None:
        """Make the filesystem and mount it."""
        image, mountpoint = self.directory / "image", self.directory / "mnt"
        make_sparse(image, _FILESYSTEM_SPARE_BYTES + 16 * (1 << 30))
        device, _ = attach_loop(self.cleanup, image, direct_io=True)
        run([*self.make, device])
        # Discarding keeps the image as small as what is in it, as the others are.
        mount(self.cleanup, device, mountpoint, "-o", "discard")
        self.directory = mountpoint

    def take_snapshot(self, volume: Volume, name: str) -> None:
        """Do what ``cp --reflink=always`` does, then make it durable."""
        source = os.open(volume.path, os.O_RDONLY)
        target = os.open(self._copy(volume, name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.ioctl(target, _FICLONE, source)
            os.fsync(target)
        finally:
            os.close(source)
            os.close(target)

    def remove_snapshot(self, volume: Volume, name: str) -> None:
        """Remove the copy."""
        self._copy(volume, name).unlink()

    def _copy(self, volume: Volume, name: str) -> Path:
        return self.directory / f"{volume.name}@{name}"


class Xfs(_Reflink):
    """XFS."""

    key = "xfs"
    title = "XFS file"
    filesystem = "xfs"
    make = ("mkfs.xfs", "-q", "-m", "reflink=1")


class Btrfs(_Reflink):
    """Btrfs."""

    key = "btrfs"
    title = "btrfs file"
    filesystem = "btrfs"
    make = ("mkfs.btrfs", "-q")


class Incfs(Subject):
    """Incfs with one of its data planes."""

    has_snapshots = True
    plane: ClassVar[str]

    @classmethod
    def missing(cls) -> str | None:
        """Ask the installed incfs whether it knows the data plane."""
        if not INCFS.exists():
            return f"{INCFS} is not there: run make setup"
        if can_choose_plane(cls.plane) or cls.plane == "python":
            return None
        return f"this incfs has no {cls.plane} data plane"

    def start(self) -> None:
        """Make a pool and mount it."""
        pool, self.mountpoint = self.directory / "pool", self.directory / "mnt"
        run([INCFS, "pool", "create", pool])
        self.daemon = self.mount(pool, self.mountpoint)

    def mount(self, pool: Path, mountpoint: Path) -> subprocess.Popen[bytes]:
        """Mount a pool in the foreground of a child; return when it answers."""
        mountpoint.mkdir(exist_ok=True)
        options = ["-o", f"data_plane={self.plane}"] if can_choose_plane(self.plane) else []
        self.cleanup.add(f"unmount {mountpoint}", lambda: unmount(mountpoint))
        daemon = spawn(
            self.cleanup,
            [INCFS, "mount", "--foreground", *options, pool, mountpoint],
            self.directory / "daemon.log",
            env={**os.environ, "INCFS_DATA_PLANE": self.plane},
        )
        await_mount(daemon, mountpoint, self.directory / "daemon.log")
        return daemon

    def create(self, name: str, size_bytes: int) -> Volume:
        """Make a volume as ``truncate`` does."""
        path = self.mountpoint / name
        make_sparse(path, size_bytes)
        return Volume(name, path, size_bytes, path.unlink)

    def take_snapshot(self, volume: Volume, name: str) -> None:
        """Do what ``touch MNT/.snapshots/VOL/SNAP`` does."""
        os.close(os.open(self._snapshot(volume, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

    def remove_snapshot(self, volume: Volume, name: str) -> None:
        """Do what ``rm`` on it does."""
        self._snapshot(volume, name).unlink()

    def _snapshot(self, volume: Volume, name: str) -> Path:
        return self.mountpoint / ".snapshots" / volume.name / name


class IncfsPython(Incfs):
    """Incfs, Python data plane."""

    key = "incfs-python"
    title = "incfs (Python)"
    plane = "python"


class IncfsNative(Incfs):
    """Incfs, native data plane."""

    key = "incfs-native"
    title = "incfs (native)"
    plane = "native"


class _Floor(Subject):
    """A pass-through that stores nothing: one process for each volume, as QEMU has it."""

    def command(self) -> list[str | Path]:
        """Give the command that IMAGE and MOUNTPOINT are added to."""
        raise NotImplementedError

    def create(self, name: str, size_bytes: int) -> Volume:
        """Serve a sparse file."""
        image, mountpoint = self.directory / f"{name}.image", self.directory / f"{name}.mnt"
        make_sparse(image, size_bytes)
        mountpoint.mkdir()
        forget_mount = self.cleanup.add(f"unmount {mountpoint}", lambda: unmount(mountpoint))
        log = self.directory / "daemon.log"
        server = spawn(self.cleanup, [*self.command(), image, mountpoint], log)
        await_mount(server, mountpoint, log)

        def remove() -> None:
            forget_mount()
            end(server)
            image.unlink()
            mountpoint.rmdir()

        return Volume(name, mountpoint / "volume", size_bytes, remove)


class FloorPython(_Floor):
    """The floor of the binding."""

    key = "floor-pyfuse3"
    title = "pass-through (pyfuse3)"

    def command(self) -> list[str | Path]:
        """Run the script."""
        return [sys.executable, ROOT / "bench/floor/binding.py"]


class FloorThreads(_Floor):
    """The floor of C threads."""

    key = "floor-threads"
    title = "pass-through (C threads)"

    @classmethod
    def missing(cls) -> str | None:
        """Need a compiler and libfuse's headers, as incfs itself does."""
        found = subprocess.run(["pkg-config", "--exists", "fuse3"], check=False).returncode == 0
        return None if found else "needs libfuse3-dev and pkg-config"

    def start(self) -> None:
        """Compile it."""
        self.program = self.directory / "threads"
        flags = run(["pkg-config", "--cflags", "--libs", "fuse3"]).split()
        source = ROOT / "bench/floor/threads.c"
        run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", source, "-o", self.program, *flags, "-lpthread"])

    def command(self) -> list[str | Path]:
        """Run the program."""
        return [self.program]


class Qemu(Subject):
    """A qcow2 file that QEMU's storage daemon exports over FUSE: one daemon for each volume."""

    key = "qemu"
    title = "QEMU qcow2 over FUSE"
    has_snapshots = True
    # QEMU 7.2 refuses block-commit and block-stream on a node that is exported writable over FUSE.
    removes_snapshots = False

    def __init__(self, directory: Path, cleanup: Cleanup) -> None:
        super().__init__(directory, cleanup)
        self._daemons: dict[str, StorageDaemon] = {}

    @classmethod
    def missing(cls) -> str | None:
        """Need both programs."""
        return StorageDaemon.missing()

    def create(self, name: str, size_bytes: int) -> Volume:
        """Make a qcow2 file and export it."""
        daemon = StorageDaemon(self.directory, name, size_bytes, self.cleanup)
        self._daemons[name] = daemon

        def remove() -> None:
            self._daemons.pop(name).remove()

        return Volume(name, daemon.path, size_bytes, remove)

    def take_snapshot(self, volume: Volume, name: str) -> None:
        """Put an overlay on top: what is below does not change any more."""
        sync_file(volume.path)
        self._daemons[volume.name].push_overlay(name)


SUBJECTS: Final[tuple[type[Subject], ...]] = (
    IncfsPython,
    IncfsNative,
    FloorPython,
    FloorThreads,
    Qemu,
    Plain,
    Xfs,
    Btrfs,
)


def make_sparse(path: Path, size_bytes: int) -> None:
    """Make an empty file of a size."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)


def await_mount(daemon: subprocess.Popen[bytes], mountpoint: Path, log: Path) -> None:
    """Return when the daemon's mount answers."""

    def answers() -> bool:
        if daemon.poll() is not None:
            raise BenchError(f"the daemon of {mountpoint} ended: {log.read_text(errors='replace')[-2000:]}")
        if not is_mounted(mountpoint):
            return False
        try:
            return bool(os.statvfs(mountpoint).f_bsize)
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                return False
            raise

    wait_until(answers, f"the mount at {mountpoint}", timeout_s=600)


_chosen: dict[str, bool] = {}


def can_choose_plane(plane: str) -> bool:
    """Tell whether the installed incfs takes ``-o data_plane=PLANE``."""
    if plane not in _chosen:
        code = f"from incfs.mount_options import parse_options; parse_options('data_plane={plane}')"
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=ROOT)
        _chosen[plane] = asked.returncode == 0
    return _chosen[plane]
