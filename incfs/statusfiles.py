"""The files in ``MNT/.incfs``: made anew each time one is opened, from what the service has in memory."""

import json
from typing import TYPE_CHECKING, Final

from incfs import metrics

if TYPE_CHECKING:
    from incfs.service import Service

OUTPUT_VERSION: Final = 1


def render(name: str, service: "Service") -> bytes:
    """Return the contents of a status file now."""
    text = render_stats(service) if name == "stats.json" else metrics.render(service)
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
