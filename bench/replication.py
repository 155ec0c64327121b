#!/usr/bin/env python3
"""What it costs to bring a copy up to date: bytes that travel and seconds, beside qcow2 overlays and rsync; and a diff.

A volume of random data, of which 1 % changes in random blocks of 4 KiB.  Everything happens on one host: the
seconds are those of making, moving through a pipe or file, and applying the difference, durable at the end.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from incfs.recovery import create_pool
from incfs.service import open_service
from incfs.units import parse_size

MIB = 1 << 20
BLOCK = 4096
CHANGED_SHARE = 0.01
QEMU_BATCH = 200
"""Writes that one qemu-io is told."""

Result = dict[str, int | float | str]


def incfs(pool: Path, *words: object) -> list[str]:
    return [sys.executable, "-m", "incfs", "-p", str(pool), *map(str, words)]


@contextmanager
def scratch(base: Path | None) -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="incfs-replication-", dir=base))
    try:
        yield home
    finally:
        shutil.rmtree(home)


def timed(work: Callable[[], int]) -> tuple[int, float]:
    """Run something that gives the bytes that travelled; give them and the seconds."""
    os.sync()
    started = time.perf_counter()
    count = work()
    return count, round(time.perf_counter() - started, 3)


def changes(size_bytes: int) -> list[int]:
    rng = random.Random(1)
    return sorted(rng.sample(range(size_bytes // BLOCK), int(size_bytes * CHANGED_SHARE) // BLOCK))


def make_files(home: Path, size_bytes: int) -> None:
    """Make old.raw, and new.raw which differs in 1 %."""
    with open(home / "old.raw", "wb") as file:
        file.writelines(os.urandom(min(MIB, size_bytes - start)) for start in range(0, size_bytes, MIB))
    subprocess.run(["cp", "--reflink=never", home / "old.raw", home / "new.raw"], check=True)
    with open(home / "new.raw", "r+b") as file:
        for index in changes(size_bytes):
            os.pwrite(file.fileno(), os.urandom(BLOCK), index * BLOCK)


async def fill_pool(pool: Path, home: Path, size_bytes: int) -> None:
    """Put old.raw into a volume, take a snapshot, put the changes in, take another."""
    create_pool(pool)
    async with open_service(pool) as service:
        volume = await service.create_volume("vol", size_bytes)
        with open(home / "old.raw", "rb") as old, open(home / "new.raw", "rb") as new:  # noqa: ASYNC230 - no others wait
            for start in range(0, size_bytes, MIB):
                await service.write(volume.map_id, start, os.pread(old.fileno(), MIB, start))
            await service.create_snapshots([(volume.id, "old")])
            for index in changes(size_bytes):
                await service.write(volume.map_id, index * BLOCK, os.pread(new.fileno(), BLOCK, index * BLOCK))
            await service.create_snapshots([(volume.id, "new")])


def pipe(source: Path, target: Path, *words: str) -> int:
    """Send and receive; give the bytes between."""
    with (
        subprocess.Popen(incfs(source, "send", *words), stdout=subprocess.PIPE) as sender,
        subprocess.Popen(incfs(target, "receive"), stdin=subprocess.PIPE) as receiver,
    ):
        assert sender.stdout is not None
        assert receiver.stdin is not None
        count = 0
        while data := sender.stdout.read(MIB):
            receiver.stdin.write(data)
            count += len(data)
        receiver.stdin.close()
    assert (sender.returncode, receiver.returncode) == (0, 0)
    return count


def measure_incfs(home: Path, size_bytes: int) -> Result:
    trio.run(fill_pool, home / "source", home, size_bytes)
    create_pool(home / "target")
    pipe(home / "source", home / "target", "vol@old")
    count, seconds = timed(lambda: pipe(home / "source", home / "target", "-i", "old", "vol@new"))
    return {"subject": "incfs send -i | receive", "wire_bytes": count, "seconds": seconds}


def measure_qcow2(home: Path, size_bytes: int) -> Result:
    """An overlay in which the changes were written; copied into a file of its own, which is committed into the copy."""
    old, overlay, moved, copy = (home / name for name in ("old.raw", "overlay.qcow2", "moved.qcow2", "copy.raw"))
    make = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={BLOCK}", "-b", str(old), "-F", "raw"]
    subprocess.run([*make, str(overlay)], check=True)
    (home / "random").write_bytes(os.urandom(BLOCK))
    wanted = changes(size_bytes)
    for first in range(0, len(wanted), QEMU_BATCH):
        writes = [f"write -q -s {home / 'random'} {i * BLOCK} {BLOCK}" for i in wanted[first : first + QEMU_BATCH]]
        words: list[str] = [word for write in writes for word in ("-c", write)]
        subprocess.run(["qemu-io", *words, str(overlay)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cp", "--reflink=never", old, copy], check=True)

    def move() -> int:
        convert: list[str | Path] = [
            "qemu-img",
            "convert",
            "-O",
            "qcow2",
            "-o",
            f"cluster_size={BLOCK}",
            "-B",
            old,
            "-F",
            "raw",
        ]
        subprocess.run([*convert, overlay, moved], check=True)
        subprocess.run(["qemu-img", "rebase", "-u", "-b", copy, "-F", "raw", moved], check=True)
        subprocess.run(["qemu-img", "commit", "-q", "-d", moved], check=True)
        return moved.stat().st_size

    count, seconds = timed(move)
    copy.unlink()
    return {"subject": "qemu-img convert -B, commit", "wire_bytes": count, "seconds": seconds}


def measure_rsync(home: Path) -> Result:
    copy = home / "copy.raw"
    subprocess.run(["cp", "--reflink=never", home / "old.raw", copy], check=True)

    def move() -> int:
        command: list[str | Path] = [
            "rsync",
            "--inplace",
            "--no-whole-file",
            "--stats",
            "--fsync",
            home / "new.raw",
            copy,
        ]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return sum(int(n.replace(",", "")) for n in re.findall(r"Total bytes (?:sent|received): ([\d,]+)", said))

    count, seconds = timed(move)
    assert subprocess.run(["cmp", home / "new.raw", copy], check=False).returncode == 0
    copy.unlink()
    return {"subject": "rsync --inplace --no-whole-file", "wire_bytes": count, "seconds": seconds}


async def measure_diff(home: Path, size_bytes: int, between: int) -> Result:
    """Compare two snapshots with others between; the same number of changes, spread over all of them."""
    pool, wanted = home / f"diff{between}", changes(size_bytes)
    create_pool(pool)
    async with open_service(pool) as service:
        volume = await service.create_volume("vol", size_bytes)
        await service.create_snapshots([(volume.id, "first")])
        for number in range(between):
            for index in wanted[number::between]:
                await service.write(volume.map_id, index * BLOCK, os.urandom(BLOCK))
            await service.create_snapshots([(volume.id, f"s{number}")])
        await service.checkpoint()
        started = time.perf_counter()
        await service.inspection.diff(volume.id, "first", f"s{between - 1}", start_bytes=0, limit=len(wanted) + 1)
        seconds = time.perf_counter() - started
    shutil.rmtree(pool)
    return {"subject": f"diff over {between} snapshots", "changed_blocks": len(wanted), "seconds": round(seconds, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default=10 << 30, help="of the volume (10G)")
    parser.add_argument("--scratch", type=Path, help="directory to work in")
    arguments = parser.parse_args()
    with scratch(arguments.scratch) as home:
        make_files(home, arguments.size)
        print(json.dumps(measure_incfs(home, arguments.size)), flush=True)
        print(json.dumps(measure_qcow2(home, arguments.size)), flush=True)
        print(json.dumps(measure_rsync(home)), flush=True)
        for between in (1, 10, 100):
            print(json.dumps(trio.run(measure_diff, home, arguments.size, between)), flush=True)


if __name__ == "__main__":
    main()
