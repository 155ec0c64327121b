"""The C data plane under many threads, watched by ThreadSanitizer and AddressSanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "tests/native/stress.c",
    *(path for name in ("plane*.c", "lane.c", "crc32c.c") for path in sorted((ROOT / "incfs").glob(name))),
]
SECONDS = "60" if os.environ.get("INCFS_TEST_PROFILE") == "long" else "4"


def build(sanitizer: str, target: Path) -> None:
    compiler = os.environ.get("CC", "cc")
    flags = ["-std=gnu11", "-g", "-O1", "-D_FILE_OFFSET_BITS=64", f"-fsanitize={sanitizer}", "-pthread"]
    built = subprocess.run(
        [compiler, *flags, f"-I{ROOT / 'incfs'}", *SOURCES, "-o", target], capture_output=True, text=True, check=False
    )
    if "cannot find" in built.stderr:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    assert built.returncode == 0, built.stderr


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_plane_under_threads(sanitizer, tmp_path):
    build(sanitizer, tmp_path / "stress")
    # ThreadSanitizer's shadow memory does not bear every kernel's address randomisation.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    run = subprocess.run(
        [*prefix, tmp_path / "stress", SECONDS, "1"], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("ok: ")
