#!/usr/bin/env python3
"""What upkeep costs those who work beside it: space that goes back to the host, and a mirror's leg that is blank.

Both through the service, without a mount: what is timed is incfs and the host's filesystem.

    python -m bench.upkeep --directory /where/to/work
"""

import argparse
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import trio

from incfs.image import DATA_OFFSET_BYTES
from incfs.model import StorageId, Volume
from incfs.options import Options
from incfs.recovery import create_pool
from incfs.service import Service, open_service

MIB = 1 << 20
BLOCK = 4096
OPTIONS = Options(checkpoint_interval_s=1e6, dump_interval_s=None, host_reserve_bytes=0)


@dataclass(slots=True)
class Waits:
    """How long each of somebody's writes took."""

    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        ordered = sorted(self.seconds)
        middle, late = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
        times = f"median {middle * 1e3:.2f} ms, p99 {late * 1e3:.1f} ms, most {ordered[-1] * 1e3:.0f} ms"
        return f"{len(ordered)} writes: {times}"


async def write_beside(service: Service, volume: Volume, waits: Waits, is_over: trio.Event) -> None:
    """Write and commit new blocks, some of which need space, until it is over."""
    for number in range(1 << 30):
        if is_over.is_set():
            return
        began = time.perf_counter()
        await service.write(volume.map_id, number % 4096 * BLOCK, os.urandom(BLOCK))
        await service.commit()
        waits.seconds.append(time.perf_counter() - began)
        await trio.sleep(0.002)


async def time_punching(home: Path, count: int) -> None:
    """Give scattered blocks back, beside somebody who writes and commits."""
    create_pool(home / "pool")
    async with open_service(home / "pool", OPTIONS) as service:
        volume, other = await service.create_volume("db"), await service.create_volume("other", 16 * MIB)
        for offset in range(0, 2 * count * BLOCK, MIB):
            await service.write(volume.map_id, offset, os.urandom(MIB))
        await service.checkpoint()
        for number in range(count):
            await service.discard(volume.map_id, 2 * number * BLOCK, BLOCK)
        await service.checkpoint()
        service._store.pool.reuse.settle()
        waits, is_over = Waits(), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_beside, service, other, waits, is_over)
            began = time.perf_counter()
            await service._keeper._give_back()
            took = time.perf_counter() - began
            is_over.set()
        print(f"{count} scattered blocks went back in {took:.1f} s; beside it {waits}")


async def time_mending(home: Path, mib: int) -> None:
    """Read a mirror of which one leg is blank, for the first time and again."""
    create_pool(home / "pool")
    async with open_service(home / "pool", OPTIONS) as service:
        paths = [home / name for name in ("a.img", "b.img")]
        await service.upkeep.add_storage(str(paths[0]), mirrors=[str(paths[1])], force=True)
        await service.upkeep.evacuate(StorageId(1), rate_bytes=None, progress=lambda *_: None)
        await service.upkeep.remove_storage(StorageId(1))
        volume, data = await service.create_volume("db"), os.urandom(MIB)
        for number in range(mib):
            await service.write(volume.map_id, number * MIB, data)
        await service.checkpoint()
        with paths[0].open("r+b") as leg:
            for offset in range(DATA_OFFSET_BYTES, leg.seek(0, os.SEEK_END), MIB):
                leg.seek(offset)
                leg.write(bytes(MIB))
        for what in ("blank", "mended"):
            began = time.perf_counter()
            for number in range(mib):
                assert await service.read(volume.map_id, number * MIB, MIB) == data
            took = time.perf_counter() - began
            print(f"{mib} MiB of a mirror whose first leg is {what}, 1 MiB at a time: {mib / took:.0f} MiB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to work; the temporary directory by default")
    parser.add_argument("--blocks", type=int, default=68_600, help="that go back (68,600)")
    parser.add_argument("--size", type=int, default=64, help="MiB that are read from a blank leg (64)")
    arguments = parser.parse_args()
    for work, amount in ((time_punching, arguments.blocks), (time_mending, arguments.size)):
        home = Path(tempfile.mkdtemp(prefix="incfs-bench-upkeep-", dir=arguments.directory))
        try:
            trio.run(work, home, amount)
        finally:
            shutil.rmtree(home)


if __name__ == "__main__":
    main()
