"""Damages tiny pools in a process of its own, which LMDB might kill.

    python -m tests.damage.sweep HOME STATE SEED COUNT NAME...

Prints the case it is at before it tries it (for the parent, if it dies), a line for each wrong
result, and the figures as JSON at the end.  ``NAME``: which files, by the start of their names.
"""

import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from random import Random

from tests.support import damage


def main(home: Path, state: str, seed: int, count: int, names: tuple[str, ...]) -> None:
    logging.disable()
    started = time.monotonic()
    built = damage.build(home, state, seed)
    paths = [path for path in built.files if path.name.startswith(names)]
    figures = damage.Figures()
    wrong = 0
    for number in range(count):
        case = damage.damaged(built, paths[number % len(paths)], Random(f"{seed}/{number}"))
        print(f"case {number} {case.what} {case.path}", flush=True)
        figures.tried += 1
        try:
            verdict = damage.judge(home / "pool", built, case, damage.options(), 2 if number % 4 == 0 else 1)
            setattr(figures, verdict, getattr(figures, verdict) + 1)
        except damage.WrongResult as error:
            wrong += 1
            print(f"wrong {state} seed {seed} case {number} {case.what} {case.path}: {error}", flush=True)
    print(json.dumps({**asdict(figures), "wrong": wrong, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), tuple(sys.argv[5:]))
