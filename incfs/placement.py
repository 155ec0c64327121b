"""Which storage volumes may hold new blocks of a virtual volume, and in which order.  Pure.

A storage volume at low water is used only when no other one that the rules allow has room:
so another one comes in before a write fails.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from incfs.errors import UsageError
from incfs.model import Storage, StorageId

RULE_KEYS: Final = ("class", "redundancy", "id", "mirrored")


class Rule(NamedTuple):
    """One condition on a storage volume."""

    key: str
    value: str
    is_equal: bool

    def __str__(self) -> str:
        return f"{self.key}{'=' if self.is_equal else '!='}{self.value}"

    def allows(self, storage: Storage) -> bool:
        """Tell whether a storage volume meets it."""
        return (_property(storage, self.key) == self.value) == self.is_equal


def _property(storage: Storage, key: str) -> str:
    match key:
        case "class":
            return storage.storage_class
        case "redundancy":
            return storage.redundancy
        case "id":
            return str(storage.id)
    return "yes" if storage.mirrors else "no"


def allows_new(rules: Iterable[Rule], storage_class: str) -> bool:
    """Tell whether rules allow a storage volume that is to be made, without mirrors, of that class."""
    made = Storage(StorageId(0), "", "", 0, 0, storage_class=storage_class)
    return all(rule.allows(made) for rule in rules)


def parse_rule(text: str) -> Rule:
    """Read a rule such as ``class=ssd`` or ``redundancy!=none``.

    Raises:
        UsageError: No rule, or of an unknown key.
    """
    key, operator, value = text.partition("=")
    is_equal = not key.endswith("!")
    key, value = key.removesuffix("!").strip(), value.strip()
    if not operator or key not in RULE_KEYS:
        raise UsageError(
            f"placement rule {text!r} is not KEY=VALUE or KEY!=VALUE with a key of {', '.join(RULE_KEYS)}", value=text
        )
    return Rule(key, value, is_equal)


def parse_rules(texts: Iterable[str]) -> tuple[Rule, ...]:
    """Read several rules, all of which must be met."""
    return tuple(parse_rule(text) for text in texts)


@dataclass(frozen=True, slots=True)
class Room:
    """How much a storage volume holds and can take."""

    storage: Storage
    used_bytes: int
    free_bytes: int
    """What it can still take: free blocks, and growth as far as its limit and its host allow."""
    low_water_bytes: int
    is_usable: bool = True
    """Online, and not being emptied."""

    @property
    def is_low(self) -> bool:
        """Whether it is at low water."""
        return self.free_bytes < self.low_water_bytes


def order_rooms(rooms: Iterable[Room], rules: Sequence[Rule], preferred: StorageId | None = None) -> list[Room]:
    """Give the usable storage volumes that the rules allow, the one to take first at the front.

    Args:
        rooms: All of them.
        rules: Each must allow the storage volume.
        preferred: A stripe's column: before its equals.
    """
    allowed = [room for room in rooms if room.is_usable and all(rule.allows(room.storage) for rule in rules)]
    return sorted(allowed, key=lambda room: (room.is_low, room.storage.id != preferred, room.storage.id))


def choose_columns(rooms: Sequence[Room], count: int) -> tuple[StorageId, ...]:
    """Choose the columns of a stripe map: those with most room, none twice; fewer if there are no more.

    Room counts in powers of two: storage volumes that are about as large are taken in order.
    """
    by_room = sorted(rooms, key=lambda room: (room.is_low, -room.free_bytes.bit_length(), room.storage.id))
    return tuple(sorted(room.storage.id for room in by_room[:count]))


def replace_low(columns: Sequence[StorageId], rooms: Sequence[Room]) -> tuple[StorageId, ...]:
    """Give a stripe map's columns with those at low water replaced by others that are not, as far as there are any."""
    by_id = {room.storage.id: room for room in rooms}
    spare = [r for r in sorted(rooms, key=lambda r: -r.free_bytes) if not r.is_low and r.storage.id not in columns]
    changed = []
    for column in columns:
        found = by_id.get(column)
        is_spent = found is None or found.is_low
        changed.append(spare.pop(0).storage.id if is_spent and spare else column)
    return tuple(changed)
