#!/usr/bin/env python3
"""What a snapshot costs: to take one of a small and of a large volume, and to read beside a thousand of them.

Both must be constant: rules I6 (O(1) in the volume's size) and I8 (live reads do not see snapshots).  Everything
goes through a mount with ``cache=none``, so that each read is a request.  Rounds are interleaved, in random order.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30
READ_BYTES = 4096
SPARE_BYTES = 2 * GIB
UNITS = {"K": 1 << 10, "M": MIB, "G": GIB, "T": 1 << 40}

Result = dict[str, int | float | str]


def incfs(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "incfs", *map(str, words)], check=True)


@contextmanager
def mounted(home: Path) -> Iterator[Path]:
    pool, mountpoint = home / "pool", home / "mnt"
    mountpoint.mkdir()
    incfs("pool", "create", pool)
    incfs("mount", pool, mountpoint, "-o", "cache=none")
    try:
        yield mountpoint
    finally:
        incfs("umount", mountpoint)


def fill(volume: Path, mapped_bytes: int) -> None:
    """Map that much of a volume, with data that cannot be elided."""
    data = random.randbytes(MIB)
    with open(volume, "wb", buffering=0) as file:
        file.writelines(data[: mapped_bytes - offset] for offset in range(0, mapped_bytes, MIB))
        file.truncate(max(mapped_bytes, MIB))
        os.fsync(file.fileno())
    assert os.stat(volume).st_blocks * 512 >= mapped_bytes


def take_snapshot(mountpoint: Path, volume: str, name: str) -> float:
    """Take a snapshot as ``touch`` does; return the milliseconds until it was durable."""
    started = time.perf_counter()
    os.close(os.open(mountpoint / ".snapshots" / volume / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    return (time.perf_counter() - started) * 1e3


def creation_times(mountpoint: Path, sizes: list[int], rounds: int) -> list[Result]:
    names = {f"mapped-{size}": size for size in sizes}
    for name, size in names.items():
        fill(mountpoint / name, size)
    took: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in random.sample(list(names), len(names)):
            took[name].append(take_snapshot(mountpoint, name, f"s{number}"))
    for name in names:
        for number in range(rounds):
            os.unlink(mountpoint / ".snapshots" / name / f"s{number}")
        os.unlink(mountpoint / name)
    return [{"mapped_bytes": names[name], **summary(took[name], "ms")} for name in names]


def read_times(mountpoint: Path, mapped_bytes: int, counts: list[int], rounds: int, reads: int) -> list[Result]:
    names = {f"snapshots-{count}": count for count in counts}
    for name, count in names.items():
        fill(mountpoint / name, mapped_bytes)
        take_many(mountpoint, name, mapped_bytes, count)
    took: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        read_at_random(mountpoint / name, mapped_bytes, reads)  # pages become resident
    for _ in range(rounds):
        for name in random.sample(list(names), len(names)):
            took[name].append(read_at_random(mountpoint / name, mapped_bytes, reads))
    return [{"snapshots": names[name], **summary(took[name], "us")} for name in names]


def take_many(mountpoint: Path, name: str, mapped_bytes: int, count: int) -> None:
    """Take snapshots with a few changes between any two, so that each has an increment."""
    with open(mountpoint / name, "r+b", buffering=0) as file:
        for number in range(count):
            for _ in range(4):
                offset = random.randrange(mapped_bytes // READ_BYTES) * READ_BYTES
                os.pwrite(file.fileno(), random.randbytes(READ_BYTES), offset)
            take_snapshot(mountpoint, name, f"s{number}")


def read_at_random(volume: Path, mapped_bytes: int, reads: int) -> float:
    """Return the microseconds that one read of 4 KiB took, over many."""
    offsets = [random.randrange(mapped_bytes // READ_BYTES) * READ_BYTES for _ in range(reads)]
    with open(volume, "rb", buffering=0) as file:
        started = time.perf_counter()
        for offset in offsets:
            os.pread(file.fileno(), READ_BYTES, offset)
        return (time.perf_counter() - started) / reads * 1e6


def summary(values: list[float], unit: str) -> Result:
    return {
        f"median_{unit}": round(statistics.median(values), 3),
        f"least_{unit}": round(min(values), 3),
        f"most_{unit}": round(max(values), 3),
        "rounds": len(values),
    }


def parse_size(text: str) -> int:
    return int(float(text[:-1]) * UNITS[text[-1]]) if text[-1:] in UNITS else int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to work; the temporary directory by default")
    parser.add_argument("--size", type=parse_size, default=20 * GIB, help="mapped bytes of the largest volume (20G)")
    parser.add_argument("--read-size", type=parse_size, default=256 * MIB, help="mapped bytes that are read (256M)")
    parser.add_argument("--snapshots", type=int, default=1000, help="beside which live data is read (1000)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--reads", type=int, default=3000, help="in one round (3000)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def measure(home: Path, arguments: argparse.Namespace) -> dict[str, list[Result]]:
    needed = arguments.size + arguments.size // 20 + 2 * arguments.read_size + SPARE_BYTES
    free = shutil.disk_usage(home).free
    if free < needed:
        sys.exit(f"{home} has {free / GIB:.0f} GiB free; this needs {needed / GIB:.0f} GiB: choose a smaller --size")
    sizes = [0, arguments.size // 20, arguments.size]
    with mounted(home) as mountpoint:
        created = creation_times(mountpoint, sizes, arguments.rounds)
        counts = [0, arguments.snapshots]
        read = read_times(mountpoint, arguments.read_size, counts, arguments.rounds, arguments.reads)
    return {"snapshot_creation": created, "live_read": read}


def show(measured: dict[str, list[Result]]) -> None:
    print("time to take a snapshot, durable on return:")
    for row in measured["snapshot_creation"]:
        print(f"  {int(row['mapped_bytes']) / GIB:8.2f} GiB mapped  {row['median_ms']:8.2f} ms"
              f"  ({row['least_ms']} .. {row['most_ms']}, {row['rounds']} rounds)")  # fmt: skip
    print("time of a 4 KiB read of the live volume:")
    for row in measured["live_read"]:
        print(f"  {row['snapshots']:8} snapshots  {row['median_us']:8.1f} us"
              f"  ({row['least_us']} .. {row['most_us']}, {row['rounds']} rounds)")  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    home = Path(tempfile.mkdtemp(prefix="incfs-bench-snapshots-", dir=arguments.directory))
    try:
        measured = measure(home, arguments)
    finally:
        if not os.path.ismount(home / "mnt"):
            shutil.rmtree(home)
    if arguments.json:
        print(json.dumps({"output_version": 1, **measured}))
    else:
        show(measured)


if __name__ == "__main__":
    main()
