"""The host really refuses: a file-size limit and a full filesystem, under both data planes.

These reach what the seam cannot: the C data plane's own writes, ``fallocate``, and LMDB's commit.
"""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from incfs import volume as volumes
from incfs.checkpoint import Checkpoint
from incfs.errors import BackingError, IncfsError, PoolReadOnly
from incfs.image import DATA_OFFSET_BYTES
from incfs.model import StorageId
from incfs.options import Options
from incfs.planes import HAS_NATIVE, PlaneKind
from incfs.recovery import MIN_JOURNAL_BYTES, create_pool
from incfs.space import Space
from incfs.store import Store
from tests.support import pools
from tests.support.figures import FIGURES
from tests.support.recorder import picture
from tests.support.watched import Watched, workload

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PLANES: list[PlaneKind] = [kind for kind in get_args(PlaneKind) if kind != "auto" and (HAS_NATIVE or kind != "native")]
SPARE_PAGES = (0, 1, 2, 3, 5, 8, 13, 256, 258, 260, 262, 265, 270, 280, 300, 350)
"""Free pages of a full filesystem: around none, and around what a checkpoint wants to have."""


class AnyFault:
    """The host may refuse at any time."""

    met = 1
    undisturbed = staticmethod(nullcontext)


class Points:
    """The commit points of a pool; those from the last that was acknowledged on may be found afterwards."""

    def __init__(self, store: Store) -> None:
        self.allowed = [picture(store)]
        begin_commit, end_commit = store.begin_commit, store.end_commit

        def begin() -> object:
            commit = begin_commit()
            if commit is not None:
                self.allowed.append(picture(store))
            return commit

        def end(commit: object) -> None:
            end_commit(commit)  # type: ignore[arg-type]
            del self.allowed[:-1]

        store.begin_commit = begin  # type: ignore[method-assign, assignment]
        store.end_commit = end  # type: ignore[method-assign]


@contextmanager
def files_up_to(length_bytes: int) -> Iterator[None]:
    """Let this process write no file beyond that length; Python ignores SIGXFSZ, so it is EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_limited(pool: Path, options: Options, limit: Callable[[], AbstractContextManager[None]]) -> IncfsError | None:
    """Run the workload under a limit; without it, everything acknowledged is there again."""
    store = pools.open_tiny(pool, options)
    points = Points(store)
    watched = Watched(store, AnyFault())
    with limit():
        workload(watched)
        failure = store.failure
        if failure is not None:
            for refused in (store.commit, store.checkpoint):
                with pytest.raises(PoolReadOnly):
                    refused()
    watched.compare()
    store = pools.crash(store)
    assert picture(store) in points.allowed, "what an fsync acknowledged is lost"
    pools.check_clean(store)
    store.close()
    FIGURES["limits of the host"] += 1
    return failure


@pytest.mark.parametrize("plane", PLANES)
def test_a_file_that_may_not_grow_further(pool_home: Path, monkeypatch: pytest.MonkeyPatch, plane: PlaneKind) -> None:
    """Image, tables and growth meet the limit, whichever comes first: that is a full host, and no failure."""
    refused, note_refused = list[int](), Space.note_refused

    def note(space: Space, storage_id: StorageId) -> None:
        refused.append(storage_id)
        note_refused(space, storage_id)

    monkeypatch.setattr(Space, "note_refused", note)
    options = replace(pools.tiny_options(small_commit_bytes=500, extend_bytes=65536), data_plane=plane)
    for number, length in enumerate(range(DATA_OFFSET_BYTES, DATA_OFFSET_BYTES + 8192, 512)):
        pool = pools.make_pool(pool_home / f"{number}")
        make_sparse(next(pool.glob("images/*")))
        failure = run_limited(pool, options, lambda length=length: files_up_to(length))  # type: ignore[misc]
        assert failure is None, failure
    assert len(refused) >= 8


@pytest.mark.parametrize("plane", PLANES)
def test_lmdb_cannot_write_its_pages(pool_home: Path, monkeypatch: pytest.MonkeyPatch, plane: PlaneKind) -> None:
    """Room was found for the tables, and yet their transaction fails: the journal has everything."""
    options = replace(pools.tiny_options(), data_plane=plane)
    store = pools.open_tiny(pools.make_pool(pool_home), options)
    volume = pools.new_volume(store, "a")
    pools.write(store, volume.map_id, 0, b"x" * 640)
    monkeypatch.setattr(Checkpoint, "reserve", lambda checkpoint: None)
    with files_up_to(12288), pytest.raises(BackingError, match=r"tables\.mdb"):
        store.checkpoint()
    with pytest.raises(PoolReadOnly):
        store.commit()
    assert pools.read(store, volume.map_id, 0, 640) == b"x" * 640
    with pools.crash(store) as store:
        assert pools.read(store, volume.map_id, 0, 640) == b"x" * 640
        pools.check_clean(store)
    FIGURES["limits of the host"] += 1


@pytest.fixture
def tiny_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 6 MiB."""
    where = tmp_path / "tiny"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


@pytest.mark.loop
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("full_at", ["images", "metadata", "both"])
def test_a_filesystem_that_is_full(pool_home: Path, tiny_filesystem: Path, plane: PlaneKind, full_at: str) -> None:
    """Nothing is harmed: no failsafe, and with room again everything goes on."""
    home = tiny_filesystem if full_at != "images" else pool_home
    images = tiny_filesystem if full_at != "metadata" else pool_home
    options = replace(pools.tiny_options(small_commit_bytes=500, extend_bytes=1024), data_plane=plane)
    pool = make_pool(home / "pool", images)
    for spare_pages in SPARE_PAGES:
        failure = run_limited(pool, options, lambda spare=spare_pages: full(tiny_filesystem, spare))  # type: ignore[misc]
        assert failure is None, failure
        empty_again(pool, options)


def make_pool(directory: Path, images: Path) -> Path:
    create_pool(directory, block_bytes=64, directories=[images], journal_bytes=MIN_JOURNAL_BYTES)
    make_sparse(next(images.glob("*.img")))
    return directory


def make_sparse(image: Path) -> None:
    """Let an image have blocks for which the host has not reserved space: then writing them may fail."""
    os.truncate(image, DATA_OFFSET_BYTES + 65536)


@contextmanager
def full(where: Path, spare_pages: int) -> Iterator[None]:
    """Fill a filesystem but for some pages."""
    status = os.statvfs(where)
    ballast = where / "ballast"
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, status.f_bavail - spare_pages) * status.f_frsize)
    try:
        yield
    finally:
        ballast.unlink()


def empty_again(pool: Path, options: Options) -> None:
    with pools.open_tiny(pool, options) as store:
        for volume in [v for v in store.catalog.volumes.values() if v.name]:
            volumes.remove(store, volume.id, snapshots=True)
        pools.reclaim(store)
