"""Raw images into volumes and out of them, offline and through a daemon."""

import json
import os
from pathlib import Path
from random import Random

import pytest

from incfs.errors import FormatError
from incfs.rawsource import read_ranges
from tests.support.cli import Cli

MIB = 1 << 20


def sparse_image(path: Path, seed: int = 1) -> bytes:
    """3 MiB and 100 bytes, most of it holes."""
    data = bytearray(3 * MIB + 100)
    for start in (0, MIB + 4096, 3 * MIB):
        data[start : start + 100] = Random(seed + start).randbytes(100)
    with path.open("wb") as stream:
        stream.truncate(len(data))
        for start in (0, MIB + 4096, 3 * MIB):
            stream.seek(start)
            stream.write(data[start : start + 100])
    return bytes(data)


def test_import_and_export_give_the_same_bytes(cli: Cli, tmp_path: Path) -> None:
    source, target = tmp_path / "source.img", tmp_path / "target.img"
    data = sparse_image(source)
    made = cli.json("import", "db", source, "--snapshot", "first")
    assert (made["volume"]["size_bytes"], made["volume"]["mapped_bytes"]) == (len(data), 3 * 4096)
    assert made["snapshot"]["name"] == "db@first"
    assert "already" in cli.fails(1, "import", "db", source)
    cli.ok("export", "db@first", target)
    assert target.read_bytes() == data
    assert os.stat(target).st_blocks * 512 < MIB
    assert "--force" in cli.fails(1, "export", "db", target)
    cli.ok("export", "db", target, "--force")
    assert target.read_bytes() == data
    assert [row["name"] for row in cli.json("snapshot", "list")["snapshots"]] == ["db@first"]
    assert cli.ok("pool", "check", "--data").startswith("clean")


def test_import_again_writes_only_what_differs(cli: Cli, tmp_path: Path) -> None:
    source, target = tmp_path / "source.img", tmp_path / "target.img"
    data = bytearray(sparse_image(source))
    cli.ok("import", "db", source, "--snapshot", "a")
    cli.ok("export", "db@a", target)
    data[MIB + 5000 : MIB + 5010] = b"0123456789"
    data[3 * MIB :] = b""
    data += bytes(MIB)
    source.write_bytes(data)
    cli.ok("import", "db", source, "--incremental", "--snapshot", "b")
    changed = cli.json("snapshot", "diff", "--from", "a", "db@b")
    assert [(m["byte_offset"], m["size_bytes"]) for m in changed["block_metadata"]] == [
        (MIB + 4096, 4096), (3 * MIB, 4096),
    ]  # fmt: skip
    cli.ok("export", "db@b", target, "--incremental", "--from", "a")
    assert target.read_bytes() == data
    assert cli.json("volume", "show", "db")["volume"]["size_bytes"] == len(data)
    cli.ok("export", "db@b", target, "--incremental", "--from", "a")  # it is there already
    cli.ok("snapshot", "create", "db@c")
    cli.fails(12, "export", "db@c", target, "--incremental", "--from", "a")
    cli.fails(2, "export", "db@b", target, "--from", "a")


def test_import_of_changed_ranges_reads_only_those(cli: Cli, tmp_path: Path) -> None:
    source, listed = tmp_path / "source.img", tmp_path / "changed.json"
    data = bytearray(sparse_image(source))
    cli.ok("import", "db", source)
    data[10:20] = b"abcdefghij"
    seen = bytes(data)
    data[2 * MIB : 2 * MIB + 4] = b"miss"
    source.write_bytes(data)
    listed.write_text(json.dumps({"block_metadata": [{"byte_offset": 12, "size_bytes": 3}]}))
    cli.ok("import", "db", source, "--incremental", "--changed", listed, "--snapshot", "b")
    cli.ok("export", "db@b", tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == seen
    listed.write_text(json.dumps({"ranges": [{"offset": len(data) - 1, "length": 2}]}))
    assert "no range within" in cli.fails(4, "import", "db", source, "--incremental", "--changed", listed)


def test_what_cannot_be_imported_or_exported(cli: Cli, tmp_path: Path) -> None:
    cli.ok("volume", "create", "db", "1M")
    assert "neither" in cli.fails(2, "import", "x", tmp_path)
    cli.fails(1, "import", "x", tmp_path / "missing")
    image = Path(cli.json("storage", "list")["storages"][0]["path"])
    assert "belongs to this pool" in cli.fails(11, "export", "db", image, "--force")
    cli.fails(10, "import", "x", "/dev/zero", "--incremental")
    assert [volume["name"] for volume in cli.json("volume", "list")["volumes"]] == ["db"]


def test_a_volume_over_an_image_in_place(cli: Cli, tmp_path: Path) -> None:
    source, target = tmp_path / "base.img", tmp_path / "out.img"
    data = sparse_image(source)
    made = cli.json("volume", "create", "db", "--origin", source)["volume"]
    assert (made["size_bytes"], made["mapped_bytes"], made["origin"]) == (len(data), 4096, str(source))
    cli.ok("export", "db", target)
    assert target.read_bytes() == data
    cli.ok("snapshot", "create", "db@a")
    cli.ok("volume", "clone", "db@a", "copy")
    changed = bytearray(data)
    changed[5000:5010] = b"0123456789"
    (tmp_path / "changed.img").write_bytes(changed)
    cli.ok("import", "db", tmp_path / "changed.img", "--incremental", "--snapshot", "b")
    assert cli.json("snapshot", "diff", "--from", "a", "db@b")["changed_bytes"] == 4096
    for name, expected in (("db@b", changed), ("db@a", data), ("copy", data)):
        cli.ok("export", name, target, "--force")
        assert target.read_bytes() == expected, name
    assert source.read_bytes() == data
    assert cli.ok("pool", "check", "--data").startswith("clean")
    cli.ok("volume", "flatten", "copy")
    assert cli.json("volume", "show", "copy")["volume"]["mapped_bytes"] == 3 * 4096
    os.utime(source, ns=(1, 1))
    assert "was changed since" in cli.fails(4, "export", "db@a", target, "--force")
    cli.ok("export", "copy", target, "--force")
    assert target.read_bytes() == data
    assert "was changed since" in cli.run("pool", "check").stdout
    cli.ok("volume", "remove", "db", "--snapshots")
    assert cli.ok("pool", "check", "--data").startswith("clean")
    cli.fails(2, "volume", "create", "x")
    cli.fails(2, "volume", "create", "x", "1M", "--origin", source)


def test_the_content_of_an_image_in_place_is_proved_on_demand(cli: Cli, tmp_path: Path) -> None:
    source, target = tmp_path / "base.img", tmp_path / "out.img"
    data = sparse_image(source)
    made = cli.json("volume", "create", "db", "--origin", source, "--digest")["volume"]
    verified = cli.json("volume", "verify", "db")["verified"]
    assert verified["digest"] == made["origin_digest"]
    # The digest is of the content: where there are holes in the file does not matter.
    cli.ok("volume", "create", "same", "--origin", filled(tmp_path / "filled.img", data), "--digest")
    assert cli.json("volume", "verify", "same")["verified"]["digest"] == made["origin_digest"]
    stamp = source.stat()
    overwrite(source, 5000, b"changed", stamp)
    error = cli.fails(4, "volume", "verify", "db")
    assert "was changed since" in error
    assert made["origin_digest"] in error
    assert "was changed since" in cli.fails(4, "export", "db", target)
    assert "baseline-changed" in cli.ok("events")
    overwrite(source, 5000, data[5000:5007], stamp)
    assert "was changed since" in cli.fails(4, "export", "db", target, "--force")
    cli.ok("volume", "verify", "db")
    cli.ok("export", "db", target, "--force")
    assert target.read_bytes() == data
    assert cli.ok("pool", "check", "--data").startswith("clean")


def filled(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def overwrite(path: Path, offset: int, data: bytes, stamp: os.stat_result) -> None:
    """Change a file so that its size and time do not show it."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_digests_that_were_not_recorded(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "base.img"
    sparse_image(source)
    cli.ok("volume", "create", "plain", "1M")
    assert "no raw image" in cli.fails(2, "volume", "verify", "plain")
    cli.fails(2, "volume", "create", "x", "1M", "--digest")
    cli.ok("volume", "create", "db", "--origin", source)
    assert "--record" in cli.fails(2, "volume", "verify", "db")
    recorded = cli.json("volume", "verify", "db", "--record")["verified"]["digest"]
    assert cli.json("volume", "show", "db")["volume"]["origin_digest"] == recorded
    # What was recorded is not replaced by what is found later.
    overwrite(source, 0, b"changed", source.stat())
    cli.fails(4, "volume", "verify", "db", "--record")
    assert cli.json("volume", "show", "db")["volume"]["origin_digest"] == recorded
    source.unlink()
    assert "cannot be read" in cli.fails(4, "volume", "verify", "db")


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{}", '{"ranges": 5}', '[{"offset": -1, "length": 1}]', '[{"offset": 0, "length": 101}]', "[" * 9999],
)
def test_hostile_lists_of_ranges(tmp_path: Path, text: str) -> None:
    path = tmp_path / "list"
    path.write_text(text)
    with pytest.raises(FormatError):
        read_ranges(path, 100)


def test_ranges_are_sorted_and_joined(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text(
        json.dumps([{"offset": 50, "length": 10}, {"offset": 0, "length": 20}, {"offset": 20, "length": 5}])
    )
    assert read_ranges(path, 100) == [(0, 25), (50, 60)]
