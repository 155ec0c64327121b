"""The files in ``MNT/.incfs``: made anew each time one is opened, from what the service has in memory."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from incfs import fusext
from incfs.boundary import BUCKETS_S, Histogram

if TYPE_CHECKING:
    from incfs.service import Service

OUTPUT_VERSION: Final = 1

_POOL_GAUGES: Final = {
    "capacity_bytes": "Bytes that the storage volumes may hold together.",
    "used_bytes": "Bytes in blocks that are in use.",
    "free_bytes": "Bytes in blocks that are free.",
    "allocated_bytes": "Bytes that the image files occupy on the host.",
}

_STORAGE_GAUGES: Final = {
    "capacity_bytes": "Bytes that a storage volume may grow to, where it has a limit.",
    "used_bytes": "Bytes in blocks of a storage volume that are in use.",
    "free_bytes": "Bytes that a storage volume can still take, growth included.",
    "host_free_bytes": "Bytes that the host filesystem of a storage volume has left.",
    "low_water_bytes": "A storage volume with fewer free bytes is at low water.",
    "is_low": "1 at low water.",
    "full_in_seconds": "When a storage volume is full if it goes on as in the last hour.",
}


def render(name: str, service: "Service", durations: Mapping[str, Histogram]) -> bytes:
    """Return the contents of a status file now."""
    text = render_stats(service) if name == "stats.json" else render_metrics(service, durations)
    return text.encode()


def render_stats(service: "Service") -> str:
    """Return ``stats.json``: the pool's facts and each volume, in bytes."""
    volumes = [
        {
            "name": volume.name,
            "uuid": volume.uuid,
            "size_bytes": volume.size_bytes,
            "mapped_bytes": service.mapped_bytes(volume.map_id),
            "snapshots": len(service.snapshots(volume.id)),
        }
        for volume in service.volumes()
    ]
    document = {"output_version": OUTPUT_VERSION, "pool": service.facts(), "volumes": volumes}
    return json.dumps(document, indent=2, default=str) + "\n"


def render_metrics(service: "Service", durations: Mapping[str, Histogram]) -> str:
    """Return ``metrics`` in Prometheus' text format."""
    facts = service.facts()
    volumes = service.volumes()
    lines: list[str] = []
    for key, help_text in _POOL_GAUGES.items():
        if key in facts:
            lines += _family(f"incfs_pool_{key}", "gauge", help_text, [("", facts[key])])
    lines += _family("incfs_pool_read_only", "gauge", "1 in the failsafe.", [("", int(bool(facts["read_only"])))])
    lines += _family(
        "incfs_volume_size_bytes",
        "gauge",
        "Size of a volume.",
        [(_label("volume", v.name), v.size_bytes) for v in volumes],
    )
    lines += _family(
        "incfs_volume_mapped_bytes",
        "gauge",
        "Bytes of a volume's current contents that occupy storage.",
        [(_label("volume", v.name), service.mapped_bytes(v.map_id)) for v in volumes],
    )
    lines += _storage_families(service.storages())
    lines += _family(
        "incfs_events_total",
        "counter",
        "Events since the pool was opened, by kind.",
        [(_label("kind", kind), count) for kind, count in sorted(service.event_counts().items())],
    )
    lines += _operations(durations)
    if counts := fusext.hot_counts():
        samples = [(_label("kind", kind), count) for kind, count in counts.items()]
        lines += _family(
            "incfs_data_plane_total", "counter", "What hot threads answered past Python, and handed to it.", samples
        )
    return "\n".join(lines) + "\n"


def _storage_families(storages: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for key, help_text in _STORAGE_GAUGES.items():
        samples = [(_label("storage", str(s["id"])), int(s[key])) for s in storages if s[key] is not None]
        lines += _family(f"incfs_storage_{key}", "gauge", help_text, samples)
    return lines


def _operations(durations: Mapping[str, Histogram]) -> list[str]:
    name = "incfs_fuse_op_duration_seconds"
    lines = [f"# HELP {name} Time that requests of the kernel took, by operation.", f"# TYPE {name} histogram"]
    for operation, histogram in sorted(durations.items()):
        total = 0
        for bound, count in zip((*BUCKETS_S, "+Inf"), histogram.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{op="{operation}",le="{bound}"}} {total}')
        lines.append(f'{name}_sum{{op="{operation}"}} {histogram.sum_s:.6f}')
        lines.append(f'{name}_count{{op="{operation}"}} {total}')
    return lines


def _family(name: str, kind: str, help_text: str, samples: Iterable[tuple[str, Any]]) -> list[str]:
    return [
        f"# HELP {name} {help_text}",
        f"# TYPE {name} {kind}",
        *(f"{name}{label} {value}" for label, value in samples),
    ]


def _label(key: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{{{key}="{escaped}"}}'
