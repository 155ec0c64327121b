"""What copies from raw images and copies to them share."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from incfs.service import Service

Progress = Callable[[int, int, str], None]

CHUNK_BYTES: Final = 1 << 20


def new_snapshot_name(what: str) -> str:
    """Name a snapshot after the time."""
    return time.strftime(f"{what}-%Y%m%dT%H%M%SZ", time.gmtime())


def images_of(service: "Service") -> list[Path]:
    """List the pool's image files, those of mirrors' legs included."""
    facts = service.storages()
    return [Path(part["path"]) for storage in facts for part in (storage, *storage["legs"])]
