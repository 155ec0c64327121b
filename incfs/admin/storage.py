"""Verbs of storage volumes."""

from typing import TYPE_CHECKING, Final

from incfs.admin.verb import Verb
from incfs.documents import Document

if TYPE_CHECKING:
    from incfs.service import Service


async def storage_add(
    service: "Service",
    *,
    path: str,
    capacity_bytes: int | None = None,
    storage_class: str = "",
    redundancy: str = "none",
) -> Document:
    """Create an image file at ``path`` and let the pool allocate from it."""
    storage = await service.add_storage(
        path,
        capacity_bytes=capacity_bytes,
        storage_class=storage_class,
        redundancy=redundancy,
    )
    return {"storage": storage}


async def storage_list(service: "Service") -> Document:
    """Report every storage volume."""
    return {"storages": service.storages()}


VERBS: Final = {
    "storage.add": Verb(storage_add, is_read_only=False),
    "storage.list": Verb(storage_list, is_read_only=True),
}
