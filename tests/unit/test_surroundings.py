"""What a daemon may count on wherever it is started."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import _thread, threading
from incfs.surroundings import settle_daemon

def begin():
    raise {error}

settle_daemon()
_thread.start_new_thread(begin, ())
threading.Event().wait({wait_s})  # as Thread.start waits for what a thread says as it begins
"""


@pytest.mark.parametrize(
    ("error", "wait_s", "code", "said"),
    [
        ("MemoryError", None, -signal.SIGKILL, "incfs: no memory to begin a thread: the process ends\n"),
        ("ValueError", 1, 0, "ValueError"),
    ],
    ids=["no-memory", "another-error"],
)
def test_a_thread_without_memory_to_begin_ends_the_daemon_instead_of_a_wait_for_ever(
    error: str, wait_s: int | None, code: int, said: str
) -> None:
    command = [sys.executable, "-c", PROGRAM.format(error=error, wait_s=wait_s)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done
    assert said in done.stderr
