"""The command line: ``python -m bench``; see README.md."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from bench import report
from bench.access import ACCESSES, TITLES
from bench.chart import Bar, draw
from bench.harness import Run, Settings, estimate_s, run_stage, say
from bench.host import BenchError, Cleanup, make_scratch
from bench.jobs import DISK, JOBS, MEMORY, PLACES, Stage, full_plan, quick_plan
from bench.subjects import SUBJECTS
from bench.summary import Results, collect, ratio

MIB = 1 << 20
QUICK = ("incfs-python", "incfs-native", "floor-pyfuse3", "floor-threads", "qemu", "plain")
"""Subjects of a quick run that names none."""
_CHART_PEERS = ("qemu", "plain")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure incfs against its peers.")
    parser.add_argument(
        "--quick", action="store_true", help="few jobs, no XFS and btrfs, 3 rounds, 1 s: under five minutes"
    )
    parser.add_argument("--list", action="store_true", help="list jobs and subjects, measure nothing")
    parser.add_argument("--jobs", metavar="JOB,...", help="only these")
    parser.add_argument("--subjects", metavar="SUBJECT,...", help="only these")
    parser.add_argument("--places", metavar="PLACE,...", help=f"only these of {', '.join(PLACES)}")
    parser.add_argument("--accesses", metavar="ACCESS,...", help=f"only these of {', '.join(ACCESSES)}")
    parser.add_argument("--rounds", type=int, help="samples of each job and subject (5; 3 if quick)")
    parser.add_argument("--seconds", type=float, help="of each timed sample (3; 1 if quick)")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="on the disk (default %(default)s)")
    parser.add_argument("--tmpfs-dir", type=Path, default=Path("/dev/shm"), help="in memory (default %(default)s)")
    parser.add_argument("--size", type=int, metavar="MIB", help="of the file on the disk (1024; 256 if quick)")
    parser.add_argument("--tmpfs-size", type=int, metavar="MIB", help="of the file in memory (256; 128 if quick)")
    parser.add_argument("--files", type=int, default=20_000, help="small files to unpack (default %(default)s)")
    parser.add_argument("--mappings", type=int, default=10_000_000, help="of the pool to mount (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="directory (default %(default)s)")
    return parser.parse_args(words)


def _chosen(text: str | None, known: Sequence[str], what: str) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text else ()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BenchError(f"no such {what}: {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def make_plan(arguments: argparse.Namespace) -> list[Stage]:
    """Pick the stages and jobs that the options leave."""
    jobs = _chosen(arguments.jobs, [job.key for job in JOBS], "job")
    places = _chosen(arguments.places, PLACES, "place")
    accesses = _chosen(arguments.accesses, ACCESSES, "access")
    # A job that is asked for by name is run although the quick plan leaves it out.
    plan = quick_plan() if arguments.quick and not jobs else full_plan()
    picked = [
        replace(stage, jobs=tuple(job for job in stage.jobs if not jobs or job.key in jobs))
        for stage in plan
        if (not places or stage.place in places) and (not accesses or stage.access in accesses)
    ]
    return [stage for stage in picked if stage.jobs]


def make_settings(arguments: argparse.Namespace) -> Settings:
    """Turn the options into settings."""
    quick = arguments.quick
    return Settings(
        directories={DISK: arguments.dir, MEMORY: arguments.tmpfs_dir},
        sizes={
            DISK: (arguments.size or (256 if quick else 1024)) * MIB,
            MEMORY: (arguments.tmpfs_size or (128 if quick else 256)) * MIB,
        },
        rounds=arguments.rounds or (3 if quick else 5),
        seconds=arguments.seconds or (1.0 if quick else 3.0),
        file_count=arguments.files,
        mapping_count=arguments.mappings,
        subjects=_chosen(arguments.subjects, [kind.key for kind in SUBJECTS], "subject") or (QUICK if quick else ()),
    )


def measure(plan: list[Stage], settings: Settings, results: Run) -> None:
    """Run every stage; an interruption still leaves the samples taken so far in ``results``."""
    try:
        for stage in plan:
            with Cleanup() as cleanup:
                scratch = make_scratch(cleanup, settings.directories[stage.place])
                run_stage(stage, settings, scratch, results)
            results.failures += [f"clean-up: {line}" for line in cleanup.failures]
    except KeyboardInterrupt:
        results.fail("interrupted: the results are not complete")


def write_results(directory: Path, document: dict[str, Any], results: Results) -> list[Path]:
    """Write results.json, results.md and one chart for each way of access."""
    directory.mkdir(parents=True, exist_ok=True)
    charts = {f"{place}-{access}.svg": _chart(results, place, access) for place, access in _places(results)}
    texts = {
        "results.json": report.to_json(document, results),
        "results.md": report.to_markdown(document, results, charts),
        **charts,
    }
    for name, text in texts.items():
        (directory / name).write_text(text)
    return [directory / name for name in texts]


def _places(results: Results) -> list[tuple[str, str]]:
    """Find the tables that have a peer to draw against."""
    return list(dict.fromkeys(key[:2] for key, line in results.items() if any(peer in line for peer in _CHART_PEERS)))


def _chart(results: Results, place: str, access: str) -> str:
    lines = {key: line for key, line in results.items() if key[:2] == (place, access)}
    peer = next(peer for peer in _CHART_PEERS if any(peer in line for line in lines.values()))
    titles = {kind.key: kind.title for kind in SUBJECTS}
    groups = {}
    for key, line in lines.items():
        if peer in line:
            found = {
                subject: ratio(line[subject], line[peer]) for subject in titles if subject in line and subject != peer
            }
            label = key[2] if key[3] in ("rate", "tps") else f"{key[2]}: {key[3]}"
            groups[label] = [Bar(titles[subject], r.value, r.low, r.high) for subject, r in found.items()]
    return draw(f"Times as fast as {titles[peer]}: images on {place}, {TITLES[access]}", groups)


def list_everything() -> None:
    for job in JOBS:
        print(f"{job.key:28} {', '.join(job.accesses):36} {job.title}")
    print()
    for kind in SUBJECTS:
        print(f"{kind.key:28} {kind.missing() or 'can be measured here':36} {kind.title}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(words)
    if arguments.list:
        list_everything()
        return 0
    if os.geteuid():
        raise BenchError("loop devices and mounts need root: sudo make bench")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    settings, plan = make_settings(arguments), make_plan(arguments)
    document: dict[str, Any] = {
        "started": report.now(),
        "machine": report.machine_facts(settings.directories),
        "versions": report.versions(),
        "options": {name: value for name, value in vars(arguments).items() if value is not None and name != "list"}
        | {"rounds": settings.rounds, "seconds": settings.seconds, "sizes": settings.sizes},
    }
    say(f"about {estimate_s(plan, settings) / 60:.0f} minutes")
    results = Run()
    measure(plan, settings, results)
    document |= {"ended": report.now(), "load_after": os.getloadavg()[0], "skipped": results.skipped}
    document |= {"failures": results.failures, "samples": results.samples}
    document["options"] = {name: str(v) if isinstance(v, Path) else v for name, v in document["options"].items()}
    for path in write_results(arguments.output, document, collect(results.samples)):
        say(f"wrote {path}")
    return 1 if results.failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
