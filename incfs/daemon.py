"""Being a daemon: the fork, the word to the waiting parent, the log and the notice to systemd.

The fork comes before trio and lmdb are started; neither survives one.
"""

import errno
import json
import logging
import logging.handlers
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

from incfs.errors import IncfsError
from incfs.protocol import error_document, rebuild_error

logger = logging.getLogger(__name__)

LOG_NAME: Final = "daemon.log"
LOG_BYTES: Final = 1 << 20
LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Parent:
    """Whoever waits to hear that the mount answers: the forking command, systemd, or nobody."""

    def __init__(self, pipe_fd: int | None = None) -> None:
        self._pipe_fd = pipe_fd

    @property
    def is_waiting(self) -> bool:
        """Whether a command waits, and goes its way without us then: we are in the background."""
        return self._pipe_fd is not None

    def tell_ready(self) -> None:
        """Say that the mount answers."""
        self._send({"ready": True})
        notify_systemd("READY=1")

    def tell_error(self, error: IncfsError) -> None:
        """Say why there will be no mount."""
        self._send({"error": error_document(error)})

    def _send(self, message: dict[str, object]) -> None:
        if self._pipe_fd is not None:
            os.write(self._pipe_fd, json.dumps(message).encode())
            os.close(self._pipe_fd)
            self._pipe_fd = None


def fork_daemon(pool: Path) -> Parent | None:
    """Fork; return the way to the parent in the child, and None in the parent once the child is ready.

    The child has its own session, no terminal, none of the parent's open files, and logs to ``POOL/daemon.log``.

    Raises:
        IncfsError: In the parent: what the child told, or that it died.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir("/")
        os.umask(0o077)
        _drop_files(keep=writer)
        log_to_file(pool)
        return Parent(writer)
    os.close(writer)
    _await_child(reader, pid, pool)
    return None


def _drop_files(keep: int) -> None:
    """Close what was inherited: a script's lock or pipe must not be held for the life of the mount."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if number > 2 and number != keep:
            try:
                os.close(number)
            except OSError:
                continue  # the listing's own


def _await_child(reader: int, pid: int, pool: Path) -> None:
    with os.fdopen(reader, "rb") as stream:
        told = stream.read()
    message = json.loads(told) if told else {}
    if message.get("ready"):
        return
    _, status = os.waitpid(pid, 0)
    if "error" in message:
        raise rebuild_error(message["error"])
    ended = os.waitstatus_to_exitcode(status)
    how = f"was killed by {signal.Signals(-ended).name}" if ended < 0 else f"ended with {ended}"
    raise IncfsError(f"the daemon {how} before the mount answered; see {pool / LOG_NAME}")


def log_to_file(pool: Path) -> None:
    """Log to ``POOL/daemon.log``, which is bounded: one older file is kept."""
    try:
        handler: logging.Handler = logging.handlers.RotatingFileHandler(
            pool / LOG_NAME, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace"
        )
    except OSError:
        handler = logging.NullHandler()  # a read-only or full disk is reported by what fails there
    _set_handler(handler)


def reopen_log() -> None:
    """Write on to a new ``daemon.log`` if somebody has moved the one that is open (logrotate)."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()  # the next line opens it by its name


def log_to_stderr() -> None:
    """Log to stderr, where systemd and a person look."""
    _set_handler(logging.StreamHandler())


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Drop what pyfuse3 calls an error when a request was given up by the kernel, as at each unmounting."""
    return not (isinstance(record.args, tuple) and record.args == (os.strerror(errno.ENOENT),))


def _set_handler(handler: logging.Handler) -> None:
    logging.getLogger("pyfuse3").addFilter(_is_worth_logging)
    logging.raiseExceptions = False  # a full disk must not make a log line an error
    logging.basicConfig(level=logging.INFO, handlers=[handler], format=LOG_FORMAT, force=True)


def notify_systemd(state: str) -> None:
    """Send a line such as ``READY=1`` to the service manager, if there is one (sd_notify protocol)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect(address)
            sender.sendall(state.encode())
    except OSError as error:
        logger.warning("the service manager was not told %s: %s", state, error)
