"""What holds for the pool and for one volume, and where that is said.  Pure.

Later wins: first what is built in, then each ``[volume."GLOB"]`` that fits the volume's name in
the order of the text, of each first the templates that it uses, in their order, then its own
keys.  A key is replaced whole: two ``keep`` tables are not mixed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Final

from incfs.policy.document import PolicyDocument, Section
from incfs.policy.rules import POOL_KEYS, VOLUME_KEYS, Key, PoolRules, VolumeRules, pool_rules, volume_rules
from incfs.settings import PoolSettings, VolumeSettings

BUILT_IN = "built in"


@dataclass(frozen=True, slots=True)
class Effective:
    """The value of one key and where it comes from."""

    value: Any
    written: Any
    """As it stands, or would stand, in the text."""
    source: str


def _apply(found: dict[str, Effective], section: Section, label: str) -> None:
    for name, value in section.values.items():
        found[name] = Effective(value.value, value.written, f"{label}, line {value.line}")


def _built_in(keys: Mapping[str, Key]) -> dict[str, Effective]:
    return {name: Effective(key.read(key.default), key.default, BUILT_IN) for name, key in keys.items()}


_BUILT_IN_POOL: Final = _built_in(POOL_KEYS)
_BUILT_IN_VOLUME: Final = _built_in(VOLUME_KEYS)


def effective_pool(policy: PolicyDocument) -> dict[str, Effective]:
    """Give the value of each key of the pool."""
    found = dict(_BUILT_IN_POOL)
    _apply(found, policy.pool, "[pool]")
    return found


def effective_volume(policy: PolicyDocument, name: str) -> dict[str, Effective]:
    """Give the value of each key for a volume of that name."""
    found = dict(_BUILT_IN_VOLUME)
    for section, label in _sections_for(policy, name):
        _apply(found, section, label)
    return found


def _sections_for(policy: PolicyDocument, name: str) -> Iterator[tuple[Section, str]]:
    for section in policy.volumes:
        if fnmatchcase(name, section.name):
            for used in section.uses:
                yield policy.templates[used], f"[template.{used}]"
            yield section, f'[volume."{section.name}"]'


def rules_for(policy: PolicyDocument, name: str) -> VolumeRules:
    """Give the rules of a volume."""
    return volume_rules({key: found.value for key, found in effective_volume(policy, name).items()})


def rules_for_pool(policy: PolicyDocument) -> PoolRules:
    """Give the rules of the pool."""
    return pool_rules({key: found.value for key, found in effective_pool(policy).items()})


def settings_of(policy: PolicyDocument) -> PoolSettings:
    """Give what ``service.apply_settings`` takes."""

    # Asked for each lease of blocks; a rule takes 30 us.
    @lru_cache(maxsize=1024)
    def volume_settings(name: str) -> VolumeSettings:
        return rules_for(policy, name).settings

    return replace(rules_for_pool(policy).settings, volume_settings=volume_settings)
