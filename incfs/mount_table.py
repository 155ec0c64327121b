"""What the kernel says about mounts: where incfs is mounted, who holds a mount, taking a mount away."""

import ctypes
import errno
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from incfs.errors import Busy, IncfsError

FILESYSTEM_TYPE: Final = "fuse.incfs"
MNT_DETACH: Final = 2
MAX_HOLDERS_NAMED: Final = 8
_MAX_LINKS: Final = 40
"""One after the other, as the kernel allows."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Mounted:
    """A line of the mount table."""

    mountpoint: Path
    filesystem_type: str
    source: str
    device: str
    """MAJOR:MINOR."""
    id: int
    parent_id: int
    root: str
    """What of the filesystem is mounted there."""
    shared: int
    """The peer group that it is in; 0 for none."""
    master: int
    """The peer group that it follows; 0 for none."""


def read_mounts() -> list[Mounted]:
    """Return this process's mount table, in the order of mounting."""
    return parse_mounts(Path("/proc/self/mountinfo").read_bytes())


def parse_mounts(table: bytes) -> list[Mounted]:
    """Take ``/proc/PID/mountinfo`` apart."""
    return [parse_mount(line) for line in table.splitlines()]


def parse_mount(line: bytes) -> Mounted:
    """Take one line of ``/proc/PID/mountinfo`` apart."""
    before, _, after = line.partition(b" - ")
    filesystem_type, source = after.split(b" ")[:2]
    number, parent, device, root, place, _, *optional = before.split(b" ")
    groups = {name: int(group) for name, _, group in (field.partition(b":") for field in optional) if group}
    return Mounted(
        mountpoint=Path(_unescape(place)),
        filesystem_type=os.fsdecode(filesystem_type),
        source=_unescape(source),
        device=os.fsdecode(device),
        id=int(number),
        parent_id=int(parent),
        root=_unescape(root),
        shared=groups.get(b"shared", 0),
        master=groups.get(b"master", 0),
    )


def _unescape(field: bytes) -> str:
    """Undo the octal escapes of blanks and backslashes."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), field))


def find_mount(mountpoint: Path) -> Mounted | None:
    """Return the topmost mount at exactly this place; None when nothing is mounted there."""
    place = resolve_mountpoint(mountpoint)
    return next((mounted for mounted in reversed(read_mounts()) if mounted.mountpoint == place), None)


def resolve_mountpoint(mountpoint: Path) -> Path:
    """Return the path as the mount table has it, without asking the mount itself, which may be dead.

    Of the last part only a link's text is read: that asks the directory around it.
    """
    place = Path(os.path.abspath(mountpoint))
    for _ in range(_MAX_LINKS):
        place = Path(os.path.realpath(place.parent)) / place.name if place.name else place
        try:
            target = os.readlink(place)
        except OSError:
            return place
        place = place.parent / target
        if place.name == "..":
            return Path(os.path.realpath(place))
    return place


def is_dead(mountpoint: Path) -> bool:
    """Say whether the daemon behind this mount has gone."""
    try:
        # Not stat: for a second after the daemon's end the kernel answers it from its cache.
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def detach(mountpoint: Path, *, lazy: bool = False) -> None:
    """Take a mount away; blocks until the kernel has written its changed pages (unless ``lazy``).

    Raises:
        Busy: Somebody uses it; the message says who.
        IncfsError: The kernel or fusermount3 refused.
    """
    place = resolve_mountpoint(mountpoint)
    if _libc.umount2(os.fsencode(place), MNT_DETACH if lazy else 0) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EPERM:
        number = _fusermount(place, lazy=lazy)
    if number == errno.EBUSY:
        raise busy_error(mountpoint)
    if number:
        raise IncfsError(f"cannot unmount {mountpoint}: {os.strerror(number)}", mountpoint=str(mountpoint))


def _fusermount(place: Path, *, lazy: bool) -> int:
    """Unmount as an ordinary user; returns an errno, 0 when done."""
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise IncfsError("fusermount3 is not installed; install the package fuse3") from error
    if done.returncode == 0:
        return 0
    if "busy" in done.stderr:
        return errno.EBUSY
    raise IncfsError(f"cannot unmount {place}: {done.stderr.strip()}", mountpoint=str(place))


def write_pages(fd: int) -> None:
    """Have the kernel write a file's changed pages and wait for it (sync_file_range): neither lock nor fsync.

    Raises:
        OSError: A page could not be written.
    """
    wait_write_wait = 7
    if _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), wait_write_wait) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def sync_filesystem(path: Path) -> None:
    """Have the kernel begin to write every changed page of the filesystem at ``path`` (syncfs).

    Of a FUSE filesystem the kernel does not wait for the writes.

    Raises:
        OSError: A page could not be written.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)


# ----------------------------------------------------------------------------------- who holds a mount


def busy_error(mountpoint: Path, holders: Sequence[str] | None = None) -> Busy:
    """Return the error that names who holds the mount."""
    holders = find_holders(mountpoint) if holders is None else list(holders)
    shown = ", ".join(holders[:MAX_HOLDERS_NAMED]) or "somebody this user cannot see"
    more = f" and {len(holders) - MAX_HOLDERS_NAMED} more" if len(holders) > MAX_HOLDERS_NAMED else ""
    return Busy(f"{mountpoint} is in use by {shown}{more}", mountpoint=str(mountpoint), holders=holders)


def find_holders(mountpoint: Path) -> list[str]:
    """Name the processes, loop devices and mounts that keep the mount busy."""
    place = str(resolve_mountpoint(mountpoint))
    prefix = place.rstrip("/") + "/"
    loops = [f"{device} on {file}" for device, file in loop_devices() if file.startswith(prefix)]
    inner = [f"the mount {m.mountpoint}" for m in read_mounts() if str(m.mountpoint).startswith(prefix)]
    return [*_processes(place, prefix), *loops, *inner]


def _processes(place: str, prefix: str) -> Iterator[str]:
    for pid in processes():
        path = next((path for path in _used_paths(pid) if path == place or path.startswith(prefix)), None)
        if path is not None:
            yield f"pid {pid} ({command_name(pid)}) on {path}"


def processes() -> list[int]:
    """Return the processes that there are, in order."""
    return sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def _used_paths(pid: int) -> Iterator[str]:
    """Yield the files that a process works in, has open or has mapped, as far as this user may know."""
    for name in ("cwd", "root", "exe"):
        yield from _read_link(Path(f"/proc/{pid}/{name}"))
    try:
        opened = list(Path(f"/proc/{pid}/fd").iterdir())
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as stream:
            mapped = [line.split(maxsplit=5)[5].rstrip("\n") for line in stream if "/" in line]
    except (OSError, IndexError):
        return  # it has gone, or belongs to another user
    for link in opened:
        yield from _read_link(link)
    yield from mapped


def _read_link(path: Path) -> Iterator[str]:
    try:
        yield str(path.readlink())
    except OSError:
        return  # it has gone, or belongs to another user


def command_name(pid: int) -> str:
    """Return what a process is called."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "ended"


def loop_devices() -> Iterator[tuple[str, str]]:
    """Yield each loop device and the file that it is on."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            yield f"/dev/{backing.parent.parent.name}", os.fsdecode(backing.read_bytes()).rstrip("\n")
        except OSError:
            continue  # detached just now
