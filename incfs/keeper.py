"""Looks after the pool's space: watches marks, brings in storage volumes before others are full.

One background task.  What it does by itself it records as an event with its reason.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from incfs import stripes
from incfs.committer import offload
from incfs.errors import IncfsError
from incfs.hosts import Hosts
from incfs.model import StorageId
from incfs.monitor import HostRoom, Monitor
from incfs.placement import Rule, allows_new, order_rooms
from incfs.settings import Directory
from incfs.storage import Host
from incfs.store import Store
from incfs.units import format_size

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 5.0
_PRUNE_EVERY_S = 5.0
"""How often the policy is asked what it can do without, while somebody needs space: that looks at every volume."""
_GIVE_BACK_EVERY_S = 5.0
_GIVE_BACK_AT_END_S = 10.0
_SLICE_S = 0.02
"""After so long no piece of a slice is begun: who needs space waits for that, and for a piece that is under way."""
_SLICE_PIECES = 1024
_LEAST_SLICE_BYTES, _MOST_SLICE_BYTES = 64 << 10, 64 << 20
"""How much a slice may be altogether, and so each piece: who writes to the image waits for one."""
_REST, _SHORT_REST = 1.0, 0.25
"""Between two slices, times what the last one took: the host's filesystem has other things to do, and somebody may
need the space.  On ext4 a piece takes 0.2 to 1 ms, and who syncs beside it is half as fast meanwhile."""
_SURVEY_PAUSE_S = 0.01
"""Between two groups of 128 MiB: 82 s for a TiB."""


AddImage = Callable[[Directory], Awaitable[dict[str, Any]]]
"""Makes an image in a directory and lets the pool allocate from it; called under the space lock."""


class Keeper:
    """The task that looks after space."""

    def __init__(self, store: Store, space_lock: trio.Lock, add_image: AddImage) -> None:
        self._store = store
        self._space_lock = space_lock
        self._add_image = add_image
        self._wake = trio.Event()
        self._hurried = trio.Event()
        self._refused: set[str] = set()
        """Directories in which no image could be made; told once."""
        self._slice_bytes = 16 << 20
        """What took no longer than a slice may, the last times."""
        self._empty: set[StorageId] = set()
        """Storage volumes that held nothing at the last turn of giving back."""
        self._healed: dict[StorageId, int] = {}
        """Healed blocks that were told of."""
        self.monitor = Monitor()
        self.low: Callable[[], None]
        """Called when a mark is crossed, or somebody has no space; set by the service."""
        self._pruned_at = float("-inf")
        self.hosts = Hosts(store.pool, store.events)

    def look_soon(self) -> None:
        """Ask for a look without waiting for it."""
        self._wake.set()

    async def run(self) -> None:
        """Look now and then, and whenever asked; never returns."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.hosts.run)
            while True:
                await self._look()
                with trio.move_on_after(_LOOK_EVERY_S):
                    await self._wake.wait()
                self._wake = trio.Event()

    async def _look(self) -> None:
        store = self._store
        await self.hosts.look()
        store.account.review()
        rooms = store.account.rooms()
        if store.failure is None:
            store.note_failed_legs()
        self._tell_healed()
        for notice in self.monitor.observe(trio.current_time(), rooms, self._host_rooms()):
            store.events.record(notice.kind, notice.subject, notice.reason, **notice.facts)
            self._prune()
        if store.failure is None and any(room.is_usable for room in rooms):
            await self._add_image_if_low()
            self._leave_low_columns()
        await offload(store.events.flush)

    def hurry(self) -> None:
        """Blocks became free: give back what a host that is short of space lacks."""
        if self._short_hosts():
            self._hurried.set()

    def need_space(self) -> None:
        """Somebody has none: give back at once what a host lacks, and prune what the policy can do without."""
        self.hurry()
        self._prune()

    def _prune(self) -> None:
        if trio.current_time() - self._pruned_at >= _PRUNE_EVERY_S:
            self._pruned_at = trio.current_time()
            self.low()

    async def give_back(self) -> None:
        """Give host space of blocks back that stay free; never returns.

        What was freed waits until it has been free for one to two turns, however busy the pool is; whole chunks do
        not wait where the host is short of space.
        """
        while True:
            with trio.move_on_after(_GIVE_BACK_EVERY_S):
                while True:
                    await self._hurried.wait()
                    self._hurried = trio.Event()
                    await self._give_back()
            await self._give_back()
            self._store.pool.reuse.settle()
            self._settle_empty()

    async def give_back_rest(self) -> None:
        """Give back what waits, before the pool is closed; what takes too long, ``survey`` finds at the next open."""
        reuse = self._store.pool.reuse
        with trio.move_on_after(_GIVE_BACK_AT_END_S):
            reuse.hurry(self._store.pool.volumes)
            await self._give_back(rest=0.0)
            reuse.settle()
            self._settle_empty()
            self._settle_empty()  # it will not be used again
            await self._give_back(rest=0.0)

    def _settle_empty(self) -> None:
        """Let storage volumes that hold nothing, and held nothing a turn ago, keep nothing of their hosts."""
        volumes = self._store.pool.volumes.items()
        empty = {i for i, volume in volumes if volume.state == "online" and not volume.live_blocks}
        for storage_id in empty & self._empty:
            self._store.pool.reuse.note_unused(storage_id)
        self._empty = empty

    async def survey(self) -> None:
        """Look through the images once for free blocks that the host still keeps, and give them back.

        Whoever freed them was cut off before: what is punched later than it is free is not recorded.
        """
        pool = self._store.pool
        for storage_id, volume in list(pool.volumes.items()):
            for group_index in range(volume.group_count):
                if volume.state != "online" or self._store.failure is not None or pool.reuse.is_withheld:
                    break
                try:
                    bits = await offload(lambda: volume.written_blocks(group_index))  # noqa: B023
                except IncfsError as error:
                    logger.warning("what %s occupies on its host is not known: %s", volume.path, error)
                    break
                if pool.reuse.note_written(storage_id, group_index, bits):
                    await self._give_back()
                await trio.sleep(_SURVEY_PAUSE_S)

    async def _give_back(self, rest: float = _REST) -> None:
        """Give host space back, in slices; who needs blocks waits for those that are held meanwhile.

        Args:
            rest: How long to wait after each slice, times what it took; less where a host is short of space.
        """
        reuse = self._store.pool.reuse
        while self._store.failure is None:
            if short := self._short_hosts():
                reuse.hurry(short)
            async with self._space_lock:
                plan = reuse.plan(_SLICE_PIECES, max(1, self._slice_bytes // self._store.block_bytes))
                if not plan.held:
                    return
                began = trio.current_time()
                with trio.CancelScope(shield=True):
                    self._note_pace(await offload(lambda: reuse.punch(plan, _SLICE_S)))  # noqa: B023
                    reuse.punched(plan)
                took_s = trio.current_time() - began
            await trio.sleep((min(rest, _SHORT_REST) if short else rest) * took_s)

    def _note_pace(self, slowest_s: float) -> None:
        """Let pieces be as large as this host punches in the time of a slice."""
        if slowest_s > _SLICE_S:
            self._slice_bytes = max(_LEAST_SLICE_BYTES, self._slice_bytes // 2)
        elif slowest_s < _SLICE_S / 4:
            self._slice_bytes = min(_MOST_SLICE_BYTES, self._slice_bytes * 2)

    def _short_hosts(self) -> list[StorageId]:
        """List the storage volumes whose host filesystem is short of space."""
        volumes = self._store.pool.volumes.items()
        return [i for i, volume in volumes if volume.state == "online" and self._store.account.is_host_short(volume)]

    def _tell_healed(self) -> None:
        for storage_id, volume in self._store.pool.volumes.items():
            healed = volume.healed_blocks - self._healed.get(storage_id, 0)
            self._healed[storage_id] = volume.healed_blocks
            if healed:
                reason = f"{healed} blocks of a leg were wrong and were rewritten from another"
                self._store.events.record("healed", f"storage {storage_id}", reason, blocks=healed)

    def _leave_low_columns(self) -> None:
        """Let stripes leave storage volumes at low water for others."""
        for volume, before, columns in stripes.leave_low_columns(self._store):
            reason = f"columns {list(before)} were at low water: new stripes go to storage volumes {list(columns)}"
            self._store.events.record("assigned", f"volume {volume.name}", reason, columns=list(columns))

    def _host_rooms(self) -> list[HostRoom]:
        """Tell how full each host filesystem with images is."""
        account, found = self._store.account, {}
        for volume in self._store.pool.volumes.values():
            for host in volume.hosts if volume.state == "online" else ():
                total, free = host.total_bytes, host.free_bytes
                low_water, reserve = account.settings.low_water.of(total), account.reserve_bytes(host)
                found[host.device] = HostRoom(host.device, str(host.directory), free, total, low_water, reserve)
        return list(found.values())

    def storage_outlook(self, storage_id: StorageId) -> dict[str, Any]:
        """Tell where a storage volume's low-water mark is, and when it will be full if it goes on like that."""
        room = self._store.account.room(self._store.pool.volume(storage_id))
        seconds = self.monitor.seconds_to_fill(room)
        return {
            "low_water_bytes": room.low_water_bytes,
            "is_low": room.is_usable and room.is_low,
            "full_in_seconds": None if seconds is None else int(seconds),
        }

    async def _add_image_if_low(self) -> None:
        """Make an image where the settings allow, when all that there are, or all of a directory's class, are low."""
        directories = self._store.account.settings.directories
        if not directories:
            return
        async with self._space_lock:
            rooms = [room for room in self._store.account.rooms() if room.is_usable]
            if all(room.is_low for room in rooms):
                await self.add_image(())
                return
            for name in {directory.storage_class for directory in directories}:
                own = [room.is_low for room in rooms if room.storage.storage_class == name]
                if own and all(own):
                    await self.add_image((Rule("class", name, True),))

    async def add_image(self, rules: Sequence[Rule]) -> None:
        """Make an image in the best directory that settings and rules allow, if there is one.  Under the space lock."""
        allowed = order_rooms(self._store.account.rooms(), rules)
        directory = await offload(lambda: self._choose_directory(rules))
        if directory is None:
            return
        try:
            made = await self._add_image(directory)
        except IncfsError as error:
            self._refused.add(directory.path)
            self._store.events.record("image-refused", f"directory {directory.path}", str(error))
            return
        which = f" with {', '.join(map(str, rules))}" if rules else ""
        free_bytes = sum(room.free_bytes for room in allowed)
        reason = f"every storage volume{which} is at low water, {format_size(free_bytes)} are left in all"
        self._store.events.record("image-added", f"storage {made['id']}", reason, path=made["path"])
        self.look_soon()

    def _choose_directory(self, rules: Sequence[Rule]) -> Directory | None:
        """Choose the directory with most room whose filesystem is not at low water itself.  Any thread."""
        account = self._store.account
        found: list[tuple[int, Directory]] = []
        for directory in account.settings.directories:
            if directory.path in self._refused or not allows_new(rules, directory.storage_class):
                continue
            try:
                free_bytes, total_bytes, device = self._store.backing.measure_directory(Path(directory.path))
            except IncfsError as error:
                logger.warning("no image can be made in %s: %s", directory.path, error)
                continue
            host = Host(device, Path(directory.path), free_bytes, total_bytes, 0)
            if free_bytes > max(account.reserve_bytes(host), account.settings.low_water.of(total_bytes) - 1):
                found.append((free_bytes, directory))
        return max(found)[1] if found else None
