"""How a command reaches its pool: through the daemon that has it mounted, or by opening it.

Both ways run the same verbs of ``incfs.admin``.  The pool is opened under its lock, so the
two can never work on it at once.
"""

import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar

import trio
import typer

from incfs.channel import NO_CHANNEL, Channel
from incfs.cli.options import FORCE_OLDER, LOCK_WAIT_S, WAIT_S, pool_directory
from incfs.cli.progress import ProgressDisplay
from incfs.client import connect_control
from incfs.documents import Document
from incfs.errors import PoolLocked
from incfs.patience import PATIENCE_S
from incfs.remains import find_remains

if TYPE_CHECKING:
    from incfs.service import Service

logger = logging.getLogger(__name__)

_LOCK_RETRY_S: Final = 0.05

T = TypeVar("T")


class Admin(Protocol):
    """Whatever carries out verbs."""

    async def call(self, verb: str, **arguments: Any) -> Document:
        """Run one verb and return its document."""

    async def transfer(self, verb: str, channel: Channel, arguments: Document) -> Document:
        """Run one verb that has bulk data, and return its document."""


class _OfflineAdmin:
    """Runs verbs in this process on a pool that it has opened."""

    def __init__(self, service: "Service", progress: ProgressDisplay) -> None:
        self._service = service
        self._progress = progress

    async def call(self, verb: str, **arguments: Any) -> Document:
        return await self.transfer(verb, NO_CHANNEL, arguments)

    async def transfer(self, verb: str, channel: Channel, arguments: Document) -> Document:
        from incfs.admin import VERBS, run_verb  # late, as in open_admin

        document = await run_verb(self._service, verb, arguments, self._progress, channel)
        if not VERBS[verb].is_read_only:
            # No daemon will do it later: the next opener should not find the work of a removal.
            await self._service.wait_reclaimed()
        return document


def call(context: typer.Context, verb: str, **arguments: Any) -> Document:
    """Run one verb on the command's pool, online or offline, and return its document.

    Raises:
        IncfsError: What the verb raised, or why the pool could not be reached.
    """
    return run(context, verb, lambda admin: admin.call(verb, **arguments))


def transfer(context: typer.Context, verb: str, channel: Channel, **arguments: Any) -> Document:
    """Do as ``call``, for a verb that has bulk data."""
    return run(context, verb, lambda admin: admin.transfer(verb, channel, arguments))


def run(context: typer.Context, verb: str, work: Callable[[Admin], Awaitable[T]]) -> T:
    """Run ``work``, which calls a verb any number of times; Ctrl-C ends the process with 130.

    For a verb that only looks, a pool that no daemon has is opened also when images are missing.
    """
    try:
        with ProgressDisplay() as progress:
            # Ctrl-C is taken at checkpoints only: never inside a change to the pool.
            return trio.run(
                partial(
                    _work,
                    pool_directory(context),
                    verb,
                    work,
                    progress,
                    force_older=bool(context.meta.get(FORCE_OLDER)),
                    wait_s=context.meta.get(WAIT_S, LOCK_WAIT_S),
                ),
                restrict_keyboard_interrupt_to_checkpoints=True,
            )
    except KeyboardInterrupt:
        _leave_interrupted()
    except BaseExceptionGroup as group:
        error = _single_cause(group)
        if isinstance(error, KeyboardInterrupt):
            _leave_interrupted()
        raise error from None


async def _work(
    directory: Path,
    verb: str,
    work: Callable[[Admin], Awaitable[T]],
    progress: ProgressDisplay,
    *,
    force_older: bool,
    wait_s: float,
) -> T:
    deadline, told_at = trio.current_time() + wait_s, trio.current_time() + PATIENCE_S
    while True:
        try:
            async with open_admin(directory, verb, progress, force_older=force_older) as admin:
                return await work(admin)
        except PoolLocked as locked:
            if trio.current_time() > deadline:
                raise
            if trio.current_time() > told_at:
                logger.warning("waiting: %s", locked)
                told_at = deadline
        await trio.sleep(_LOCK_RETRY_S)


@contextlib.asynccontextmanager
async def open_admin(
    directory: Path, verb: str, progress: ProgressDisplay, *, force_older: bool
) -> AsyncIterator[Admin]:
    """Reach the pool for a verb: its daemon when that answers, else the pool itself.

    Raises:
        PoolLocked: Another process has it open and no daemon answers.
        IncfsError: It cannot be opened.
    """
    async with connect_control(directory, progress) as client:
        if client is not None:
            yield client
            return
    from incfs.admin import VERBS  # late: an online command does not need the core
    from incfs.service import open_service

    remains = find_remains(directory)
    async with open_service(directory, degraded=VERBS[verb].is_read_only, force_older=force_older) as service:
        for line in await trio.to_thread.run_sync(remains.describe):
            logger.warning("%s", line)
        remains.forget()
        yield _OfflineAdmin(service, progress)


def _single_cause(error: BaseException) -> BaseException:
    """Return the one error that nurseries wrapped; of several, the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _leave_interrupted() -> NoReturn:
    sys.exit(128 + signal.SIGINT)
