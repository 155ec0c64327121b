"""The native data plane (``_dataplane.c``) as the store uses it; importable only where it was built.

Owns what the C code leaves to Python: the words of the errors.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from incfs._dataplane import DataPlane as _DataPlane
from incfs.backing import translate
from incfs.blocks import split_address
from incfs.dataplane import BlockFile, PlaneState, mismatch
from incfs.errors import BackingError, ChecksumMismatch, IncfsError, MetadataFull, NoSpace
from incfs.model import MapId, StorageId


class DescribedFile(BlockFile, Protocol):
    """A storage volume whose file C code may use."""

    @property
    def path(self) -> Path:
        """Where the file is, for messages."""

    def descriptor(self) -> tuple[int | tuple[int, ...], int]:
        """Give the file descriptor, or those of a mirror's legs, and the offset of the first block's data."""


class NativePlane(_DataPlane):
    """Block input and output through resident pages, in C: the same as ``dataplane.DataPlane``.

    Concurrency: control methods on the owner thread; the plane's own locks let other native
    threads read and write meanwhile.
    """

    def __init__(self, block_bytes: int, files: Mapping[StorageId, DescribedFile]) -> None:
        super().__init__()  # block_bytes went to __new__
        self._files = files

    def _mismatch_error(
        self, map_id: MapId, virtual_block: int, address: int, found: int, expected: int
    ) -> ChecksumMismatch:
        return mismatch(map_id, virtual_block, address, found=found, expected=expected)

    def _host_error(self, action: str, address: int, host_errno: int) -> IncfsError:
        storage_id, block_index = split_address(address)
        if not storage_id:
            text = f"cannot {action} the journal: {os.strerror(host_errno)}"
            return BackingError(text, action=action) if action == "write" else MetadataFull(text)
        path = self._files[storage_id].path
        if not host_errno:
            return BackingError(
                f"{path} ends before block {block_index}, expected it there",
                path=str(path),
                action="read",
                storage=storage_id,
                block=block_index,
            )
        error = translate(OSError(host_errno, os.strerror(host_errno)), path, action)
        if action == "read" or isinstance(error, NoSpace):
            error.facts.update(storage=storage_id, block=block_index)
        return error

    def inspect(self) -> PlaneState:
        """Copy everything inside, for tests."""
        pages, leases, dropped = self._inspect()
        return PlaneState(
            {(map_id, page_index): (entries, replaced) for map_id, page_index, entries, replaced in pages},
            sorted(leases),
            dropped,
        )
