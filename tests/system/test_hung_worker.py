"""The tests' own bench: where a test waits in the kernel for ever, that test fails, and the run goes on and ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import os
import signal
import subprocess
import sys
import time

import pytest

INCFS = [sys.executable, "-m", "incfs"]


@pytest.mark.timeout(15)
def test_that_waits(tmp_path):
    pool, mountpoint = tmp_path / "pool", tmp_path / "mnt"
    mountpoint.mkdir()
    subprocess.run([*INCFS, "pool", "create", pool], check=True)
    subprocess.run([*INCFS, "-p", pool, "volume", "create", "v", "1M"], check=True)
    daemon = subprocess.Popen([*INCFS, "mount", "--foreground", pool, mountpoint])
    print(daemon.pid, file=open(os.environ["PID_FILE"], "w"), flush=True)
    while not mountpoint.is_mount():
        time.sleep(0.1)
    os.kill(daemon.pid, signal.SIGSTOP)
    (mountpoint / "v").read_bytes()


def test_after_it():
    pass
"""


@pytest.mark.mount
@pytest.mark.slow
def test_a_test_that_waits_in_the_kernel_for_ever_fails_and_the_run_ends(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    (tmp_path / "test_run.py").write_text(RUN)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.conftest", "--numprocesses", "1"]
    command += ["-o", "timeout_method=thread"]
    try:
        done = subprocess.run(
            [*command, f"--rootdir={tmp_path}", f"--basetemp={tmp_path / 'run'}", "test_run.py"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(root), "TMPDIR": str(tmp_path), "PID_FILE": str(pid_file)},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        if pid_file.exists():
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
    assert "1 failed, 1 passed" in done.stdout, done
    assert "crashed while running 'test_run.py::test_that_waits'" in done.stdout, done
