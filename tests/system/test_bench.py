"""The benchmark of snapshots still runs: a tiny round, no judgement on its figures."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.loop import run

BENCH = Path(__file__).resolve().parents[2] / "bench" / "snapshots.py"


@pytest.mark.mount
def test_bench_of_snapshots(tmp_path: Path) -> None:
    small = ["--size", "20M", "--read-size", "4M", "--snapshots", "20", "--rounds", "2", "--reads", "50"]
    printed = run(sys.executable, BENCH, "--directory", tmp_path, *small, "--json").stdout
    measured = json.loads(printed)
    assert [row["mapped_bytes"] for row in measured["snapshot_creation"]] == [0, 1 << 20, 20 << 20]
    assert [row["snapshots"] for row in measured["live_read"]] == [0, 20]
    assert list(tmp_path.iterdir()) == []
