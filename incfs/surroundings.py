"""What a process of ours finds where it is started, made into what the rest of the code may count on.

Called first thing at every entry point: ``settle`` by each command, ``settle_daemon`` by the daemon before it forks or
starts a thread.  Nothing here raises: what the system does not permit stays as it was.

1. Text is UTF-8 whatever the locale, as in the format.
2. Descriptors 0 to 2 are open: otherwise the pool's lock, an image or ``/dev/fuse`` would become "standard output",
   and a stray line would be written into it.
3. Only signals that mean an end end a daemon.  The others have a handler and are not ignored: what is ignored stays so
   in the programs that a daemon starts (hooks, ssh), a handler does not.
"""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Final

from incfs._guard import end_without_thread

STANDARD: Final = ("stdin", "stdout", "stderr")
_closed: Final[set[str]] = set()

_MEANT: Final = frozenset({
    signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1,
    # Faults of the process itself, and the terminal's job control.
    signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP,
    signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
    # What does nothing by itself, cannot be handled, or is ignored by Python already.
    signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH, signal.SIGKILL, signal.SIGSTOP,
    signal.SIGPIPE, signal.SIGXFSZ,
})  # fmt: skip

_PR_SET_IO_FLUSHER: Final = 57
_OOM_SCORE: Final = "/proc/{}/oom_score_adj"
_DAEMON_OOM_SCORE: Final = "-900"
"""As low as system daemons that disks depend on; killed all the same before the kernel gives up."""


def settle() -> None:
    """Make what a command may count on: UTF-8, descriptors 0 to 2, and a SIGUSR1 that ends nothing.

    A locale that is not UTF-8 makes the process begin anew; what it starts (daemon, helper, commands) begins like that.
    """
    _speak_utf8()
    _fill_standard()
    signal.signal(signal.SIGUSR1, _pass_by)


def settle_daemon() -> None:
    """Make what a daemon may count on: stray signals pass by, and the kernel spares it when memory is short.

    Whoever writes the kernel's pages back must not wait for pages to be written back (``PR_SET_IO_FLUSHER``).  A thread
    that has no memory to begin ends the daemon: whoever started it, often the owner's thread, would wait for ever.

    Concurrency: before the process forks or starts threads, which inherit both.
    """
    for number in signal.valid_signals() - _MEANT | {signal.SIGUSR1}:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _pass_by)
    sys.unraisablehook = end_without_thread
    ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    score = Path(_OOM_SCORE.format("self"))
    with contextlib.suppress(OSError):
        if score.read_text(encoding="ascii").strip() == "0":  # otherwise somebody has chosen
            score.write_text(_DAEMON_OOM_SCORE, encoding="ascii")


def expose(pid: int) -> None:
    """Take from a program that a daemon started what spares the daemon when memory is short."""
    with contextlib.suppress(OSError):
        score = Path(_OOM_SCORE.format(pid))
        if score.read_text(encoding="ascii").strip() == _DAEMON_OOM_SCORE:
            score.write_text("0", encoding="ascii")


def is_closed(stream: str) -> bool:
    """Tell whether ``stdin``, ``stdout`` or ``stderr`` was closed when the process began: bulk data needs them."""
    return stream in _closed


def _speak_utf8() -> None:
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - it is ourselves


def _fill_standard() -> None:
    """Put ``/dev/null`` on what is closed, for this process and those that it starts."""
    for fd, name in enumerate(STANDARD):
        try:
            os.fstat(fd)
        except OSError:
            _closed.add(name)
            # The lowest free number: those below are open.
            opened = os.open(os.devnull, os.O_RDONLY if fd == 0 else os.O_WRONLY)
            assert opened == fd
            os.set_inheritable(fd, True)
        if getattr(sys, name) is None:
            stream = open(fd, "r" if fd == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for good
            setattr(sys, name, stream)


def _pass_by(number: int, frame: FrameType | None) -> None:
    """Be the handler of what means nothing."""
