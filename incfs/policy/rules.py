"""What a policy can say: its keys, their values and what holds where nothing is said.  Pure.

One table per kind of section.  A key that is not in it is an error, and none is in it
without an effect.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, tzinfo
from typing import Any, Final

from incfs.errors import UsageError
from incfs.policy import readers
from incfs.policy.periods import PERIODS
from incfs.policy.readers import MAX_COUNT, Reader
from incfs.policy.schedule import Schedule
from incfs.settings import PoolSettings, VolumeSettings

ALL: Final = MAX_COUNT
"""A count that keeps everything: ``yearly = "all"``."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Retention: a snapshot that any of the rules wants is kept."""

    last: int = 0
    """The newest ones."""
    hourly: int = 0
    """The newest of each of the newest hours that have one; the others alike."""
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within_s: int = 0
    """Everything so much older than the newest one at the most."""

    def count(self, period: str) -> int:
        """How many of a natural period are kept."""
        return int(getattr(self, period))


def read_keep(value: Any) -> Keep | None:
    """Read the table ``keep``; "all" is None.

    Raises:
        UsageError: An unknown rule, or none that keeps anything.
    """
    if value == "all":
        return None
    if not isinstance(value, dict):
        raise UsageError(f'{value!r} is neither a table such as {{ last = 3, daily = 7 }} nor "all"')
    keep = Keep(**dict(_keep_rule(key, item) for key, item in value.items()))
    if keep == Keep():
        raise UsageError('keep without a rule would remove every snapshot; write "all" to keep every one')
    return keep


def _keep_rule(key: str, value: Any) -> tuple[str, int]:
    if key == "within":
        return "within_s", readers.duration(value)
    if key != "last" and key not in PERIODS:
        raise UsageError(f"unknown rule {key!r} in keep; known are last, {', '.join(PERIODS)} and within")
    return key, ALL if value == "all" else readers.count(0)(value)


@dataclass(frozen=True, slots=True)
class Replicate:
    """Where a volume is replicated to."""

    to: str
    """``ssh://host/pool``, or the directory of another pool of this host."""
    every: Schedule | None
    keep: Keep | None = None
    """What of the snapshots that the target has not got yet stays here until it has; None: only the newest
    that both have."""


def read_replicate(value: Any) -> tuple[Replicate, ...]:
    """Read the list ``replicate``.

    Raises:
        UsageError: An unknown key, or a target that is none.
    """
    if not isinstance(value, list):
        raise UsageError(f'{value!r} is not a list of tables such as [{{ to = "ssh://host/pool", every = "1h" }}]')
    found = tuple(_read_replica(item) for item in value)
    if len({rule.to for rule in found}) != len(found):
        raise UsageError("a target stands there twice")
    return found


def _read_replica(value: Any) -> Replicate:
    if not isinstance(value, dict) or not {"to", "every"} <= value.keys() <= {"to", "every", "keep"}:
        raise UsageError(f"{value!r} is not a table of to, every and, if wanted, keep")
    to = readers.text(value["to"])
    if not to.startswith(("/", "ssh://")) or not to.isprintable():
        raise UsageError(f"{to!r} is neither ssh://host/pool nor an absolute path")
    return Replicate(to, readers.schedule(value["every"]), read_keep(value.get("keep", "all")))


@dataclass(frozen=True, slots=True)
class Hooks:
    """Programs that run around a snapshot."""

    before: tuple[str, ...] = ()
    """Program and arguments; empty for none."""
    after: tuple[str, ...] = ()
    timeout_s: int = 30
    """What each may take before it is killed."""
    failure: str = "abort"
    """``abort``: no snapshot when ``before`` fails; ``continue``: take it all the same."""

    def __bool__(self) -> bool:
        return bool(self.before or self.after)


@dataclass(frozen=True, slots=True)
class PoolRules:
    """What holds for the pool."""

    settings: PoolSettings = field(default_factory=PoolSettings)
    timezone: tzinfo = UTC
    """Of the natural periods and cron forms."""
    scrub: Schedule | None = None
    balance: Schedule | None = None
    move_rate_bytes: int | None = None
    """Bytes a second that works move or read at the most."""


@dataclass(frozen=True, slots=True)
class VolumeRules:
    """What holds for one volume."""

    settings: VolumeSettings = field(default_factory=VolumeSettings)
    schedule: Schedule | None = None
    """When snapshots are taken."""
    keep: Keep | None = None
    """Which stay; None: all."""
    prune_all: bool = False
    """Prune also snapshots that the policy has not made."""
    migrate: Schedule | None = None
    """When what lies where ``place`` does not want it is moved."""
    prune_when_low: bool = False
    """Prune more than ``keep`` says when the pool has little space."""
    hooks: Hooks = field(default_factory=Hooks)
    replicate: tuple[Replicate, ...] = ()


@dataclass(frozen=True, slots=True)
class Key:
    """How a key is read, and what holds without it."""

    read: Reader
    default: Any
    """As it would stand in the text."""
    field: str
    """Where the value goes."""


_STRIPE_UNIT: Final = VolumeSettings().stripe_unit_bytes

POOL_KEYS: Final[Mapping[str, Key]] = {
    "low_water": Key(readers.amount, "10%", "low_water"),
    "extend_by": Key(readers.or_none(readers.size), "none", "extend_bytes"),
    "extend_max": Key(readers.or_none(readers.size), "none", "extend_max_bytes"),
    "reserve": Key(readers.or_none(readers.amount), "none", "reserve"),
    "when_full": Key(readers.when_full, "error", "queue_s"),
    "directories": Key(readers.directories, [], "directories"),
    "timezone": Key(readers.timezone, "UTC", "timezone"),
    "scrub": Key(readers.schedule, "never", "scrub"),
    "balance": Key(readers.schedule, "never", "balance"),
    "move_rate": Key(readers.or_none(readers.rate), "none", "move_rate_bytes"),
}
VOLUME_KEYS: Final[Mapping[str, Key]] = {
    "place": Key(readers.placement_rules, [], "place"),
    "copies": Key(readers.count(1, 4), 1, "copies"),
    "stripe_columns": Key(readers.count(1, 64), 1, "stripe_columns"),
    "stripe_unit": Key(readers.power_of_two, _STRIPE_UNIT, "stripe_unit_bytes"),
    "quota": Key(readers.or_none(readers.size), "none", "quota_bytes"),
    "reservation": Key(readers.size, 0, "reservation_bytes"),
    "snapshot_max": Key(readers.or_none(readers.count(1)), "none", "snapshot_max"),
    "snapshot_max_size": Key(readers.or_none(readers.size), "none", "snapshot_max_bytes"),
    "zero_elision": Key(readers.flag, True, "zero_elision"),
    "verify": Key(readers.one_of("always", "never"), "always", "verify"),
    "migrate": Key(readers.schedule, "never", "migrate"),
    "schedule": Key(readers.schedule, "never", "schedule"),
    "keep": Key(read_keep, "all", "keep"),
    "prune": Key(readers.one_of("policy", "all"), "policy", "prune"),
    "prune_when_low": Key(readers.flag, False, "prune_when_low"),
    "replicate": Key(read_replicate, [], "replicate"),
    "before": Key(readers.command, [], "before"),
    "after": Key(readers.command, [], "after"),
    "hook_timeout": Key(readers.hook_timeout, "30s", "timeout_s"),
    "hook_failure": Key(readers.one_of("abort", "continue"), "abort", "failure"),
}


def pool_rules(values: Mapping[str, Any]) -> PoolRules:
    """Make rules of the values of all keys of the pool."""
    by_field = {key.field: values[name] for name, key in POOL_KEYS.items()}
    own = {name: by_field.pop(name) for name in PoolRules.__slots__ if name != "settings"}
    return PoolRules(PoolSettings(**by_field), **own)


def volume_rules(values: Mapping[str, Any]) -> VolumeRules:
    """Make rules of the values of all keys of a volume."""
    by_field = {key.field: values[name] for name, key in VOLUME_KEYS.items()}
    hooks = Hooks(**{name: by_field.pop(name) for name in Hooks.__slots__})
    return VolumeRules(
        schedule=by_field.pop("schedule"),
        keep=by_field.pop("keep"),
        migrate=by_field.pop("migrate"),
        prune_all=by_field.pop("prune") == "all",
        prune_when_low=by_field.pop("prune_when_low"),
        hooks=hooks,
        replicate=by_field.pop("replicate"),
        settings=VolumeSettings(**by_field),
    )
