"""How an open pool behaves: values that are given when it is opened, and stored nowhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from incfs.model import StorageId
from incfs.planes import PlaneKind, default_kind
from incfs.pool import DEFAULT_EXTEND_BYTES


@dataclass(frozen=True, slots=True)
class Salvage:
    """How to open a copy of a damaged pool's metadata, to save what can be saved."""

    images_home: Path
    """What relative paths of images start from."""
    image_paths: Mapping[StorageId, Path]
    """Images that are not where their records say."""
    cut_journal: bool
    """Take the journal up to its first damage."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an open pool behaves; nothing of it is stored."""

    commit_interval_s: float = 5.0
    """Commit without being asked this often, so that a crash loses little."""
    checkpoint_interval_s: float = 30.0
    page_cache_pages: int = 8192
    """Resident map pages, about 7 KiB of memory each."""
    small_commit_bytes: int = 65536
    """Up to this much data goes into the journal record instead of flushing the images."""
    overlay_pages: int = 4096
    """Changed map pages in memory that trigger a checkpoint."""
    extend_bytes: int = DEFAULT_EXTEND_BYTES
    """Step in which images grow."""
    host_reserve_bytes: int = 16 << 20
    """Space that growth leaves free on an image's host filesystem."""
    reserve_blocks: int = 16
    """Free blocks that ordinary writes leave: for discards of parts of blocks in a full pool."""
    data_plane: PlaneKind = field(default_factory=default_kind)
    """Who moves the bytes: ``native`` (C), ``python``, or ``auto``: native where it was built."""
    dump_interval_s: float | None = 86400.0
    """Write the metadata beside the images at the first checkpoint after so many seconds; None: never."""
    degraded: bool = False
    """Open also when an image is missing, cut off or another one: read-only, the rest can be read."""
    force_older: bool = False
    """Open although directory and images are of different times: what is newer is lost (I14)."""
    salvage: Salvage | None = None
