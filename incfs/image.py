"""The header of an image file: which storage volume of which pool it is.

``docs/FORMAT.md`` draws the bytes.  Blocks begin at ``DATA_OFFSET_BYTES``.
"""

import struct
from dataclasses import dataclass
from uuid import UUID

from incfs.backing import File
from incfs.codec import checksum
from incfs.errors import BackingError, ImageMismatch

DATA_OFFSET_BYTES = 65536
HEADER_BYTES = 4096
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


def write_header(file: File, header: ImageHeader) -> None:
    """Write the header into a new image and make the file long enough to hold it.

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
    file.pwrite(0, (head + _CRC.pack(checksum(head))).ljust(HEADER_BYTES, b"\0"))
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
