"""Copies the tree, breaks the copy, runs the named test in it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from xml.etree import ElementTree as ET

from tests.teeth.breakage import Breakage, Misfit
from tests.teeth.verdict import Outcome, Verdict

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 150.0
"""Of one test, and of one build; far more than any needs."""
_COPIED = ("incfs", "packaging", "tests", "tools", "pyproject.toml", "setup.py")
_SEVERITY = ("red", "skipped", "green")
_ENVIRONMENT = {"INCFS_REQUIRE_MOUNT": "1", "INCFS_TEST_PROFILE": "unshrunk"}


def bite(breakage: Breakage, home: Path) -> Verdict:
    """Break a copy and run the named test in it."""
    started = time.monotonic()
    copy = _make_copy(home)
    try:
        (copy / breakage.file).write_text(breakage.broken_text(copy))
        if breakage.is_native:
            _build(copy)
        outcome = _run_tests(copy, [breakage.test], LIMIT_S)[breakage.test]
    except Misfit as error:
        outcome = Outcome("unable", "the breakage does not fit", str(error))
    finally:
        shutil.rmtree(copy)
    return Verdict(breakage, outcome, time.monotonic() - started)


def run_unchanged(breakages: Sequence[Breakage], home: Path) -> dict[str, Outcome]:
    """Run every named test in an unchanged copy."""
    copy = _make_copy(home)
    try:
        return _run_tests(copy, sorted({breakage.test for breakage in breakages}), 10 * LIMIT_S)
    finally:
        shutil.rmtree(copy)


def _make_copy(home: Path) -> Path:
    """Copy what tests need, with the built extensions; times are kept, so that only what is changed is built."""
    copy = Path(mkdtemp(dir=home))
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name)
        else:
            shutil.copy2(ROOT / name, copy / name)
    return copy


def _build(copy: Path) -> None:
    code, output = _run(["setup.py", "--quiet", "build_ext", "--inplace"], copy, LIMIT_S)
    if code != 0:
        raise Misfit(f"it cannot be built: {output[-2000:]}")


def _run_tests(copy: Path, tests: Sequence[str], limit_s: float) -> dict[str, Outcome]:
    report = copy / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={copy / 'tmp'}", f"--junitxml={report}"]
    code, output = _run(["-m", "pytest", *options, *tests], copy, limit_s)
    found = _read_report(report) if report.exists() else []
    unknown = Outcome("hung" if code is None else "unable", f"pytest ended with {code}", output[-3000:])
    return {test: _outcome_of(test, found) or unknown for test in tests}


def _run(arguments: Sequence[str], copy: Path, limit_s: float) -> tuple[int | None, str]:
    """Run Python in a process group of its own; there is no code when it had to be killed.

    Dead mounts are swept before tests, below the temporary directory: those of tests that run beside these must stay.
    """
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=copy,
        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(copy), "TMPDIR": str(copy)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _detach_mounts(copy)
            return None, process.communicate()[0]
        return process.returncode, output


def _detach_mounts(copy: Path) -> None:
    """Tests that were killed leave their mounts behind; the daemons end with them."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        path = line.split()[1]
        if path.startswith(f"{copy}/"):
            subprocess.run(["umount", "--lazy", path], check=False)


def _outcome_of(test: str, found: Sequence[tuple[str, Outcome]]) -> Outcome | None:
    """Join what the report says of a test: of its phases and, when the id names none, of its parameters."""
    outcomes = [outcome for name, outcome in found if name == test or name.startswith(f"{test}[")]
    return min(outcomes, key=lambda outcome: _SEVERITY.index(outcome.status), default=None)


def _read_report(report: Path) -> list[tuple[str, Outcome]]:
    cases = ET.parse(report).iter("testcase")
    return [(f"{c.get('classname', '').replace('.', '/')}.py::{c.get('name')}", _case_outcome(c)) for c in cases]


def _case_outcome(case: ET.Element) -> Outcome:
    for kind, status in (("failure", "red"), ("error", "red"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            return Outcome(status, found.get("message", "").split("\n", 1)[0], found.text or "")
    return Outcome("green")
