"""What a policy wants done: a list of actions, each with its reason.  Pure, frozen."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from incfs.policy.rules import Hooks


@dataclass(frozen=True, slots=True)
class TakeSnapshots:
    """Snapshots of several volumes at one point in time."""

    volumes: tuple[str, ...]
    name: str
    """Of each of the snapshots."""
    hooks: Hooks
    reason: str


@dataclass(frozen=True, slots=True)
class Prune:
    """A snapshot to be removed."""

    volume: str
    name: str
    uuid: str
    """So that another of that name is left alone."""
    freed_bytes: int
    """At the most."""
    reason: str


@dataclass(frozen=True, slots=True)
class Work:
    """Something that takes long and runs beside everything else."""

    kind: str
    """``scrub``: verify every copy of every block; ``balance``: even out the storage volumes;
    ``migrate``: move what the volumes store to where ``place`` says; ``replicate``: bring the target up to date."""
    volumes: tuple[str, ...]
    """For ``migrate`` and ``replicate``."""
    rate_bytes: int | None
    """Bytes a second that are moved or read at the most."""
    reason: str
    target: str = ""
    """For ``replicate``."""


Action = TakeSnapshots | Prune | Work


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done now."""

    actions: tuple[Action, ...] = ()
    """In order."""
    runs: Mapping[str, int] = field(default_factory=dict)
    """When each task last ran, once this is done."""
    next_due_ns: int | None = None
    """When something is due again; None: never."""
    notes: tuple[str, ...] = ()
    """What a person should know."""
