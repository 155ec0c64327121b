"""Volumes made from raw images and block devices, and exported to them: through the service, mounted or not."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from incfs.committer import offload
from incfs.errors import AlreadyExists, BaseMismatch, Busy, NoData, VolumeNotFound
from incfs.model import MAX_NAME_BYTES, MapId, Snapshot, Volume, validate_name
from incfs.rawsource import RawSource, read_ranges
from incfs.rawtarget import RawTarget, open_target, require_foreign
from incfs.stream.records import Link, Member, SnapBegin

if TYPE_CHECKING:
    from incfs.service import Service

Progress = Callable[[int, int, str], None]

_CHUNK_BYTES: Final = 1 << 20
_RANGES: Final = 1000
_SCRATCH_SUFFIX: Final = ".importing"
_SCRATCH_BYTES: Final = MAX_NAME_BYTES - len(_SCRATCH_SUFFIX)


def new_snapshot_name(what: str) -> str:
    """Name a snapshot after the time."""
    return time.strftime(f"{what}-%Y%m%dT%H%M%SZ", time.gmtime())


# ---------------------------------------------------------------------------------- import


async def import_new(
    service: "Service", name: str, path: Path, snapshot: str, progress: Progress
) -> tuple[Volume, Snapshot]:
    """Make a volume that is a copy of a source, and a snapshot of it.

    Atomicity: the copy has the volume's name only once it is whole; meanwhile it is named NAME.importing.  What an
    import that was killed left under that name is replaced by the next one.

    Raises:
        AlreadyExists: There is such a volume.
        BaseMismatch: The source was changed while it was read.
    """
    validate_name(name)
    validate_name(snapshot, what="snapshot")
    if any(volume.name == name for volume in service.volumes()):
        raise AlreadyExists(f"there is a volume {name!r} already; --incremental brings it up to date", volume=name)
    scratch = name.encode()[:_SCRATCH_BYTES].decode(errors="ignore") + _SCRATCH_SUFFIX
    await _remove_left(service, scratch)
    source = await offload(lambda: RawSource(path))
    try:
        volume = await service.create_volume(scratch, source.size_bytes)
        service.open_handle(volume.map_id, "import")
        try:
            await _Import(service, volume.map_id, source, progress, is_new=True).copy([(0, source.size_bytes)])
            (taken,) = await service.create_snapshots([(volume.id, snapshot)])
            return await service.rename_volume(volume.id, name), taken
        except BaseException:
            with trio.CancelScope(shield=True):
                await service.remove_volume(volume.id, snapshots=True)
            raise
        finally:
            service.close_handle(volume.map_id)
    finally:
        source.close()


async def create_on_baseline(service: "Service", name: str, path: Path) -> Volume:
    """Make a volume over a raw image or block device, which stays where it is and is only read.

    A last part that is no whole block is copied into the volume.

    Atomicity: as ``import_new``.

    Raises:
        AlreadyExists: There is such a volume.
        Busy: The file belongs to the pool.
    """
    validate_name(name)
    if any(volume.name == name for volume in service.volumes()):
        raise AlreadyExists(f"there is a volume {name!r} already", volume=name)
    await offload(lambda: require_foreign(path, _images(service)))
    scratch = name.encode()[:_SCRATCH_BYTES].decode(errors="ignore") + _SCRATCH_SUFFIX
    await _remove_left(service, scratch)
    volume = await service.branches.create_on_baseline(scratch, path)
    try:
        whole = volume.size_bytes - volume.size_bytes % service.block_bytes
        tail = await offload(lambda: _read_tail(path, whole, volume.size_bytes))
        await service.write(volume.map_id, whole, tail)
        return await service.rename_volume(volume.id, name)
    except BaseException:
        with trio.CancelScope(shield=True):
            await service.remove_volume(volume.id)
        raise


def _images(service: "Service") -> list[Path]:
    """List the pool's image files, those of mirrors' legs included."""
    facts = service.storages()
    return [Path(part["path"]) for storage in facts for part in (storage, *storage["legs"])]


def _read_tail(path: Path, start_bytes: int, end_bytes: int) -> bytes:
    source = RawSource(path)
    try:
        return source.read(start_bytes, end_bytes - start_bytes)
    finally:
        source.close()


async def _remove_left(service: "Service", scratch: str) -> None:
    try:
        left = service.volume(scratch)
    except VolumeNotFound:
        return
    if service.holders(left.id):
        raise Busy(f"volume {scratch} is open by {', '.join(service.holders(left.id))}", volume=scratch)
    await service.remove_volume(left.id, snapshots=True)


async def import_changes(
    service: "Service", volume: Volume, path: Path, snapshot: str, progress: Progress, *, changed: Path | None = None
) -> tuple[Volume, Snapshot]:
    """Let a volume that nobody has open be what a source is now, writing only blocks that differ; take a snapshot.

    Args:
        service: The pool.
        volume: The volume.
        path: The source.
        snapshot: The new snapshot's name.
        progress: Called with what is done.
        changed: A list of ranges: only these are read.

    Raises:
        FormatError: The list is none.
        BaseMismatch: The source was changed while it was read.
    """
    validate_name(snapshot, what="snapshot")
    source = await offload(lambda: RawSource(path))
    try:
        whole = [(0, source.size_bytes)]
        wanted = whole if changed is None else await offload(lambda: read_ranges(changed, source.size_bytes))
        service.branches.note_changed(volume.map_id)
        await service.resize_volume(volume.id, source.size_bytes, shrink=True)
        await _Import(service, volume.map_id, source, progress, is_new=False).copy(wanted)
    finally:
        source.close()
    if service.mounted is not None:
        await service.mounted.refresh_volume(volume.name, service.volume_by_id(volume.id).size_bytes)
    (taken,) = await service.create_snapshots([(volume.id, snapshot)])
    return service.volume_by_id(volume.id), taken


class _Import:
    """One copy from a source into a volume's table."""

    def __init__(
        self, service: "Service", table: MapId, source: RawSource, progress: Progress, *, is_new: bool
    ) -> None:
        self._service = service
        self._table = table
        self._source = source
        self._progress = progress
        self._is_new = is_new

    async def copy(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Copy ranges, cut to whole blocks where they begin."""
        block, total = self._service.block_bytes, self._source.size_bytes
        stamp = self._source.stamp()
        for start, end in ranges:
            position = start - start % block
            while position < end:
                position = await self._copy_stretch(position, min(total, -(-end // block) * block))
                self._progress(min(position, total), total, "bytes")
        if self._source.stamp() != stamp:
            raise BaseMismatch(f"{self._source.path} was changed while it was read; stop who writes to it, and repeat")

    async def _copy_stretch(self, position: int, end: int) -> int:
        is_data, stop = await offload(lambda: self._source.stretch(position, end))
        if not is_data:
            if not self._is_new:
                await self._service.discard(self._table, position, stop - position)
            return stop
        length = min(stop, position - position % _CHUNK_BYTES + _CHUNK_BYTES) - position
        if position + length < stop:
            length -= length % self._service.block_bytes
        data = await offload(lambda: self._source.read(position, length))
        for start, piece in await self._different(position, data):
            await self._service.write(self._table, start, piece)
        return position + length

    async def _different(self, position: int, data: bytes) -> list[tuple[int, bytes]]:
        """Give the runs of blocks that are not in the volume yet."""
        if self._is_new:
            return [(position, data)]
        known = await self._service.read(self._table, position, len(data))
        block = self._service.block_bytes
        runs: list[tuple[int, int]] = []
        for start in range(0, len(data), block):
            if data[start : start + block] == known[start : start + block]:
                continue
            if runs and runs[-1][1] == start:
                runs[-1] = runs[-1][0], start + block
            else:
                runs.append((start, start + block))
        return [(position + start, data[start:end]) for start, end in runs]


# ---------------------------------------------------------------------------------- export


async def export(
    service: "Service",
    volume: Volume,
    snapshot: Snapshot | None,
    path: Path,
    progress: Progress,
    *,
    base: Snapshot | None = None,
    force: bool = False,
) -> Snapshot:
    """Write a snapshot, or the volume as of now, to a raw file or a block device.

    A file is sparse, and a note beside it says which snapshot it holds.  With a base only what changed since is
    written, onto a file whose note names that.

    Raises:
        AlreadyExists, Busy, NoSpace, BaseMismatch: As ``rawtarget`` says.
    """
    if snapshot is not None:
        await _export(service, volume, snapshot, path, progress, base=base, force=force)
        return snapshot
    (taken,) = await service.create_snapshots([(volume.id, new_snapshot_name("export"))])
    try:
        await _export(service, volume, taken, path, progress, base=base, force=force)
    finally:
        with trio.CancelScope(shield=True):
            await service.remove_snapshots([taken])
    return taken


async def _export(
    service: "Service",
    volume: Volume,
    snapshot: Snapshot,
    path: Path,
    progress: Progress,
    *,
    base: Snapshot | None,
    force: bool,
) -> None:
    images = _images(service)
    pinned = [taken.map_id for taken in (snapshot, base) if taken is not None]
    for table in pinned:
        service.open_handle(table, "export")
    try:
        target = await offload(
            lambda: open_target(path, is_incremental=base is not None, force=force, forbidden=images)
        )
        try:
            await _Export(service, volume, snapshot, target, progress).run(base)
        finally:
            target.close()
    finally:
        for table in pinned:
            service.close_handle(table)


class _Export:
    """One copy of a snapshot to a target."""

    def __init__(
        self, service: "Service", volume: Volume, snapshot: Snapshot, target: RawTarget, progress: Progress
    ) -> None:
        self._service = service
        self._volume = volume
        self._snapshot = snapshot
        self._target = target
        self._progress = progress

    async def run(self, base: Snapshot | None) -> None:
        """Write everything, or what changed since the base."""
        facts, block = self._snapshot, self._service.block_bytes
        link = Link(0, base.uuid if base else None, facts.uuid)
        base_size = base.size_bytes if base else 0
        begin = SnapBegin(link, facts.name, base_size, facts.size_bytes, block, facts.created_ns, facts.tag)
        member = Member(self._volume.uuid, self._volume.name)
        await offload(lambda: self._target.begin(member, begin))
        if base is None:
            await self._write_all()
        else:
            await self._write_changed(base)
        await offload(self._target.end)

    async def _write_all(self) -> None:
        position, size = 0, self._snapshot.size_bytes
        while position < size:
            data = await self._seek(position, data=True)
            if data > position and not self._target.is_empty:
                await self._clear(position, data - position)
            position = data
            if position < size:
                hole = await self._seek(position, data=False)
                await self._write(position, hole - position)
                position = hole

    async def _seek(self, position: int, *, data: bool) -> int:
        try:
            return await self._service.seek(self._snapshot.map_id, position, data=data)
        except NoData:
            return self._snapshot.size_bytes

    async def _write_changed(self, base: Snapshot) -> None:
        start: int | None = 0
        while start is not None:
            ranges: list[dict[str, Any]]
            ranges, start = await self._service.diff(
                self._volume.id, base.name, self._snapshot.name, start_bytes=start, limit=_RANGES
            )
            for part in ranges:
                if part["kind"] == "data":
                    await self._write(part["offset"], part["length"])
                else:
                    await self._clear(part["offset"], part["length"])

    async def _write(self, offset_bytes: int, length_bytes: int) -> None:
        end = offset_bytes + length_bytes
        for start in range(offset_bytes, end, _CHUNK_BYTES):
            data = await self._service.read(self._snapshot.map_id, start, min(_CHUNK_BYTES, end - start))
            await offload(lambda start=start, data=data: self._target.write(start, data))  # type: ignore[misc]
            self._progress(start + len(data), self._snapshot.size_bytes, "bytes")

    async def _clear(self, offset_bytes: int, length_bytes: int) -> None:
        await offload(lambda: self._target.clear(offset_bytes, length_bytes))
        self._progress(offset_bytes + length_bytes, self._snapshot.size_bytes, "bytes")
