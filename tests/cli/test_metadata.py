"""``pool metadata`` and what else says where the metadata is, offline and through a daemon."""

from pathlib import Path

import pytest

from incfs.roster import ROSTER_NAME
from tests.cli.conftest import serving
from tests.support.cli import Cli, InProcessCli


def test_a_copy_is_added_listed_and_removed(cli: Cli, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (first,) = cli.json("pool", "metadata", "list")["copies"]
    assert (first["path"], first["state"]) == (str(cli.pool), "online")
    assert "filesystem" in cli.fails(2, "pool", "metadata", "add", other)
    cli.ok("pool", "metadata", "add", other, "--force")
    cli.ok("volume", "create", "db", "1G")
    assert [(c["path"], c["state"]) for c in cli.json("pool", "metadata", "list")["copies"]] == [
        (str(cli.pool), "online"),
        (str(other), "online"),
    ]
    assert cli.json("pool", "show")["pool"]["metadata_copy_count"] == 2
    assert "up to date already" in cli.fails(2, "pool", "metadata", "add", other)
    assert "is open by" in cli.fails(2, "pool", "metadata", "remove", str(cli.pool))
    cli.fails(10, "pool", "metadata", "remove", tmp_path / "third")
    cli.ok("pool", "metadata", "rm", other)
    assert list(other.iterdir()) == []
    assert cli.json("pool", "show")["pool"]["metadata_copy_count"] == 1
    assert [event["kind"] for event in cli.json("events")["events"]][-2:] == ["metadata-added", "metadata-removed"]


def test_a_command_finds_the_daemon_by_any_copy(offline: Cli, tmp_path: Path) -> None:
    offline.ok("pool", "metadata", "add", tmp_path / "other", "--force")
    assert offline.pool is not None
    with serving(offline.pool):
        Cli(tmp_path / "other").ok("volume", "create", "db", "1G")
        assert [volume["name"] for volume in offline.json("volume", "list")["volumes"]] == ["db"]


def test_a_copy_that_is_away_is_reported_and_brought_up_to_date_when_it_is_there(cli: Cli, tmp_path: Path) -> None:
    other, away = tmp_path / "other", tmp_path / "away"
    cli.ok("pool", "metadata", "add", other, "--force")
    other.rename(away)
    cli.ok("volume", "create", "db", "1G")
    states = {copy["path"]: copy["state"] for copy in cli.json("pool", "metadata", "list")["copies"]}
    if isinstance(cli, InProcessCli) and states[str(other)] == "online":
        return  # a daemon keeps the files open: nothing has failed
    assert states == {str(cli.pool): "online", str(other): "stale"}
    away.rename(other)
    cli.ok("volume", "create", "log", "1G")
    assert {copy["state"] for copy in cli.json("pool", "metadata", "list")["copies"]} == {"online"}


def test_a_pool_is_made_with_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maker = InProcessCli(None, capsys)
    first, second = tmp_path / "a", tmp_path / "b"
    assert "filesystem" in maker.fails(2, "pool", "create", first, "--metadata-mirror", second)
    maker.ok("pool", "create", first, "--metadata-mirror", second, "--force")
    assert (second / ROSTER_NAME).exists()
    cli = InProcessCli(second, capsys)
    assert cli.json("pool", "show")["pool"]["metadata_paths"] == [str(first), str(second)]
    cli.ok("volume", "create", "db", "1G")


def test_mirror_makes_all_of_it_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maker = InProcessCli(None, capsys)
    first, second = tmp_path / "a", tmp_path / "b"
    assert "two to four" in maker.fails(2, "pool", "create", first, "--mirror")
    assert "two to four" in maker.fails(2, "pool", "create", first, second)
    assert "filesystem" in maker.fails(2, "pool", "create", "--mirror", first, second)
    maker.ok("pool", "create", "--mirror", first, second, "--force")
    cli = InProcessCli(first, capsys)
    (storage,) = cli.json("storage", "list")["storages"]
    assert [Path(leg["path"]).parent for leg in storage["legs"]] == [first / "images", second / "images"]
    assert cli.json("pool", "show")["pool"]["metadata_warning"] is None
    assert cli.ok("pool", "check", "--data").startswith("clean")


def test_it_is_said_when_data_has_more_copies_than_metadata(cli: Cli, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    done = cli.run("storage", "add", tmp_path / "a", "--mirror", tmp_path / "b", "--force")
    assert done.returncode == 0
    assert "warning" in done.stderr
    assert "pool metadata add" in cli.json("pool", "show")["pool"]["metadata_warning"]
    cli.ok("pool", "metadata", "add", tmp_path / "other", "--force")
    assert cli.json("pool", "show")["pool"]["metadata_warning"] is None
