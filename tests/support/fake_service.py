"""A service in memory: bytearrays for volumes, copies for snapshots.  Lets handlers be tested without a kernel."""

from dataclasses import replace
from itertools import count
from pathlib import Path

from incfs.errors import AlreadyExists, Busy, LimitExceeded, NoData, PoolReadOnly, SnapshotNotFound, VolumeNotFound
from incfs.model import (
    MAX_VOLUME_BYTES,
    Generation,
    Snapshot,
    Volume,
    VolumeId,
    map_id,
    snapshot_facts,
    split_map_id,
    validate_name,
    volume_facts,
)

BLOCK_BYTES = 4096


class FakeBranches:
    def take_changed(self, table):
        return False


class FakeHandles(dict):  # type: ignore[type-arg]
    def __init__(self, closed):
        self._closed = closed

    def open(self, table, holder):
        self.setdefault(table, []).append(holder)

    def close(self, table):
        self[table].pop()
        if not self[table]:
            del self[table]
            self._closed(table)

    def of_volume(self, volume_id):
        return [h for table, held in self.items() if split_map_id(table)[0] == volume_id for h in held]


class FakeService:
    def __init__(self, directory=Path("/fake")):
        self.directory = directory
        self.failure = None
        self.mounted = None
        self.commits = 0
        self._volumes = {}
        self._snapshots = {}
        self._data = {}
        self.handles = FakeHandles(self._reclaim)
        self._ids = count(1)
        self.branches = FakeBranches()

    def stat(self, table):
        volume_id, generation = split_map_id(table)
        volume = self.volume_by_id(volume_id)
        snapshot = self.snapshot_by_generation(volume_id, generation) if generation else None
        facts = snapshot_facts(volume, snapshot) if snapshot else volume_facts(volume)
        return (snapshot or volume).size_bytes, facts._replace(mapped_blocks=self.mapped_bytes(table) // BLOCK_BYTES)

    # look-ups

    def facts(self):
        used = sum(self.mapped_bytes(table) for table in self._data)
        return {
            "uuid": "fake", "block_bytes": BLOCK_BYTES, "capacity_bytes": 1 << 30, "used_bytes": used,
            "free_bytes": (1 << 30) - used, "allocated_bytes": used, "format_version": 1,
            "read_only": self.failure is not None, "failure": self.failure,
        }  # fmt: skip

    def volumes(self):
        return sorted((v for v in self._volumes.values() if v.name), key=lambda v: v.name)

    @property
    def volume_count(self):
        return len(self.volumes())

    def volume(self, name):
        for volume in self.volumes():
            if volume.name == name:
                return volume
        raise VolumeNotFound(f"no volume {name!r}")

    def volume_by_id(self, volume_id):
        if volume_id not in self._volumes:
            raise VolumeNotFound(f"no volume {volume_id}")
        return self._volumes[volume_id]

    def snapshots(self, volume_id):
        return [s for s in self._snapshots.values() if s.volume_id == volume_id]

    def snapshot(self, volume_id, name):
        for snapshot in self.snapshots(volume_id):
            if snapshot.name == name:
                return snapshot
        raise SnapshotNotFound(f"no snapshot {name!r}")

    def snapshot_by_generation(self, volume_id, generation):
        table = map_id(volume_id, generation)
        if table not in self._snapshots:
            raise SnapshotNotFound(f"no snapshot {table}")
        return self._snapshots[table]

    def mapped_bytes(self, table):
        data = self._data[table]
        return sum(BLOCK_BYTES for start in range(0, len(data), BLOCK_BYTES) if any(data[start : start + BLOCK_BYTES]))

    def require_ordinary(self, volume_id) -> None:
        """All of them are."""

    # data

    async def read_for_user(self, table, offset, length):
        return bytes(self._data[table][offset : offset + length])

    async def write(self, table, offset, data):
        self._check_writable()
        if offset + len(data) > MAX_VOLUME_BYTES:
            raise LimitExceeded("too large")
        held = self._data[table]
        held.extend(bytes(max(0, offset + len(data) - len(held))))
        held[offset : offset + len(data)] = data
        self._change(split_map_id(table)[0], size_bytes=len(held))
        return len(data)

    async def discard(self, table, offset, length):
        self._check_writable()
        self._data[table][offset : offset + length] = bytes(length)

    async def seek(self, table, offset, *, data):
        held = self._data[table]
        if not 0 <= offset < len(held):
            raise NoData("beyond the end")
        for start in range(offset - offset % BLOCK_BYTES, len(held), BLOCK_BYTES):
            if any(held[start : start + BLOCK_BYTES]) == data:
                return max(start, offset)
        if data:
            raise NoData("no more data")
        return len(held)

    async def commit(self):
        self._check_writable()
        self.commits += 1

    # volumes and snapshots

    async def create_volume(self, name, size_bytes=0, *, mode=0o600, uid=0, gid=0):
        self._check_writable()
        validate_name(name)
        if any(volume.name == name for volume in self.volumes()):
            raise AlreadyExists(f"{name!r} exists")
        volume = Volume(VolumeId(next(self._ids)), f"uuid-{name}", name, size_bytes, 0, mode, uid, gid, 1, 1, 1, 1)
        self._volumes[volume.id] = volume
        self._data[volume.map_id] = bytearray(size_bytes)
        return volume

    async def resize_volume(self, volume_id, size_bytes, *, shrink=False):
        self._check_writable()
        held = self._data[map_id(volume_id)]
        del held[size_bytes:]
        held.extend(bytes(size_bytes - len(held)))
        return self._change(volume_id, size_bytes=size_bytes)

    async def rename_volume(self, volume_id, new_name, *, replace=False):
        other = next((v for v in self.volumes() if v.name == new_name and v.id != volume_id), None)
        if other is not None:
            if not replace:
                raise AlreadyExists(f"{new_name!r} exists")
            await self.remove_volume(other.id)
        return self._change(volume_id, name=new_name)

    async def exchange_volumes(self, id_a, id_b):
        name_a, name_b = self._volumes[id_a].name, self._volumes[id_b].name
        self._change(id_a, name=name_b)
        self._change(id_b, name=name_a)

    async def remove_volume(self, volume_id, *, snapshots=False):
        if self.snapshots(volume_id):
            raise Busy("it has snapshots")
        self._change(volume_id, name="")
        self._reclaim(map_id(volume_id))

    async def set_attributes(self, volume_id, **changes):
        self._check_writable()
        return self._change(volume_id, **changes)

    async def set_xattr(self, volume_id, name, value):
        self._change(volume_id, xattrs={**self._volumes[volume_id].xattrs, name: value})

    async def remove_xattr(self, volume_id, name):
        kept = {key: value for key, value in self._volumes[volume_id].xattrs.items() if key != name}
        self._change(volume_id, xattrs=kept)

    async def create_snapshots(self, wanted):
        taken = []
        for volume_id, name in wanted:
            volume = self._volumes[volume_id]
            if any(snapshot.name == name for snapshot in self.snapshots(volume_id)):
                raise AlreadyExists(f"{name!r} exists")
            generation = Generation(volume.last_generation + 1)
            snapshot = Snapshot(volume_id, generation, f"uuid-{name}", name, volume.size_bytes, 0, 1)
            self._change(volume_id, newest_generation=generation, last_generation=generation)
            self._snapshots[snapshot.map_id] = snapshot
            self._data[snapshot.map_id] = bytearray(self._data[volume.map_id])
            taken.append(snapshot)
        return taken

    async def remove_snapshot(self, volume_id, name):
        snapshot = self.snapshot(volume_id, name)
        del self._snapshots[snapshot.map_id], self._data[snapshot.map_id]

    async def rename_snapshot(self, volume_id, old, new):
        if any(snapshot.name == new for snapshot in self.snapshots(volume_id)):
            raise AlreadyExists(f"{new!r} exists")
        snapshot = self.snapshot(volume_id, old)
        self._snapshots[snapshot.map_id] = replace(snapshot, name=new)

    # life

    def fail(self, reason):
        self.failure = reason

    def _reclaim(self, table):
        volume_id = split_map_id(table)[0]
        if table not in self.handles and volume_id in self._volumes and not self._volumes[volume_id].name:
            del self._volumes[volume_id], self._data[table]

    def _change(self, volume_id, **changes):
        self._volumes[volume_id] = replace(self._volumes[volume_id], **changes)
        return self._volumes[volume_id]

    def _check_writable(self):
        if self.failure is not None:
            raise PoolReadOnly(f"read-only: {self.failure}")
