"""`make teeth`: break a copy of the product in each way; every time the named test must turn red.

    python -m tests.teeth [PART-OF-A-NAME...]
    python -m tests.teeth --some [--seed TEXT]

A breakage is caught when its test is green in an unchanged copy and fails in the broken one, of an
assertion and not because something cannot be imported or built.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.teeth.breakage import Breakage
from tests.teeth.breakages import BREAKAGES, ROOMS
from tests.teeth.runner import ROOT, bite, run_unchanged
from tests.teeth.sample import DOZEN, commit_seed, sample
from tests.teeth.verdict import Verdict


def chosen(parts: Sequence[str]) -> list[Breakage]:
    """Pick breakages by parts of their names; all without any."""
    return [b for b in BREAKAGES if not parts or any(part in b.name for part in parts)]


def some(seed: str | None) -> list[Breakage]:
    """Pick a dozen, and say by what, so that the same dozen can be had again."""
    seed = seed or commit_seed(ROOT)
    print(
        f"a dozen of {len(BREAKAGES)} breakages; the same again: python -m tests.teeth --some --seed {seed}", flush=True
    )
    return sample(ROOMS, DOZEN, seed)


def run_all(breakages: Sequence[Breakage], home: Path, jobs: int) -> list[Verdict]:
    """Try each in a copy of its own, several at a time, and tell of each as it ends."""
    with ThreadPoolExecutor(jobs) as executor:
        unchanged = executor.submit(run_unchanged, breakages, home)
        verdicts = []
        for verdict in executor.map(lambda breakage: bite(breakage, home), breakages):
            print(verdict.line(), flush=True)
            verdicts.append(verdict)
        return [verdict.given(unchanged.result()) for verdict in verdicts]


def main() -> int:
    """Run, print, and give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.teeth")
    parser.add_argument("names", nargs="*", help="parts of names; all breakages without any")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--some", action="store_true", help="a dozen of all rooms, another one for each commit")
    parser.add_argument("--seed", help="choose that dozen by this rather than by the commit")
    options = parser.parse_args()
    breakages = some(options.seed) if options.some else chosen(options.names)
    started = time.monotonic()
    with TemporaryDirectory(prefix="incfs-teeth-") as home:
        verdicts = run_all(breakages, Path(home), options.jobs)
    missed = [verdict for verdict in verdicts if not verdict.is_caught]
    for verdict in missed:
        print(f"\n{verdict.line()}\n{verdict.breakage.test}\n{verdict.outcome.details}")
    caught = len(verdicts) - len(missed)
    print(f"{caught} of {len(verdicts)} caught in {time.monotonic() - started:.0f} s")
    return 1 if missed or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
