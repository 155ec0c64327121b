"""Copying a large sparse snapshot away with what everybody has: quick, equal, sparse."""

import json
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import MountedPool, mounted_pool
from tests.support.loop import allocated_bytes, run

MIB = 1 << 20
GIB = 1 << 30
HELD_BYTES = 50 * MIB


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[MountedPool]:
    with mounted_pool(tmp_path) as pool:
        yield pool


def scatter(volume: Path, size_bytes: int) -> dict[int, bytes]:
    """Write 50 MiB at random places of a volume, in pieces of 4 KiB to 4 MiB; return them by offset."""
    rng, pieces, held = random.Random(3), dict[int, bytes](), 0
    with open(volume, "r+b", buffering=0) as file:
        while held < HELD_BYTES:
            length = min(4096 << rng.randrange(11), HELD_BYTES - held)
            offset = rng.randrange(size_bytes // (8 * MIB)) * 8 * MIB
            if offset not in pieces:
                pieces[offset] = rng.randbytes(length)
                held += os.pwrite(file.fileno(), pieces[offset], offset)
        os.fsync(file.fileno())
    return pieces


def assert_holds(path: Path, size_bytes: int, pieces: dict[int, bytes]) -> None:
    """Compare a file with the pieces; between them are holes, which read as zeros by definition."""
    assert path.stat().st_size == size_bytes
    with open(path, "rb", buffering=0) as file:
        for offset, data in pieces.items():
            assert os.pread(file.fileno(), len(data), offset) == data
    # Nothing is stored but the pieces.
    assert allocated_bytes(path) <= HELD_BYTES + MIB


def reads(mounted: MountedPool) -> int:
    """Count the reads that the kernel has asked for."""
    text = (mounted / ".incfs/metrics").read_text()
    found = re.search(r'fuse_op_duration_seconds_count\{op="read"\} (\d+)', text)
    return int(found[1]) if found else 0


@pytest.mark.mount
@pytest.mark.parametrize(
    ("size_bytes", "command", "most_reads"),
    [
        (100 * GIB, ("cp", "--sparse=auto"), 3000),
        (100 * GIB, ("cp", "--sparse=always"), 3000),
        # rsync knows no holes when it reads: it goes through every zero, twice with --checksum.
        (2 * GIB, ("rsync", "--sparse"), 3000 + 2 * GIB // (64 << 10)),
    ],
    ids=["cp-auto", "cp-always", "rsync"],
)
def test_copy_of_a_snapshot(
    mounted: MountedPool, tmp_path: Path, size_bytes: int, command: tuple[str, ...], most_reads: int
) -> None:
    mounted.command("volume", "create", "db", size_bytes)
    pieces = scatter(mounted / "db", size_bytes)
    mounted.command("snapshot", "create", "db@s")
    (mounted / "db").write_bytes(b"")
    snapshot, copy = mounted / ".snapshots" / "db" / "s", tmp_path / "copy"
    assert allocated_bytes(snapshot) == HELD_BYTES
    before, started = reads(mounted), time.monotonic()
    run(*command, snapshot, copy)
    took_s, count = time.monotonic() - started, reads(mounted) - before
    print(
        f"\n{' '.join(command)}: {size_bytes >> 30} GiB in {took_s:.2f} s and {count} reads, "
        f"copy {allocated_bytes(copy) / MIB:.1f} MiB"
    )
    assert_holds(snapshot, size_bytes, pieces)
    assert_holds(copy, size_bytes, pieces)
    assert count < most_reads  # a file without holes would have 100,000 of a MiB


@pytest.mark.mount
def test_rsync_inplace_updates_a_volume(mounted: MountedPool, tmp_path: Path) -> None:
    """The other way round: a changed source into a volume, block by block."""
    source = tmp_path / "source"
    data = bytearray(random.Random(4).randbytes(64 * MIB))
    source.write_bytes(data)
    run("rsync", "--inplace", source, mounted / "db")
    mounted.command("snapshot", "create", "db@before")
    for offset in (0, 12345, 40 * MIB, 64 * MIB - 5):
        data[offset : offset + 5] = b"other"
    source.write_bytes(data)
    run("rsync", "--inplace", "--no-whole-file", "--checksum", source, mounted / "db")
    assert (mounted / "db").read_bytes() == data
    mounted.command("snapshot", "create", "db@after")
    found = json.loads(mounted.command("snapshot", "diff", "--from", "before", "db@after", "--json").stdout)
    changed = sum(extent["length"] for extent in found["ranges"])
    assert 0 < changed < MIB, found
