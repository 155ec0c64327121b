"""Volumes and snapshots written to raw images and block devices, whole or what changed; mounted or not."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from incfs.committer import offload
from incfs.errors import NoData
from incfs.foreign import RAW
from incfs.model import Base, Snapshot, Volume
from incfs.qemu import QemuTarget
from incfs.rawtarget import RawTarget, open_target, require_foreign
from incfs.stream.records import Link, Member, SnapBegin

if TYPE_CHECKING:
    from incfs.service import Service

from incfs.rawcopy import CHUNK_BYTES, Progress, images_of, new_snapshot_name

_RANGES: Final = 1000


async def export(
    service: "Service",
    volume: Volume,
    snapshot: Snapshot | None,
    path: Path,
    progress: Progress,
    *,
    base: Base | None = None,
    force: bool = False,
    image_format: str = RAW,
) -> Snapshot:
    """Write a snapshot, or the volume as of now, to a raw file or a block device, or to an image of another format.

    A raw file is sparse, and a note beside it says which snapshot it holds.  With a base only what changed since is
    written, onto a file whose note names that.

    Raises:
        AlreadyExists, Busy, NoSpace, BaseMismatch: As ``rawtarget`` says.
        NotSupported: As ``QemuTarget`` says.
    """

    def open_it() -> RawTarget:
        forbidden = images_of(service)
        if image_format == RAW:
            return open_target(path, is_incremental=base is not None, force=force, forbidden=forbidden)
        require_foreign(path, forbidden)
        return QemuTarget(path.resolve(), image_format, force=force)

    async with _settled(service, volume, snapshot) as taken, _pinned(service, taken, base):
        target = await offload(open_it)
        try:
            await _Export(service, volume, taken, target, progress).run(base)
        finally:
            with trio.CancelScope(shield=True):
                await offload(target.close)
    return taken


async def export_stream(
    service: "Service",
    volume: Volume,
    snapshot: Snapshot | None,
    put: Callable[[bytes], Awaitable[None]],
    progress: Progress,
) -> Snapshot:
    """Give the bytes of a snapshot, or of the volume as of now, from the first to the last."""
    async with _settled(service, volume, snapshot) as taken, _pinned(service, taken):
        position, size = 0, taken.size_bytes
        while position < size:
            length = min(CHUNK_BYTES, size - position)
            await put(await service.read(taken.map_id, position, length))
            position += length
            progress(position, size, "bytes")
    return taken


@asynccontextmanager
async def _settled(service: "Service", volume: Volume, snapshot: Snapshot | None) -> AsyncIterator[Snapshot]:
    """Give a snapshot: the one that was named, or one of now that goes at the end."""
    if snapshot is not None:
        yield snapshot
        return
    (taken,) = await service.create_snapshots([(volume.id, new_snapshot_name("export"))])
    try:
        yield taken
    finally:
        with trio.CancelScope(shield=True):
            await service.remove_snapshots([taken])


@asynccontextmanager
async def _pinned(service: "Service", *tables: Snapshot | Base | None) -> AsyncIterator[None]:
    """Keep what is read, and what it is compared with."""
    pinned = [taken.map_id for taken in tables if taken is not None]
    for table in pinned:
        service.handles.pin(table, "export")
    try:
        yield
    finally:
        for table in pinned:
            service.handles.close(table)


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

    async def run(self, base: Base | None) -> None:
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

    async def _write_changed(self, base: Base) -> None:
        start: int | None = 0
        while start is not None:
            ranges: list[dict[str, Any]]
            ranges, start = await self._service.inspection.diff(
                self._volume.id, f"uuid:{base.uuid}", self._snapshot.name, start_bytes=start, limit=_RANGES
            )
            for part in ranges:
                if part["kind"] == "data":
                    await self._write(part["offset"], part["length"])
                else:
                    await self._clear(part["offset"], part["length"])

    async def _write(self, offset_bytes: int, length_bytes: int) -> None:
        end = offset_bytes + length_bytes
        for start in range(offset_bytes, end, CHUNK_BYTES):
            data = await self._service.read(self._snapshot.map_id, start, min(CHUNK_BYTES, end - start))
            await offload(lambda start=start, data=data: self._target.write(start, data))  # type: ignore[misc]
            self._progress(start + len(data), self._snapshot.size_bytes, "bytes")

    async def _clear(self, offset_bytes: int, length_bytes: int) -> None:
        await offload(lambda: self._target.clear(offset_bytes, length_bytes))
        self._progress(offset_bytes + length_bytes, self._snapshot.size_bytes, "bytes")
