"""What the values of a policy's keys may be, and what they become.  Pure.

A reader takes what TOML gave and returns the typed value, or raises UsageError; the caller
knows key and line.
"""

from collections.abc import Callable
from datetime import UTC, tzinfo
from typing import Any, Final
from zoneinfo import ZoneInfo

from incfs.errors import UsageError
from incfs.model import MAX_VOLUME_BYTES
from incfs.placement import parse_rules
from incfs.policy.schedule import Schedule, parse_schedule
from incfs.settings import Amount, Directory
from incfs.units import parse_duration, parse_percent, parse_size

Reader = Callable[[Any], Any]

NONE: Final = "none"
MAX_COUNT: Final = 1_000_000
MAX_HOOK_S: Final = 3600


def text(value: Any) -> str:
    """Read a string."""
    if not isinstance(value, str):
        raise UsageError(f"{value!r} is not a text in quotes")
    return value


def flag(value: Any) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise UsageError(f"{value!r} is neither true nor false")
    return value


def size(value: Any) -> int:
    """Read a size: a whole number of bytes, or a text such as "10G"."""
    found = parse_size(value) if isinstance(value, str) else value
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= MAX_VOLUME_BYTES:
        raise UsageError(f'{value!r} is not a size; write bytes, or a text such as "10G"')
    return found


def rate(value: Any) -> int:
    """Read bytes a second, above 0."""
    found = size(value)
    if found == 0:
        raise UsageError("a rate of 0 moves nothing; write never as the schedule instead")
    return found


def amount(value: Any) -> Amount:
    """Read a size or a share such as "15%"."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return Amount(percent=parse_percent(value))
    return Amount(fixed_bytes=size(value))


def count(low: int, high: int = MAX_COUNT) -> Reader:
    """Make a reader of a whole number."""

    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise UsageError(f"{value!r} is not a whole number from {low} to {high}")
        return value

    return read


def duration(value: Any) -> int:
    """Read a duration such as "2h", in whole seconds."""
    return int(parse_duration(text(value)))


def hook_timeout(value: Any) -> int:
    """Read the time that a hook may take, in seconds."""
    found = duration(value)
    if not 0 < found <= MAX_HOOK_S:
        raise UsageError(f"{value!r} is out of range: a hook may take 1s to 1h")
    return found


def or_none(reader: Reader) -> Reader:
    """Make a reader that takes "none" too."""
    return lambda value: None if value == NONE else reader(value)


def one_of(*choices: str) -> Reader:
    """Make a reader of one of several words."""

    def read(value: Any) -> str:
        if value not in choices:
            raise UsageError(f"{value!r} is not one of {', '.join(choices)}")
        return text(value)

    return read


def texts(value: Any) -> tuple[str, ...]:
    """Read a list of strings."""
    if not isinstance(value, list):
        raise UsageError(f"{value!r} is not a list")
    return tuple(text(item) for item in value)


def placement_rules(value: Any) -> tuple[str, ...]:
    """Read a list of rules such as "class=ssd"."""
    found = texts(value)
    parse_rules(found)
    return found


def directories(value: Any) -> tuple[Directory, ...]:
    """Read a list of absolute paths, or of tables with ``path`` and ``class``."""
    if not isinstance(value, list):
        raise UsageError(f"{value!r} is not a list")
    return tuple(_directory(item) for item in value)


def _directory(value: Any) -> Directory:
    found = value if isinstance(value, dict) else {"path": value}
    if unknown := found.keys() - {"path", "class"}:
        raise UsageError(f"a directory has a path and a class, not {min(unknown)!r}")
    path = text(found.get("path"))
    if not path.startswith("/") or "\0" in path:
        raise UsageError(f"{path!r} is not an absolute path")
    return Directory(path, text(found.get("class", "")))


def command(value: Any) -> tuple[str, ...]:
    """Read a program with its arguments: a list, never a shell's text; empty for none."""
    found = texts(value)
    if any("\0" in part for part in found):
        raise UsageError("a program's argument cannot hold a NUL")
    if found and not found[0].startswith("/"):
        raise UsageError(f"{found[0]!r} is not the absolute path of a program")
    return found


def when_full(value: Any) -> float:
    """Read what a write does in a full pool: "error", or "queue:60s"; as seconds to wait."""
    word, _, rest = text(value).partition(":")
    if word == "error" and not rest:
        return 0.0
    if word != "queue":
        raise UsageError(f'{value!r} is neither "error" nor "queue:60s"')
    return float(parse_duration(rest))


def power_of_two(value: Any) -> int:
    """Read a size that is a power of two, at least 64 KiB."""
    found = size(value)
    if found < 65536 or found & (found - 1):
        raise UsageError(f"{value!r} is not a power of two of at least 64K")
    return found


def schedule(value: Any) -> Schedule | None:
    """Read a schedule; "never" is None."""
    return parse_schedule(text(value))


def timezone(value: Any) -> tzinfo:
    """Read the name of a time zone that this host knows; UTC needs no table of the host."""
    if value == "UTC":
        return UTC
    try:
        return ZoneInfo(text(value))
    except (OSError, ValueError, LookupError) as error:
        raise UsageError(f"{value!r} is no time zone that this host knows, such as UTC or Europe/Rome") from error
