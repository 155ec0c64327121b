"""``incfs top``."""

from tests.support.cli import Cli


def test_top_looks_as_often_as_asked(cli: Cli) -> None:
    cli.ok("volume", "create", "db", "1M")
    shown = cli.ok("top", "-n", 2, "-d", 0.1)
    assert shown.count("OPERATION") == 2
    assert "db" in shown
    activity = cli.json("top", "-n", 1)["activity"]
    assert activity["operations"] == {}
    assert [row["name"] for row in activity["volumes"]] == ["db"]
