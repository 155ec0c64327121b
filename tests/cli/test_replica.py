"""``incfs replica``: a volume and its copy in another pool of this host."""

import random
import subprocess
from pathlib import Path

import pytest
import trio

from incfs.recovery import create_pool
from incfs.service import open_service
from tests.cli.test_transfer import _fill, contents
from tests.support.cli import Cli, environment


@pytest.fixture
def pools(tmp_path: Path) -> tuple[Cli, Cli]:
    for name in ("here", "there"):
        create_pool(tmp_path / name, capacity_bytes=1 << 30)
    trio.run(_fill, tmp_path / "here", 2)
    return Cli(tmp_path / "here"), Cli(tmp_path / "there")


async def _go_on(directory: Path) -> None:
    async with open_service(directory) as service:
        volumes = service.volumes()
        for volume in volumes:
            await service.write(volume.map_id, 4096, random.Random(volume.id).randbytes(600_000))
        await service.create_snapshots([(volume.id, "next") for volume in volumes])


def test_a_group_is_followed_promoted_and_refused(pools: tuple[Cli, Cli]) -> None:
    here, there = pools
    assert here.pool is not None
    here.ok("replica", "add", "db", "log", "--to", there.pool, "--name", "off", "--as", "one", "--as", "two")
    assert here.fails(2, "replica", "add", "db", "--to", here.pool, "--name", "self")
    assert here.json("replica", "run")["runs"][0]["stream_bytes"] > 0
    assert contents(there, "one") == contents(here, "db")
    trio.run(_go_on, here.pool)
    # Cut off in the middle, for what cannot be compressed takes ten minutes: the rest follows, and nothing twice.
    cut = subprocess.Popen(here.command("replica", "run", "--rate", "2K"), env=environment())
    with pytest.raises(subprocess.TimeoutExpired):
        cut.wait(4)
    cut.kill()
    cut.wait()
    here.ok("replica", "run", "off")
    assert contents(there, "one") == contents(here, "db")
    assert contents(there, "two") == contents(here, "log")
    status = here.json("replica", "list")["replicas"][0]
    assert (status["last_error"], status["volumes"], len(status["common"])) == (None, ["db", "log"], 2)
    assert "held by replica-off" in here.fails(11, "snapshot", "remove", "db@next")
    assert "held by replica-off" in there.fails(11, "snapshot", "remove", "one@next")
    # What both have is removed on this side: its bookmark is enough.
    assert [row["name"] for row in here.json("bookmark", "list")["bookmarks"]] == ["db#replica-off", "log#replica-off"]
    here.ok("snapshot", "release", "replica-off", "db@next", "log@next")
    here.ok("snapshot", "remove", "db@next", "log@next")
    here.ok("snapshot", "create", "db@later", "log@later")
    assert here.json("replica", "run", "off")["runs"][0]["stream_bytes"] < 5000
    assert contents(there, "one").items() >= contents(here, "db").items()
    there.ok("replica", "promote", "one")
    there.ok("snapshot", "create", "one@mine")
    assert "promoted" in here.fails(12, "replica", "run")
    assert "promoted" in here.json("replica", "status", "off")["replica"]["last_error"]
    here.ok("replica", "remove", "off")
    assert here.json("bookmark", "list")["bookmarks"] == []
    here.ok("snapshot", "remove", "db@later")
    here.fails(10, "replica", "status", "off")


def test_a_volume_of_a_group_that_the_target_has_already_is_no_error(pools: tuple[Cli, Cli]) -> None:
    """It ended with "2 is not older than 2"."""
    here, there = pools
    assert there.pool is not None
    here.ok("replica", "add", "db", "log", "--to", there.pool, "--name", "both")
    here.ok("replica", "run", "both")
    here.ok("snapshot", "create", "db@more", "log@more")
    here.ok("replica", "add", "db", "--to", there.pool, "--name", "one")
    here.ok("replica", "run", "one")
    assert here.json("replica", "run", "both")["runs"][0]["stream_bytes"] > 0
    assert here.json("replica", "run", "both")["runs"][0]["stream_bytes"] == 0
    for name in ("db", "log"):
        assert contents(there, name) == contents(here, name)
    here.ok("snapshot", "create", "db@alone")
    here.ok("replica", "run", "one")
    assert here.json("replica", "run", "both")["runs"][0]["stream_bytes"] == 0
