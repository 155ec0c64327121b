"""Replication, decided: where a replica is, what it has, what to send it.  Pure.

The newest snapshot that a replica has must be one of ours, or be bookmarked: then what follows it is sent, in one
stream that can be gone on with.  Everything else is a conflict, which is told and never solved
by removing something.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from incfs.errors import BaseMismatch, FormatError, ReplicaFailed, UsageError

DEFAULT_PROGRAM: Final = "incfs"
_SOCKET_SUFFIX: Final = ".sock"
_SSH_OPTIONS: Final = (
    "-oBatchMode=yes",
    # A host that is away, or goes away meanwhile, is given up after a minute.  Behind the admin's own, which win.
    "-oConnectTimeout=60",
    "-oServerAliveInterval=15",
    "-oServerAliveCountMax=4",
)
_QUOTED: Final = 200


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """What a pool keeps of one replica: in the record of the first volume that is replicated."""

    name: str
    target: str
    """``ssh://[user@]host[:port]/pool``, the directory of another pool, or its daemon's socket."""
    volumes: list[str]
    """UUIDs of the volumes that are replicated together."""
    names: list[str]
    """What they are called at the target."""
    program: str = DEFAULT_PROGRAM
    """The command on the other host."""
    last_success_ns: int = 0
    last_error: str = ""
    """Of the last run; empty when it succeeded."""
    common: list[str] = field(default_factory=list)
    """UUIDs of the newest snapshots that both sides are known to have."""

    def to_text(self) -> str:
        """Encode for the record."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> "ReplicaConfig":
        """Undo ``to_text``.

        Raises:
            FormatError: It is none.
        """
        try:
            found = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise FormatError(f"the record of a replica is damaged: {error}") from error
        if not found._has_types():
            raise FormatError(f"the record of a replica holds a value that cannot be: {text[:200]}")
        return found

    def _has_types(self) -> bool:
        lists: tuple[object, ...] = (self.volumes, self.names, self.common)
        texts: tuple[object, ...] = (self.name, self.target, self.program, self.last_error)
        return (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(found, list) and all(isinstance(text, str) for text in found) for found in lists)
            and len(self.volumes) == len(self.names) > 0
            and len(self.common) in (0, len(self.volumes))
            and type(self.last_success_ns) is int
        )


def target_command(config: ReplicaConfig, arguments: Sequence[str], ssh: Sequence[str]) -> list[str]:
    """Make the command that runs ``incfs`` on the target's pool.

    Raises:
        UsageError: The target is neither a path nor an ssh address.
    """
    if "://" not in config.target:
        return [sys.executable, "-m", "incfs", "-p", str(local_pool(config.target)), *arguments]
    parts = urlsplit(config.target)
    try:
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{config.target!r} has no valid port") from error
    if parts.scheme != "ssh" or not parts.hostname or parts.hostname.startswith("-") or not parts.path.strip("/"):
        raise UsageError(f"{config.target!r} is no target; write ssh://host/pool, or the path of a pool")
    if (parts.username or "").startswith("-"):
        raise UsageError(f"{config.target!r}: the user's name must not begin with '-'")
    host = f"{parts.username}@{parts.hostname}" if parts.username else parts.hostname
    options = ["-p", str(port)] if port else []
    remote = shlex.join([*shlex.split(config.program), "-p", parts.path, *arguments])
    return [*ssh, *_SSH_OPTIONS, *options, host, remote]


def decode_answer(name: str, answer: bytes) -> dict[str, Any]:
    """Decode the document that the command at a target printed; nothing is an empty one.

    Raises:
        ReplicaFailed: It is none.  What came is quoted: often a greeting of the shell there.
    """
    try:
        document = json.loads(answer or b"{}")
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        came = " ".join(answer[: 4 * _QUOTED].decode(errors="replace").split())[:_QUOTED]
        raise ReplicaFailed(
            f"replica {name} answered with what is no document of incfs: {came!r}; "
            f"a shell that greets must do so only where it is interactive"
        )
    return document


def local_pool(target: str) -> Path:
    """Give the pool's directory of a target that is a path."""
    path = Path(target)
    return path.parent if path.suffix == _SOCKET_SUFFIX else path


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """A volume at the target."""

    is_replica: bool
    token: str | None
    """Of an unfinished receive."""
    snapshots: list[str]
    """UUIDs, oldest first."""

    @classmethod
    def from_document(cls, document: Any) -> "TargetFacts | None":
        """Take apart what the target says; None where it has no such volume.

        Raises:
            FormatError: It says something else.
        """
        if document is None:
            return None
        match document:
            case {"is_replica": bool(is_replica), "token": str() | None as token, "snapshots": list(snapshots)}:
                return cls(is_replica, token, [str(uuid) for uuid in snapshots])
        raise FormatError("the replica's answer is malformed; is its incfs of another version?")


@dataclass(frozen=True, slots=True)
class OurSnapshot:
    """A snapshot of ours, or a bookmark of one that is gone."""

    uuid: str
    created_ns: int
    is_there: bool = True


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """What to do for a replica."""

    goals: tuple[str, ...]
    """UUIDs of the snapshots that it must have at the end, one of each volume."""
    bases: tuple[str | None, ...]
    """UUIDs of those that it has, in the same order: the goal itself where it has that; None for a new volume."""
    token: str | None = None
    """Of an unfinished receive, which comes first."""
    receiving: int = 0
    """A volume that it is of."""

    @property
    def lacking(self) -> list[int]:
        """The volumes whose goals it has not yet."""
        return [number for number, goal in enumerate(self.goals) if self.bases[number] != goal]

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be sent."""
        return not self.lacking and self.token is None


def plan_replica(
    names: Sequence[str], ours: Sequence[Sequence[OurSnapshot]], theirs: Sequence[TargetFacts | None]
) -> ReplicaPlan:
    """Plan how a replica becomes as new as we are.

    Args:
        names: What the volumes are called at the target.
        ours: Of each volume its snapshots and bookmarks, oldest first.
        theirs: Of each volume what the target has.

    Raises:
        BaseMismatch: The two do not go together.
    """
    goals = _goals(names, ours)
    bases = tuple(
        _base(name, chain, found, goal) for name, chain, found, goal in zip(names, ours, theirs, goals, strict=True)
    )
    tokens = [(found.token, number) for number, found in enumerate(theirs) if found is not None and found.token]
    return ReplicaPlan(goals, bases, *min(tokens, default=()))


def _goals(names: Sequence[str], ours: Sequence[Sequence[OurSnapshot]]) -> tuple[str, ...]:
    """Choose the newest snapshots, of several volumes those that were taken together."""
    times = [{taken.created_ns: taken.uuid for taken in chain if taken.is_there} for chain in ours]
    shared = set(times[0]).intersection(*times[1:])
    if not shared:
        what = "no snapshot" if len(names) == 1 else "no snapshots that were taken together"
        raise BaseMismatch(f"there is {what} of {', '.join(names)}; `incfs snapshot create` takes them")
    return tuple(found[max(shared)] for found in times)


def _base(name: str, chain: Sequence[OurSnapshot], found: TargetFacts | None, goal: str) -> str | None:
    if found is None or (not found.snapshots and found.token is not None):
        return None
    if not found.is_replica:
        raise BaseMismatch(f"volume {name} at the target is no replica (any more): it was promoted, or made there")
    newest = found.snapshots[-1] if found.snapshots else None
    ages = {taken.uuid: age for age, taken in enumerate(chain)}
    if newest not in ages:
        common = [taken.uuid for taken in chain if taken.uuid in found.snapshots]
        last = f"the last one that both have is {common[-1]}" if common else "they have none in common"
        raise BaseMismatch(f"the newest snapshot of {name} at the target ({newest}) is not one of ours; {last}")
    if goal in found.snapshots:
        return goal
    if ages[newest] > ages[goal]:
        raise BaseMismatch(
            f"{name} at the target is newer than the newest snapshots that were taken together; take such ones"
        )
    return newest
