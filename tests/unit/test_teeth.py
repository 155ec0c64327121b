"""The breakages of tests/teeth still fit the code; `make teeth` tries them all, here are three."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.teeth.breakage import Breakage, Misfit
from tests.teeth.breakages import BREAKAGES, ROOMS
from tests.teeth.runner import ROOT, _run, bite, run_unchanged
from tests.teeth.sample import DOZEN, sample

SAMPLE = ("checksum-not-compared", "lease-granted-twice", "journal-sequence-not-checked")


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.name)
def test_a_breakage_fits_the_code(breakage: Breakage) -> None:
    """After a change of the code that it breaks, or of the name of its test, update the breakage."""
    assert breakage.broken_text(ROOT) != (ROOT / breakage.file).read_text()
    path, _, function = breakage.test.partition("::")
    assert f"def {function.split('[')[0]}(" in (ROOT / path).read_text(), breakage.test


def test_each_test_that_must_turn_red_is_there() -> None:
    """One that is missing keeps the run without any breakage from being made, and then nothing is proved."""
    tests = sorted({breakage.test for breakage in BREAKAGES})
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *tests]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-3000:]


def test_each_rule_is_broken() -> None:
    assert max(Counter(breakage.name for breakage in BREAKAGES).values()) == 1
    rules = {breakage.rule for breakage in BREAKAGES} - {"policy", "waiting"}
    assert rules == {f"I{number}" for number in range(1, 18)}
    assert sum(breakage.file.endswith(".c") for breakage in BREAKAGES) >= 8


def test_every_commit_has_a_dozen_of_its_own() -> None:
    first, again, other = (sample(ROOMS, DOZEN, seed) for seed in ("a", "a", "b"))
    assert first == again != other
    assert len(set(first)) == DOZEN
    assert all(len(set(first) & set(room)) == DOZEN // len(ROOMS) for room in ROOMS)
    seen = {breakage for seed in range(200) for breakage in sample(ROOMS, DOZEN, str(seed))}
    assert seen == set(BREAKAGES)


def named(name: str) -> Breakage:
    return next(breakage for breakage in BREAKAGES if breakage.name == name)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_breakage_is_caught(tmp_path: Path, name: str) -> None:
    verdict = bite(named(name), tmp_path)
    assert verdict.is_caught, verdict.outcome


@pytest.mark.parametrize(
    ("new", "word"),
    [
        ("            if found != crc != -1:", "SURVIVED"),
        ("            if found != nobody_knows:", "WRONG REASON"),
        ("            if found !=", "UNABLE"),
    ],
)
def test_what_is_not_caught_is_told(tmp_path: Path, new: str, word: str) -> None:
    assert bite(replace(named(SAMPLE[0]), new=new), tmp_path).word == word


def test_runs_in_a_copy_sweep_no_mounts_of_others(tmp_path: Path) -> None:
    """The tests of a copy took away the dead mounts that other tests, which ran beside them, were about to look at."""
    code = "import os, tempfile; print(tempfile.gettempdir(), os.environ['TMPDIR'])"
    assert _run(["-c", code], tmp_path, 60) == (0, f"{tmp_path} {tmp_path}\n")


def test_a_test_that_is_red_anyway_proves_nothing(tmp_path: Path) -> None:
    missing = replace(named(SAMPLE[0]), test="tests/unit/test_dataplane.py::test_nobody_wrote")
    verdict = bite(missing, tmp_path).given(run_unchanged([missing], tmp_path))
    assert verdict.word == "UNABLE WITHOUT IT"


def test_an_anchor_must_be_there_once(tmp_path: Path) -> None:
    for old in ("no such text", "return"):
        with pytest.raises(Misfit, match="update the breakage"):
            replace(named(SAMPLE[0]), old=old).broken_text(ROOT)
