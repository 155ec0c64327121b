"""``-n``: what moves or destroys says beforehand how much, and why, and changes nothing."""

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import typer

from incfs.cli import app
from tests.support.cli import Cli

MIB = 1 << 20
DESTROYS_OR_MOVES = (
    "balance", "bookmark remove", "evacuate", "flatten", "import", "migrate", "restripe", "rollback", "send",
    "snapshot remove", "storage remove", "volume remove",
)  # fmt: skip


def commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Walk the tree of commands."""
    if isinstance(getattr(command, "commands", None), dict):
        for name, child in command.commands.items():
            yield from commands(child, f"{path} {name}".strip())
    else:
        yield path, command


@pytest.mark.parametrize("ending", DESTROYS_OR_MOVES)
def test_whatever_moves_or_destroys_can_say_so_beforehand(ending: str) -> None:
    found = [command for name, command in commands(typer.main.get_command(app)) if f" {name}".endswith(f" {ending}")]
    assert len(found) == 1
    assert {"-n", "--dry-run"} <= {option for parameter in found[0].params for option in parameter.opts}


def state(cli: Cli) -> list[Any]:
    """Everything that a move or removal changes."""
    storages = cli.json("storage", "list")["storages"]
    volumes = [volume["name"] for volume in cli.json("volume", "list")["volumes"]]
    return [
        [(row["id"], row["path"], row["used_bytes"], row["state"]) for row in storages],
        [cli.json("volume", "map", name) for name in volumes],
        cli.json("snapshot", "list"),
        cli.json("bookmark", "list"),
        cli.json("pool", "jobs"),
        [os.path.exists(row["path"]) for row in storages],
    ]


def told(cli: Cli, *command: object) -> int:
    """Give the bytes that a dry run tells, in words and in JSON, of; it changed nothing."""
    before = state(cli)
    plan = cli.json(*command, "-n")["plan"]
    assert plan.pop("dry_run") is True
    reason = plan.pop("reason")
    ((name, size_bytes),) = plan.items()
    said = cli.ok(*command, "-n")
    assert said.startswith(f"would {name.removesuffix('d_bytes').replace('copie', 'copy')} ")
    assert said.endswith(f"({size_bytes} bytes): {reason}\n")
    assert state(cli) == before
    assert isinstance(size_bytes, int)
    return size_bytes


@pytest.fixture
def filled(cli: Cli, tmp_path: Path) -> Cli:
    """A pool with 3 MiB in ``db`` on storage volume 1, of which its snapshot has one more, and an empty one, 2."""
    source = tmp_path / "db.img"
    source.write_bytes(Random(1).randbytes(3 * MIB))
    cli.ok("import", "db", source, "--snapshot", "s")
    source.write_bytes(Random(2).randbytes(MIB) + source.read_bytes()[MIB:])
    cli.ok("import", "db", source, "--incremental", "--snapshot", "t")
    cli.ok("storage", "add", tmp_path / "second.img", "--capacity", "64M")
    return cli


def used(cli: Cli) -> dict[int, int]:
    return {row["id"]: row["used_bytes"] for row in cli.json("storage", "list")["storages"]}


def test_an_evacuation_and_a_removal(filled: Cli, tmp_path: Path) -> None:
    assert "holds 4194304 bytes" in filled.fails(11, "storage", "remove", 1, "-n")
    assert told(filled, "storage", "evacuate", 1) == 4 * MIB
    filled.fails(2, "storage", "evacuate", 1, "--cancel", "-n")
    assert filled.json("storage", "evacuate", 1)["move"]["moved_bytes"] == 4 * MIB
    assert told(filled, "storage", "evacuate", 1) == 0
    before = state(filled)
    image = before[0][0][1]
    assert filled.ok("storage", "remove", 1, "-n") == f"would delete {image}: it holds no data\n"
    assert filled.json("storage", "remove", 1, "-n")["images"] == [image]
    assert state(filled) == before
    filled.ok("storage", "remove", 1)
    assert not os.path.exists(image)
    assert "the only one" in filled.fails(2, "storage", "evacuate", 2, "-n")
    assert "the only one" in filled.fails(2, "storage", "remove", 2, "-n")


def test_an_evacuation_without_room_says_how_much_is_missing(filled: Cli, tmp_path: Path) -> None:
    filled.ok("storage", "evacuate", 1)
    filled.ok("storage", "remove", 1)
    filled.ok("storage", "add", tmp_path / "third.img", "--capacity", "3M")
    assert told(filled, "storage", "evacuate", 2) == 4 * MIB
    assert "too little" in filled.ok("storage", "evacuate", 2, "-n")


def test_a_balance(filled: Cli, tmp_path: Path) -> None:
    filled.ok("storage", "evacuate", 1)
    filled.ok("storage", "remove", 1)
    filled.ok("storage", "add", tmp_path / "third.img", "--capacity", "64M")
    planned = told(filled, "pool", "balance")
    assert "from 2 to 3; striped volumes stay" in filled.ok("pool", "balance", "-n")
    moved = filled.json("pool", "balance")["move"]["moved_bytes"]
    assert MIB < moved < 3 * MIB
    assert abs(moved - planned) <= MIB // 8
    assert told(filled, "pool", "balance") == 0
    assert "differ by less than" in filled.ok("pool", "balance", "-n")


def test_restriping(filled: Cli) -> None:
    filled.fails(2, "volume", "restripe", "db", "-n")
    filled.fails(2, "volume", "restripe", "db", "--stripe-columns", 9, "-n")
    filled.fails(2, "volume", "restripe", "db", "--stripe-columns", 2, "--new-only", "-n")
    command = ("volume", "restripe", "db", "--stripe-columns", 2, "--stripe-unit", "64K")
    planned = told(filled, *command)
    assert planned == 2 * MIB
    assert filled.json(*command)["move"]["moved_bytes"] == planned
    assert told(filled, "volume", "restripe", "db") == 0


def test_a_migration(filled: Cli, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[volume."db"]\nplace = ["id=2"]\n')
    filled.run("policy", "set", policy)
    planned = told(filled, "volume", "migrate", "db")
    assert planned == 4 * MIB
    assert filled.json("volume", "migrate", "db")["move"]["moved_bytes"] == planned


def test_flattening(filled: Cli, tmp_path: Path) -> None:
    filled.ok("volume", "clone", "db@s", "clone")
    before = sum(used(filled).values())
    planned = told(filled, "volume", "flatten", "clone")
    assert planned == 3 * MIB
    filled.ok("volume", "flatten", "clone")
    assert sum(used(filled).values()) - before == planned
    assert told(filled, "volume", "flatten", "clone") == 0


def test_forgetting_a_bookmark(filled: Cli) -> None:
    filled.ok("bookmark", "create", "db@s", "m")
    before = state(filled)
    assert filled.ok("bookmark", "remove", "db#m", "-n") == "would forget db#m: a bookmark holds no data\n"
    assert filled.json("bookmark", "remove", "db#m", "-n") == {"removed": [], "would_remove": ["db#m"]}
    filled.fails(10, "bookmark", "remove", "db#m", "db#x", "-n")
    filled.fails(2, "bookmark", "remove", "db#m", "db#m", "-n")
    assert state(filled) == before


def test_an_import(filled: Cli, tmp_path: Path) -> None:
    source = tmp_path / "new.img"
    with source.open("wb") as stream:
        stream.truncate(8 * MIB)
        stream.seek(5 * MIB)
        stream.write(Random(3).randbytes(MIB))
    assert "already" in filled.fails(1, "import", "db", source, "-n")
    assert told(filled, "import", "new", source) == MIB
    filled.ok("import", "new", source)
    with source.open("r+b") as stream:
        stream.truncate(9 * MIB)
        stream.seek(5 * MIB)
        stream.write(Random(4).randbytes(64 << 10))
        stream.seek(8 * MIB)
        stream.write(Random(4).randbytes(4096))
    assert told(filled, "import", "new", source, "--incremental") == (64 << 10) + 4096
    qcow2 = tmp_path / "disk.qcow2"
    qcow2.write_bytes(b"QFI\xfb" + bytes(2 * MIB))
    assert "qcow2" in filled.fails(2, "import", "disk", qcow2, "-n")
