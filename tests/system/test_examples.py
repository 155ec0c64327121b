"""The examples do what they say, on this machine's own files."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.mount
@pytest.mark.loop
@pytest.mark.timeout(600)
def test_quickstart_ends_with_ok():
    done = subprocess.run(
        [ROOT / "examples/quickstart.sh", "/usr/include/linux"],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("\x1b[1mOK:")
