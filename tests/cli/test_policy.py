"""``incfs policy``, offline and through a daemon."""

import json
from pathlib import Path

from tests.support.cli import Cli

POLICY = """
[template.gold]
schedule = "hourly"
keep = { last = 2 }

[volume."db*"]
use = ["gold"]
"""


def test_policy_life(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(POLICY)
    cli.ok("volume", "create", "db", "1M")
    assert cli.ok("policy", "show") == ""
    assert cli.ok("policy", "check", file) == ""
    assert cli.ok("policy", "set", file) == ""
    assert cli.ok("policy", "show") == POLICY
    rows = {row["key"]: row for row in cli.json("policy", "show", "--effective", "db")["effective"]}
    assert rows["keep"] == {"key": "keep", "value": {"last": 2}, "from": "[template.gold], line 4"}
    assert "[template.gold], line 3" in cli.ok("policy", "show", "--effective", "db", "-H")
    planned = cli.json("policy", "run", "-n")["run"]
    assert [action["result"] for action in planned["actions"]] == ["planned"]
    assert cli.json("snapshot", "list")["snapshots"] == []
    done = cli.json("policy", "run")["run"]
    assert [(action["action"], action["result"], action["volumes"]) for action in done["actions"]] == [
        ("snapshot", "done", ["db"])
    ]
    assert done["next_due"].endswith("00:00.000000Z")
    assert cli.ok("policy", "run") == ""
    (snapshot,) = cli.json("snapshot", "list")["snapshots"]
    assert snapshot["tag"] == "policy"
    explained = cli.json("policy", "explain", "db")
    assert explained["schedule"] == "hourly"
    assert [(row["kept"], row["reasons"]) for row in explained["snapshots"]] == [(True, ["last 1 of 2"])]
    assert "last 1 of 2" in cli.ok("policy", "explain", "db")
    assert explained["notes"] == []
    file.write_text('[volume."*"]\nverify = "never"\nzero_elision = false\n')
    cli.ok("policy", "set", file)
    assert [note.split(":")[0] for note in cli.json("policy", "explain", "db")["notes"]] == [
        'verify = "never"',
        "zero_elision = false",
    ]
    assert "policy-snapshot" in cli.ok("events")


def test_errors_have_a_line_and_exit_2(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("[pool]\n\nlow_watre = 1\n")
    for verb in ("set", "check"):
        assert "line 3 of the policy: unknown key 'low_watre'" in cli.fails(2, "policy", verb, file)
    file.write_bytes(b"\xff")
    assert "not UTF-8" in cli.fails(2, "policy", "check", file)
    cli.fails(1, "policy", "check", tmp_path / "none")
    cli.fails(10, "policy", "show", "--effective", "db")
    cli.fails(10, "policy", "explain", "db")


def test_what_failed_is_exit_3(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('[volume."*"]\nschedule = "hourly"\nbefore = ["/bin/false"]\n')
    cli.ok("volume", "create", "db", "1M")
    cli.ok("policy", "set", file)
    done = cli.run("policy", "run", "--hooks", "--json")
    assert done.returncode == 3
    (action,) = json.loads(done.stdout)["run"]["actions"]
    assert action["result"] == "failed"
    assert "/bin/false ended with 1" in action["error"]


def test_a_scrub_that_is_new_begins_when_it_is_due_next_and_that_is_told(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('[pool]\nscrub = "monthly"\nbalance = "yearly"\n[volume."*"]\nmigrate = "weekly"\n')
    cli.ok("volume", "create", "db", "1M")
    said = cli.ok("policy", "set", file).splitlines()
    assert [line.split(": first at 2")[0] for line in said] == ["scrub", "balance", "migrate weekly"]
    assert said[0].endswith("-01T00:00:00.000000Z")
    assert cli.json("policy", "run")["run"]["actions"] == []
    first = cli.json("policy", "set", file)["first_runs"]
    assert [f"{row['task']}: first at {row['due']}" for row in first] == said


def test_a_hook_that_is_not_there_is_found_when_the_policy_is_set(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('[template.t]\nschedule = "hourly"\nafter = ["/usr/local/bin/no-such-hook", "x"]\n')
    assert "line 3 of the policy: after names /usr/local/bin/no-such-hook" in cli.fails(2, "policy", "set", file)
    assert cli.ok("policy", "show") == ""
    cli.ok("policy", "check", file)
