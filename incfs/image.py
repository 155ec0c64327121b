"""The header of an image file: which storage volume of which pool it is, and when it last belonged to it.

``docs/FORMAT.md`` draws the bytes.  Blocks begin at ``DATA_OFFSET_BYTES``.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from incfs.backing import File
from incfs.codec import checksum
from incfs.epoch import SLOT_BYTES, SLOT_STEP_BYTES, Stamp, decode_stamp, encode_stamp
from incfs.errors import BackingError, ImageMismatch, IncfsError

DATA_OFFSET_BYTES = 65536
HEADER_BYTES = 4096
_STAMP_OFFSETS = (4096, 8192)
"""Two, written in turn."""
_HEADER = struct.Struct("<8sHHI16s16s")
_CRC = struct.Struct("<I")
_MAGIC = b"INCFSIM\0"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Identity of an image."""

    pool_uuid: UUID
    storage_uuid: UUID
    storage_id: int
    block_bytes: int

    def __str__(self) -> str:
        return f"storage volume {self.storage_id} ({self.storage_uuid}) of pool {self.pool_uuid}"


def write_header(file: File, header: ImageHeader, stamp: Stamp) -> None:
    """Write the header and the first stamp into a new image, and make the file long enough to hold them.

    The room of later stamps is taken now: a full disk must not keep a pool from being opened.

    Durability: durable on return.
    """
    head = _HEADER.pack(
        _MAGIC,
        _VERSION,
        header.storage_id,
        header.block_bytes,
        header.pool_uuid.bytes,
        header.storage_uuid.bytes,
    )
    file.truncate(DATA_OFFSET_BYTES)
    header_sectors = (head + _CRC.pack(checksum(head))).ljust(HEADER_BYTES, b"\0")
    file.pwrite(0, header_sectors + encode_stamp(stamp, 0).ljust(SLOT_STEP_BYTES, b"\0") + bytes(SLOT_STEP_BYTES))
    file.sync()


def read_header(file: File) -> ImageHeader:
    """Read and verify the header.

    Raises:
        ImageMismatch: No image, a damaged header, or an unknown version.
    """
    try:
        sector = file.pread(0, HEADER_BYTES)
    except BackingError as error:
        raise ImageMismatch(f"{file.path} is no storage image: {error}") from error
    magic, version, storage_id, block_bytes, pool, storage = _HEADER.unpack_from(sector)
    if magic != _MAGIC or _CRC.unpack_from(sector, _HEADER.size)[0] != checksum(sector[: _HEADER.size]):
        raise ImageMismatch(f"{file.path} is no storage image, or its header is damaged")
    if version != _VERSION:
        raise ImageMismatch(f"{file.path} is a storage image of version {version}, supported is {_VERSION}")
    return ImageHeader(UUID(bytes=pool), UUID(bytes=storage), storage_id, block_bytes)


def read_stamp(file: File) -> Stamp | None:
    """Read the newest sound stamp; None when there is none.

    Raises:
        FormatError: A newer incfs wrote it.
        BackingError: The host failed.
    """
    newest = max(_stamps(file), key=_serial_of, default=None)
    return None if newest is None else newest[1]


def write_stamp(file: File, stamp: Stamp) -> None:
    """Write a stamp in the place of the older of the two, unless it is there already.  Any thread.

    Durability: none until ``sync``, which must come before the next stamp: of both slots one is always durable.
    """
    newest = max(_stamps(file), key=_serial_of, default=None)
    if newest is not None and newest[1] == stamp:
        return
    serial = 0 if newest is None else newest[0] + 1
    file.pwrite(_STAMP_OFFSETS[serial % 2], encode_stamp(stamp, serial))


def _stamps(file: File) -> list[tuple[int, Stamp]]:
    if file.length_bytes() < DATA_OFFSET_BYTES:
        return []
    found = (decode_stamp(file.pread(offset, SLOT_BYTES)) for offset in _STAMP_OFFSETS)
    return [slot for slot in found if slot is not None]


def _serial_of(slot: tuple[int, Stamp]) -> int:
    return slot[0]


class AbsentImage(File):
    """Stands for an image that could not be attached: whatever needs its blocks fails with the reason."""

    def __init__(self, path: Path, reason: IncfsError) -> None:
        super().__init__(path, -1)
        self._reason = reason

    def pread_cached(self, offset_bytes: int, length_bytes: int) -> bytes | None:
        """Refuse."""
        del offset_bytes, length_bytes
        raise self._refusal()

    def _call(self, action: str, function: Callable[..., Any], *arguments: Any) -> Any:
        del action, function, arguments
        raise self._refusal()

    def _fallocate(self, action: str, mode: int, offset_bytes: int, length_bytes: int) -> bool:
        del action, mode, offset_bytes, length_bytes
        raise self._refusal()

    def _refusal(self) -> IncfsError:
        return type(self._reason)(self._reason.message, **self._reason.facts)

    def length_bytes(self) -> int:
        """Nothing of it is there."""
        return 0

    def allocated_bytes(self) -> int:
        """Nothing of it is there."""
        return 0

    def host_free_bytes(self) -> int:
        """Nothing can be written."""
        return 0

    def host_total_bytes(self) -> int:
        """Nothing can be written."""
        return 0

    def host_device(self) -> int:
        """No filesystem."""
        return 0

    def close(self) -> None:
        """Nothing is open."""
