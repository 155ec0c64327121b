"""``incfs stream``: on streams alone, without a pool."""

import json
import subprocess
from dataclasses import dataclass

import pytest

from tests.support.cli import Cli
from tests.support.streams import VOLUME, make_step, snapshot_uuid

CHAIN = [b"a" * 300, b"b" * 64 + bytes(100), b"c" * 500, b"c" * 400 + b"d" * 100]


@dataclass(frozen=True)
class Streams:
    cli: Cli
    full: str
    steps: list[str]
    whole: str


@pytest.fixture
def streams(tmp_path):
    def store(name, made):
        (tmp_path / name).write_bytes(made)
        return str(tmp_path / name)

    steps = [store(f"step{i}", make_step(CHAIN[i : i + 2], i + 1)) for i in range(3)]
    full = store("full", make_step([b"", CHAIN[0]], 0, full=True))
    return Streams(Cli(), full, steps, store("whole", make_step(CHAIN, 1)))


def test_info_lists_the_snapshots_and_verify_is_silent(streams):
    assert streams.cli.ok("stream", "verify", streams.whole) == ""
    document = streams.cli.json("stream", "info", streams.whole)
    assert [s["uuid"] for s in document["snapshots"]] == [snapshot_uuid(i) for i in (2, 3, 4)]
    assert document["volumes"] == [{"name": "vol", "uuid": VOLUME}]
    assert "vol@s2" in streams.cli.ok("stream", "info", streams.whole)


def test_a_damaged_stream_is_exit_14_with_one_line(streams, tmp_path):
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "bad").write_bytes(data[:200] + b"?" + data[201:])
    assert "damaged" in streams.cli.fails(14, "stream", "verify", tmp_path / "bad")
    (tmp_path / "cut").write_bytes(data[:-1])
    assert "token" in streams.cli.fails(14, "stream", "verify", tmp_path / "cut")
    streams.cli.fails(2, "stream", "verify", tmp_path / "missing")


def test_token_of_a_cut_stream(streams, tmp_path):
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-1])
    streams.cli.fails(2, "stream", "token", streams.whole)
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    assert streams.cli.ok("stream", "token", tmp_path / "cut").startswith("incfs1-")
    assert streams.cli.json("stream", "token", tmp_path / "cut")["token"].startswith("incfs1-")


def test_apply_brings_a_file_along_and_refuses_another(streams, tmp_path):
    image = tmp_path / "image"
    streams.cli.ok("stream", "apply", image, streams.full)
    assert image.read_bytes() == CHAIN[0]
    assert "starts from" in streams.cli.fails(12, "stream", "apply", image, streams.steps[1])
    document = streams.cli.json("stream", "apply", image, streams.whole)
    assert (document["snapshot"], image.read_bytes()) == (snapshot_uuid(4), CHAIN[3])
    streams.cli.ok("stream", "apply", image, streams.whole)
    image.write_bytes(b"changed")
    assert "changed" in streams.cli.fails(12, "stream", "apply", image, streams.steps[2])


def test_apply_to_a_file_without_a_note_needs_the_users_word(streams, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(CHAIN[0])
    assert "--base" in streams.cli.fails(12, "stream", "apply", image, streams.steps[0])
    streams.cli.ok("stream", "apply", image, streams.steps[0], "--base", snapshot_uuid(1))
    assert image.read_bytes() == CHAIN[1]


def test_merge_makes_one_stream_of_several(streams, tmp_path):
    made = subprocess.run(streams.cli.command("stream", "merge", *streams.steps), stdout=subprocess.PIPE, check=True)
    (tmp_path / "merged").write_bytes(made.stdout)
    image = tmp_path / "image"
    streams.cli.ok("stream", "apply", image, streams.full)
    streams.cli.ok("stream", "apply", image, tmp_path / "merged")
    assert image.read_bytes() == CHAIN[3]
    assert json.loads((tmp_path / "image.incfs").read_text())["snapshot"] == snapshot_uuid(4)
    streams.cli.fails(12, "stream", "merge", streams.steps[0], streams.steps[2])
