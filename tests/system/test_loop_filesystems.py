"""The loop cycle: a filesystem on a volume keeps 20,000 real files, over a daemon's restart, and gives space back."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mount.conftest import START_TIMEOUT_S, MountedPool, mounted_pool, wait_for
from tests.support.loop import allocated_bytes, filesystem, loop_device, run, stage_files

GIB = 1 << 30
MIB = 1 << 20
FILE_COUNT = 20_000


@dataclass(frozen=True)
class Kind:
    """A filesystem and its tools."""

    name: str
    make: tuple[str, ...]
    verify: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


KINDS = [
    Kind("ext4", ("mkfs.ext4", "-q"), ("e2fsck", "-fn")),
    Kind("xfs", ("mkfs.xfs", "-q"), ("xfs_repair", "-n")),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At least 20,000 files of this machine."""
    staged = tmp_path_factory.mktemp("files")
    total = stage_files(Path("/usr"), staged, file_count=FILE_COUNT, largest_bytes=128 << 10)
    count = sum(len(names) for _, _, names in os.walk(staged))
    assert count >= FILE_COUNT
    print(f"\n{count} files of {total / MIB:.0f} MiB")
    return staged


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[MountedPool]:
    with mounted_pool(tmp_path) as pool:
        yield pool


@pytest.mark.loop
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_filesystem_keeps_files_and_gives_space_back(
    mounted: MountedPool, kind: Kind, files: Path, tmp_path: Path
) -> None:
    volume, images = mounted / "db", mounted.pool / "images"

    def note(what: str) -> None:
        figures = f"volume {allocated_bytes(volume) / MIB:.0f} MiB, images {allocated_bytes(images) / MIB:.0f} MiB"
        print(f"  {time.monotonic() - started:5.1f} s  {what}: {figures}")

    print(f"\n{kind}:")
    started = time.monotonic()
    mounted.command("volume", "create", "db", 3 * GIB)
    with loop_device(volume, "--direct-io=on") as device:
        run(*kind.make, device)
        note("made")
        with filesystem(device, tmp_path / "fs") as root:
            run("cp", "-a", "--no-preserve=links", files, root / "files")  # staged twice where /usr is small
            run("sync", "-f", root)
            note("filled")
        run(*kind.verify, device)
        note("verified")

    mounted.remount()
    with loop_device(volume, "--direct-io=on") as device:
        with filesystem(device, tmp_path / "fs") as root:
            run("diff", "-r", "--no-dereference", files, root / "files")
            note("compared after the daemon's restart")
            before = allocated_bytes(volume), allocated_bytes(images)
            _delete_half(root / "files")
        # XFS frees what was unlinked some time after; once it was unmounted it has.
        with filesystem(device, tmp_path / "fs") as root:
            run("fstrim", root)
            note("half deleted and trimmed")
        run(*kind.verify, device)
    # Freed blocks go back to the host when they have been free for a while after the next checkpoint.
    wait_for(lambda: allocated_bytes(images) < before[1] - 20 * MIB, timeout_s=2 * START_TIMEOUT_S)
    note("given back")
    after = allocated_bytes(volume), allocated_bytes(images)
    assert after[0] < before[0] * 0.75  # half of the files hold about half of the bytes
    # The images keep what they grew by in advance.
    assert after[1] < before[1] - 20 * MIB


def _delete_half(root: Path) -> None:
    """Delete half of the files, directory by directory, as people do."""
    paths = sorted(Path(directory, name) for directory, _, names in os.walk(root) for name in names)
    for path in paths[: len(paths) // 2]:
        path.unlink()
