"""A snapshot taken while a filesystem is written to: sound after journal replay, mountable, and it never changes."""

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.conftest import MountedPool, mounted_pool, wait_for
from tests.support.cli import environment
from tests.support.loop import filesystem, loop_device, run

MIB = 1 << 20
LOAD = """
import os, random, sys
root, rng, number = sys.argv[1], random.Random(1), 0
while True:
    number += 1
    name = f"{root}/f{rng.randrange(300)}"
    with open(name + ".new", "wb") as file:
        file.write(rng.randbytes(rng.randrange(200_000)))
        if number % 10 == 0:
            os.fsync(file.fileno())
    os.rename(name + ".new", name)
    if number % 7 == 0:
        os.unlink(name)
    if number % 50 == 0:
        print(number, flush=True)
"""


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[MountedPool]:
    with mounted_pool(tmp_path) as pool:
        yield pool


@contextmanager
def load(root: Path) -> Iterator[None]:
    """Write, rename, sync and delete files while the body runs; it begins when that is in full swing."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD, str(root)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "50\n"
        yield
        assert process.poll() is None, "the load ended by itself"
    finally:
        process.kill()
        process.communicate()


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def overwrite(volume: Path) -> None:
    """Replace every byte of a volume."""
    rng = random.Random(2)
    with open(volume, "r+b", buffering=0) as file:
        file.writelines(rng.randbytes(MIB) for _ in range(0, os.path.getsize(volume), MIB))
        os.fsync(file.fileno())


@pytest.mark.loop
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("size_bytes", "make", "verify", "frozen_options"),
    [
        (100 * MIB, ("mkfs.ext4", "-q"), ("e2fsck", "-fn"), "ro,noload"),
        (310 * MIB, ("mkfs.xfs", "-q"), ("xfs_repair", "-n"), "ro,norecovery,nouuid"),
    ],
    ids=["ext4", "xfs"],
)
def test_snapshots_under_load(
    mounted: MountedPool,
    tmp_path: Path,
    size_bytes: int,
    make: tuple[str, ...],
    verify: tuple[str, ...],
    frozen_options: str,
) -> None:
    volume, names = mounted / "db", ["s1", "s2"]
    mounted.command("volume", "create", "db", size_bytes)
    with loop_device(volume, "--direct-io=on") as device:
        run(*make, device)
        with filesystem(device, tmp_path / "fs") as root, load(root):
            for name in names:
                files = len(list(root.iterdir()))
                mounted.command("snapshot", "create", f"db@{name}")
                wait_for(lambda seen=files: len(list(root.iterdir())) != seen)
    snapshots = [mounted / ".snapshots" / "db" / name for name in names]
    before = [digest(snapshot) for snapshot in snapshots]
    assert len(set(before)) == len(names), "the load changed nothing between two snapshots"
    for snapshot in snapshots:
        _verify_after_replay(snapshot, tmp_path, verify)
        with (
            loop_device(snapshot, "--read-only") as device,
            filesystem(device, tmp_path / "fs", "-o", frozen_options) as root,
        ):
            list(root.iterdir())  # what only the journal has is not there
    overwrite(volume)
    assert [digest(snapshot) for snapshot in snapshots] == before
    mounted.remount()
    assert [digest(snapshot) for snapshot in snapshots] == before


def _verify_after_replay(snapshot: Path, scratch: Path, verify: tuple[str, ...]) -> None:
    """Let the filesystem replay its journal on a copy, and check that copy."""
    copy = scratch / "copy"
    run("cp", "--sparse=always", snapshot, copy)
    with loop_device(copy) as device:
        with filesystem(device, scratch / "replayed") as root:
            assert [path for path in root.iterdir() if path.is_file() and path.read_bytes()]
        run(*verify, device)
    copy.unlink()
