"""What a power cut left on a machine's disk, looked at on this one: the filesystem replays, the pool recovers."""

import struct
import subprocess
from pathlib import Path

from incfs.options import Options
from incfs.recovery import open_store
from tests.support.cli import Cli
from tests.support.loop import filesystem, loop_device
from tests.support.pools import read

BLOCK_BYTES = 4096
"""Of the stamper's blocks."""


def acknowledged(stamps: str) -> dict[tuple[int, int], int]:
    """Return the newest sequence of each (volume, block) that was said to be durable; a torn last line says nothing."""
    whole = stamps[: stamps.rfind("\n") + 1].split()
    numbers = [int(word) for word in whole]
    return {(v, b): s for v, b, s in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)}


def judge(disk: Path, stamps: str, pool: str) -> int:
    """Assert that nothing that was acknowledged is lost; returns how many blocks were looked at.

    Args:
        disk: The machine's, which is changed by it.
        stamps: What the stamper had said before the cut.
        pool: The pool's directory in the machine.
    """
    raw = disk.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-q", "-O", "raw", disk, raw], check=True)
    try:
        with loop_device(raw) as device, filesystem(device, disk.with_suffix(".mnt")) as root:
            assert_kept(root / pool.lstrip("/"), acknowledged(stamps))
            checked = Cli(root / pool.lstrip("/")).run("pool", "check", "--data")
            assert checked.returncode == 0, checked
            assert "clean" in checked.stdout, checked
            assert "ended without closing it" in checked.stderr, checked
    finally:
        raw.unlink()
    return len(acknowledged(stamps))


def assert_kept(pool: Path, expected: dict[tuple[int, int], int]) -> None:
    """Compare each block with what was acknowledged: that, or what was written to it later."""
    with open_store(pool, Options()) as store:
        contents = {v: read(store, store.catalog.volume_named(f"stamped{v}").map_id) for v in {v for v, _ in expected}}
    for (volume, block), sequence in expected.items():
        found = contents[volume][block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        (stamp,) = struct.unpack_from("<Q", found)
        assert found == struct.pack("<Q", stamp) * (BLOCK_BYTES // 8), f"stamped{volume}, block {block} is torn"
        assert stamp >= sequence, f"stamped{volume}, block {block}: {sequence} was durable, {stamp} is there"
