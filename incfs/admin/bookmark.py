"""Verbs of bookmarks."""

from typing import TYPE_CHECKING, Final

from incfs.admin.verb import Verb
from incfs.documents import Document, bookmark_documents
from incfs.errors import UsageError
from incfs.targets import find_snapshot, find_volume, split_bookmark

if TYPE_CHECKING:
    from incfs.service import Service


async def bookmark_create(service: "Service", *, target: str, name: str) -> Document:
    """Let increments start from a snapshot also when it is gone; ``name`` is ``MARK`` or ``VOL#MARK``."""
    volume, taken = find_snapshot(service, target)
    if "#" in name:
        owner, name = split_bookmark(name)
        if find_volume(service, owner).id != volume.id:
            raise UsageError(f"a bookmark of {volume.name}@{taken.name} cannot be of {owner}")
    made = await service.branches.bookmark(taken, name)
    found = [document for document in bookmark_documents(service, volume, [made]) if document["bookmark"] == name]
    return {"bookmark": found[0]}


async def bookmark_list(service: "Service", *, volume: str | None = None) -> Document:
    """Report the bookmarks of one volume or of all, oldest first."""
    volumes = service.volumes() if volume is None else [find_volume(service, volume)]
    return {
        "bookmarks": [
            document
            for owner in volumes
            for document in bookmark_documents(service, owner, service.branches.bookmarks(owner.id))
        ]
    }


async def bookmark_remove(service: "Service", *, targets: list[str], dry_run: bool = False) -> Document:
    """Forget bookmarks, all or none; ``dry_run`` only says which."""
    named = [split_bookmark(target) for target in targets]
    doomed = [(find_volume(service, volume).id, name) for volume, name in named]
    if dry_run:
        service.branches.require_forgettable(doomed)
        return {"removed": [], "would_remove": targets}
    await service.branches.remove_bookmarks(doomed)
    return {"removed": targets}


VERBS: Final = {
    "bookmark.create": Verb(bookmark_create, is_read_only=False),
    "bookmark.list": Verb(bookmark_list, is_read_only=True),
    "bookmark.remove": Verb(bookmark_remove, is_read_only=False),
}
