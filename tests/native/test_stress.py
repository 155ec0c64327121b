"""The C data plane, the threads that read /dev/fuse and the pages of mappings, watched by sanitizers."""

import os
import shlex
import shutil
import subprocess
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "stress": ("plane*.c", "lane.c", "crc32c.c"),
    "hot_stress": ("fuse_*.c",),
    "mappings_fuzz": ("mappings.c",),
}
SANITIZERS = ("thread", "address,undefined")
SECONDS = {"stress": "4", "hot_stress": "2", "mappings_fuzz": "2"}
LONG = os.environ.get("INCFS_TEST_PROFILE") == "long"


def build(program: str, sanitizer: str, target: Path) -> None:
    found = (sorted((ROOT / "incfs").glob(pattern)) for pattern in PROGRAMS[program])
    sources = [ROOT / f"tests/native/{program}.c", *chain.from_iterable(found)]
    compiler = os.environ.get("CC", "cc")
    fuse = subprocess.run(["pkg-config", "--cflags", "fuse3"], capture_output=True, text=True, check=True).stdout
    flags = ["-std=gnu11", "-g", "-O1", "-D_FILE_OFFSET_BITS=64", f"-fsanitize={sanitizer}", "-pthread"]
    built = subprocess.run(
        [compiler, *flags, *shlex.split(fuse), f"-I{ROOT / 'incfs'}", *sources, "-o", target],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "cannot find" in built.stderr:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    assert built.returncode == 0, built.stderr


def run(program: str, sanitizer: str, tmp_path: Path) -> None:
    build(program, sanitizer, tmp_path / program)
    # ThreadSanitizer's shadow memory does not bear every kernel's address randomisation.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    seconds = "60" if LONG else SECONDS[program]
    done = subprocess.run(
        [*prefix, tmp_path / program, seconds, "1"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("ok: ")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_plane_under_threads(sanitizer, tmp_path):
    run("stress", sanitizer, tmp_path)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_threads_on_dev_fuse(sanitizer, tmp_path):
    run("hot_stress", sanitizer, tmp_path)


def test_any_bytes_as_a_page(tmp_path):
    run("mappings_fuzz", "address,undefined", tmp_path)
