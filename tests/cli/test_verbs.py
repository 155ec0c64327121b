"""Every verb, offline and through a daemon: the same output and the same exit codes."""

import re
from pathlib import Path

import pytest

from incfs.errors import NoSpace
from tests.support.cli import Cli, InProcessCli

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


def test_volume_life(cli: Cli) -> None:
    assert cli.ok("volume", "create", "db", "1G") == ""
    made = cli.json("volume", "create", "log", 4096)["volume"]
    assert made["size_bytes"] == 4096
    assert RFC3339.fullmatch(made["created"])
    assert [volume["name"] for volume in cli.json("volume", "list")["volumes"]] == ["db", "log"]
    cli.ok("volume", "resize", "db", "2G")
    assert "--shrink" in cli.fails(2, "volume", "resize", "db", "1G")
    cli.ok("volume", "resize", "db", "1.5G", "--shrink")
    cli.ok("volume", "resize", "db", "+1G")
    assert "would be lost" in cli.fails(2, "volume", "resize", "db", "-1G")
    cli.fails(2, "volume", "resize", "db", "-9G", "--shrink")
    cli.ok("volume", "resize", "db", "-1G", "--shrink")
    cli.ok("volume", "rename", "db", "data")
    shown = cli.json("volume", "show", "data")["volume"]
    assert shown["size_bytes"] == 3 << 29
    assert shown["mode"] == "0600"
    assert cli.json("volume", "show", f"uuid:{shown['uuid']}")["volume"] == shown
    assert "would free" in cli.ok("volume", "remove", "-n", "data")
    cli.ok("volume", "rm", "data")
    assert [volume["name"] for volume in cli.json("volume", "ls")["volumes"]] == ["log"]
    cli.fails(10, "volume", "show", "data")
    assert cli.ok("pool", "check").startswith("clean")


def test_snapshot_life(cli: Cli) -> None:
    cli.ok("volume", "create", "db", "1G")
    cli.ok("volume", "create", "log", "1G")
    cli.ok("snapshot", "create", "db@a", "log@a")
    made = cli.json("snapshot", "create", "db@b")["snapshots"]
    assert [snapshot["name"] for snapshot in made] == ["db@b"]
    cli.fails(1, "snapshot", "create", "db@a")
    assert [row["name"] for row in cli.json("snapshot", "list")["snapshots"]] == ["db@a", "db@b", "log@a"]
    assert [row["name"] for row in cli.json("snapshot", "ls", "db")["snapshots"]] == ["db@a", "db@b"]
    cli.ok("snapshot", "rename", "db@a", "x")
    cli.ok("snapshot", "rename", "db@x", "db@y")
    assert cli.json("snapshot", "show", "db@y")["snapshot"]["volume"] == "db"
    difference = cli.json("snapshot", "diff", "--from", "y", "db@b")
    assert (difference["changed_bytes"], difference["ranges"]) == (0, [])
    assert "has snapshots (y, b)" in cli.fails(11, "volume", "remove", "db")
    assert "would free" in cli.ok("snapshot", "remove", "--dry-run", "db@y")
    cli.ok("snapshot", "rm", "db@y")
    cli.fails(10, "snapshot", "show", "db@y")
    removal = cli.json("volume", "remove", "db", "--snapshots")["removal"]
    assert [item["name"] for item in removal["items"]] == ["db@b", "db"]
    assert [row["name"] for row in cli.json("snapshot", "list")["snapshots"]] == ["log@a"]
    assert cli.ok("pool", "check", "--data").startswith("clean")


def test_pool_and_storage(cli: Cli, tmp_path: Path) -> None:
    pool = cli.json("pool", "show")["pool"]
    assert pool["directory"] == str(cli.pool)
    assert pool["block_bytes"] == 4096
    assert "block" in cli.ok("pool", "show")
    (first,) = cli.json("storage", "list")["storages"]
    assert first["capacity_bytes"] == 1 << 30
    added = cli.json("storage", "add", tmp_path / "second.img", "--capacity", "2G", "--class", "ssd")["storage"]
    assert added["capacity_bytes"] == 2 << 30
    cli.ok("storage", "add", tmp_path / "third.img", "--redundancy", "raid6")
    rows = cli.json("storage", "ls")["storages"]
    assert [(row["class"], row["redundancy"]) for row in rows[1:]] == [("ssd", "none"), ("", "raid6")]
    cli.fails(2, "storage", "add", tmp_path / "x.img", "--redundancy", "hope")
    assert cli.json("pool", "check")["check"]["is_clean"] is True


def test_debug(cli: Cli) -> None:
    cli.ok("volume", "create", "db", "1G")
    assert cli.json("debug", "dump")["records"]
    assert cli.ok("debug", "dump").count("\n") == len(cli.json("debug", "dump")["records"])
    assert isinstance(cli.json("debug", "log")["records"], list)
    cli.ok("debug", "log")
    assert cli.json("debug", "map", "db", 0)["page_index"] == 0
    cli.ok("debug", "map", "db", 0)


def test_map_of_an_empty_volume(cli: Cli) -> None:
    cli.ok("volume", "create", "db", "1G")
    document = cli.json("volume", "map", "db")
    assert document["target"] == "db"
    assert all(extent["kind"] == "zero" for extent in document["extents"])


def test_lists_for_people_and_for_scripts(cli: Cli) -> None:
    cli.ok("volume", "create", "db", "1536M")
    cli.ok("volume", "create", "a name", "0")
    people = cli.ok("volume", "list").splitlines()
    assert people[0].split()[:3] == ["NAME", "SIZE", "MAPPED"]
    assert "1.5 GiB" in people[2]
    assert not any(line.endswith(" ") for line in people)
    scripts = cli.ok("volume", "list", "-H", "-p", "-o", "name,size,snapshot_count")
    assert scripts == f"a name\t0\t0\ndb\t{3 << 29}\t0\n"
    assert cli.ok("volume", "list", "-H", "-o", "size_bytes").splitlines() == ["0 B", "1.5 GiB"]
    assert "there are: name, uuid" in cli.fails(2, "volume", "list", "-o", "colour")


def test_names_that_cannot_be(cli: Cli) -> None:
    for name in ("a/b", ".a", "a@b", "a#b", "a\tb", "x" * 201, ""):
        cli.fails(2, "volume", "create", name, "1G")
    cli.ok("volume", "create", "ünïcode 漢", "1G")
    assert cli.ok("volume", "list", "-H", "-o", "name") == "ünïcode 漢\n"
    cli.fails(1, "volume", "create", "ünïcode 漢", "1G")


def test_columns_are_known_also_where_a_list_is_empty(cli: Cli, tmp_path: Path) -> None:
    """What a list without rows says it has is what one with rows has."""
    lists = {
        ("volume", "list"): "volumes",
        ("snapshot", "list"): "snapshots",
        ("bookmark", "list"): "bookmarks",
        ("replica", "list"): "replicas",
        ("volume", "map", "db"): "extents",
        ("snapshot", "holds"): "holds",
        ("snapshot", "diff", "db@a"): "ranges",
    }
    empty = {}
    for verb in lists:
        if verb[-1] == "db":
            cli.ok("volume", "create", "db", "0")
        if verb[-1] == "db@a":
            cli.ok("snapshot", "create", "db@a")
        error = cli.fails(2, *verb, "-o", "none")
        assert "no column 'none'; there are: " in error, verb
        empty[verb] = set(error.rpartition(": ")[2].strip().split(", "))
    cli.ok("volume", "remove", "db", "--snapshots")
    (tmp_path / "image").write_bytes(b"x" * 4096)
    cli.ok("import", "db", tmp_path / "image", "--snapshot", "a")
    cli.ok("snapshot", "hold", "t", "db@a")
    cli.ok("bookmark", "create", "db@a", "mark")
    cli.ok("replica", "add", "db", "--to", tmp_path)
    for verb, key in lists.items():
        (row,) = cli.json(*verb)[key]
        assert empty[verb] == set(row), verb
    assert "there are: number, job" in cli.fails(2, "pool", "jobs", "-o", "none")


def test_a_replica_is_in_a_pool_that_is_there(cli: Cli, tmp_path: Path) -> None:
    cli.ok("volume", "create", "db", "1M")
    assert "there is no pool" in cli.fails(2, "replica", "add", "db", "--to", tmp_path / "foo")
    cli.ok("replica", "add", "db", "--to", "ssh://host/foo")


def test_images_are_made_on_disks_that_are_mounted(tmp_path: Path, offline: Cli) -> None:
    """A directory whose parent is missing is on a disk that is not there."""
    error = offline.fails(2, "pool", "create", tmp_path / "new", "--dir", tmp_path / "disk/images")
    assert f"there is no {tmp_path}/disk for images: mount its disk" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pool"]


def test_health_is_a_line_and_an_exit_code(cli: Cli) -> None:
    assert cli.ok("pool", "show").splitlines()[0] == "health: sound"
    assert cli.ok("pool", "status") == "health: sound\n"
    assert cli.json("pool", "status")["health"] == {"state": "sound", "reasons": [], "line": "sound", "exit_code": 0}


def test_legs_of_a_mirror_read_well(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    cli.json("storage", "add", tmp_path / "a", "--mirror", tmp_path / "b.img", "--force")
    row = cli.ok("storage", "list", "-H", "-o", "redundancy,legs").splitlines()[1]
    assert row == f"mirror 2/2\t{cli.json('storage', 'list')['storages'][1]['path']} (online),{tmp_path}/b.img (online)"
    assert "{" not in cli.ok("storage", "list", "-o", "legs")


def test_an_import_that_was_cut_off_is_seen(cli: Cli) -> None:
    cli.ok("volume", "create", "db.importing", "1M")
    listed = cli.run("volume", "list")
    assert "importing" in listed.stdout
    assert "`incfs volume remove db.importing` gives it up" in listed.stderr
    assert cli.ok("volume", "list", "-H", "-o", "name,state") == "db.importing\timporting\n"


def test_a_restore_that_fails_leaves_nothing(
    offline: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = InProcessCli(offline.pool, capsys)
    here.ok("volume", "create", "db", "1M")
    here.ok("pool", "dump", tmp_path / "dump")
    again = tmp_path / "again"
    for part in ("incfs.builder.Journal.create", "incfs.builder.write_superblock"):
        with monkeypatch.context() as patched:
            patched.setattr(part, raise_no_space)
            assert "no room" in here.fails(13, "pool", "restore", again, "--from", tmp_path / "dump")
        assert list(again.iterdir()) == []
    here.ok("pool", "restore", again, "--from", tmp_path / "dump")
    restored = InProcessCli(again, capsys)
    assert [volume["name"] for volume in restored.json("volume", "list")["volumes"]] == ["db"]


def test_a_creation_that_fails_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = InProcessCli(None, capsys)
    create = ("pool", "create", tmp_path / "pool", "--dir", tmp_path / "images")
    with monkeypatch.context() as patched:
        patched.setattr("incfs.recovery.Journal.create", raise_no_space)
        assert "no room" in here.fails(13, *create)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]
    here.ok(*create)


def raise_no_space(*arguments: object, **options: object) -> None:
    raise NoSpace(f"no room for {len(arguments) + len(options)} things")
