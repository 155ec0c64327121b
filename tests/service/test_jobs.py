"""Long jobs: noted while they are under way, gone on with after a daemon that was cut off, stopped by command."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio

from incfs.admin import run_verb
from incfs.errors import ImageMismatch, JobStopped, NotFound
from incfs.jobs import JOBS_NAME, LEFT_NAME, Job, Request
from incfs.resume import resume_jobs
from incfs.service import Service, open_service
from tests.support import pools

BLOCK = pools.BLOCK
DATA = Random(1).randbytes(2500 * BLOCK)


def noted(home: Path) -> list[Any]:
    found = json.loads((home / "pool" / JOBS_NAME).read_text())
    assert found.pop("version") == 1
    jobs: list[Any] = found.pop("jobs")
    assert not found
    return jobs


def note(home: Path, jobs: list[Any], version: int = 1) -> None:
    (home / "pool" / JOBS_NAME).write_text(json.dumps({"version": version, "jobs": jobs}))


def quiet(done: int, total: int, unit: str) -> None:
    assert unit


async def verb(service: Service, name: str, **arguments: Any) -> Any:
    return await run_verb(service, name, arguments, quiet)


def kinds(service: Service) -> list[str]:
    return [event["kind"] for event in service.events()]


async def cut_off(home: Path, name: str, **arguments: Any) -> None:
    """Begin a slow job, and end the daemon under it."""
    pools.make_pool(home, storages=2, capacity_bytes=8000 * BLOCK)
    async with open_service(home / "pool", pools.tiny_options()) as service, trio.open_nursery() as nursery:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, DATA)
        nursery.start_soon(lambda: verb(service, name, **arguments, rate_bytes=10_000))
        with trio.fail_after(60):
            while not (service.jobs.running() and service.jobs.running()[0].done):
                await trio.sleep(0.001)
        service.jobs.is_ending = True
        nursery.cancel_scope.cancel()


async def test_an_evacuation_goes_on_by_itself(pool_home: Path) -> None:
    await cut_off(pool_home, "storage.evacuate", storage=1)
    assert noted(pool_home) == [["storage.evacuate", "storage 1", {"storage": 1, "rate_bytes": 10_000}]]
    note(pool_home, [["storage.evacuate", "storage 1", {"storage": 1, "rate_bytes": None}]])
    async with open_service(pool_home / "pool", pools.tiny_options()) as service:
        assert service.storages()[0]["used_bytes"]
        await resume_jobs(service)
        assert not service.storages()[0]["used_bytes"]
        assert service.storages()[0]["job"] is None
        assert kinds(service)[-4:] == ["job-resumed", "evacuation-begun", "evacuation-ended", "job-ended"]
        assert noted(pool_home) == []
        assert await service.read(service.volume("db").map_id, 0, len(DATA)) == DATA
        assert (await service.inspection.check(data=True)).is_clean


async def test_what_nobody_has_gone_on_with_stays_noted(pool_home: Path) -> None:
    """A command opens the pool between two daemons, and has a job of its own."""
    await cut_off(pool_home, "storage.evacuate", storage=1)
    async with open_service(pool_home / "pool", pools.tiny_options()) as service:
        await verb(service, "pool.scrub")
    assert [job[:2] for job in noted(pool_home)] == [["storage.evacuate", "storage 1"]]
    async with open_service(pool_home / "pool", pools.tiny_options()) as service:
        await verb(service, "storage.evacuate", storage=1)
    assert noted(pool_home) == []


async def test_a_job_is_listed_and_can_be_stopped(pool_home: Path) -> None:
    pools.make_pool(pool_home, storages=2, capacity_bytes=8000 * BLOCK)
    async with open_service(pool_home / "pool", pools.tiny_options()) as service:
        volume = await service.create_volume("db", 1 << 20)
        await service.write(volume.map_id, 0, DATA)

        async def evacuate() -> None:
            with pytest.raises(JobStopped):
                await verb(service, "storage.evacuate", storage=1, rate_bytes=10_000)

        for stop, arguments in (("pool.stop", {"job": 1}), ("storage.keep", {"storage": 1})):
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(evacuate)
                    while not (service.jobs.running() and service.jobs.running()[0].done):
                        await trio.sleep(0.001)
                    (listed,) = (await verb(service, "pool.jobs"))["jobs"]
                    assert (listed["job"], listed["subject"]) == ("storage.evacuate", "storage 1")
                    assert str(service.storages()[0]["job"]).startswith("evacuate ")
                    await verb(service, stop, **arguments)
            assert noted(pool_home) == []
        assert service.storages()[0]["state"] == "online"
        assert service.storages()[0]["used_bytes"]
        with pytest.raises(NotFound):
            await verb(service, "pool.stop", job=1)


async def test_a_job_that_cannot_go_on_is_told_and_forgotten(pool_home: Path) -> None:
    pools.make_pool(pool_home, storages=2)
    note(pool_home, [["volume.migrate", "volume gone", {"volume": "uuid:1"}]])
    async with open_service(pool_home / "pool", pools.tiny_options()) as service:
        await resume_jobs(service)
        assert kinds(service) == ["job-resumed", "job-failed"]
        await verb(service, "pool.balance")
    assert noted(pool_home) == []


async def test_jobs_of_a_newer_incfs_are_told_of_and_kept(pool_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There was no version: what another release notes would have been obeyed by guess, or written over."""
    pools.make_pool(pool_home, storages=2)
    note(pool_home, [["storage.evacuate", "storage 1", {"storage": 1, "rate_bytes": None}]], version=2)
    text = (pool_home / "pool" / JOBS_NAME).read_text()
    async with open_service(pool_home / "pool", pools.tiny_options()) as service:
        assert "version 2" in caplog.text
        await resume_jobs(service)
        assert kinds(service) == []
        assert (pool_home / "pool" / JOBS_NAME).read_text() == text
        await verb(service, "pool.balance")
    assert noted(pool_home) == []
    assert (pool_home / "pool" / LEFT_NAME).read_text() == text


@pytest.mark.parametrize("text", ["", "{", '["x"]', "[[1]]", '{"version": 1, "jobs": [1]}', '{"version": "1"}'])
async def test_a_damaged_note_is_no_harm(pool_home: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (pools.make_pool(pool_home) / JOBS_NAME).write_text(text)
    async with open_service(pool_home / "pool", pools.tiny_options()) as service:
        assert "cannot be read" in caplog.text
        await resume_jobs(service)
        await verb(service, "pool.scrub")
    assert noted(pool_home) == []


async def test_what_a_removal_left_is_deleted_if_it_is_its_image(pool_home: Path) -> None:
    """Killed when the record was gone and the file was not."""
    pools.make_pool(pool_home, storages=2)
    async with open_service(pool_home / "pool", pools.tiny_options()) as service:
        two = service.storages()[1]
        image = Path(two["path"])
        shutil.copy(image, pool_home / "copy")
        await verb(service, "storage.remove", storage=2)
        assert not image.exists()
        shutil.copy(pool_home / "copy", image)
        await verb(service, "storage.remove", storage=2, left=[two["uuid"], str(image)])
        assert not image.exists()
        await verb(service, "storage.remove", storage=2, left=[two["uuid"], str(image)])
        one = service.storages()[0]["path"]
        with pytest.raises(ImageMismatch):
            await verb(service, "storage.remove", storage=2, left=[two["uuid"], one])
        assert Path(one).exists()


def test_a_job_tells_how_fast_it_is_and_when_it_ends() -> None:
    job = Job(1, Request("pool.scrub", "pool", {}), 0, 4096)
    assert job.to_dict(0, 5.0)["rate_bytes"] is None
    job.note(100, 1000, 5.0)  # it goes on: these were done before
    job.note(300, 1000, 7.0)
    told = job.to_dict(0, 7.0)
    assert (told["percent"], told["done_bytes"], told["total_bytes"]) == (30, 300 * 4096, 1000 * 4096)
    assert (told["rate_bytes"], told["ends"]) == (100 * 4096, "1970-01-01T00:00:07.000000Z")
    assert told["since"] == "1970-01-01T00:00:00.000000Z"
