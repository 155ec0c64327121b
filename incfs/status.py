"""What an open pool reports of itself: facts for people, metrics and debugging.  Reads only, and memory only.

What the hosts say is as old as the last look at them (``hosts``).
"""

from typing import Any

from incfs.blocks import split_address
from incfs.changes import decode_body
from incfs.codec import decode_entries, decode_trail, entry_runs, open_value, unpack
from incfs.dataplane import DataPlane
from incfs.extents import Extent, page_entries
from incfs.journal import Journal
from incfs.model import HOLE, PAGE_BLOCKS, MapId, Storage
from incfs.recovery import UNLIMITED_BLOCKS
from incfs.storage import StorageVolume
from incfs.store import Store
from incfs.superblock import FORMAT_VERSION
from incfs.tables import DATABASES, ReadableTables


def pool_facts(store: Store) -> dict[str, Any]:
    """Report the pool's identity, sizes in bytes, and state."""
    storages = [storage_facts(store, storage) for storage in store.catalog.storages.values()]
    used, free = store.account.used_bytes(), store.account.free_bytes()
    return {
        "uuid": store.superblock.uuid,
        "format_version": FORMAT_VERSION,
        "block_bytes": store.block_bytes,
        "capacity_bytes": used + free,
        "used_bytes": used,
        "free_bytes": free,
        "reserved_bytes": store.account.reserved_bytes(),
        "allocated_bytes": sum(s["allocated_bytes"] for s in storages),
        "freed_bytes": store.pool.freed_blocks * store.block_bytes,
        "silent_storages": [i for i, volume in store.pool.volumes.items() if volume.is_silent],
        "journal_bytes": store.superblock.journal_bytes,
        "journal_used_bytes": store.journal.used_bytes,
        "metadata_used_bytes": store.tables.used_bytes(),
        "metadata_map_bytes": store.tables.map_bytes(),
        "metadata_copy_count": len(store.copies.current),
        "metadata_paths": [str(store.copies.path_of(number)) for number in sorted(store.copies.current)],
        "metadata_warning": _copies_warning(store),
        "sequence": store.durable_sequence,
        "resident_pages": store.plane.page_count,
        "data_plane": "python" if isinstance(store.plane, DataPlane) else "native",
        "overlay_pages": store.log.overlay_pages,
        "epoch": str(store.standing.newest),
        "is_proved": store.mismatch is None and not store.standing.is_unproved,
        "read_only": store.failure is not None,
        "failure": None if store.failure is None else str(store.failure),
    }


def storage_facts(store: Store, storage: Storage) -> dict[str, Any]:
    """Report one storage volume; sizes in bytes."""
    volume = store.pool.volume(storage.id)
    block = store.block_bytes
    unlimited = storage.capacity_blocks >= UNLIMITED_BLOCKS
    return {
        "id": storage.id,
        "uuid": storage.uuid,
        "path": str(store.pool.images.path(storage)),
        "capacity_bytes": None if unlimited else storage.capacity_blocks * block,
        "grown_bytes": volume.grown_blocks * block,
        "used_bytes": volume.live_blocks * block,
        "free_bytes": store.account.room(volume).free_bytes,
        "allocated_bytes": volume.allocated_bytes,
        "host_free_bytes": volume.host_free_bytes,
        "class": storage.storage_class,
        "redundancy": storage.redundancy,
        "legs": _leg_facts(store, storage),
        "changed_bytes": sum(bits.bit_count() for bits in volume.changed.values()) * block,
        "healed_blocks": volume.healed_blocks,
        "state": _state(storage, volume),
    }


def _state(storage: Storage, volume: StorageVolume) -> str:
    if volume.state != "online":
        return volume.state
    if storage.is_evacuating:
        return "evacuating"
    if volume.is_silent:
        return "silent"
    return "degraded" if volume.mirror is not None and volume.mirror.stale else "online"


def _leg_facts(store: Store, storage: Storage) -> list[dict[str, Any]]:
    """Report the legs of a mirror; none for a single image."""
    mirror = store.pool.volume(storage.id).mirror
    if mirror is None:
        return []
    return [
        {
            "leg": number,
            "path": str(path),
            "state": "rebuilding" if number in mirror.rebuilding else "stale" if number in mirror.stale else "online",
        }
        for number, path in enumerate(store.pool.images.leg_paths(storage))
    ]


def copy_facts(store: Store) -> list[dict[str, Any]]:
    """Report every copy of the metadata."""
    copies = store.copies
    if copies.roster is None:
        return [{"copy": copies.here, "path": str(store.directory), "state": "online", "reason": ""}]
    return [
        {
            "copy": place.number,
            "path": str(copies.path_of(place.number)),
            "state": "online" if place.number in copies.current else "stale",
            "reason": "" if place.number in copies.current else copies.reasons.get(place.number, "it is away"),
        }
        for place in copies.roster.places
    ]


def _copies_warning(store: Store) -> str | None:
    """Say when the loss of one disk takes all metadata, but not all data."""
    mirrored = [storage.id for storage in store.catalog.storages.values() if storage.mirrors]
    count = len(store.copies.current)
    if not mirrored or count > 1:
        return None
    return (
        f"storage volume {', '.join(map(str, mirrored))} is mirrored, but the metadata has one copy up to date, in "
        f"{store.copies.path_of(store.copies.current[0])}: the loss of that disk would take the pool; "
        f"`incfs pool metadata add DIR` makes another one"
    )


def extent_document(extent: Extent) -> dict[str, Any]:
    """Describe a stretch of a volume."""
    document: dict[str, Any] = {"offset": extent.offset_bytes, "length": extent.length_bytes}
    if extent.address <= HOLE:
        return {**document, "kind": "zero", "storage": None, "block": None}
    storage_id, block_index = split_address(extent.address)
    return {**document, "kind": "data", "storage": storage_id, "block": block_index}


def dump_tables(tables: ReadableTables) -> list[dict[str, Any]]:
    """Decode every record of the tables.  Any thread."""
    found = []
    with tables.reading() as reader:
        for database in DATABASES:
            for key, value in reader.items(database):
                found.append({"table": database, "key": key.hex(), "value": _plain(database, open_value(key, value))})
    return found


def _plain(database: str, body: bytes) -> Any:
    if database == "space":
        return {"live_blocks": int.from_bytes(body, "little").bit_count()}
    if database == "trail":
        return [list(run[:2]) for run in entry_runs(decode_trail(body))]
    if database in ("map", "inc"):
        return [list(run) for run in entry_runs(decode_entries(body))]
    return _printable(unpack(body))


def dump_page(store: Store, table: MapId, page_index: int) -> list[dict[str, Any]]:
    """Decode the mappings of one page as sealed, its unsealed ones first."""
    store.absorb()
    mappings = []
    for index, (address, crc) in sorted(page_entries(store, table, page_index).items()):
        storage_id, block_index = split_address(address)
        mappings.append(
            {
                "block": page_index * PAGE_BLOCKS + index,
                "kind": "data" if address > HOLE else "zero",
                "storage": storage_id if address > HOLE else None,
                "storage_block": block_index if address > HOLE else None,
                "crc32c": f"{crc:08x}",
            }
        )
    return mappings


def dump_journal(journal: Journal) -> list[dict[str, Any]]:
    """Decode the records of the current journal segment.  Any thread."""
    found = []
    for record in journal.records():
        changes, data, _ = decode_body(record.body)
        found.append(
            {
                "sequence": record.sequence,
                "offset_bytes": record.offset_bytes,
                "data_bytes": len(data),
                "changes": [_printable(change) for change in changes],
            }
        )
    return found


def _printable(value: Any) -> Any:
    """Give bytes as hexadecimal text."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {key: _printable(item) for key, item in value.items()}
    return value
