"""Starts daemons quickly: ``python -m tests.support.spawner`` has everything imported and forks one for each line.

A line of stdin is a JSON list [pool, mount point, options, log file, notify socket, preparations]; the answer is the
daemon's process id.  The daemon is the product's own ``mount_pool`` in the foreground, after the preparations: calls of
functions of the tests, each ["module:function", arguments...].
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.support.cli import environment

Preparation = tuple[str | int | float, ...]
"""("module:function", argument, ...)."""


class Spawner:
    """The process, as seen by a test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.spawner"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip

    def mount(
        self, pool: Path, mountpoint: Path, options: str, log: Path, notify: Path, prepare: Sequence[Preparation] = ()
    ) -> int:
        """Begin to mount; ``notify`` hears READY=1 when the mount answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request: list[object] = [str(pool), str(mountpoint), options, str(log), str(notify), list(prepare)]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process; daemons that still run are no business of its."""
        self._process.communicate(timeout=30)


def _serve() -> None:
    from incfs.mount import mount_pool  # the slow import, once

    for line in sys.stdin:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # daemons that were killed
        pool, mountpoint, options, log, notify, prepare = json.loads(line)
        # Python ignores what a signal raises in the hooks of a fork.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        pid = os.fork()
        if pid == 0:
            _become_daemon(Path(log), notify)
            code = 1
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
                for function, *arguments in prepare:
                    module, _, name = function.partition(":")
                    getattr(importlib.import_module(module), name)(*arguments)
                mount_pool(Path(pool), Path(mountpoint), options, foreground=True)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        print(pid, flush=True)


def _become_daemon(log: Path, notify: str) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard, fd in enumerate((null, out, out)):
        os.dup2(fd, standard)
    os.environ["NOTIFY_SOCKET"] = notify


if __name__ == "__main__":
    _serve()
