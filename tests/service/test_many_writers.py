"""Sixty-four writers at once, to volumes of their own and to one: nobody waits for ever, every byte is there."""

from pathlib import Path
from random import Random

import pytest
import trio

from incfs.options import Options
from incfs.planes import HAS_NATIVE, PlaneKind
from incfs.service import open_service
from tests.support.pools import make_pool

WRITERS = 64
BLOCK = 512
SPAN = 40 * BLOCK
PLANES: list[PlaneKind] = ["python", "native"] if HAS_NATIVE else ["python"]


@pytest.mark.parametrize("plane", PLANES)
async def test_sixty_four_writers(plane: PlaneKind, pool_home: Path) -> None:
    options = Options(extend_bytes=1 << 20, overlay_pages=64, page_cache_pages=100, data_plane=plane)
    async with open_service(make_pool(pool_home, block_bytes=BLOCK), options) as service:
        shared = await service.create_volume("shared", WRITERS * SPAN)
        expected = bytearray(WRITERS * SPAN)
        own: dict[int, bytearray] = {}

        async def work(number: int) -> None:
            chance = Random(number)
            volume = await service.create_volume(f"v{number}", SPAN)
            content = own[number] = bytearray(SPAN)
            for turn in range(20):
                start = chance.randrange(SPAN - 1500)
                data = bytes([1 + (number + turn) % 255]) * chance.randrange(1, 1500)
                content[start : start + len(data)] = data
                await service.write(volume.map_id, start, data)
                expected[number * SPAN + start : number * SPAN + start + len(data)] = data
                await service.write(shared.map_id, number * SPAN + start, data)
                match turn % 5:
                    case 1:
                        await service.commit()
                    case 2:
                        await service.create_snapshots([(volume.id, f"s{turn}")])
                    case 3 if turn > 3:
                        await service.remove_snapshot(volume.id, f"s{turn - 6}")
                    case 4 if number % 16 == 0:
                        await service.checkpoint()
                assert await service.read(volume.map_id, 0, SPAN) == content

        with trio.fail_after(200):
            async with trio.open_nursery() as nursery:
                for number in range(WRITERS):
                    nursery.start_soon(work, number)
            assert await service.read(shared.map_id, 0, WRITERS * SPAN) == expected
            for number, content in own.items():
                assert await service.read(service.volume(f"v{number}").map_id, 0, SPAN) == content
            await service.wait_reclaimed()
            assert (await service.inspection.check(data=True)).is_clean
