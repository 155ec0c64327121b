"""How much room there is: the one account of a pool's space.

Whoever gives blocks out, tells how many there are, or decides by that, asks here: leases and growth, ``df``, lists and
metrics, marks and forecasts, pruning.  It counts what has the host's space already, and what can still get it: blocks
whose space was given back, and growth of the images.

Owns the settings of space and no count of its own: bitmaps, records and the last look at the hosts say it all.

Invariants:
    1. Host space is counted once, however many images and legs lie on a filesystem, and never the reserve.
    2. What is told to be free can be written: volumes that nothing limits meet ENOSPC there and not before, to
       within a step of growth; as long as the hosts are as they were at the last look.
"""

from collections import Counter
from collections.abc import Iterable, Set
from typing import Protocol

from incfs.catalog import Catalog
from incfs.errors import QuotaExceeded
from incfs.model import MapId, Volume, VolumeId
from incfs.placement import Room
from incfs.pool import Pool
from incfs.settings import PoolSettings, VolumeSettings
from incfs.storage import Host, StorageVolume

METADATA_RESERVE_BYTES = 16 << 20
"""Kept free where metadata lies, whatever the settings say: checkpoints, checks and the end of a mount need some."""
_METADATA_SHARE = 16
"""But of a small filesystem only this part."""
_NO_LIMIT = 1 << 62
"""Blocks."""


class Unsealed(Protocol):
    """What is needed of a data plane."""

    def mapped_delta(self, map_id: MapId, /) -> int:
        """Count the blocks that a table gained since the last seal."""

    @property
    def fresh_count(self) -> int:
        """Mappings appended since the last seal."""


class Account:
    """The space of one pool.  Owner thread; nothing here asks a host.

    Args:
        catalog: The pool's records.
        pool: Its storage volumes.
        plane: What was written since the last seal.
        block_bytes: Size of a block.
        extend_bytes: Step of growth, unless the settings say otherwise.
        host_reserve_bytes: What stays free on a host filesystem, unless the settings say otherwise.
        reserve_blocks: Free blocks that only urgent requests get.
    """

    def __init__(
        self,
        catalog: Catalog,
        pool: Pool,
        plane: Unsealed,
        *,
        block_bytes: int,
        extend_bytes: int,
        host_reserve_bytes: int,
        reserve_blocks: int,
    ) -> None:
        self._catalog = catalog
        self._pool = pool
        self._plane = plane
        self._block_bytes = block_bytes
        self._extend_bytes = extend_bytes
        self._host_reserve_bytes = host_reserve_bytes
        self.reserve_blocks = reserve_blocks
        self._owed: dict[VolumeId, int] = {}
        """Volumes with reservations -> blocks of it that they do not occupy yet."""
        self.settings = PoolSettings()
        self.metadata_devices: Set[int] = frozenset()
        """Filesystems where metadata lies."""

    # Hosts

    @property
    def extend_bytes(self) -> int:
        """Step in which images grow."""
        return self.settings.extend_bytes or self._extend_bytes

    def reserve_bytes(self, host: Host) -> int:
        """Give what must stay free on a host filesystem."""
        setting = self.settings.reserve
        reserve = self._host_reserve_bytes if setting is None else setting.of(host.total_bytes)
        if host.device not in self.metadata_devices:
            return reserve
        return max(reserve, min(METADATA_RESERVE_BYTES, host.total_bytes // _METADATA_SHARE))

    def is_host_short(self, volume: StorageVolume) -> bool:
        """Tell whether others need what a host of an image has left, by the last look at it."""
        return any(
            host.free_bytes
            < max(self.settings.low_water.of(host.total_bytes), self.reserve_bytes(host) + self.extend_bytes)
            for host in volume.hosts
        )

    def _unusable_bytes(self, volume: StorageVolume, host: Host) -> int:
        """Give what a host has free and does not give: the reserve, and what it refused although it has it."""
        return max(self.reserve_bytes(host), volume.refused_bytes)

    # Blocks

    def free_blocks(self, volumes: Iterable[StorageVolume]) -> int:
        """Count what storage volumes can still take together: without growth, by getting space again, and by growth."""
        growth_left, taken = self.growth_limit(), Counter[int]()
        total = 0
        for volume in volumes:
            if not volume.is_usable:
                continue
            lacking = volume.lacking_blocks
            kept = max(0, volume.grown_blocks - volume.live_blocks - lacking)
            lacking = max(0, lacking - volume.lost_blocks)
            longer = max(0, volume.most_blocks - volume.grown_blocks)
            host = volume.host_room(lambda host: self._unusable_bytes(volume, host), taken) // self._block_bytes  # noqa: B023
            lacking = min(lacking, host)
            longer = min(longer, host - lacking, growth_left)
            growth_left -= longer
            for leg in volume.hosts:
                taken[leg.device] += (lacking + longer) * self._block_bytes
            total += kept + lacking + longer
        return total

    def growth_limit(self) -> int:
        """Count the blocks that the settings let all images grow by."""
        limit = self.settings.extend_max_bytes
        if limit is None:
            return _NO_LIMIT
        grown = sum(volume.grown_blocks for volume in self._pool.volumes.values())
        return max(0, limit // self._block_bytes - grown)

    def can_get_more(self, volume: StorageVolume) -> bool:
        """Tell whether an image can have more blocks from its hosts now, by the last look at them."""
        unbacked = volume.unbacked.count - volume.lost_blocks
        wanted = unbacked or min(self.growth_limit(), volume.most_blocks - volume.grown_blocks)
        has_space = volume.lacking_blocks < volume.unbacked.count
        return wanted > 0 and (has_space or volume.host_room(self.reserve_bytes) >= self._block_bytes)

    def room(self, volume: StorageVolume) -> Room:
        """Tell how full a storage volume is, as if it were the only one on its hosts."""
        used, free = volume.live_blocks * self._block_bytes, self.free_blocks([volume]) * self._block_bytes
        low_water = self.settings.low_water.of(used + free)
        return Room(volume.record, used, free, low_water, volume.is_usable)

    def rooms(self) -> list[Room]:
        """Tell how full every storage volume is."""
        return [self.room(volume) for volume in self._pool.volumes.values()]

    def free_bytes(self) -> int:
        """Tell what can still be written into the pool, which is less than its storage volumes say together."""
        # What is not sealed yet has its blocks already.
        spent = self.reserve_blocks + self._plane.fresh_count
        return max(0, self.free_blocks(self._pool.volumes.values()) - spent) * self._block_bytes

    def reserved_bytes(self) -> int:
        """Tell how much of that is kept for volumes with reservations."""
        return min(self.free_bytes(), sum(self._owed.values()) * self._block_bytes)

    def used_bytes(self) -> int:
        """Tell what is in use."""
        return (self._pool.used_blocks() + self._plane.fresh_count) * self._block_bytes

    def allowance(self, volume_id: VolumeId, *, urgent: bool) -> int:
        """Count the blocks that a volume may be leased now, out of those that need no host."""
        volumes = [volume for volume in self._pool.volumes.values() if volume.is_usable]
        free = self.at_hand(volumes)
        if urgent:
            return free
        owed = sum(blocks for other, blocks in self._owed.items() if other != volume_id)
        if owed:
            leased = sum(volume.given_blocks - volume.live_blocks for volume in volumes)
            free = min(free, self.free_blocks(volumes) - leased - owed)
        return free - self.reserve_blocks

    @staticmethod
    def at_hand(volumes: Iterable[StorageVolume]) -> int:
        """Count the blocks of storage volumes that can be leased at once."""
        return sum(max(0, volume.grown_blocks - volume.busy_blocks) for volume in volumes)

    # Limits

    def settings_of(self, volume_id: VolumeId) -> VolumeSettings:
        """Give what rules a volume; one that is being removed is ruled by nothing."""
        volume = self._catalog.volumes.get(volume_id)
        return self.settings.volume_settings(volume.name) if volume is not None and volume.name else VolumeSettings()

    def used_blocks(self, volume: Volume) -> int:
        """Count what a volume and its snapshots occupy, unsealed writes included."""
        held = sum(s.held_blocks for s in self._catalog.snapshots(volume.id, removed=True))
        return volume.mapped_blocks + held + self._plane.mapped_delta(volume.map_id)

    def quota_left(self, volume_id: VolumeId) -> int | None:
        """Count the blocks that a volume may gain at least; exactly after a seal; None without a quota."""
        quota = self.settings_of(volume_id).quota_bytes
        if quota is None:
            return None
        volume = self._catalog.volume(volume_id)
        # What unsealed writes replaced, the newest snapshot may have to hold: nobody knows yet.
        unknown = self._plane.fresh_count if volume.newest_generation else 0
        return max(0, quota // self._block_bytes - self.used_blocks(volume) - unknown)

    def require_quota(self, volume_id: VolumeId, block_count: int) -> None:
        """Refuse what would lead a volume over its quota.

        Raises:
            QuotaExceeded: It would.
        """
        left = self.quota_left(volume_id)
        if left is not None and block_count > left:
            volume = self._catalog.volume(volume_id)
            raise QuotaExceeded(
                f"volume {volume.name} and its snapshots may occupy {self.settings_of(volume_id).quota_bytes} bytes, "
                f"of which {left * self._block_bytes} are left; raise its quota, or remove data or snapshots",
                volume=volume.name,
            )

    def require_snapshot(self, volume_id: VolumeId) -> None:
        """Refuse another snapshot beyond a volume's limits.

        Raises:
            QuotaExceeded: It has as many as it may have, or they hold as much as they may.
        """
        settings, volume = self.settings_of(volume_id), self._catalog.volume(volume_id)
        taken = self._catalog.snapshots(volume_id)
        held_bytes = sum(snapshot.held_blocks for snapshot in taken) * self._block_bytes
        if settings.snapshot_max is not None and len(taken) >= settings.snapshot_max:
            raise QuotaExceeded(
                f"volume {volume.name} has {len(taken)} snapshots, its limit is {settings.snapshot_max}; remove some",
                volume=volume.name,
            )
        if settings.snapshot_max_bytes is not None and held_bytes > settings.snapshot_max_bytes:
            raise QuotaExceeded(
                f"the snapshots of volume {volume.name} hold {held_bytes} bytes, their limit is "
                f"{settings.snapshot_max_bytes}; remove some",
                volume=volume.name,
            )

    def review(self) -> None:
        """Count anew what reservations are owed; after a change of settings, and now and then."""
        self._owed = {}
        for volume in self._catalog.volumes.values():
            reserved = self.settings_of(volume.id).reservation_bytes // self._block_bytes
            if owed := max(0, reserved - self.used_blocks(volume) if reserved else 0):
                self._owed[volume.id] = owed
