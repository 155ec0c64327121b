"""Verbs of the pool."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from incfs import fusext
from incfs.admin.verb import Verb, plan_document
from incfs.channel import Progress
from incfs.documents import Document
from incfs.errors import UsageError
from incfs.health import Health, judge
from incfs.histogram import merge
from incfs.jobs import Request

if TYPE_CHECKING:
    from incfs.service import Service


async def pool_show(service: "Service") -> Document:
    """Report the pool's facts and how much it holds."""
    await service.look_at_hosts()
    volumes, facts = service.volumes(), service.facts()
    counts = {
        "health": _health(service, facts).to_dict(),
        "directory": str(service.directory),
        "mounted": service.mounted is not None,
        "volume_count": len(volumes),
        "snapshot_count": sum(len(service.snapshots(volume.id)) for volume in volumes),
    }
    return {"pool": {**counts, **facts}}


async def pool_status(service: "Service") -> Document:
    """Judge the pool."""
    await service.look_at_hosts()
    return {"health": _health(service, service.facts()).to_dict()}


def _health(service: "Service", facts: Document) -> Health:
    return judge(facts, service.storages(), service.metadata_copies(), service.events())


async def pool_activity(service: "Service") -> Document:
    """Report counters that rise, and what grows: two of these make rates."""
    operations = {
        name: {"count": sum(histogram.counts), "sum_s": histogram.sum_s}
        for name, histogram in merge(service.durations, fusext.hot_durations()).items()
    }
    volumes = [
        {"name": v.name, "uuid": v.uuid, "mapped_bytes": service.mapped_bytes(v.map_id)} for v in service.volumes()
    ]
    facts = {
        "uptime_s": trio.current_time() - service.opened_s,
        "operations": operations,
        "data_plane": fusext.hot_counts(),
    }
    return {"activity": {**facts, "pool": service.facts(), "volumes": volumes}}


async def pool_check(service: "Service", *, data: bool = False, progress: Progress) -> Document:
    """Prove from the tables that each block has one owner; with ``data`` read every block."""
    report = await service.inspection.check(data, lambda done, total: progress(done, total, "blocks"))
    return {"check": report.to_dict()}


async def pool_dump(service: "Service", *, path: str) -> Document:
    """Write the metadata as text to a file that the caller names absolutely."""
    target = Path(path)
    if not target.is_absolute():
        raise UsageError(f"the dump's path must be absolute, not {path!r}")
    return {"dump": {"path": path, "length_bytes": await service.inspection.dump(target)}}


async def pool_scrub(
    service: "Service", *, rate_bytes: int | None = None, restart: bool = False, progress: Progress
) -> Document:
    """Verify every copy of every block on disk, and heal what can be."""
    async with service.jobs.under_way(Request("pool.scrub", "pool", {"rate_bytes": rate_bytes}), progress) as tell:
        await service.copies.scrub()
        report = await service.upkeep.mirrors.scrub(rate_bytes=rate_bytes, restart=restart, progress=tell)
    return {"scrub": report}


async def pool_balance(
    service: "Service", *, rate_bytes: int | None = None, dry_run: bool = False, progress: Progress
) -> Document:
    """Move blocks from the fullest storage volumes to the emptiest; ``dry_run`` only says how much."""
    if dry_run:
        return plan_document(service, service.upkeep.plan_balance())
    async with service.jobs.under_way(Request("pool.balance", "pool", {"rate_bytes": rate_bytes}), progress) as tell:
        report = await service.upkeep.balance(rate_bytes=rate_bytes, progress=tell)
    return {"move": report.to_dict(service.block_bytes)}


async def metadata_list(service: "Service") -> Document:
    """List the directories that hold the metadata."""
    return {"copies": service.metadata_copies()}


async def metadata_add(service: "Service", *, path: str, force: bool = False) -> Document:
    """Have the metadata in a further directory, or bring the copy in it up to date."""
    await service.copies.add(_absolute(path), force=force)
    return {"copies": service.metadata_copies()}


async def metadata_remove(service: "Service", *, path: str) -> Document:
    """Have the metadata in a directory no more."""
    await service.copies.remove(_absolute(path))
    return {"copies": service.metadata_copies()}


def _absolute(path: str) -> Path:
    if not Path(path).is_absolute():
        raise UsageError(f"a directory's path must be absolute, not {path!r}")
    return Path(path)


async def pool_jobs(service: "Service") -> Document:
    """List the long jobs that are under way."""
    return {"jobs": service.jobs.documents()}


async def pool_stop(service: "Service", *, job: int) -> Document:
    """Stop a job; what it did stays done."""
    service.jobs.stop(job)
    return {}


VERBS: Final = {
    "pool.scrub": Verb(pool_scrub, is_read_only=False, can_stop=True),
    "pool.balance": Verb(pool_balance, is_read_only=False, can_stop=True),
    "pool.jobs": Verb(pool_jobs, is_read_only=True),
    "pool.stop": Verb(pool_stop, is_read_only=False),
    "pool.status": Verb(pool_status, is_read_only=True),
    "pool.show": Verb(pool_show, is_read_only=True),
    "pool.activity": Verb(pool_activity, is_read_only=True),
    "pool.metadata.list": Verb(metadata_list, is_read_only=True),
    "pool.metadata.add": Verb(metadata_add, is_read_only=False),
    "pool.metadata.remove": Verb(metadata_remove, is_read_only=False),
    "pool.check": Verb(pool_check, is_read_only=True),
    "pool.dump": Verb(pool_dump, is_read_only=True),
}
