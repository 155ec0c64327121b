"""What rules the pool's space and its volumes, as the policy engine works it out.  Pure.

The engine makes a ``PoolSettings`` from the rules that it reads, and gives it to
``service.apply_settings``.  Nothing here is stored by itself: the rules are.  The defaults
are how a pool without a policy behaves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, NamedTuple

DEFAULT_STRIPE_UNIT_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of bytes, or a share of something."""

    fixed_bytes: int = 0
    percent: Fraction = Fraction(0)
    """Of the whole, added to the fixed bytes."""

    def of(self, whole_bytes: int) -> int:
        """Give it in bytes."""
        percent = self.percent
        return self.fixed_bytes + whole_bytes * percent.numerator // (100 * percent.denominator)


class Directory(NamedTuple):
    """Where new images may be made."""

    path: str
    storage_class: str = ""
    """What they get."""


@dataclass(frozen=True, slots=True)
class VolumeSettings:
    """What rules one virtual volume."""

    place: tuple[str, ...] = ()
    """Rules that a storage volume must all meet to get new blocks: ``class=ssd``,
    ``redundancy=raid6``, ``id=3``, ``mirrored=yes``, each also with ``!=``.  See ``placement``."""
    copies: int = 1
    """Least number of copies: legs of a mirrored storage volume."""
    stripe_columns: int = 1
    """Storage volumes that new stripes rotate over."""
    stripe_unit_bytes: int = DEFAULT_STRIPE_UNIT_BYTES
    quota_bytes: int | None = None
    """Most that the volume and its snapshots may occupy."""
    reservation_bytes: int = 0
    """What the volume may occupy whatever the others do."""
    snapshot_max: int | None = None
    """Most snapshots."""
    snapshot_max_bytes: int | None = None
    """No snapshot is taken while those there are hold more than this."""
    zero_elision: bool = True
    """Blocks of zeros become holes."""
    verify: str = "always"
    """Whether reads compare checksums: ``always`` or ``never``; what copies, moves or checks data always does."""

    @property
    def verifies_reads(self) -> bool:
        """Whether reads compare checksums."""
        return self.verify == "always"


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What rules a pool."""

    low_water: Amount = Amount(percent=Fraction(10))
    """A storage volume, or a host filesystem, with less room than this is at low water."""
    extend_bytes: int | None = None
    """Step in which images grow; None: what the pool was opened with."""
    extend_max_bytes: int | None = None
    """Most that images may grow to together."""
    reserve: Amount | None = None
    """What growth leaves free on an image's host filesystem; None: what the pool was opened with."""
    queue_s: float = 0.0
    """How long a write waits for space in a full pool before it fails with ENOSPC."""
    directories: tuple[Directory, ...] = ()
    """Where new images may be made when the storage volumes run low."""
    volume_settings: Callable[[str], VolumeSettings] = lambda _: VolumeSettings()
    """What rules a virtual volume of that name."""
