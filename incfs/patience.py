"""Saying for whom one waits, once that takes longer than anybody expects."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 10.0
"""After which whoever waits says for whom."""


@contextlib.contextmanager
def telling(whom: Callable[[], str], after_s: float = PATIENCE_S) -> Iterator[None]:
    """Warn ``waiting for WHOM`` if what is done inside takes longer.

    Concurrency: ``whom`` is asked by a thread of its own, so the caller may be inside a system call.
    """
    timer = threading.Timer(after_s, lambda: logger.warning("waiting for %s", whom()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def process_words(pid: int | str) -> str:
    """Name a process, and say if it is stopped: then it answers nobody until it is continued."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"process {pid}"
    is_stopped = status.rpartition(")")[2].split()[:1] in (["T"], ["t"])
    return f"process {pid}, which is stopped: `kill -CONT {pid}`" if is_stopped else f"process {pid}"
