"""What becomes of a pool's parts that are of another time, or of another fork: refused, or stale; never wrong (I14)."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from incfs import keeper, restore
from incfs.checkpoint import Checkpoint
from incfs.epoch import EPOCH_NAME
from incfs.errors import EpochMismatch, FormatError, ImageMismatch, IncfsError, NoSpace
from incfs.image import DATA_OFFSET_BYTES
from incfs.planes import PlaneKind
from incfs.recovery import create_pool
from incfs.repair import repair
from incfs.service import Service, open_service
from tests.service.test_mirrors import BLOCK, TWO, leg_states, noise, opened, quiet
from tests.support import pools

PLANE: PlaneKind = "python"


@pytest.fixture(autouse=True)
def quick_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_SURVEY_PAUSE_S", 0.0)


@pytest.fixture
def home(pool_home: Path) -> Path:
    """A pool with its image outside of the directory."""
    (pool_home / "images").mkdir()

    create_pool(pool_home / "pool", block_bytes=BLOCK, directories=[pool_home / "images"], journal_bytes=1 << 16)
    return pool_home


async def fill(service: Service, seed: int, *, at: int = 0) -> bytes:
    """Write a volume, and commit."""
    names = [volume.name for volume in service.volumes()]
    volume = service.volume("db") if names else await service.create_volume("db", 1 << 20)
    data = noise(1000, seed)
    await service.write(volume.map_id, at, data)
    await service.commit()
    return data


async def read(service: Service) -> bytes:
    return await service.read(service.volume("db").map_id, 0, 1000 * BLOCK)


def set_aside(home: Path, name: str) -> None:
    """Copy the pool and its images as they are: while the pool is open, as a crash would leave them."""
    for part in ("pool", "images"):
        shutil.copytree(home / part, home / name / part)


def bring_back(home: Path, name: str) -> None:
    for part in ("pool", "images"):
        shutil.rmtree(home / part)
        shutil.copytree(home / name / part, home / part)


def files_of(path: Path) -> dict[Path, bytes]:
    return {
        found: found.read_bytes() for found in path.rglob("*") if found.is_file() and not found.name.endswith("lock")
    }


async def test_an_older_directory_is_refused_before_anything_is_touched(home: Path) -> None:
    async with open_service(home / "pool") as service:
        await fill(service, 1)
    shutil.copytree(home / "pool", home / "copy")
    async with open_service(home / "pool") as service:
        data = await fill(service, 2)
    before = files_of(home / "images")
    with pytest.raises(EpochMismatch, match="the image is newer") as caught:
        async with open_service(home / "copy"):
            pass
    assert caught.value.exit_code == 12
    assert str(home / "copy") in str(caught.value)
    assert "--force-older" in str(caught.value)
    assert files_of(home / "images") == before
    async with open_service(home / "pool") as service:
        assert await read(service) == data
        assert (await service.inspection.check(data=True)).is_clean


async def test_a_directory_copied_while_the_pool_is_open_is_older_after_the_next_checkpoint(home: Path) -> None:
    """Within one epoch: the stamps name the checkpoint."""
    async with open_service(home / "pool") as service:
        await fill(service, 1)
        await service.checkpoint()
        shutil.copytree(home / "pool", home / "copy")
        data = await fill(service, 2)
        await service.checkpoint()
        shutil.copytree(home / "pool", home / "crashed")
        shutil.copytree(home / "images", home / "images.crashed")
    shutil.rmtree(home / "images")
    (home / "images.crashed").rename(home / "images")
    with pytest.raises(EpochMismatch, match="was last stamped at"):
        async with open_service(home / "copy"):
            pass
    async with open_service(home / "crashed") as service:
        assert await read(service) == data


async def test_an_older_image_is_refused(home: Path) -> None:
    async with open_service(home / "pool") as service:
        await fill(service, 1)
    shutil.copytree(home / "images", home / "old")
    async with open_service(home / "pool") as service:
        await fill(service, 2)
    (home / "images").rename(home / "newer")
    (home / "old").rename(home / "images")
    before = files_of(home)
    with pytest.raises(EpochMismatch, match="the image is older"):
        async with open_service(home / "pool"):
            pass
    assert files_of(home) == before


async def test_two_forks_of_a_pool_do_not_share_images(home: Path) -> None:
    async with open_service(home / "pool") as service:
        await fill(service, 1)
    copies = {name: home / f"{name}.fork" for name in ("pool", "images")}
    for name, path in copies.items():
        shutil.copytree(home / name, path)
    async with open_service(home / "pool") as service:
        await fill(service, 2)
    for name, path in copies.items():
        (home / name).rename(home / f"{name}.first")
        path.rename(home / name)
    async with open_service(home / "pool") as service:
        await fill(service, 3)
    with pytest.raises(EpochMismatch, match="of another fork"):
        async with open_service(home / "pool.first"):
            pass


async def test_two_forks_that_crashed_do_not_share_images(home: Path) -> None:
    """No end told them apart, and no checkpoint: their openings did."""
    async with open_service(home / "pool") as service:
        await fill(service, 1)
    set_aside(home, "base")
    for seed, fork in enumerate(("one", "two"), start=2):
        bring_back(home, "base")
        async with open_service(home / "pool") as service:
            await fill(service, seed)
            set_aside(home, fork)
    bring_back(home, "one")
    shutil.rmtree(home / "images")
    shutil.copytree(home / "two" / "images", home / "images")
    with pytest.raises(EpochMismatch, match="of another fork"):
        async with open_service(home / "pool"):
            pass


async def test_a_directory_copied_before_an_end_without_a_checkpoint_is_older(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stamps name no newer checkpoint then: only the end of the epoch tells."""

    def refuse(checkpoint: Checkpoint) -> None:
        raise NoSpace(f"no room for checkpoint {checkpoint.sequence}")

    async with open_service(home / "pool") as service:
        await fill(service, 1)
        await service.checkpoint()
        shutil.copytree(home / "pool", home / "copy")
        await fill(service, 2)
        monkeypatch.setattr(Checkpoint, "reserve", refuse)
    monkeypatch.undo()
    with pytest.raises(EpochMismatch, match="the image is newer"):
        async with open_service(home / "copy"):
            pass


async def test_who_insists_goes_on_and_gives_nothing_back_before_a_check(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_service(home / "pool") as service:
        old = await fill(service, 1)
    shutil.copytree(home / "pool", home / "copy")
    async with open_service(home / "pool") as service:
        await fill(service, 2, at=1000 * BLOCK)  # beside what was there
    (image,) = (home / "images").glob("*.img")
    allocated = image.stat().st_blocks
    monkeypatch.setattr(keeper, "_GIVE_BACK_EVERY_S", 0.01)
    async with open_service(home / "copy", force_older=True) as service:
        assert await read(service) == old
        await trio.sleep(0.2)
    assert image.stat().st_blocks >= allocated, "blocks of the newer directory were punched"
    with pytest.raises(EpochMismatch, match="the image is newer"):
        async with open_service(home / "pool"):
            pass
    async with open_service(home / "copy") as service:
        assert not service.facts()["is_proved"]
        assert (await service.inspection.check(data=True)).is_clean
        assert service.facts()["is_proved"]
        await trio.sleep(0.2)
    async with open_service(home / "copy") as service:
        assert service.facts()["is_proved"]
        await trio.sleep(0.2)
    assert image.stat().st_blocks < allocated


async def test_whoever_only_looks_is_told(home: Path) -> None:
    async with open_service(home / "pool") as service:
        old = await fill(service, 1)
    shutil.copytree(home / "pool", home / "copy")
    async with open_service(home / "pool") as service:
        await fill(service, 2, at=1000 * BLOCK)
    before = files_of(home / "images")
    async with open_service(home / "copy", degraded=True) as service:
        assert await read(service) == old
        assert service.facts()["read_only"]
        assert "the image is newer" in service.facts()["failure"]
        report = await service.inspection.check(data=False)
        assert [problem.where for problem in report.problems] == ["parts"]
        await service.inspection.dump(home / "dump")
    assert files_of(home / "images") == before
    found = repair(home / "copy", home / "repaired")
    assert [item["name"] for item in found.saved] == ["db"]
    assert any("is newer" in note for note in found.notes)
    assert files_of(home / "images") == before


@pytest.mark.parametrize("content", [None, bytes(8192)], ids=["missing", "damaged"])
async def test_a_lost_epoch_file_is_refused_until_somebody_insists(home: Path, content: bytes | None) -> None:
    async with open_service(home / "pool") as service:
        data = await fill(service, 1)
    (home / "pool" / EPOCH_NAME).unlink()
    if content is not None:
        (home / "pool" / EPOCH_NAME).write_bytes(content)
    with pytest.raises(FormatError, match="force_older"):
        async with open_service(home / "pool"):
            pass
    async with open_service(home / "pool", degraded=True) as service:
        assert await read(service) == data
    async with open_service(home / "pool", force_older=True) as service:
        assert await read(service) == data
    async with open_service(home / "pool") as service:
        assert await read(service) == data


async def test_a_restored_directory_takes_the_images_over(home: Path) -> None:
    async with open_service(home / "pool") as service:
        data = await fill(service, 1)
        await service.inspection.dump(home / "dump")
    before = files_of(home / "images")
    with restore.open_dump(home / "dump") as lines:
        restore.restore(lines, home / "restored")
    assert files_of(home / "images") == before
    async with open_service(home / "restored") as service:
        assert await read(service) == data
        assert not service.facts()["is_proved"]
    with pytest.raises(EpochMismatch):
        async with open_service(home / "pool"):
            pass
    async with open_service(home / "restored") as service:
        assert await read(service) == data


async def test_a_truncated_image_is_refused_before_the_epoch_is_raised(home: Path) -> None:
    """Else the right file, brought back, would be refused as older."""
    async with open_service(home / "pool") as service:
        data = await fill(service, 1)
    (image,) = (home / "images").glob("*.img")
    content = image.read_bytes()
    with image.open("r+b") as file:
        file.truncate(DATA_OFFSET_BYTES + 4096)
    with pytest.raises(ImageMismatch, match="truncated"):
        async with open_service(home / "pool"):
            pass
    image.write_bytes(content)
    async with open_service(home / "pool") as service:
        assert await read(service) == data


async def test_a_foreign_image_is_refused_although_somebody_insists(home: Path) -> None:
    """Who takes an older image accepts that something is lost, not that another pool's data is read."""
    async with open_service(home / "pool") as service:
        data = await fill(service, 1)
    (image,) = (home / "images").glob("*.img")
    content = image.read_bytes()
    (home / "others").mkdir()
    create_pool(home / "other", block_bytes=BLOCK, directories=[home / "others"], journal_bytes=1 << 16)
    (foreign,) = (home / "others").glob("*.img")
    image.write_bytes(foreign.read_bytes().ljust(len(content), b"\0"))
    with pytest.raises(ImageMismatch, match="expected"):
        async with open_service(home / "pool", force_older=True):
            pass
    image.write_bytes(content)
    async with open_service(home / "pool") as service:
        assert await read(service) == data


# Legs of mirrors


async def make_mirror(home: Path) -> bytes:
    async with opened(home, PLANE) as service:
        return await fill(service, 1)


def truncate(leg: Path, old: bytes) -> None:
    del old
    with leg.open("r+b") as file:
        file.truncate(DATA_OFFSET_BYTES + 640)


def put_back(leg: Path, old: bytes) -> None:
    leg.write_bytes(old)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("spoil", [truncate, put_back])
async def test_a_leg_that_does_not_fit_is_stale_and_gets_everything(
    pool_home: Path, spoil: Callable[[Path, bytes], None], number: int
) -> None:
    await make_mirror(pool_home)
    legs = [pool_home / "a.img", pool_home / "b.img"]
    old = legs[number].read_bytes()
    async with opened(pool_home, PLANE) as service:
        data = await fill(service, 2)
    spoil(legs[number], old)
    async with opened(pool_home, PLANE) as service:
        assert leg_states(service)[number] == "stale"
        assert "leg-failed" in [event["kind"] for event in service.events()]
        assert await read(service) == data
        assert (await service.upkeep.mirrors.resilver(TWO, rate_bytes=None, progress=quiet)).copied_blocks == 1000
        assert leg_states(service) == ["online", "online"]
    legs[1 - number].unlink()
    async with opened(pool_home, PLANE) as service:
        assert await read(service) == data


async def test_an_older_copy_of_a_leg_that_was_left_behind_gets_everything(pool_home: Path) -> None:
    await make_mirror(pool_home)
    leg = pool_home / "b.img"
    old = leg.read_bytes()
    async with opened(pool_home, PLANE) as service:
        await fill(service, 2)
    leg.rename(pool_home / "away")
    async with opened(pool_home, PLANE) as service:
        volume = service.volume("db")
        await service.write(volume.map_id, 0, noise(10, 3))
        data = await read(service)
    leg.write_bytes(old)
    async with opened(pool_home, PLANE) as service:
        assert leg_states(service) == ["online", "stale"]
        assert (await service.upkeep.mirrors.resilver(TWO, rate_bytes=None, progress=quiet)).copied_blocks == 1000
    (pool_home / "a.img").unlink()
    async with opened(pool_home, PLANE) as service:
        assert await read(service) == data


async def test_a_resilver_that_was_cut_off_begins_where_it_can(pool_home: Path) -> None:
    """The leg says what it said when it was left behind until everything is on it."""
    await make_mirror(pool_home)
    (pool_home / "b.img").rename(pool_home / "away")
    async with opened(pool_home, PLANE) as service:
        await service.write(service.volume("db").map_id, 0, noise(10, 3))
        await service.checkpoint()
        (pool_home / "away").rename(pool_home / "b.img")

        def stop(done: int, total: int) -> None:
            raise IncfsError(f"stopped at {done} of {total}")

        with pytest.raises(IncfsError, match="stopped"):
            await service.upkeep.mirrors.resilver(TWO, rate_bytes=None, progress=stop)
        await service.checkpoint()
    async with opened(pool_home, PLANE) as service:
        assert leg_states(service) == ["online", "stale"]
        report = await service.upkeep.mirrors.resilver(TWO, rate_bytes=None, progress=quiet)
        assert report.copied_blocks < 200


async def test_old_legs_alone_are_refused_and_the_newest_counts_if_somebody_insists(pool_home: Path) -> None:
    first = await make_mirror(pool_home)
    legs = [pool_home / "a.img", pool_home / "b.img"]
    old = [leg.read_bytes() for leg in legs]
    async with opened(pool_home, PLANE):
        pass
    newer = legs[1].read_bytes()
    async with opened(pool_home, PLANE) as service:
        await fill(service, 2, at=1000 * BLOCK)
    for leg, content in zip(legs, (old[0], newer), strict=True):
        leg.write_bytes(content)
    with pytest.raises(EpochMismatch, match="the image is older"):
        async with opened(pool_home, PLANE):
            pass
    async with open_service(pool_home / "pool", pools.tiny_options(), force_older=True) as service:
        assert leg_states(service) == ["stale", "online"]
        assert await read(service) == first


async def test_a_leg_that_is_newer_than_the_directory_is_never_written_over(pool_home: Path) -> None:
    """Directory and one leg lie on a machine that was rolled back, the other leg does not."""
    await make_mirror(pool_home)
    shutil.copytree(pool_home / "pool", pool_home / "old")
    shutil.copy(pool_home / "a.img", pool_home / "old.img")
    async with opened(pool_home, PLANE) as service:
        await fill(service, 2)
    shutil.rmtree(pool_home / "pool")
    (pool_home / "old").rename(pool_home / "pool")
    (pool_home / "old.img").replace(pool_home / "a.img")
    newer = (pool_home / "b.img").read_bytes()
    with pytest.raises(EpochMismatch, match=r"b\.img.*the image is newer"):
        async with opened(pool_home, PLANE):
            pass
    assert (pool_home / "b.img").read_bytes() == newer
