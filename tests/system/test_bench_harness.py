"""The benchmark's harness runs, writes its results and leaves nothing behind; no judgement on its figures."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.chart import Bar, draw
from bench.host import loops_below, mounts_below
from bench.summary import collect, judge, ratio

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--places", "disk", "--accesses", "file", "--subjects", "incfs-python,plain", "--size", "4"]


def command(home: Path, *words: str) -> list[str]:
    output = ["--dir", str(home / "work"), "--output", str(home / "results")]
    return [sys.executable, "-m", "bench", *SMALL, *output, *words]


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A run that has taken its first sample."""
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "randread-4k-qd1" in line)
        yield process


def assert_nothing_left(work: Path) -> None:
    assert list(work.iterdir()) == []
    assert mounts_below(work) == []
    assert loops_below(work) == []


@pytest.mark.mount
def test_smoke(tmp_path):
    (tmp_path / "work").mkdir()
    words = command(tmp_path, "--jobs", "randread-4k-qd1", "--rounds", "1", "--seconds", "1")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "results/results.json").read_text())
    assert [sample["subject"] for sample in document["samples"]] == ["incfs-python", "plain"]
    assert all(sample["value"] > 0 for sample in document["samples"])
    assert document["failures"] == []
    assert "| 4 KiB random read, direct, depth 1 | iops |" in (tmp_path / "results/results.md").read_text()
    ElementTree.parse(tmp_path / "results/disk-file.svg")
    assert_nothing_left(tmp_path / "work")


@pytest.mark.mount
def test_an_interrupted_run_cleans_up_and_keeps_its_samples(tmp_path):
    (tmp_path / "work").mkdir()
    words = command(tmp_path, "--jobs", "randread-4k-qd1", "--rounds", "50", "--seconds", "0.5")
    with started(words) as process:
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 1
    document = json.loads((tmp_path / "results/results.json").read_text())
    assert document["samples"]
    assert document["failures"] == ["interrupted: the results are not complete"]
    assert_nothing_left(tmp_path / "work")


@pytest.mark.mount
def test_a_killed_run_is_removed_by_the_next(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    words = command(tmp_path, "--jobs", "randread-4k-qd1", "--rounds", "50", "--seconds", "0.5")
    with started(words) as process:
        process.kill()
    limit = time.monotonic() + 30
    while mounts_below(work) and time.monotonic() < limit:
        time.sleep(0.1)  # its children were told by the kernel
    words = command(tmp_path, "--jobs", "randread-4k-qd1", "--rounds", "1", "--seconds", "0.5")
    subprocess.run(words, cwd=ROOT, capture_output=True, check=True, timeout=100)
    assert_nothing_left(work)


def sample(subject: str, number: int, value: float, job: str = "randread-4k-qd16") -> dict[str, object]:
    where = {"place": "tmpfs", "access": "file", "job": job, "metric": "rate", "subject": subject}
    return {**where, "round": number, "value": value, "unit": "iops", "is_rate": True}


def test_ratios_are_of_medians_with_extremes_within_a_round():
    mine, others = [30.0, 60.0, 90.0], [10.0, 30.0, 15.0]
    samples = [sample("incfs-native", n, v) for n, v in enumerate(mine)]
    samples += [sample("qemu", n, v) for n, v in enumerate(others)]
    results = collect(samples)
    line = results["tmpfs", "file", "randread-4k-qd16", "rate"]
    found = ratio(line["incfs-native"], line["qemu"])
    assert (found.value, found.low, found.high) == (4.0, 2.0, 6.0)
    verdict = next(v for v in judge(results) if v.goal.peer == "qemu")
    assert verdict.is_met
    assert verdict.goal.at_least == 3


def test_a_chart_is_well_formed():
    text = draw("a < b", {"job": [Bar("x & y", 0.001, 0.0, 2.0), Bar("z", 40.0, 30.0, 50.0)]})
    assert ElementTree.fromstring(text).tag.endswith("svg")
