"""Loop devices and filesystems on them, which never outlive the test that made them."""

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAM_TIMEOUT_S = 250


def run(*command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program; what it said is in the failure."""
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S, check=False)
    assert not check or done.returncode == 0, f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done


@contextmanager
def loop_device(path: Path, *options: str) -> Iterator[Path]:
    """Attach a file to a loop device."""
    device = Path(run("losetup", "--find", "--show", *options, path).stdout.strip())
    try:
        yield device
    except BaseException:
        # What is mounted on it goes first, or the device stays.
        for mountpoint in run("findmnt", "-rno", "TARGET", device, check=False).stdout.split():
            run("umount", "--lazy", mountpoint, check=False)
        run("losetup", "--detach", device, check=False)
        raise
    run("losetup", "--detach", device)


@contextmanager
def filesystem(device: Path, directory: Path, *options: str) -> Iterator[Path]:
    """Mount the filesystem on a device."""
    directory.mkdir(exist_ok=True)
    run("mount", *options, device, directory)
    try:
        yield directory
    except BaseException:
        run("umount", "--lazy", directory, check=False)
        raise
    run("umount", directory)


MAKERS = {
    "ext4": ("mkfs.ext4", "-q", "-m", "0"),
    "xfs": ("mkfs.xfs", "-q"),
    "btrfs": ("mkfs.btrfs", "-q"),
}


@contextmanager
def small_disk(kind: str, size_bytes: int, image: Path, where: Path) -> Iterator[Path]:
    """Give a directory on a filesystem of its own: tmpfs, or another one in a file."""
    if kind == "tmpfs":
        where.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", where)
        try:
            yield where
        finally:
            run("umount", where)
        return
    with open(image, "wb") as stream:
        stream.truncate(size_bytes)
    with loop_device(image) as device:
        run(*MAKERS[kind], device)
        with filesystem(device, where) as directory:
            yield directory


def clone(source: Path, target: Path) -> None:
    """Copy a file of a filesystem that shares blocks, at one point in time (FICLONE)."""
    ficlone = 0x40049409
    with open(source, "rb") as original, open(target, "xb") as copy:
        fcntl.ioctl(copy, ficlone, original.fileno())


def allocated_bytes(path: Path) -> int:
    """Return what a file, or all files below a directory, occupy."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(os.stat(file).st_blocks * 512 for file in files)


def stage_files(source: Path, target: Path, *, file_count: int, largest_bytes: int) -> int:
    """Gather at least ``file_count`` real files below ``target``: an even selection of those below ``source``.

    The same machine gives the same selection.  When it has too few, all are taken, several times.
    Returns their total size.
    """
    found = sorted(_regular_files(source, largest_bytes))
    assert found, f"no files below {source}"
    step = max(1, len(found) // (file_count + file_count // 40))
    chosen, total, taken, turn = found[::step], 0, 0, 0
    while taken < file_count:
        for path in chosen:
            staged = target / str(turn) / path.relative_to(source)
            staged.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(path, staged)
            total += staged.stat().st_size
        taken += len(chosen)
        turn += 1
    return total


def _regular_files(source: Path, largest_bytes: int) -> Iterator[Path]:
    device = os.stat(source).st_dev
    for directory, names, files in os.walk(source):
        names[:] = [name for name in names if _device(Path(directory, name)) == device]
        for path in (Path(directory, name) for name in files):
            if path.is_file() and not path.is_symlink() and path.stat().st_size <= largest_bytes:
                yield path


def _device(path: Path) -> int:
    with contextlib.suppress(OSError):
        return os.lstat(path).st_dev
    return -1


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        target.write_bytes(source.read_bytes())
