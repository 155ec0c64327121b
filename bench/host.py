"""The host as the benchmark uses it: commands, daemons, loop devices, mounts, and nothing left behind.

Owns every process, mount, loop device and file that a run makes.

1. Whatever is made is registered with a ``Cleanup`` before it is used; clean-up goes on after a failed step.
2. Daemons are children in sessions of their own: Ctrl-C reaches only the harness, and when the harness is
   killed the kernel ends them.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PREFIX = "incfs-bench."
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class BenchError(Exception):
    """A step of the benchmark failed; the text says which and why."""


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run(command: Sequence[str | Path], *, timeout_s: float = 600, **options: Any) -> str:
    """Run a command to its end and return its standard output.

    Raises:
        BenchError: It failed or took too long.
    """
    words = [str(word) for word in command]
    process: subprocess.Popen[str] = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - the harness has one thread
        **options,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise BenchError(f"{' '.join(words)}: still running after {timeout_s:.0f} s") from None
        raise
    if process.returncode:
        raise BenchError(f"{' '.join(words)}: exit {process.returncode}: {(err or out).strip()[-2000:]}")
    return out


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Wait for something to become true.

    Raises:
        BenchError: It did not in time.
    """
    limit = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > limit:
            raise BenchError(f"{what}: not after {timeout_s:.0f} s")
        time.sleep(0.02)


class Cleanup:
    """Steps that undo what was made, taken in the opposite order; a failed one does not stop the others.

    Attributes:
        failures: What could not be undone.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[int, str, Callable[[], object]]] = []
        self._numbers = iter(range(sys.maxsize))
        self.failures: list[str] = []

    def add(self, what: str, step: Callable[[], object]) -> Callable[[], None]:
        """Register a step; the returned function takes it early."""
        number = next(self._numbers)
        self._steps.append((number, what, step))

        def take_now() -> None:
            for entry in [entry for entry in self._steps if entry[0] == number]:
                self._steps.remove(entry)
                step()

        return take_now

    def close(self) -> None:
        """Take every step that is left."""
        while self._steps:
            _, what, step = self._steps.pop()
            try:
                step()
            except Exception as error:  # noqa: BLE001 - the steps that follow still have to be taken
                self.failures.append(f"{what}: {error}")
                print(f"clean-up: {what}: {error}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with signals_blocked():
            self.close()


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Let nothing but SIGKILL interrupt: a second Ctrl-C must not cut off a clean-up."""
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        for number in numbers & signal.sigpending():
            signal.sigtimedwait({number}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spawn(cleanup: Cleanup, command: Sequence[str | Path], log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """Start a daemon as a child; it ends with the clean-up at the latest."""
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - the harness has one thread
            **options,
        )
    cleanup.add(f"end {Path(str(command[0])).name} ({process.pid})", lambda: end(process))
    return process


def end(process: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    """End a daemon that we started: asked first, killed if it does not listen."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise BenchError(f"pid {process.pid} had to be killed") from None


def is_mounted(path: Path) -> bool:
    """Tell whether something is mounted on ``path``, a directory or a file."""
    return str(path) in mounts_below(path)


def mounts_below(path: Path) -> list[str]:
    """List the mount points at and below ``path``, the deepest last."""
    points = [line.split()[4].replace("\\040", " ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point == str(path) or point.startswith(f"{path}/")]


def unmount(path: Path) -> None:
    """Unmount if mounted; lazily if somebody keeps it busy."""
    for _ in range(50):
        if not is_mounted(path):
            return
        if subprocess.run(["umount", path], capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.1)
    run(["umount", "--lazy", path])
    raise BenchError(f"{path} was busy: detached lazily")


def attach_loop(cleanup: Cleanup, image: Path, *, direct_io: bool) -> tuple[Path, Callable[[], None]]:
    """Attach a loop device; give it and the function that detaches it early."""
    mode = "on" if direct_io else "off"
    device = Path(run(["losetup", "--find", "--show", f"--direct-io={mode}", image]).strip())
    return device, cleanup.add(f"detach {device}", lambda: detach_loop(device))


def detach_loop(device: Path) -> None:
    """Detach a loop device and wait until it has let go of its file."""
    run(["losetup", "--detach", device])
    backing = Path(f"/sys/block/{device.name}/loop/backing_file")
    wait_until(lambda: not backing.exists(), f"{device} to let go of its file")


def mount(cleanup: Cleanup, device: Path, mountpoint: Path, *options: str) -> Callable[[], None]:
    """Mount a block device; give the function that unmounts it early."""
    mountpoint.mkdir(exist_ok=True)
    run(["mount", *options, device, mountpoint])
    return cleanup.add(f"unmount {mountpoint}", lambda: unmount(mountpoint))


def sync_file(path: Path) -> None:
    """Flush one file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def forget_pages(path: Path) -> None:
    """Take a flushed file out of the page cache; of what lies below it, nothing."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def drop_caches() -> None:
    """Empty the machine's page cache."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def make_scratch(cleanup: Cleanup, base: Path) -> Path:
    """Make the directory that everything of a run lives in, after removing what a killed run left there."""
    for stale in base.glob(PREFIX + "*"):
        pid = int(stale.name[len(PREFIX) :].split(".")[0])
        if not Path(f"/proc/{pid}").exists():
            print(f"removing {stale}, left by a run that was killed", file=sys.stderr)
            remove_scratch(stale)
    path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}.", dir=base))
    path.chmod(0o711)  # PostgreSQL's user passes through
    cleanup.add(f"remove {path}", lambda: remove_scratch(path))
    return path


def remove_scratch(path: Path) -> None:
    """Remove a run's directory with all mounts and loop devices below it.

    Raises:
        BenchError: The run had not undone them itself.
    """
    left = []
    while points := mounts_below(path):
        left.append(points[-1])
        run(["umount", "--lazy", points[-1]])
    for device, backing in loops_below(path):
        left.append(f"{device} on {backing}")
        run(["losetup", "--detach", device])
    shutil.rmtree(path)
    if left and f"{PREFIX}{os.getpid()}." in path.name:
        raise BenchError(f"was still there: {', '.join(left)}")


def loops_below(path: Path) -> list[tuple[str, str]]:
    """List the loop devices on files below ``path``."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = entry.read_text().strip()
        except OSError:
            continue  # detached meanwhile
        if backing.startswith(f"{path}/"):
            found.append((f"/dev/{entry.parts[3]}", backing))
    return found
