"""Where else a mount is: bound to other places, or copied into other mount namespaces.

Whoever has such another one keeps the daemon, and with it the pool: an unmounting here would be no end.  Places that
an unmounting here reaches through propagation (most services' namespaces are slaves of the host's) do not count.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from incfs.mount_table import Mounted, command_name, find_mount, parse_mounts, processes


@dataclass(frozen=True, slots=True)
class Namespace:
    """What the processes of one mount namespace see."""

    pid: int
    """Of one of them; 0 for our own."""
    mounts: tuple[Mounted, ...]


def find_elsewhere(mountpoint: Path) -> list[str]:
    """Name the places that keep the mount at ``mountpoint`` alive when it is unmounted there.

    Cost: reads the mount table of every process that this user may look at.
    """
    mounted = find_mount(mountpoint)
    if mounted is None:
        return []
    return list(_named(staying(mounted, _namespaces())))


def staying(mounted: Mounted, namespaces: Iterable[Namespace]) -> list[tuple[Namespace, Mounted]]:
    """Return the mounts of the same filesystem that stay when ``mounted`` is unmounted.  Pure."""
    spaces = list(namespaces)
    everything = {other.id: other for space in spaces for other in space.mounts}
    parent = everything.get(mounted.parent_id)
    reached = _reached(parent.shared, everything.values()) if parent is not None else set()
    place = _place_in(parent, mounted)
    found = []
    seen = {mounted.id}  # processes with another root see the same mounts
    for space in spaces:
        for other in space.mounts:
            if other.device != mounted.device or other.id in seen:
                continue
            seen.add(other.id)
            above = everything.get(other.parent_id)
            goes_along = (
                above is not None and {above.shared, above.master} & reached and _place_in(above, other) == place
            )
            if not goes_along:
                found.append((space, other))
    return found


def _reached(group: int, mounts: Iterable[Mounted]) -> set[int]:
    """Return the peer groups that hear of what happens in one: itself, its slaves, theirs."""
    if not group:
        return set()
    reached = {group}
    slaves = [(other.master, other.shared) for other in mounts if other.master and other.shared]
    while fresh := {shared for master, shared in slaves if master in reached} - reached:
        reached |= fresh
    return reached


def _place_in(parent: Mounted | None, mounted: Mounted) -> PurePosixPath | None:
    """Return where in the parent's filesystem something is mounted; None when that cannot be said."""
    if parent is None or not mounted.mountpoint.is_relative_to(parent.mountpoint):
        return None
    return PurePosixPath(parent.root) / mounted.mountpoint.relative_to(parent.mountpoint)


def _namespaces() -> Iterator[Namespace]:
    """Read the mount table of every process, once where they are the same; our own first."""
    seen = set()
    for pid in (0, *processes()):
        try:
            table = Path(f"/proc/{pid or 'self'}/mountinfo").read_bytes()
        except OSError:
            continue  # it has gone
        if table not in seen:
            seen.add(table)
            yield Namespace(pid, tuple(parse_mounts(table)))


def _named(found: Iterable[tuple[Namespace, Mounted]]) -> Iterator[str]:
    for space, other in found:
        where = f" in the mount namespace of pid {space.pid} ({command_name(space.pid)})" if space.pid else ""
        yield f"the mount {other.mountpoint}{where}"
