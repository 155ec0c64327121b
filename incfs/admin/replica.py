"""Verbs of replicas: where volumes are replicated to, and the runs that do it."""

from typing import TYPE_CHECKING, Final

from incfs import replicator
from incfs.admin.verb import Verb, in_bytes
from incfs.channel import Progress
from incfs.documents import Document, volume_document
from incfs.model import Volume
from incfs.replication import DEFAULT_PROGRAM, ReplicaConfig
from incfs.targets import find_volume
from incfs.units import format_time

if TYPE_CHECKING:
    from incfs.service import Service


async def replica_add(
    service: "Service",
    *,
    volumes: list[str],
    target: str,
    name: str | None = None,
    names: list[str] | None = None,
    program: str = DEFAULT_PROGRAM,
) -> Document:
    """Keep where volumes are replicated to, several as a group."""
    found = [find_volume(service, volume) for volume in volumes]
    config = await replicator.add(
        service,
        found,
        target,
        name=name or found[0].name,
        names=names or [volume.name for volume in found],
        program=program,
    )
    return {"replica": _document(service, config)}


async def replica_list(service: "Service", *, name: str | None = None) -> Document:
    """Report the replicas, or one."""
    found = replicator.list_replicas(service) if name is None else [replicator.find_replica(service, name)]
    return {"replicas": [_document(service, config) for _, config in found]}


def _document(service: "Service", config: ReplicaConfig) -> Document:
    known = {volume.uuid: volume for volume in service.volumes()}
    volumes: list[Volume] = [known[uuid] for uuid in config.volumes if uuid in known]
    return {
        "name": config.name,
        "volumes": [volume.name for volume in volumes],
        "target": config.target,
        "names": config.names,
        "last_success": format_time(config.last_success_ns) if config.last_success_ns else None,
        "last_error": config.last_error or None,
        "common": config.common,
    }


async def replica_run(
    service: "Service", *, names: list[str], rate_bytes: int | None = None, progress: Progress
) -> Document:
    """Bring replicas up to date, all of them without names; the first that fails ends it."""
    chosen = names or [config.name for _, config in replicator.list_replicas(service)]
    runs = [await replicator.run(service, name, rate_bytes=rate_bytes, progress=in_bytes(progress)) for name in chosen]
    return {"runs": runs}


async def replica_remove(service: "Service", *, name: str) -> Document:
    """Forget a replica; the target stays as it is."""
    await replicator.remove(service, name)
    return {}


async def replica_facts(service: "Service", *, names: list[str]) -> Document:
    """Report what this pool, as a target, has of volumes."""
    return {"volumes": replicator.target_facts(service, names)}


async def replica_promote(service: "Service", *, volume: str) -> Document:
    """Make a replica an ordinary volume."""
    return {"volume": volume_document(service, await service.transfers.set_replica(volume, is_replica=False))}


async def replica_demote(service: "Service", *, volume: str) -> Document:
    """Make a volume one that changes by streams only."""
    return {"volume": volume_document(service, await service.transfers.set_replica(volume, is_replica=True))}


VERBS: Final = {
    "replica.add": Verb(replica_add, is_read_only=False),
    "replica.list": Verb(replica_list, is_read_only=True),
    "replica.run": Verb(replica_run, is_read_only=False, can_stop=True),
    "replica.remove": Verb(replica_remove, is_read_only=False),
    "replica.facts": Verb(replica_facts, is_read_only=True),
    "replica.promote": Verb(replica_promote, is_read_only=False),
    "replica.demote": Verb(replica_demote, is_read_only=False),
}
