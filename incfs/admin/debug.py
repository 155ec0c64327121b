"""Verbs for looking inside."""

from typing import TYPE_CHECKING, Final

from incfs.admin.verb import Verb
from incfs.documents import Document
from incfs.errors import UsageError
from incfs.model import MAX_VOLUME_BYTES
from incfs.targets import find_table

if TYPE_CHECKING:
    from incfs.service import Service


async def debug_dump(service: "Service") -> Document:
    """Report every record of the tables."""
    return {"records": await service.inspection.debug_dump()}


async def debug_map(service: "Service", *, target: str, page_index: int) -> Document:
    """Report the mappings of one map page."""
    if not 0 <= page_index < MAX_VOLUME_BYTES:
        raise UsageError(f"there is no page {page_index}")
    volume, snapshot = find_table(service, target)
    table = volume if snapshot is None else snapshot
    mappings = await service.inspection.debug_map(table.map_id, page_index)
    return {"target": target, "page_index": page_index, "mappings": mappings}


async def debug_log(service: "Service") -> Document:
    """Report the journal's records that no checkpoint has folded in yet."""
    return {"records": await service.inspection.debug_journal()}


VERBS: Final = {
    "debug.dump": Verb(debug_dump, is_read_only=True),
    "debug.map": Verb(debug_map, is_read_only=True),
    "debug.log": Verb(debug_log, is_read_only=True),
}
