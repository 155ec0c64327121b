"""Clones and holds by command, offline and through a daemon."""

from tests.support.cli import Cli


def test_clone_life(cli: Cli) -> None:
    cli.ok("volume", "create", "db", "1M")
    cli.ok("snapshot", "create", "db@a")
    made = cli.json("volume", "clone", "db@a", "try")["volume"]
    assert (made["size_bytes"], made["mapped_bytes"], made["origin"]) == (1 << 20, 0, "db@a")
    assert cli.json("snapshot", "show", "db@a")["snapshot"]["clones"] == ["try"]
    assert "origin of try" in cli.fails(11, "snapshot", "remove", "db@a")
    assert "origin of try" in cli.fails(11, "volume", "remove", "db", "--snapshots")
    cli.fails(1, "volume", "clone", "db@a", "try")
    cli.fails(10, "volume", "clone", "db@b", "other")
    flat = cli.json("volume", "flatten", "try")["volume"]
    assert (flat["origin"], flat["flattened"]) == (None, True)
    cli.ok("volume", "remove", "db", "--snapshots")
    cli.ok("volume", "remove", "try")
    assert cli.ok("pool", "check").startswith("clean")


def test_hold_life(cli: Cli) -> None:
    cli.ok("volume", "create", "db", "1M")
    cli.ok("snapshot", "create", "db@a")
    cli.ok("snapshot", "create", "db@b")
    cli.ok("snapshot", "hold", "backup", "db@a", "db@b")
    lease = cli.json("snapshot", "hold", "lease", "db@b", "--expires", "1h")["holds"][-1]
    assert (lease["name"], lease["tag"]) == ("db@b", "lease")
    assert lease["expires"].endswith("Z")
    rows = [line.split("\t") for line in cli.ok("snapshot", "holds", "-H", "db").splitlines()]
    assert [row[:2] for row in rows] == [["db@a", "backup"], ["db@b", "backup"], ["db@b", "lease"]]
    assert "held by backup" in cli.fails(11, "snapshot", "remove", "db@a")
    assert "held by backup" in cli.fails(11, "snapshot", "remove", "-n", "db@a")
    assert cli.json("snapshot", "show", "db@b")["snapshot"]["holds"] == ["backup", "lease"]
    cli.ok("snapshot", "release", "backup", "db@a")
    cli.fails(10, "snapshot", "release", "backup", "db@a")
    cli.fails(2, "snapshot", "hold", "x/y", "db@a")
    cli.fails(2, "snapshot", "hold", "x", "db@a", "--expires", "soon")
    cli.ok("snapshot", "remove", "db@a")


def test_rollback(cli: Cli) -> None:
    cli.ok("volume", "create", "db", "1M")
    cli.ok("snapshot", "create", "db@a")
    cli.ok("volume", "resize", "db", "2M")
    cli.ok("snapshot", "create", "db@b")
    assert "newer than a (b)" in cli.fails(11, "volume", "rollback", "db@a")
    planned = cli.json("volume", "rollback", "-n", "--force", "db@a")["rollback"]
    assert (planned["removed_snapshots"], planned["freed_bytes"]) == (["db@b"], 0)
    cli.ok("snapshot", "hold", "backup", "db@b")
    assert "held by backup" in cli.fails(11, "volume", "rollback", "--force", "db@a")
    cli.ok("snapshot", "release", "backup", "db@b")
    assert cli.ok("volume", "rollback", "--force", "db@a") == ""
    assert cli.json("volume", "show", "db")["volume"]["size_bytes"] == 1 << 20
    assert [row["name"] for row in cli.json("snapshot", "list")["snapshots"]] == ["db@a"]
    cli.fails(10, "volume", "rollback", "db@b")
    assert cli.ok("pool", "check").startswith("clean")


def test_removal_of_a_range(cli: Cli) -> None:
    cli.ok("volume", "create", "db", "1M")
    for name in "abcdef":
        cli.ok("snapshot", "create", f"db@{name}")
    assert "swap them" in cli.fails(2, "snapshot", "remove", "db@d%b")
    cli.fails(10, "snapshot", "remove", "db@b%x")
    planned = cli.json("snapshot", "remove", "-n", "db@b%d", "db@c", "db@f")["removal"]
    assert [item["name"] for item in planned["items"]] == ["db@b", "db@c", "db@d", "db@f"]
    cli.ok("snapshot", "hold", "backup", "db@c")
    cli.fails(11, "snapshot", "remove", "db@b%d")
    cli.ok("snapshot", "release", "backup", "db@c")
    cli.ok("snapshot", "remove", "db@b%d")
    assert [row["name"] for row in cli.json("snapshot", "list")["snapshots"]] == ["db@a", "db@e", "db@f"]
    cli.ok("snapshot", "create", "db@e%")
    cli.ok("snapshot", "remove", "db@e%")
    cli.ok("snapshot", "remove", "db@e%", "db@%a")
    assert cli.json("snapshot", "list")["snapshots"] == []


def test_diff_in_the_shape_of_the_changed_block_service(cli: Cli) -> None:
    cli.ok("volume", "create", "db", "1M")
    cli.ok("snapshot", "create", "db@a")
    cli.ok("snapshot", "create", "db@b")
    document = cli.json("snapshot", "diff", "--from", "a", "db@b", "--start", "64K", "--max-results", "5")
    assert document["block_metadata_type"] == "VARIABLE_LENGTH"
    assert document["volume_capacity_bytes"] == 1 << 20
    assert (document["block_metadata"], document["next_offset"]) == ([], None)


def test_bookmark_life(cli: Cli) -> None:
    cli.ok("volume", "create", "db", "1M")
    cli.ok("snapshot", "create", "db@a")
    made = cli.json("bookmark", "create", "db@a", "db#m")["bookmark"]
    assert (made["name"], made["snapshot"], made["size_bytes"]) == ("db#m", "a", 1 << 20)
    assert made["uuid"] == cli.json("snapshot", "show", "db@a")["snapshot"]["uuid"]
    cli.ok("snapshot", "bookmark", "db@a", "n")
    cli.fails(1, "bookmark", "create", "db@a", "m")
    cli.fails(10, "bookmark", "create", "db@a", "other#m")
    cli.fails(2, "bookmark", "create", "db@a", "x@y")
    cli.ok("snapshot", "create", "db@b")
    assert cli.ok("snapshot", "remove", "db@a") == ""
    rows = [line.split("\t") for line in cli.ok("bookmark", "list", "-H", "db", "-o", "name,snapshot").splitlines()]
    assert [row[0] for row in rows] == ["db#m", "db#n"]
    for base in ("#m", "db#m", f"uuid:{made['uuid']}"):
        assert cli.json("snapshot", "diff", "--from", base, "db@b")["ranges"] == []
        assert cli.json("send", "-n", "-i", base, "db@b")["stream"]["snapshots"][0]["name"] == "db@b"
    cli.fails(10, "send", "-n", "-i", "#x", "db@b")
    cli.fails(2, "bookmark", "remove", "db@b")
    cli.fails(10, "bookmark", "remove", "db#m", "db#x")
    cli.ok("bookmark", "rm", "db#m", "db#n")
    assert cli.json("bookmark", "list")["bookmarks"] == []
    cli.fails(10, "snapshot", "diff", "--from", "#m", "db@b")
    assert cli.ok("pool", "check").startswith("clean")
