"""What a pool tells to Prometheus, as text: sizes, times of operations, events, what the policy did.

Made anew each time, from what the service has in memory.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from incfs import fusext
from incfs.histogram import BUCKETS_S, merge
from incfs.replication import ReplicaConfig

if TYPE_CHECKING:
    from incfs.service import Service

Sample = tuple[str, Any]
"""Labels in braces, or nothing, and a value."""

_POOL_GAUGES: Final = {
    "capacity_bytes": "Bytes that the storage volumes may hold together.",
    "used_bytes": "Bytes in blocks that are in use.",
    "free_bytes": "Bytes in blocks that are free.",
    "allocated_bytes": "Bytes that the image files occupy on the host.",
    "freed_bytes": "Bytes in blocks that wait for a checkpoint to be free.",
    "journal_bytes": "Size of a journal segment.",
    "journal_used_bytes": "Bytes of the journal segment that no checkpoint has folded in.",
}

_STORAGE_GAUGES: Final = {
    "capacity_bytes": "Bytes that a storage volume may grow to, where it has a limit.",
    "used_bytes": "Bytes in blocks of a storage volume that are in use.",
    "free_bytes": "Bytes that a storage volume can still take, growth included.",
    "host_free_bytes": "Bytes that the host filesystem of a storage volume has left.",
    "low_water_bytes": "A storage volume with fewer free bytes is at low water.",
    "is_low": "1 at low water.",
    "healed_blocks": "Blocks of a mirror's legs that were wrong and were rewritten, since the pool was opened.",
    "changed_bytes": "Bytes that stale legs of a mirror lack.",
    "full_in_seconds": "When a storage volume is full if it goes on as in the last hour.",
}

_METADATA_GAUGES: Final = {
    "metadata_map_bytes": (
        "incfs_metadata_map_size_bytes",
        "Bytes that the metadata may take before its map grows.",
    ),
    "metadata_used_bytes": ("incfs_metadata_map_used_bytes", "Bytes of the metadata's map in use."),
}


def render(service: "Service") -> str:
    """Return everything in Prometheus' text format."""
    parts = (_pool, _volumes, _storages, _copies, _events, _policy, _replicas, _operations, _hot)
    return "\n".join(line for part in parts for line in part(service)) + "\n"


def _pool(service: "Service") -> Iterator[str]:
    facts = service.facts()
    for key, text in _POOL_GAUGES.items():
        yield from _family(f"incfs_pool_{key}", "gauge", text, [("", facts[key])])
    for key, (name, text) in _METADATA_GAUGES.items():
        yield from _family(name, "gauge", text, [("", facts[key])])
    yield from _family("incfs_pool_read_only", "gauge", "1 in the failsafe.", [("", int(facts["read_only"]))])


def _volumes(service: "Service") -> Iterator[str]:
    volumes = [(_label("volume", v.name), v, service.snapshots(v.id)) for v in service.volumes()]
    block = service.block_bytes
    families: tuple[tuple[str, str, list[Sample]], ...] = (
        ("size_bytes", "Size of a volume.", [(label, v.size_bytes) for label, v, _ in volumes]),
        (
            "mapped_bytes",
            "Bytes of a volume's current contents that occupy storage.",
            [(label, service.mapped_bytes(v.map_id)) for label, v, _ in volumes],
        ),
        (
            "held_bytes",
            "Bytes that only the snapshots of a volume hold.",
            [(label, sum(s.held_blocks for s in taken) * block) for label, _, taken in volumes],
        ),
        ("snapshots", "Snapshots of a volume.", [(label, len(taken)) for label, _, taken in volumes]),
        (
            "newest_snapshot_timestamp_seconds",
            "When the newest snapshot of a volume was taken.",
            [(label, f"{taken[-1].created_ns / 1e9:.3f}") for label, _, taken in volumes if taken],
        ),
    )
    for key, text, samples in families:
        yield from _family(f"incfs_volume_{key}", "gauge", text, samples)


def _storages(service: "Service") -> Iterator[str]:
    storages = service.storages()
    for key, text in _STORAGE_GAUGES.items():
        samples = [(_label("storage", str(s["id"])), int(s[key])) for s in storages if s[key] is not None]
        yield from _family(f"incfs_storage_{key}", "gauge", text, samples)
    online = [
        (_label("storage", str(s["id"])), int(s["state"] in ("online", "degraded", "evacuating"))) for s in storages
    ]
    yield from _family("incfs_storage_is_online", "gauge", "1 for a storage volume whose image is there.", online)


def _copies(service: "Service") -> Iterator[str]:
    text = "Copies of blocks that did not match their checksum, since the pool was opened."
    yield from _family("incfs_checksum_errors_total", "counter", text, [("", service.inspection.checksum_errors())])
    ended = service.upkeep.mirrors.scrub_ended_ns / 1e9
    if ended:
        text = "When the last whole scrub ended."
        yield from _family("incfs_scrub_last_end_timestamp_seconds", "gauge", text, [("", ended)])


def _events(service: "Service") -> Iterator[str]:
    samples = [(_label("kind", kind), count) for kind, count in sorted(service.inspection.event_counts().items())]
    yield from _family("incfs_events_total", "counter", "Events since the pool was opened, by kind.", samples)


def _policy(service: "Service") -> Iterator[str]:
    runs = [(_label("task", task), f"{when / 1e9:.3f}") for task, when in sorted(service.policies.stored.runs.items())]
    text = "When a task of the policy last ran; clock: when the policy was last looked at."
    yield from _family("incfs_policy_run_timestamp_seconds", "gauge", text, runs)


def _replicas(service: "Service") -> Iterator[str]:
    known = [ReplicaConfig.from_text(text) for volume in service.volumes() for text in volume.replicas.values()]
    samples = [(_label("replica", r.name), f"{r.last_success_ns / 1e9:.3f}") for r in known if r.last_success_ns]
    text = "When a replica was last brought up to date."
    yield from _family("incfs_replica_last_success_timestamp_seconds", "gauge", text, samples)


def _operations(service: "Service") -> Iterator[str]:
    name = "incfs_fuse_op_duration_seconds"
    yield f"# HELP {name} Time that requests of the kernel took, by operation."
    yield f"# TYPE {name} histogram"
    for operation, histogram in merge(service.durations, fusext.hot_durations()).items():
        total = 0
        for bound, count in zip((*BUCKETS_S, "+Inf"), histogram.counts, strict=True):
            total += count
            yield f'{name}_bucket{{op="{operation}",le="{bound}"}} {total}'
        yield f'{name}_sum{{op="{operation}"}} {histogram.sum_s:.6f}'
        yield f'{name}_count{{op="{operation}"}} {total}'


def _hot(service: "Service") -> Iterator[str]:
    del service
    if counts := fusext.hot_counts():
        samples = [(_label("kind", kind), count) for kind, count in counts.items()]
        text = "What hot threads answered past Python, and handed to it."
        yield from _family("incfs_data_plane_total", "counter", text, samples)


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for label, value in samples:
        yield f"{name}{label} {value}"


def _label(key: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{{{key}="{escaped}"}}'
