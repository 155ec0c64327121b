"""A service in memory for tests of the admin verbs and the control socket."""

import itertools
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from incfs.errors import AlreadyExists, SnapshotNotFound, VolumeNotFound
from incfs.model import Generation, MapId, Snapshot, Volume, VolumeId, validate_name
from incfs.removal import Freed

BLOCK_BYTES = 4096


class Report:
    """What a check found."""

    def to_dict(self) -> dict[str, Any]:
        return {"is_clean": True}


class Branches:
    """Lets everything be removed."""

    def require_removable(self, snapshots: list[Snapshot]) -> None:
        pass


class FakeAdminService:
    """As much of ``Service`` as the verbs use; ``check`` and ``add_storage`` wait for ``may_finish``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mounted: Any = None
        self.may_finish = trio.Event()
        self.check_begun, self.check_cancelled = trio.Event(), trio.Event()
        self.addition_begun = trio.Event()
        self.report = Report()
        self.open_by: list[str] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._volumes: dict[VolumeId, Volume] = {}
        self._snapshots: dict[VolumeId, list[Snapshot]] = {}
        self._ids = itertools.count(1)
        self.branches = Branches()
        self.handles = self.inspection = self.upkeep = self  # it plays every part

    @property
    def block_bytes(self) -> int:
        return BLOCK_BYTES

    def facts(self) -> dict[str, Any]:
        return {"uuid": "u", "read_only": False, "failure": None}

    def volumes(self) -> list[Volume]:
        return sorted(self._volumes.values(), key=lambda volume: volume.name)

    def incoming(self) -> list[Volume]:
        return []

    def volume(self, name: str) -> Volume:
        for volume in self._volumes.values():
            if name in (volume.name, f"uuid:{volume.uuid}"):
                return volume
        raise VolumeNotFound(f"no volume {name}", name=name)

    def volume_by_id(self, volume_id: VolumeId) -> Volume:
        return self._volumes[volume_id]

    def snapshots(self, volume_id: VolumeId) -> list[Snapshot]:
        return self._snapshots[volume_id]

    def snapshot(self, volume_id: VolumeId, name: str) -> Snapshot:
        for snapshot in self._snapshots[volume_id]:
            if snapshot.name == name:
                return snapshot
        raise SnapshotNotFound(f"no snapshot {name}", name=name)

    def mapped_bytes(self, table: MapId) -> int:
        return 3 * BLOCK_BYTES

    def clones(self, snapshot: Snapshot) -> list[Volume]:
        return []

    def of_volume(self, volume_id: VolumeId) -> list[str]:
        return self.open_by

    def of_table(self, table: MapId) -> list[str]:
        return self.open_by

    async def create_volume(self, name: str, size_bytes: int = 0) -> Volume:
        await trio.lowlevel.checkpoint()
        validate_name(name)
        if any(volume.name == name for volume in self._volumes.values()):
            raise AlreadyExists(f"there is a volume {name} already", name=name)
        volume_id = VolumeId(next(self._ids))
        now = time.time_ns()
        volume = Volume(
            id=volume_id, uuid=str(uuid.uuid4()), name=name, size_bytes=size_bytes, mapped_blocks=3, mode=0o600,
            uid=0, gid=0, created_ns=now, modified_ns=now, changed_ns=now, accessed_ns=now,
        )  # fmt: skip
        self._volumes[volume_id] = volume
        self._snapshots[volume_id] = []
        return volume

    async def resize_volume(self, volume_id: VolumeId, size_bytes: int, *, shrink: bool = False) -> Volume:
        self._volumes[volume_id] = replace(self._volumes[volume_id], size_bytes=size_bytes)
        return self._volumes[volume_id]

    async def rename_volume(self, volume_id: VolumeId, name: str, *, replace: bool = False) -> Volume:
        from dataclasses import replace as replace_fields

        self._volumes[volume_id] = replace_fields(self._volumes[volume_id], name=name)
        return self._volumes[volume_id]

    async def remove_volume(self, volume_id: VolumeId, *, snapshots: bool = False) -> None:
        self.calls.append(("remove_volume", (volume_id, snapshots)))
        del self._volumes[volume_id]

    async def create_snapshots(self, pairs: list[tuple[VolumeId, str]]) -> list[Snapshot]:
        made = []
        for volume_id, name in pairs:
            generation = Generation(len(self._snapshots[volume_id]) + 1)
            snapshot = Snapshot(
                volume_id, generation, str(uuid.uuid4()), name, self._volumes[volume_id].size_bytes, 3,
                time.time_ns(), held_blocks=int(generation),
            )  # fmt: skip
            self._snapshots[volume_id].append(snapshot)
            made.append(snapshot)
        return made

    async def remove_snapshot(self, volume_id: VolumeId, name: str) -> None:
        self._snapshots[volume_id].remove(self.snapshot(volume_id, name))

    async def rename_snapshot(self, volume_id: VolumeId, old: str, new: str) -> None:
        at = self._snapshots[volume_id].index(self.snapshot(volume_id, old))
        self._snapshots[volume_id][at] = replace(self._snapshots[volume_id][at], name=new)

    async def remove_snapshots(self, doomed: list[Snapshot]) -> None:
        for snapshot in doomed:
            await self.remove_snapshot(snapshot.volume_id, snapshot.name)

    async def plan_removal(self, volume_id: VolumeId, doomed: list[Snapshot]) -> Freed:
        return Freed(7, {snapshot.generation: 2 for snapshot in doomed})

    async def diff(
        self, volume_id: VolumeId, from_name: str | None, to_name: str, *, start_bytes: int, limit: int
    ) -> tuple[list[dict[str, Any]], int | None]:
        every = [{"offset": 0, "length": BLOCK_BYTES}, {"offset": 8192, "length": BLOCK_BYTES}]
        left = [part for part in every if part["offset"] >= start_bytes]
        return left[:limit], left[limit]["offset"] if len(left) > limit else None

    async def extents(self, table: MapId, start_bytes: int, limit: int) -> list[dict[str, Any]]:
        every: list[dict[str, Any]] = [
            {"offset": i * BLOCK_BYTES, "length": BLOCK_BYTES, "kind": "data", "storage": 1, "block": i}
            for i in range(25)
        ]
        return [extent for extent in every if extent["offset"] >= start_bytes][:limit]

    async def check(self, data: bool, progress: Any) -> Report:
        self.check_begun.set()
        progress(40, 100)
        try:
            await self.may_finish.wait()
        except trio.Cancelled:
            self.check_cancelled.set()
            raise
        progress(100, 100)
        return self.report

    async def debug_journal(self) -> list[dict[str, Any]]:
        raise ZeroDivisionError("a bug")

    async def add_storage(self, path: str, **facts: Any) -> dict[str, Any]:
        """To be disconnected from."""
        self.addition_begun.set()
        await self.may_finish.wait()
        self.calls.append(("add_storage", (path,)))
        return {"id": 2, "path": path}
