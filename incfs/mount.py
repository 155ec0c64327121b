"""The life of a mount: from the options to the last byte on disk.

Owns the order of events.  Everything is built up in ``_run`` and taken down in the opposite order:

    pool open -> FUSE session mounted -> extension -> hook -> admin socket -> signals -> requests -> ready

1. The pool is closed after the last request was answered, and the process ends after the pool is closed.
2. A daemon that dies leaves its mount behind: ENOTCONN, never an empty directory.  Only a clean end unmounts.
   A daemon that is told to end while its mount is in use serves it until it is free.
3. The kernel's own pages are written before a clean end and before a snapshot.
4. No thread of the daemon waits for the daemon's own mount: another process does that (``outside``).  After the last
   request nobody waits for that process either.
"""

import contextlib
import errno
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import pyfuse3
import trio

from incfs import fusext, metrics
from incfs.backing import ReadingBacking
from incfs.backing_device import widen_page_cache
from incfs.control import serve_control
from incfs.daemon import Parent, fork_daemon, log_to_stderr, notify_systemd, reopen_log
from incfs.enforcer import enforce
from incfs.errors import Busy, IncfsError, UsageError
from incfs.exporter import serve_metrics
from incfs.fuse_ops import Operations
from incfs.kernel_hook import KernelHook
from incfs.lastcall import is_last_call, release_devices
from incfs.model import Volume
from incfs.mount_options import MountOptions, parse_options
from incfs.mount_table import (
    FILESYSTEM_TYPE,
    detach,
    find_mount,
    is_dead,
    resolve_mountpoint,
)
from incfs.options import Options
from incfs.outside import Outside, fork_outside
from incfs.resume import resume_jobs
from incfs.service import open_service
from incfs.superblock import read_superblock
from incfs.surroundings import settle_daemon
from incfs.systemd import leave_session
from incfs.unmount import require_sole

if TYPE_CHECKING:
    from incfs.service import Service

logger = logging.getLogger(__name__)

_SHARED_REQUEST_BYTES: Final = 512 << 10
"""So that two hot threads share in a read or write of 1 MiB; cold reads of less than that are slower on disks."""
MIN_TASKS: Final = 8
MAX_TASKS: Final = 4096
"""A request that waits for others (a snapshot for the write-back of its volumes, FSYNC of each for the others) holds
its task, so tasks must not run out: twice the volumes of one standstill."""
_LOOK_FOR_SPACE_EVERY_S: Final = 0.1
"""While writers are refused because the pool is full."""
_LOOK_AT_SERVING_EVERY_S: Final = 1.0
RETRY_S: Final = 1.0
"""Between attempts to unmount what is in use; what the kernel holds is written as often."""
REMIND_S: Final = 60.0
"""How often the log says who uses the mount still."""


def mount_pool(pool: Path, mountpoint: Path, options: str, *, foreground: bool) -> None:
    """Mount the pool in directory ``pool``.

    In the background it returns when the mount answers; in the foreground when it has been unmounted and everything
    is on disk.

    Raises:
        UsageError: An option or the mount point makes no sense.
        PoolLocked: The pool is open elsewhere.
        IncfsError: The pool or the FUSE device cannot be used; or SIGTERM or SIGINT came and the mount could not be
            taken away though nobody uses it: everything is on disk, the mount is dead but in place.
    """
    parsed = parse_options(options)
    pool, mountpoint = Path(os.path.realpath(pool)), resolve_mountpoint(mountpoint)
    _prepare_mountpoint(pool, mountpoint)
    if foreground:
        log_to_stderr()
        _run_trio(pool, mountpoint, parsed, Parent())
        return
    read_superblock(ReadingBacking(), pool)
    parent = fork_daemon(pool)
    if parent is not None:
        leave_session(mountpoint)
        _run_child(pool, mountpoint, parsed, parent)


def _run_child(pool: Path, mountpoint: Path, options: MountOptions, parent: Parent) -> None:
    """Be the daemon, then end the process here: the rest of the stack is the parent's."""
    exit_code = 1
    try:
        _run_trio(pool, mountpoint, options, parent)
        exit_code = 0
    except IncfsError as error:
        logger.error("%s", error)
        parent.tell_error(error)
        exit_code = error.exit_code
    except BaseException:
        logger.exception("the daemon ends because of an unexpected error")
    finally:
        logging.shutdown()
        os._exit(exit_code)


def _prepare_mountpoint(pool: Path, mountpoint: Path) -> None:
    """Refuse what cannot be mounted on; take away what a killed daemon left there."""
    mounted = find_mount(mountpoint)
    if mounted is not None and mounted.filesystem_type == FILESYSTEM_TYPE:
        if not is_dead(mountpoint):
            raise Busy(f"{mounted.source} is mounted at {mountpoint} already", mountpoint=str(mountpoint))
        logger.warning("detaching the dead mount at %s", mountpoint)
        detach(mountpoint, lazy=True)
    if not mountpoint.is_dir():
        raise UsageError(f"the mount point {mountpoint} is not a directory", mountpoint=str(mountpoint))
    if Path(os.path.realpath(mountpoint)) in (pool, *pool.parents):
        raise UsageError(f"mounting at {mountpoint} would hide the pool {pool}", mountpoint=str(mountpoint))


def _run_trio(pool: Path, mountpoint: Path, options: MountOptions, parent: Parent) -> None:
    """Run the daemon; of errors that nurseries wrapped, raise the first."""
    settle_daemon()
    try:
        with fork_outside() as outside:
            trio.run(partial(_run, pool, mountpoint, options, parent, outside))
    except BaseExceptionGroup as group:
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        raise cause from group


async def _run(pool: Path, mountpoint: Path, options: MountOptions, parent: Parent, outside: Outside) -> None:
    """Serve the mount from its first to its last request."""
    # The outer nursery minds signals until the pool is closed: one that comes meanwhile must not cut that off.
    async with trio.open_nursery() as minding:
        async with open_service(pool, _store_options(options)) as service:
            if service.facts()["read_only"]:
                # Degraded: the kernel must not take writes that nobody could carry out.
                options = replace(options, read_only=True)
            operations = Operations(service, options.cache)
            service.durations = operations.durations
            with _fuse_session(operations, pool, mountpoint, options) as session:
                async with trio.open_nursery() as nursery:
                    fusext.start(nursery, operations, service.server)
                    hook = KernelHook(mountpoint, outside, operations.writers, service.name_of)
                    with _given_up_when_unserved(nursery, outside), _hooked(service, operations, hook):
                        stopping = _Stopping(service, hook, mountpoint, outside)
                        await _start_tasks(nursery, service, options)
                        await minding.start(stopping.watch_signals, parent.is_waiting)
                        nursery.start_soon(_refuse_writers_of_a_full_pool, service, operations, hook)
                        nursery.start_soon(_tell_ready, mountpoint, session, parent, outside)
                        aborted = await _serve_requests(mountpoint, outside, stopping)
                    notify_systemd("STOPPING=1")
                    logger.info("%s: no more requests; closing the pool", mountpoint)
                    service.jobs.is_ending = True
                    nursery.cancel_scope.cancel()
        minding.cancel_scope.cancel()
    logger.info("%s: the pool is closed", mountpoint)
    failure = stopping.refused or aborted
    if failure is not None:
        raise failure


async def _start_tasks(nursery: trio.Nursery, service: "Service", options: MountOptions) -> None:
    await nursery.start(serve_control, service)
    if options.metrics is not None:
        await nursery.start(serve_metrics, options.metrics, lambda: metrics.render(service))
    if not options.read_only:
        service.policies.may_hook = options.hooks
        nursery.start_soon(enforce, service)
        nursery.start_soon(resume_jobs, service)


@contextlib.contextmanager
def _given_up_when_unserved(nursery: trio.Nursery, outside: Outside) -> Iterator[None]:
    """Wait for no answer of the mount when an error has ended those who give them: a standstill is shielded."""
    served = trio.Event()
    nursery.start_soon(_watch_serving, trio.lowlevel.current_task(), outside, served)
    try:
        yield
    except BaseException:
        outside.give_up()
        raise
    finally:
        served.set()


async def _watch_serving(serving: trio.lowlevel.Task, outside: Outside, served: trio.Event) -> None:
    """See to the nursery of ``pyfuse3.main``, which ``serving`` runs: it waits for its handlers before it ends."""
    was_cancelled = False
    with trio.CancelScope(shield=True):
        while not served.is_set():
            is_cancelled = any(nursery.cancel_scope.cancel_called for nursery in serving.child_nurseries)
            if was_cancelled and is_cancelled:  # an ordinary end takes no second
                outside.give_up()
            was_cancelled = is_cancelled
            with trio.move_on_after(_LOOK_AT_SERVING_EVERY_S):
                await served.wait()


async def _refuse_writers_of_a_full_pool(service: "Service", operations: Operations, hook: KernelHook) -> None:
    """While the pool is full, let writers hear so: the kernel takes their writes and drops what we refuse."""
    while operations.enable_writeback_cache:
        await service.wait_full()
        fusext.refuse_writers(True)
        try:
            for table in operations.writers():
                hook.forget_attributes(table)
            while service.is_full:  # noqa: ASYNC110 - nobody tells when space comes back
                await trio.sleep(_LOOK_FOR_SPACE_EVERY_S)
        finally:
            fusext.refuse_writers(False)


async def _serve_requests(mountpoint: Path, outside: Outside, stopping: "_Stopping") -> IncfsError | None:
    """Answer the kernel until it is unmounted; returns what is wrong when the mount stayed behind."""
    try:
        await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)
    except BaseExceptionGroup as group:
        # Seen now and then instead of the ordinary end when a read of /dev/fuse meets the unmounting.
        _, others = group.split(lambda error: isinstance(error, OSError) and error.errno == errno.ECONNABORTED)
        if others is not None:
            raise
    if stopping.refused is not None or not await outside.run(_is_left_behind, mountpoint):
        return None
    # An administrator's last resort (/sys/fs/fuse/connections/N/abort): what arrived here is kept all the same.
    return IncfsError(f"{mountpoint}: the connection to the kernel was aborted; what it had not written is lost")


def _is_left_behind(mountpoint: Path) -> bool:
    return _is_mounted(mountpoint) and is_dead(mountpoint)


def _is_mounted(mountpoint: Path) -> bool:
    mounted = find_mount(mountpoint)
    return mounted is not None and mounted.filesystem_type == FILESYSTEM_TYPE


def _store_options(options: MountOptions) -> Options:
    chosen: dict[str, Any] = {
        "degraded": options.degraded,
        "force_older": options.force_older,
        "dump_interval_s": options.dump_s,
    }
    if options.commit_s is not None:
        chosen["commit_interval_s"] = options.commit_s
    if options.data_plane is not None:
        chosen["data_plane"] = options.data_plane
    return Options(**chosen)


@dataclass(slots=True)
class _Session:
    """The kernel's connection."""

    has_answered: bool = False


@contextlib.contextmanager
def _fuse_session(operations: Operations, pool: Path, mountpoint: Path, options: MountOptions) -> Iterator[_Session]:
    """Mount; at the end close the connection, and unmount only what never answered."""
    threads = options.threads if operations.service.server is not None else 0
    limits = fusext.Limits(
        hot_threads=threads,
        max_request_bytes=_SHARED_REQUEST_BYTES if threads > 1 else 0,
        # With a cache the kernel maps volumes anyway; a snapshot that was just created, which it does not cache, is
        # open for writing as far as it knows, and must not be.
        maps_shared=options.cache == "none",
    )
    told = fuse_options(pool, options)
    if fusext.install(limits):
        told |= limits.mount_options
    session = _Session()
    try:
        pyfuse3.init(operations, str(mountpoint), told)
    except RuntimeError as error:
        raise IncfsError(f"cannot mount at {mountpoint}: libfuse refused ({error}); {why_refused(options)}") from error
    try:
        yield session
    finally:
        fusext.stop()
        pyfuse3.close(unmount=not session.has_answered)


def why_refused(options: MountOptions, device: Path = Path("/dev/fuse")) -> str:
    """Say what may be the reason; libfuse and fusermount3 say theirs on stderr only."""
    if not os.path.exists(device):
        return f"there is no {device}: `modprobe fuse`, or give it to the container"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"this user may not open {device}"
    if options.allow_other and os.geteuid() != 0:
        return "allow_other needs a line user_allow_other in /etc/fuse.conf"
    return "fusermount3 says why on standard error; the mount point must be this user's"


def fuse_options(pool: Path, options: MountOptions) -> set[str]:
    """Return what libfuse is told; permissions are always the kernel's to check."""
    source = options.source or str(pool)
    # libfuse splits at commas, and pyfuse3 passes ASCII only.
    escaped = quote(os.fsencode(source), safe="".join(map(chr, range(33, 127))) + " ")
    escaped = escaped.replace("\\", "\\\\").replace(",", "\\,")
    told = {"default_permissions", f"fsname={escaped}", "subtype=incfs", *options.kernel}
    if options.allow_other:
        told.add("allow_other")
    if options.read_only:
        told.add("ro")
    return told


@contextlib.contextmanager
def _hooked(service: "Service", operations: Operations, hook: KernelHook) -> Iterator[None]:
    """Let the service and the handlers reach the kernel while the mount is up."""
    service.mounted = hook
    operations.kernel = hook
    try:
        yield
    finally:
        service.mounted = None
        operations.kernel = None


async def _tell_ready(mountpoint: Path, session: _Session, parent: Parent, outside: Outside) -> None:
    """Wait until the mount answers like any other, then say so."""
    await outside.run(os.stat, mountpoint)
    session.has_answered = True
    await trio.to_thread.run_sync(widen_page_cache, mountpoint)
    logger.info("%s: mounted", mountpoint)
    parent.tell_ready()


def _ends(*, in_background: bool) -> frozenset[signal.Signals]:
    """Return the signals that ask for the end; SIGHUP is one for a daemon that has a terminal to lose."""
    ends = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
    return frozenset(ends if in_background or _is_hangup_ignored() else ends | {signal.SIGHUP})


def _heard(*, in_background: bool) -> frozenset[signal.Signals]:
    """Return all signals that say something: a hangup does, where no terminal can hang up, whoever started it."""
    hangup = {signal.SIGHUP} if in_background or not _is_hangup_ignored() else set()
    return _ends(in_background=in_background) | {signal.SIGUSR1} | hangup


def _is_hangup_ignored() -> bool:
    """Tell whether the one who started us wants it (``nohup``)."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


class _Stopping:
    """Unmounts when the daemon is asked to end, as soon as nobody uses the mount.

    Args:
        service: The mounted pool.
        hook: Its way to the kernel.
        mountpoint: Where the pool is mounted.
        outside: Unmounts.
    """

    def __init__(self, service: "Service", hook: KernelHook, mountpoint: Path, outside: Outside) -> None:
        self._service = service
        self._hook = hook
        self._mountpoint = mountpoint
        self._outside = outside
        self._is_asked = False
        self._unwritten: set[str] = set()
        self._reminded_at = -math.inf
        self.refused: IncfsError | None = None
        """Why the mount was left in place, dead."""

    async def watch_signals(
        self, in_background: bool, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Unmount at the first signal that asks for the end; it is under way when others come.

        SIGUSR1 has the log say what is under way; SIGHUP, where it is no end, opens the log anew.
        """
        ends = _ends(in_background=in_background)
        with trio.open_signal_receiver(*_heard(in_background=in_background)) as received:
            async with trio.open_nursery() as nursery:
                task_status.started()
                async for number in received:
                    if number == signal.SIGUSR1:
                        self._log_state()
                    elif number not in ends:
                        reopen_log()
                    elif self._is_asked:
                        name = signal.Signals(number).name
                        logger.info("%s: %s changes nothing: the mount is ending already", self._mountpoint, name)
                    else:
                        self._is_asked = True
                        logger.info("%s: unmounting because of %s", self._mountpoint, signal.Signals(number).name)
                        nursery.start_soon(self._unmount)

    def _log_state(self) -> None:
        """Say what takes long: the jobs, and the end that waits for somebody."""
        jobs = [
            f"{job.request.verb} of {job.request.subject}" + (f" ({job.percent} %)" if job.percent is not None else "")
            for job in self._service.jobs.running()
        ]
        ending = "; ending, once nobody uses the mount" if self._is_asked else ""
        logger.info("%s: under way: %s%s", self._mountpoint, ", ".join(jobs) or "no long work", ending)

    async def _unmount(self) -> None:
        try:
            while not await self._is_unmounted():  # noqa: ASYNC110 - nobody tells when a mount becomes free
                await trio.sleep(RETRY_S)
        except IncfsError as error:
            # An end was asked for: write what the kernel holds and go.  The mount stays and answers ENOTCONN.
            logger.warning("%s; the mount stays in place without its daemon", error)
            self.refused = error
            await self._write_open_volumes()
            pyfuse3.terminate()
            # Snapshots under way wait for answers of the mount: their handlers, and so the end, would wait for ever.
            self._outside.give_up()

    async def _is_unmounted(self) -> bool:
        """Unmount; while somebody uses the mount, see that nothing is left to lose should SIGKILL come.

        A mount that was taken away lazily serves those who use it until they have gone.
        """
        try:
            if await self._outside.run(_is_mounted, self._mountpoint):
                if not is_last_call():
                    await self._outside.run(require_sole, self._mountpoint)
                await self._outside.run(detach, self._mountpoint)
        except Busy as busy:
            self._say_for_whom(busy)
            await self._make_durable()
            if is_last_call():
                await self._outside.run(release_devices, self._mountpoint)
            return False
        return True

    async def _make_durable(self) -> None:
        """Take over what the kernel holds and commit it: an fsync of our own does not."""
        await self._write_open_volumes()
        try:
            await self._service.commit()
        except IncfsError as error:
            if not self._unwritten:
                logger.error("not everything could be written: %s", error)
            self._unwritten.add("")

    def _say_for_whom(self, busy: Busy) -> None:
        notify_systemd(f"STATUS={busy}; it is served until it is free")
        if time.monotonic() - self._reminded_at >= REMIND_S:
            self._reminded_at = time.monotonic()
            logger.warning("%s; it is served until it is free, and what is written goes to disk at once", busy)

    async def _write_open_volumes(self) -> None:
        """Take over what the kernel has not written yet (syncfs does not wait for FUSE)."""
        for volume in self._service.volumes():
            if self._service.handles.of_volume(volume.id):
                await self._write_volume(volume)

    async def _write_volume(self, volume: Volume) -> None:
        try:
            await self._hook.sync_volume(volume.name)
        except IncfsError as error:
            now = next((found for found in self._service.volumes() if found.id == volume.id), None)
            if now is not None and now.name != volume.name:
                await self._write_volume(now)
            elif now is not None and volume.name not in self._unwritten:
                self._unwritten.add(volume.name)
                logger.error("%s: not everything could be written: %s", volume.name, error)
