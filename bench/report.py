"""What a run leaves: JSON with everything, Markdown for people."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from bench.access import TITLES
from bench.jobs import JOBS
from bench.subjects import ROOT, SUBJECTS
from bench.summary import Ratio, Result, Results, judge, ratio

OUTPUT_VERSION: Final = 1
_LIBRARIES: Final = ("pyfuse3", "trio", "lmdb", "crc32c", "msgpack")
_PROGRAMS: Final = {
    "fio": ["fio", "--version"],
    "qemu-storage-daemon": ["qemu-storage-daemon", "--version"],
    "libfuse": ["pkg-config", "--modversion", "fuse3"],
    "mkfs.xfs": ["mkfs.xfs", "-V"],
    "mkfs.btrfs": ["mkfs.btrfs", "--version"],
    "postgres": ["pgbench", "--version"],
}
_SUBJECT_TITLES: Final = {kind.key: kind.title for kind in SUBJECTS}
_JOB_TITLES: Final = {job.key: job.title for job in JOBS}
_COLD: Final = {job.key for job in JOBS if job.is_cold}
_PEERS: Final = ("qemu", "plain", "floor-threads", "floor-pyfuse3", "xfs", "btrfs")
NOISY_SPREAD: Final = 0.3


def machine_facts(directories: dict[str, Path]) -> dict[str, Any]:
    """Describe the machine, as far as figures depend on it."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": int(memory.group(1)) * 1024 if memory else None,
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
        "places": {
            place: _output(["findmnt", "-no", "SOURCE,FSTYPE,OPTIONS", "--target", str(directory)])
            for place, directory in directories.items()
        },
    }


def versions() -> dict[str, str]:
    """Name the versions of everything that is compared."""
    found = {name: _output(command).splitlines()[0] for name, command in _PROGRAMS.items() if _output(command)}
    revision = _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    return {
        "incfs": f"{version('incfs')} ({revision})",
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
        **found,
    }


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def now() -> str:
    """Give the time, as the documents have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def to_json(document: dict[str, Any], results: Results) -> str:
    """Render everything."""
    summary = [
        {
            **dict(zip(("place", "access", "job", "metric"), key, strict=True)),
            "subject": subject,
            "median": result.median,
            "spread": round(result.spread, 3),
            "unit": result.unit,
            "ratios": {
                peer: {"of_medians": r.value, "low": r.low, "high": r.high}
                for peer in _PEERS
                if peer in line and peer != subject
                for r in [ratio(result, line[peer])]
            },
        }
        for key, line in results.items()
        for subject, result in line.items()
    ]
    verdicts = [
        {"work": v.goal.work, "access": v.goal.key[1], "subject": v.subject, "against": v.goal.peer,
         "goal": v.goal.at_least, "measured": v.measured.value, "low": v.measured.low, "high": v.measured.high,
         "is_met": v.is_met}
        for v in judge(results)
    ]  # fmt: skip
    whole = {"output_version": OUTPUT_VERSION, **document, "summary": summary, "goals": verdicts}
    return json.dumps(whole, indent=1) + "\n"


def to_markdown(document: dict[str, Any], results: Results, charts: Iterable[str] = ()) -> str:
    """Render the tables."""
    parts = [_head(document), _goals(results)]
    places = list(dict.fromkeys((key[0], key[1]) for key in results))
    for place, access in places:
        lines = {key: line for key, line in results.items() if key[:2] == (place, access)}
        parts += [f"## Images on {_place(place)}; {TITLES[access]}", _medians(lines), _ratios(lines)]
    parts += [f"![Rates against QEMU]({name})" for name in charts]
    for title in ("skipped", "failures"):
        if document[title]:
            parts.append(f"## {title.capitalize()}\n\n" + "\n".join(f"- {line}" for line in document[title]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _place(place: str) -> str:
    return "a disk" if place == "disk" else place


def _head(document: dict[str, Any]) -> str:
    machine, options = document["machine"], document["options"]
    lines = [f"{name} {number}" for name, number in document["versions"].items()]
    return (
        f"# Benchmark of {document['started']}\n\n"
        f"{machine['cores']} x {machine['cpu']}, {(machine['memory_bytes'] or 0) / 2**30:.0f} GiB, "
        f"Linux {machine['kernel']}; load before the run {machine['load_before']:.1f}.\n"
        f"{options['rounds']} rounds, subjects in turn within each, {options['seconds']} s for each timed sample; "
        f"medians over the rounds; `~` marks a spread (largest less smallest) over {NOISY_SPREAD:.0%} of the median.\n"
        f"Ratios are of medians, in brackets the least and the greatest of a round.\n"
        f"Caches are warm (what was written before is in the page cache under the images) unless a job says cold; "
        f"direct reads of the plain file never come from a cache.\n\n"
        f"{'; '.join(lines)}."
    )


def _goals(results: Results) -> str:
    verdicts = judge(results)
    if not verdicts:
        return ""
    rows = [
        [v.goal.work, _SUBJECT_TITLES[v.subject], _SUBJECT_TITLES.get(v.goal.peer, v.goal.peer),
         f">= {v.goal.at_least:.2f}", _ratio(v.measured), "met" if v.is_met else "**not met**"]
        for v in verdicts
    ]  # fmt: skip
    return "## Goals\n\n" + _table(["work", "subject", "against", "goal", "measured", ""], rows)


def _label(key: tuple[str, ...]) -> str:
    job, metric = key[2], key[3]
    title = _JOB_TITLES.get(job, job)
    title = f"{title} ({job})" if title.startswith("the same") else title
    return title if metric in ("rate", "tps") else f"{title}: {metric}"


def _medians(lines: Results) -> str:
    subjects = [key for key in _SUBJECT_TITLES if any(key in line for line in lines.values())]
    rows = [
        [_label(key), next(iter(line.values())).unit, *(_median(line.get(subject)) for subject in subjects)]
        for key, line in lines.items()
    ]
    return _table(["", "", *(_SUBJECT_TITLES[subject] for subject in subjects)], rows)


def _median(result: Result | None) -> str:
    if result is None:
        return ""
    digits = 0 if result.median >= 100 else 2
    return f"{result.median:,.{digits}f}{' ~' if result.spread > NOISY_SPREAD else ''}"


def _ratios(lines: Results) -> str:
    pairs = [
        (subject, peer)
        for subject in ("incfs-native", "incfs-python")
        for peer in _PEERS
        if any(subject in line and peer in line for line in lines.values())
    ]
    rows = [
        [_label(key), *(_ratio(ratio(line[s], line[p])) if s in line and p in line else "" for s, p in pairs)]
        for key, line in lines.items()
    ]
    heads = [f"{_SUBJECT_TITLES[s]} / {_SUBJECT_TITLES[p]}" for s, p in pairs]
    return _table(["times as fast", *heads], rows) if pairs else ""


def _ratio(found: Ratio) -> str:
    return f"{found.value:.2f} ({found.low:.2f}-{found.high:.2f})"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
