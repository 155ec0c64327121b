"""Progress of long work: a bar on a terminal's stderr, and a line whenever SIGUSR1 asks."""

import contextlib
import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Final, Self

from incfs.units import format_size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

BAR_AFTER_S: Final = 0.5
"""Work that ends sooner shows no bar."""


class ProgressDisplay:
    """Takes progress calls and shows them; use as a context manager on the main thread."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._newest: tuple[int, int, str] | None = None
        self._bar: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGUSR1, self._print_line)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGUSR1, self._previous)
        if self._bar is not None:
            self._bar[0].stop()

    def __call__(self, done: int, total: int, unit: str) -> None:
        """Take note of progress."""
        self._newest = (done, total, unit)
        if self._bar is None and self._wants_bar():
            self._bar = _start_bar(unit)
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=done, total=total)

    def _wants_bar(self) -> bool:
        return time.monotonic() - self._started_s > BAR_AFTER_S and sys.stderr.isatty()

    def _print_line(self, number: int, frame: FrameType | None) -> None:
        text = "working"
        if self._newest is not None:
            done, total, unit = self._newest
            text = f"{done} of {total} {unit} done"
            seconds = time.monotonic() - self._started_s
            if unit == "bytes" and seconds > 0:
                text += f", {format_size(int(done / seconds))} a second"
        # Past sys.stderr: another signal may come while this one is answered, and its buffer cannot be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, f"incfs: {text}\n".encode())


def _start_bar(unit: str) -> "tuple[Progress, TaskID]":
    from rich.console import Console  # late: most commands need neither
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    speed = [DownloadColumn(binary_units=True), TransferSpeedColumn()] if unit == "bytes" else []
    bar = Progress(*Progress.get_default_columns(), *speed, console=Console(stderr=True), transient=True)
    bar.start()
    return bar, bar.add_task(unit)
