"""The choice between the two data planes."""

import os
from collections.abc import Mapping
from typing import Final, Literal, cast

from incfs.backing import Backing
from incfs.dataplane import DataPlane
from incfs.errors import NotSupported, UsageError
from incfs.model import StorageId

try:
    from incfs.nativeplane import DescribedFile, NativePlane
except ImportError:  # an installation without a compiler
    HAS_NATIVE = False
else:
    HAS_NATIVE = True

PlaneKind = Literal["auto", "native", "python"]
PLANE_KINDS: Final = ("auto", "native", "python")


def default_kind() -> PlaneKind:
    """Return what the environment's INCFS_DATA_PLANE asks for, else ``auto``.

    Raises:
        UsageError: It asks for something that does not exist.
    """
    kind = os.environ.get("INCFS_DATA_PLANE", "auto")
    if kind not in PLANE_KINDS:
        raise UsageError(f"INCFS_DATA_PLANE is {kind!r}; it is one of {', '.join(PLANE_KINDS)}")
    return cast("PlaneKind", kind)


def make_plane(
    kind: PlaneKind, block_bytes: int, files: "Mapping[StorageId, DescribedFile]", backing: Backing
) -> "DataPlane | NativePlane":
    """Make the data plane of a pool.

    A backing that watches or injects faults must be handed every operation, so it always gets
    the Python one.

    Raises:
        NotSupported: The native one is asked for and was not built.
    """
    if kind == "native" and not HAS_NATIVE:
        raise NotSupported("this incfs was installed without its C data plane; mount with data_plane=python")
    if kind == "python" or not HAS_NATIVE or type(backing) is not Backing:
        return DataPlane(block_bytes, files)
    return NativePlane(block_bytes, files)
