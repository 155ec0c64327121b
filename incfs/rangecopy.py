"""Copies of ranges inside a pool, through the service."""

from typing import TYPE_CHECKING

from incfs.errors import NoData
from incfs.model import MapId, split_map_id

if TYPE_CHECKING:
    from incfs.service import Service

_COPY_BYTES = 1 << 20
_MAX_COPY_BYTES = 1 << 30


async def clone_range(
    service: "Service", source: MapId, source_bytes: int, target: MapId, target_bytes: int, length_bytes: int
) -> int:
    """Copy a range inside the pool; holes stay holes.  Give the bytes copied (at most 1 GiB)."""
    end = min(source_bytes + min(length_bytes, _MAX_COPY_BYTES), service.stat(source)[0])
    shift = target_bytes - source_bytes
    position = source_bytes
    while position < end:
        data_start = min(end, await _next_data(service, source, position, end))
        if data_start > position:
            await _clear(service, target, position + shift, data_start - position)
            position = data_start
            continue
        data = await service.read(source, position, min(_COPY_BYTES, end - position))
        position += await service.write(target, position + shift, data)
    return max(0, end - source_bytes)


async def _next_data(service: "Service", table: MapId, position: int, end: int) -> int:
    try:
        return await service.seek(table, position, data=True)
    except NoData:
        return end


async def _clear(service: "Service", table: MapId, offset_bytes: int, length_bytes: int) -> None:
    await service.discard(table, offset_bytes, length_bytes)
    volume_id, _ = split_map_id(table)
    if service.volume_by_id(volume_id).size_bytes < offset_bytes + length_bytes:
        await service.resize_volume(volume_id, offset_bytes + length_bytes)
