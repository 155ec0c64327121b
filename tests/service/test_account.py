"""The free space that is reported is what can be written then, to within a step of growth, on hosts that really end."""

import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
import trio

from incfs import keeper
from incfs.backing import File
from incfs.errors import NoSpace
from incfs.model import StorageId, Volume
from incfs.options import Options
from incfs.planes import HAS_NATIVE, PlaneKind
from incfs.recovery import create_pool
from incfs.service import Service, open_service
from incfs.settings import Amount, PoolSettings, VolumeSettings
from tests.support import pools
from tests.support.loop import allocated_bytes, filesystem, loop_device, run

PLANES: list[PlaneKind] = [kind for kind in get_args(PlaneKind) if kind != "auto" and (HAS_NATIVE or kind != "native")]
pytestmark = [pytest.mark.loop, pytest.mark.slow]
MIB = 1 << 20
STEP = MIB
"""Images grow in such steps."""
OPTIONS = Options(
    extend_bytes=STEP, host_reserve_bytes=MIB, commit_interval_s=1e6, checkpoint_interval_s=1e6, dump_interval_s=None
)
LEAST_BYTES = (3 * 1 + 6) * MIB
"""What an emptied pool keeps: three times its journal's size, 6 MiB, and what is noted of earlier times."""
NEVER_LOW = PoolSettings(low_water=Amount(fixed_bytes=0))
DATA = bytes(range(1, 252)) * (MIB // 251 + 1)


@dataclass
class Disks:
    """Host filesystems of one test, and where its pool is."""

    home: Path
    stack: ExitStack

    def memory(self, name: str, size_mib: int) -> Path:
        """Make a filesystem in memory."""
        where = self.home / name
        where.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", where)
        self.stack.callback(run, "umount", where)
        return where

    def disk(self, name: str, size_mib: int, kind: str = "ext4") -> Path:
        """Make a filesystem on a loop device."""
        image = self.home / f"{name}.img"
        image.touch()
        run("truncate", "--size", f"{size_mib}M", image)
        run(f"mkfs.{kind}", "-q", *(["-m", "0"] if kind == "ext4" else []), image)
        device = self.stack.enter_context(loop_device(image))
        return self.stack.enter_context(filesystem(device, self.home / name))


@pytest.fixture
def disks(pool_home: Path) -> Iterator[Disks]:
    with ExitStack() as stack:
        yield Disks(pool_home, stack)


@asynccontextmanager
async def opened(pool: Path, settings: PoolSettings | None = None, **options: Any) -> AsyncIterator[Service]:
    async with open_service(pool, replace(OPTIONS, **options)) as service:
        service.apply_settings(settings or PoolSettings())
        await service.look_at_hosts()
        yield service


async def volume_of(service: Service, name: str = "db") -> Volume:
    found = [volume for volume in service.volumes() if volume.name == name]
    return found[0] if found else await service.create_volume(name, 1 << 30)


async def fill(service: Service, volume: Volume, start: int = 0) -> int:
    """Write until there is no space, to the last block; give the bytes."""
    offset, step = start, 64 * 1024
    while step:
        try:
            await service.write(volume.map_id, offset, DATA[:step])
            offset += step
        except NoSpace:
            step = step // 2 // service.block_bytes * service.block_bytes
    return offset - start


async def require_truth(service: Service, volume: Volume, start: int = 0, most_wrong: int = STEP) -> int:
    """Compare what is said to be free with what can be written."""
    await service.look_at_hosts()
    said = service.facts()["free_bytes"]
    written = await fill(service, volume, start)
    assert abs(said - written) <= most_wrong, f"{said} bytes were free, {written} could be written"
    await service.look_at_hosts()
    assert service.facts()["free_bytes"] <= most_wrong
    assert service.facts()["failure"] is None
    return written


async def punch(service: Service, volume: Volume, first: int, length: int) -> None:
    """Discard a range, and let the host have its space."""
    await service.discard(volume.map_id, first, length)
    await service.checkpoint()
    await service._keeper.give_back_rest()
    await service.look_at_hosts()


@pytest.mark.parametrize("percent", [10, 60])
async def test_the_hosts_reserve_is_not_free(disks: Disks, percent: int) -> None:
    """With ``reserve = 60 %`` every write got ENOSPC, while ``df`` said that 50 MiB were free."""
    place = disks.memory("disk", 48)
    create_pool(disks.home / "pool", directories=[place])
    async with opened(disks.home / "pool", PoolSettings(reserve=Amount(percent=Fraction(percent)))) as service:
        written = await require_truth(service, await volume_of(service))
        assert abs(written - 48 * MIB * (100 - percent) // 100) <= 2 * STEP
        (storage,) = service.storages()
        assert storage["free_bytes"] <= STEP
        assert storage["is_low"]


async def test_a_host_that_counts_when_it_commits_keeps_its_reserve(disks: Disks) -> None:
    """The statfs of btrfs tells of 30 s ago: images grew until it was full to the last byte."""
    place = disks.disk("disk", 300, "btrfs")
    create_pool(disks.home / "pool", directories=[place])
    reserve = 100 * MIB
    async with opened(disks.home / "pool", PoolSettings(reserve=Amount(fixed_bytes=reserve))) as service:
        volume = await volume_of(service)
        written = await require_truth(service, volume)
        assert written >= 64 * MIB
        run("sync", "-f", place)
        status = os.statvfs(place)
        assert abs(status.f_bavail * status.f_frsize - reserve) <= 2 * STEP
        await punch(service, volume, 0, 48 * MIB)
        with trio.fail_after(60):
            while abs(service.facts()["free_bytes"] - 48 * MIB) > 2 * STEP:
                run("sync", "-f", place)  # where a chunk became empty, it is neither used nor free for a moment
                await service.look_at_hosts()
        await require_truth(service, volume, written, most_wrong=2 * STEP)


@pytest.mark.parametrize(("one", "other"), [("a", "a"), ("a", "b")], ids=["one-disk", "two-disks"])
async def test_each_leg_of_a_mirror_takes_its_host(disks: Disks, one: str, other: str) -> None:
    for name, size_mib in (("a", 32), ("b", 20)):
        disks.memory(name, size_mib)
    create_pool(disks.home / "pool", directories=[disks.home / one], mirrors=[disks.home / other])
    async with opened(disks.home / "pool") as service:
        written = await require_truth(service, await volume_of(service))
        assert abs(written - (15.5 if one == other else 19) * MIB) <= STEP


async def test_several_images_on_one_filesystem_share_it(disks: Disks) -> None:
    place = disks.memory("disk", 40)
    places = [place / name for name in "abc"]
    for directory in places:
        directory.mkdir()
    create_pool(disks.home / "pool", directories=places)
    async with opened(disks.home / "pool") as service:
        written = await require_truth(service, await volume_of(service))
        assert 37 * MIB <= written <= 40 * MIB


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
async def test_blocks_that_went_back_to_the_host_count_once(disks: Disks, kind: str) -> None:
    """They counted as free in the image and as free on the host."""
    place = disks.memory("disk", 48) if kind == "tmpfs" else disks.disk("disk", 64)
    create_pool(disks.home / "pool", directories=[place])
    async with opened(disks.home / "pool") as service:
        volume = await volume_of(service)
        await fill(service, volume)
        await punch(service, volume, 4 * MIB, 24 * MIB)
        assert abs(service.facts()["free_bytes"] - 24 * MIB) <= STEP
        await require_truth(service, volume, 512 * MIB)
        assert await service.read(volume.map_id, 0, 4 * MIB) == b"".join(DATA[: 64 * 1024] for _ in range(64))


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
async def test_what_went_back_to_the_host_is_known_when_the_pool_is_opened_again(disks: Disks, kind: str) -> None:
    """Somebody else has taken most of it meanwhile; what the image kept can be used."""
    place = disks.memory("disk", 48) if kind == "tmpfs" else disks.disk("disk", 64)
    create_pool(disks.home / "pool", directories=[place])
    async with opened(disks.home / "pool", extend_bytes=8 * MIB) as service:
        volume = await volume_of(service)
        await service.write(volume.map_id, 0, DATA[:MIB] * 25)  # the image has 32 MiB
        await punch(service, volume, 2 * MIB, 12 * MIB)
    with open(place / "other", "wb") as other:
        eat(place, other, left_bytes=3 * MIB)
        async with opened(disks.home / "pool") as service:
            written = await require_truth(service, volume, 512 * MIB)
            assert 6 * MIB <= written <= 10 * MIB
            assert (await service.inspection.check(data=True)).is_clean


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
async def test_an_emptied_pool_keeps_its_journals_and_little_else(
    disks: Disks, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept what its images had grown by in advance: 100 MiB stayed of an empty pool."""
    monkeypatch.setattr(keeper, "_GIVE_BACK_EVERY_S", 0.2)
    place = disks.memory("disk", 128) if kind == "tmpfs" else disks.disk("disk", 160)
    create_pool(place / "pool", journal_bytes=MIB)
    async with opened(place / "pool", extend_bytes=64 * MIB) as service:
        volume = await volume_of(service)
        await service.write(volume.map_id, 0, DATA[:MIB] * 5)
        await service.commit()
        assert allocated_bytes(place) >= 64 * MIB
        await service.remove_volume(volume.id)
        await service.wait_reclaimed()
        await service.checkpoint()
        with trio.fail_after(20):
            while allocated_bytes(place) > LEAST_BYTES:  # also while it is mounted
                await trio.sleep(0.2)
        other = await volume_of(service, "other")
        await service.write(other.map_id, 0, DATA[:MIB])
        await service.commit()
        await service.remove_volume(other.id)
    assert allocated_bytes(place) <= LEAST_BYTES
    async with opened(place / "pool") as service:
        await require_truth(service, await volume_of(service), most_wrong=2 * STEP)


def eat(place: Path, other: Any, left_bytes: int) -> None:
    """Let another program take what a filesystem has free, but for so much."""
    status = os.statvfs(place)
    os.posix_fallocate(other.fileno(), 0, status.f_bavail * status.f_frsize - left_bytes)


async def test_caps_and_another_program(disks: Disks) -> None:
    place = disks.memory("disk", 48)
    create_pool(disks.home / "pool", directories=[place], capacity_bytes=30 * MIB)
    async with opened(disks.home / "pool", PoolSettings(extend_max_bytes=10 * MIB)) as service:
        volume = await volume_of(service)
        assert abs(await require_truth(service, volume) - 10 * MIB) <= STEP
        service.apply_settings(PoolSettings(extend_max_bytes=12 * MIB))
        assert abs(await require_truth(service, volume, 100 * MIB) - 2 * MIB) <= STEP
        service.apply_settings(PoolSettings())
        assert abs(service.facts()["free_bytes"] - 18 * MIB) <= STEP
        with open(place / "other", "wb") as other:
            eat(place, other, left_bytes=8 * MIB)
            written = await require_truth(service, volume, 200 * MIB)
            assert abs(written - 7 * MIB) <= STEP
        (place / "other").unlink()
        assert abs(await require_truth(service, volume, 300 * MIB) - (18 * MIB - written)) <= STEP


async def test_what_is_reserved_is_free_but_not_for_others(disks: Disks) -> None:
    create_pool(disks.home / "pool", directories=[disks.memory("disk", 48)], capacity_bytes=30 * MIB)
    rules = pools.by_name({"db": VolumeSettings(reservation_bytes=10 * MIB)})
    async with opened(disks.home / "pool", PoolSettings(volume_settings=rules)) as service:
        db, other = await volume_of(service), await volume_of(service, "other")
        service.apply_settings(PoolSettings(volume_settings=rules))
        facts = service.facts()
        assert (facts["reserved_bytes"], facts["free_bytes"] // MIB) == (10 * MIB, 29)
        written = await fill(service, other)
        assert abs(written - (facts["free_bytes"] - facts["reserved_bytes"])) <= STEP
        assert abs(await fill(service, db) - 10 * MIB) <= STEP


# A host that refuses what it had reserved


@pytest.fixture
def hollow_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every host be one that writes elsewhere each time: what it reserves is worth nothing."""

    def allocate(file: File, offset_bytes: int, length_bytes: int, *, keep_size: bool = False) -> None:
        if not keep_size and file.length_bytes() < offset_bytes + length_bytes:
            file.truncate(offset_bytes + length_bytes)

    monkeypatch.setattr(File, "allocate", allocate)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.usefixtures("hollow_promises")
async def test_a_write_that_one_host_refuses_goes_to_another(disks: Disks, plane: PlaneKind) -> None:
    """The write got ENOSPC while other images had room."""
    places = [disks.memory("a", 6), disks.memory("b", 20)]
    create_pool(disks.home / "pool", directories=places)
    async with opened(disks.home / "pool", NEVER_LOW, data_plane=plane, host_reserve_bytes=0) as service:
        volume = await volume_of(service)
        written = await fill(service, volume)
        assert written >= 24 * MIB
        assert service.facts()["failure"] is None
        assert await service.read(volume.map_id, 0, 64 * 1024) == DATA[: 64 * 1024]
        assert (await service.inspection.check(data=True)).is_clean


@pytest.mark.usefixtures("hollow_promises")
async def test_a_move_that_one_host_refuses_goes_to_another(disks: Disks) -> None:
    places = [disks.memory("a", 9), disks.memory("b", 4), disks.memory("c", 20)]
    create_pool(disks.home / "pool", directories=places)
    async with opened(disks.home / "pool", NEVER_LOW, host_reserve_bytes=0) as service:
        volume = await volume_of(service)
        await service.write(volume.map_id, 0, DATA[:MIB] * 7)
        await service.upkeep.evacuate(StorageId(1), rate_bytes=None, progress=lambda done, total: None)
        used = {storage["id"]: storage["used_bytes"] for storage in service.storages()}
        assert used[1] == 0
        assert used[2] > 3 * MIB
        assert await service.read(volume.map_id, 6 * MIB, MIB) == DATA[:MIB]
        assert (await service.inspection.check(data=True)).is_clean


@pytest.mark.parametrize("plane", PLANES)
async def test_an_image_that_may_be_no_longer_is_full_and_no_failure(disks: Disks, plane: PlaneKind) -> None:
    """EFBIG was a failed disk: EIO, and the pool was read-only, while ``df`` promised the space."""
    create_pool(disks.home / "pool", directories=[disks.memory("disk", 64)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with opened(disks.home / "pool", data_plane=plane) as service:
        volume = await volume_of(service)
        await service.write(volume.map_id, 0, DATA[:MIB] * 12)
        await punch(service, volume, 4 * MIB, 8 * MIB)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 * MIB, before[1]))
        try:
            assert abs(await fill(service, volume, 100 * MIB) - 4 * MIB) <= STEP
            assert service.facts()["free_bytes"] <= STEP
            assert service.facts()["failure"] is None
            assert "full" in [event["kind"] for event in service.events()]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("plane", PLANES)
async def test_a_queued_write_waits_for_host_space_of_blocks_that_went_back(disks: Disks, plane: PlaneKind) -> None:
    """They were leased although their space was gone, and the write got ENOSPC at once."""
    place = disks.memory("disk", 48)
    create_pool(disks.home / "pool", directories=[place])
    async with opened(disks.home / "pool", PoolSettings(queue_s=60), data_plane=plane) as service:
        volume = await volume_of(service)
        await service.write(volume.map_id, 0, DATA[:MIB] * 30)
        await punch(service, volume, 0, 30 * MIB)
        with open(place / "other", "wb") as other:
            eat(place, other, left_bytes=0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.write, volume.map_id, 0, DATA[:MIB] * 30)
            await until_told(service, "queue")
            (place / "other").unlink()
        assert await service.read(volume.map_id, 29 * MIB, MIB) == DATA[:MIB]


async def until_told(service: Service, kind: str) -> None:
    with trio.fail_after(60):
        while kind not in [event["kind"] for event in service.events()]:
            await trio.sleep(0.01)


async def test_a_small_filesystem_keeps_room_for_the_metadata(disks: Disks) -> None:
    """With a reserve of nothing the images took all: no checkpoint, no check, no end without a failure."""
    place = disks.memory("disk", 40)
    create_pool(place / "pool", journal_bytes=MIB)
    settings = PoolSettings(reserve=Amount(fixed_bytes=0))
    for number in range(3):
        async with opened(place / "pool", settings, host_reserve_bytes=0) as service:
            volume = await volume_of(service, f"db{number}")
            assert await fill(service, volume) >= 5 * MIB
            assert os.statvfs(place).f_bavail * 4096 >= MIB
            await service.checkpoint()
            await service.create_snapshots([(volume.id, "s")])
            await service.discard(volume.map_id, 0, 3 * MIB)
            assert (await service.inspection.check(data=True)).is_clean
            await service.remove_snapshot(volume.id, "s")
            await service.wait_reclaimed()
            await service.checkpoint()
            assert service.facts()["failure"] is None
            await punch(service, volume, 0, 10 * MIB)
