"""Mount options: what may stand after ``-o`` on the command line and in fstab.  Pure."""

from dataclasses import dataclass
from typing import Final, cast

from incfs.errors import UsageError
from incfs.fuse_files import CacheMode
from incfs.planes import PLANE_KINDS, PlaneKind

MAX_THREADS: Final = 16
CACHE_MODES: Final = ("writeback", "writethrough", "none")

# fmt: off
_IGNORED: Final = frozenset({
    "defaults", "rw", "dev", "nodev", "suid", "nosuid", "exec", "auto",
    "noauto", "nofail", "user", "nouser", "users", "owner", "group", "async",
    "atime", "relatime", "norelatime", "strictatime", "nostrictatime", "diratime", "nodiratime", "lazytime",
    "nolazytime", "mand", "nomand", "_netdev", "nonempty", "default_permissions", "bg", "fg",
    "silent", "loud", "iversion", "noiversion",
})
# fmt: on
"""Options of mount(8) that ask for nothing here, or for what always holds (``nosuid``, ``nodev``)."""
_IGNORED_PREFIXES: Final = ("x-", "X-", "comment=", "context=", "uhelper=", "helper=", "dev=", "subtype=", "user=")
_KERNEL: Final = frozenset({"noexec", "noatime", "sync", "dirsync"})
"""Passed on as they are."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How a pool is to be mounted."""

    cache: CacheMode = "writeback"
    allow_other: bool = False
    """Let other users in, as far as the modes of volumes do."""
    read_only: bool = False
    commit_s: float | None = None
    """Seconds between commits that nobody asked for; None is the pool's own choice."""
    data_plane: PlaneKind | None = None
    """Who moves the bytes; None is what the environment or the installation says."""
    threads: int = 2
    """Threads of the native data plane that read and write past Python; 0 for none."""
    degraded: bool = False
    """Mount also without all images: read-only, what is on the others can be read."""
    force_older: bool = False
    """Mount although directory and images are of different times: what is newer is lost."""
    hooks: bool = False
    """Run the programs that the pool's policy names."""
    metrics: str | None = None
    """Where metrics are served over HTTP: a unix socket's path, or a port of 127.0.0.1."""
    dump_s: float | None = 86400.0
    """Copy the metadata beside the images at the first checkpoint after so many seconds; None: never."""
    source: str | None = None
    """What mount(8) and df show as the device; None is the pool's directory."""
    kernel: tuple[str, ...] = ()


def parse_options(text: str) -> MountOptions:
    """Return the options in a comma-separated list; of contradictions the last one counts.

    Raises:
        UsageError: An option is unknown or has a value that makes no sense.
    """
    values: dict[str, object] = {}
    kernel: list[str] = []
    for option in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = option.partition("=")
        if option in _KERNEL:
            kernel.append(option)
        elif key in _PARSERS:
            name, parse = _PARSERS[key]
            values[name] = parse(option, value)
        elif option in {"ro", "rw"}:
            values["read_only"] = option == "ro"
        elif option not in _IGNORED and not option.startswith(_IGNORED_PREFIXES):
            raise UsageError(f"unknown mount option {option!r}", option=option)
    return MountOptions(kernel=tuple(dict.fromkeys(kernel)), **values)  # type: ignore[arg-type]  # by _PARSERS


def _parse_cache(option: str, value: str) -> CacheMode:
    if value not in CACHE_MODES:
        raise UsageError(f"mount option {option!r}: cache is one of {', '.join(CACHE_MODES)}", option=option)
    return cast("CacheMode", value)


def _parse_plane(option: str, value: str) -> PlaneKind:
    if value not in PLANE_KINDS:
        raise UsageError(f"mount option {option!r}: data_plane is one of {', '.join(PLANE_KINDS)}", option=option)
    return cast("PlaneKind", value)


def _parse_threads(option: str, value: str) -> int:
    if not (value.isdecimal() and int(value) <= MAX_THREADS):
        raise UsageError(f"mount option {option!r}: threads is a number from 0 to {MAX_THREADS}", option=option)
    return int(value)


def _parse_seconds(option: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0.1 <= seconds <= 3600:
        raise UsageError(f"mount option {option!r}: commit is a number of seconds from 0.1 to 3600", option=option)
    return seconds


def _parse_dump(option: str, value: str) -> float | None:
    named: dict[str, float | None] = {"off": None, "checkpoint": 0.0, "daily": 86400.0}
    if value in named:
        return named[value]
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise UsageError(f"mount option {option!r}: dump is off, checkpoint, daily or a number of seconds")
    return float(value)


def _parse_metrics(option: str, value: str) -> str:
    is_port = value.isascii() and value.isdigit() and 0 < int(value[:6]) < 65536
    if not (is_port or (value.startswith("/") and len(value.encode()) < 108)):
        raise UsageError(f"mount option {option!r}: metrics is a port, or the absolute path of a socket", option=option)
    return value


def _parse_flag(option: str, value: str) -> bool:
    if value:
        raise UsageError(f"mount option {option!r} takes no value", option=option)
    return True


def _parse_text(option: str, value: str) -> str:
    if not value:
        raise UsageError(f"mount option {option!r} needs a value", option=option)
    return value


_PARSERS: Final = {
    "cache": ("cache", _parse_cache),
    "commit": ("commit_s", _parse_seconds),
    "data_plane": ("data_plane", _parse_plane),
    "threads": ("threads", _parse_threads),
    "dump": ("dump_s", _parse_dump),
    "degraded": ("degraded", _parse_flag),
    "force_older": ("force_older", _parse_flag),
    "allow_other": ("allow_other", _parse_flag),
    "hooks": ("hooks", _parse_flag),
    "metrics": ("metrics", _parse_metrics),
    "fsname": ("source", _parse_text),
}
