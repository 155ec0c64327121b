"""Verbs of storage volumes."""

from typing import TYPE_CHECKING, Final

from incfs.admin.verb import Verb, plan_document
from incfs.channel import Progress
from incfs.documents import Document
from incfs.jobs import Request
from incfs.model import StorageId

if TYPE_CHECKING:
    from incfs.service import Service


async def storage_add(
    service: "Service",
    *,
    path: str,
    capacity_bytes: int | None = None,
    storage_class: str = "",
    redundancy: str = "none",
    mirrors: list[str] | None = None,
    force: bool = False,
) -> Document:
    """Create an image file at ``path`` and let the pool allocate from it."""
    storage = await service.upkeep.add_storage(
        path,
        capacity_bytes=capacity_bytes,
        storage_class=storage_class,
        redundancy=redundancy,
        mirrors=mirrors or [],
        force=force,
    )
    return {"storage": storage, "metadata_warning": service.facts()["metadata_warning"] if mirrors else None}


async def storage_list(service: "Service") -> Document:
    """Report every storage volume."""
    await service.look_at_hosts()
    return {"storages": service.storages()}


async def storage_evacuate(
    service: "Service", *, storage: int, rate_bytes: int | None = None, dry_run: bool = False, progress: Progress
) -> Document:
    """Move everything off a storage volume, which gets nothing new from now on; ``dry_run`` only says how much."""
    if dry_run:
        return plan_document(service, service.upkeep.plan_evacuation(StorageId(storage)))
    request = _request("storage.evacuate", storage, rate_bytes=rate_bytes)
    async with service.jobs.under_way(request, progress) as tell:
        report = await service.upkeep.evacuate(StorageId(storage), rate_bytes=rate_bytes, progress=tell)
    return {"move": report.to_dict(service.block_bytes)}


async def storage_resilver(
    service: "Service", *, storage: int, rate_bytes: int | None = None, progress: Progress
) -> Document:
    """Bring the stale legs of a mirror up to date."""
    request = _request("storage.resilver", storage, rate_bytes=rate_bytes)
    async with service.jobs.under_way(request, progress) as tell:
        report = await service.upkeep.mirrors.resilver(StorageId(storage), rate_bytes=rate_bytes, progress=tell)
    return {"resilver": report.to_dict(service.block_bytes)}


async def storage_replace(service: "Service", *, storage: int, leg: int, path: str) -> Document:
    """Let an empty file take the place of a leg; a resilver fills it."""
    await service.upkeep.mirrors.replace_leg(StorageId(storage), leg, path)
    return {}


async def storage_keep(service: "Service", *, storage: int) -> Document:
    """Let a storage volume that was being evacuated get new data again."""
    for job in service.jobs.about(f"storage {storage}"):
        if job.request.verb == "storage.evacuate":
            service.jobs.stop(job.number)
    await service.upkeep.cancel_evacuation(StorageId(storage))
    return {}


async def storage_remove(
    service: "Service", *, storage: int, left: list[str] | None = None, dry_run: bool = False
) -> Document:
    """Take an empty storage volume out of the pool and delete its image.

    Args:
        service: The pool.
        storage: Which one.
        left: Image files of one whose removal had been cut off, after its UUID.
        dry_run: Only name its image files.
    """
    if dry_run:
        return {"images": service.upkeep.plan_removal(StorageId(storage))}
    if left and left[0] not in [known["uuid"] for known in service.storages()]:
        await service.upkeep.delete_left(left[0], left[1:])
        return {"images": left[1:]}
    request = _request("storage.remove", storage, left=service.upkeep.image_files(StorageId(storage)))
    async with service.jobs.under_way(request):
        await service.upkeep.remove_storage(StorageId(storage))
    return {"images": request.arguments["left"][1:]}


def _request(verb: str, storage: int, **arguments: int | list[str] | None) -> Request:
    return Request(verb, f"storage {storage}", {"storage": storage, **arguments})


VERBS: Final = {
    "storage.evacuate": Verb(storage_evacuate, is_read_only=False, can_stop=True),
    "storage.resilver": Verb(storage_resilver, is_read_only=False, can_stop=True),
    "storage.replace": Verb(storage_replace, is_read_only=False),
    "storage.keep": Verb(storage_keep, is_read_only=False),
    "storage.remove": Verb(storage_remove, is_read_only=False),
    "storage.add": Verb(storage_add, is_read_only=False),
    "storage.list": Verb(storage_list, is_read_only=True),
}
