"""Volumes made from raw images and block devices: copied, brought up to date, or laid over them; mounted or not."""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from incfs.committer import offload
from incfs.errors import AlreadyExists, BaseMismatch, Busy, VolumeNotFound
from incfs.foreign import AUTO, IMAGES, RAW, recognise, require_raw
from incfs.model import IMPORTING_SUFFIX, MAX_NAME_BYTES, MapId, Snapshot, Volume, validate_name
from incfs.qemu import QemuSource
from incfs.rawsource import RawSource, Source, read_ranges
from incfs.rawtarget import require_foreign

if TYPE_CHECKING:
    from incfs.service import Service

from incfs.rawcopy import CHUNK_BYTES, Progress, images_of


async def import_new(
    service: "Service", name: str, path: Path, snapshot: str, progress: Progress, *, image_format: str | None = None
) -> tuple[Volume, Snapshot]:
    """Make a volume that is a copy of a source, and a snapshot of it.

    Without ``image_format`` it must be raw, and what looks like anything else is refused.

    Atomicity: the copy has the volume's name only once it is whole; meanwhile it is named NAME.importing.  What an
    import that was killed left under that name is replaced by the next one.

    Raises:
        AlreadyExists: There is such a volume.
        NotSupported: The source is of another format than was said.
        BaseMismatch: The source was changed while it was read.
    """
    _require_new(service, name, snapshot)
    scratch = _scratch_name(name)
    await _remove_left(service, scratch)
    with closing(await offload(lambda: _open_source(path, image_format, name))) as source:
        volume = await service.create_volume(scratch, source.size_bytes)
        service.handles.open(volume.map_id, "import")
        try:
            await _Import(service, volume.map_id, source, progress, is_new=True).copy([(0, source.size_bytes)])
            (taken,) = await service.create_snapshots([(volume.id, snapshot)])
            return await service.rename_volume(volume.id, name), taken
        except BaseException:
            with trio.CancelScope(shield=True):
                await service.remove_volume(volume.id, snapshots=True)
            raise
        finally:
            service.handles.close(volume.map_id)


async def measure_new(
    service: "Service", name: str, path: Path, snapshot: str, progress: Progress, *, image_format: str | None = None
) -> int:
    """Count the bytes that ``import_new`` would write; change nothing.

    Raises:
        AlreadyExists, NotSupported, BaseMismatch: As ``import_new``.
    """
    _require_new(service, name, snapshot)
    with closing(await offload(lambda: _open_source(path, image_format, name))) as source:
        counted = _Import(service, MapId(0), source, progress, is_new=True, is_dry=True)  # there is no table yet
        return await counted.copy([(0, source.size_bytes)])


def _require_new(service: "Service", name: str, snapshot: str) -> None:
    validate_name(name)
    validate_name(snapshot, what="snapshot")
    if any(volume.name == name for volume in service.volumes()):
        raise AlreadyExists(f"there is a volume {name!r} already; --incremental brings it up to date", volume=name)


async def create_on_baseline(
    service: "Service",
    name: str,
    path: Path,
    progress: Progress,
    *,
    digest: bool = False,
    image_format: str | None = None,
) -> Volume:
    """Make a volume over a raw image or block device, which stays where it is and is only read.

    With ``digest`` it is read once, so that a change that size and time do not show can be found later.

    A last part that is no whole block is copied into the volume.

    Atomicity: as ``import_new``.

    Raises:
        AlreadyExists: There is such a volume.
        Busy: The file belongs to the pool.
        NotSupported: It looks like something else than a raw image, and nothing says that it is one.
    """
    validate_name(name)
    if any(volume.name == name for volume in service.volumes()):
        raise AlreadyExists(f"there is a volume {name!r} already", volume=name)
    await offload(lambda: require_foreign(path, images_of(service)))
    if image_format is None:
        await offload(lambda: _require_raw(path, name))
    scratch = _scratch_name(name)
    await _remove_left(service, scratch)
    volume = await service.branches.create_on_baseline(scratch, path)
    try:
        whole = volume.size_bytes - volume.size_bytes % service.block_bytes
        tail = await offload(lambda: _read_tail(path, whole, volume.size_bytes))
        await service.write(volume.map_id, whole, tail)
        if digest:
            await service.branches.verify_baseline(
                volume.id, lambda done, total: progress(done, total, "bytes"), record=True
            )
        return await service.rename_volume(volume.id, name)
    except BaseException:
        with trio.CancelScope(shield=True):
            await service.remove_volume(volume.id)
        raise


def _scratch_name(name: str) -> str:
    """Return what a volume is called until it is whole."""
    return name.encode()[: MAX_NAME_BYTES - len(IMPORTING_SUFFIX)].decode(errors="ignore") + IMPORTING_SUFFIX


def _open_source(path: Path, image_format: str | None, name: str) -> Source:
    raw = RawSource(path)
    try:
        chosen = image_format or RAW
        if chosen == AUTO:
            found = recognise(raw)
            chosen = found if found in IMAGES else RAW
        if chosen == RAW and image_format != RAW:
            require_raw(raw, name, can_convert=True)
    except BaseException:
        raw.close()
        raise
    if chosen == RAW:
        return raw
    raw.close()
    return QemuSource(path, chosen)


def _require_raw(path: Path, name: str) -> None:
    with closing(RawSource(path)) as source:
        require_raw(source, name, can_convert=False)


def _read_tail(path: Path, start_bytes: int, end_bytes: int) -> bytes:
    with closing(RawSource(path)) as source:
        return source.read(start_bytes, end_bytes - start_bytes)


async def _remove_left(service: "Service", scratch: str) -> None:
    try:
        left = service.volume(scratch)
    except VolumeNotFound:
        return
    if service.handles.of_volume(left.id):
        raise Busy(f"volume {scratch} is open by {', '.join(service.handles.of_volume(left.id))}", volume=scratch)
    await service.remove_volume(left.id, snapshots=True)


async def import_changes(
    service: "Service",
    volume: Volume,
    path: Path,
    snapshot: str,
    progress: Progress,
    *,
    changed: Path | None = None,
    image_format: str | None = None,
) -> tuple[Volume, Snapshot]:
    """Let a volume that nobody has open be what a source is now, writing only blocks that differ; take a snapshot.

    Args:
        service: The pool.
        volume: The volume.
        path: The source.
        snapshot: The new snapshot's name.
        progress: Called with what is done.
        changed: A list of ranges: only these are read.
        image_format: As for ``import_new``.

    Raises:
        FormatError: The list is none.
        BaseMismatch: The source was changed while it was read.
    """
    validate_name(snapshot, what="snapshot")
    with closing(await offload(lambda: _open_source(path, image_format, volume.name))) as source:
        wanted = await _wanted(source, changed)
        service.branches.note_changed(volume.map_id)
        await service.resize_volume(volume.id, source.size_bytes, shrink=True)
        await _Import(service, volume.map_id, source, progress, is_new=False).copy(wanted)
    if service.mounted is not None:
        await service.mounted.refresh_volume(volume.name, service.volume_by_id(volume.id).size_bytes)
    (taken,) = await service.create_snapshots([(volume.id, snapshot)])
    return service.volume_by_id(volume.id), taken


async def measure_changes(
    service: "Service",
    volume: Volume,
    path: Path,
    progress: Progress,
    *,
    changed: Path | None = None,
    image_format: str | None = None,
) -> int:
    """Count the bytes that ``import_changes`` would write; change nothing."""
    with closing(await offload(lambda: _open_source(path, image_format, volume.name))) as source:
        wanted = await _wanted(source, changed)
        return await _Import(service, volume.map_id, source, progress, is_new=False, is_dry=True).copy(wanted)


async def _wanted(source: Source, changed: Path | None) -> Iterable[tuple[int, int]]:
    if changed is None:
        return [(0, source.size_bytes)]
    return await offload(lambda: read_ranges(changed, source.size_bytes))


class _Import:
    """One copy from a source into a volume's table, which with ``is_dry`` is only counted."""

    def __init__(
        self,
        service: "Service",
        table: MapId,
        source: Source,
        progress: Progress,
        *,
        is_new: bool,
        is_dry: bool = False,
    ) -> None:
        self._service = service
        self._table = table
        self._source = source
        self._progress = progress
        self._is_new = is_new
        self._is_dry = is_dry
        self._written_bytes = 0

    async def copy(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Copy ranges, cut to whole blocks where they begin; give how many bytes were written."""
        block, total = self._service.block_bytes, self._source.size_bytes
        stamp = await offload(self._source.stamp)
        for start, end in ranges:
            position = start - start % block
            while position < end:
                position = await self._copy_stretch(position, min(total, -(-end // block) * block))
                self._progress(min(position, total), total, "bytes")
        if await offload(self._source.stamp) != stamp:
            raise BaseMismatch(f"{self._source.path} was changed while it was read; stop who writes to it, and repeat")
        return self._written_bytes

    async def _copy_stretch(self, position: int, end: int) -> int:
        is_data, stop = await offload(lambda: self._source.stretch(position, end))
        if not is_data:
            if not self._is_new and not self._is_dry:
                await self._service.discard(self._table, position, stop - position)
            return stop
        length = min(stop, position - position % CHUNK_BYTES + CHUNK_BYTES) - position
        if position + length < stop:
            length -= length % self._service.block_bytes
        data = await offload(lambda: self._source.read(position, length))
        for start, piece in await self._different(position, data):
            self._written_bytes += len(piece)
            if not self._is_dry:
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
