"""What plans are made of: a pool as it is at one moment.  Pure, frozen."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from incfs.policy.rules import Keep

POLICY_TAG = "policy"
"""``Snapshot.tag`` of what the policy has made."""


@dataclass(frozen=True, slots=True)
class SnapshotFacts:
    """A snapshot."""

    name: str
    uuid: str
    created_ns: int
    generation: int
    held_bytes: int = 0
    """What its removal frees at the most."""
    is_policy: bool = True
    """Made by the policy."""
    holds: tuple[str, ...] = ()
    """Tags of the holds that have not expired."""
    clones: tuple[str, ...] = ()
    """Volumes whose origin it is."""


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """A target that a volume is replicated to, reachable or not."""

    target: str
    common_uuid: str | None = None
    """The newest snapshot that both sides have; None before the first transfer."""
    keep: Keep | None = None
    """What the target keeps; None: nothing but what it has."""


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """A volume and its snapshots."""

    name: str
    snapshots: tuple[SnapshotFacts, ...] = ()
    replicas: tuple[ReplicaFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """A pool."""

    volumes: tuple[VolumeFacts, ...] = ()
    free_bytes: int = 0
    capacity_bytes: int = 0
    runs: Mapping[str, int] = field(default_factory=dict)
    """When each task last ran, in ns since 1970."""
    set_ns: int = 0
    """When the policy was set."""
