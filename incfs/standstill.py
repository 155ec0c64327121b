"""A standstill: a moment at which nobody can write to any of some volumes, and all that was written is in the daemon.

Owns the answers to FSYNC that are held back for it.  Under write-back a write has returned once the kernel has it, and
the kernel sends changed pages one by one while programs go on: a snapshot of what had arrived would have later writes
and lack earlier ones.  But the kernel takes a file's lock before it writes that file's pages, keeps it until FSYNC is
answered, and no write returns, and no direct one begins, without that lock.  So another process asks for an fsync of
every volume.  When all have arrived here and none is answered, whatever had returned is in the daemon, and nothing can
return.

1. What is held is answered, whatever happens: after the step, an error, or the time that volumes may wait for others.
2. Volumes that nobody has open for writing need no fsync: closing writes a file's pages, and a mapping keeps its file
   open.  Who opens one meanwhile is seen in the step that the standstill is for, and it is tried again.
3. Files are opened before the first answer is held: a name needs the lock of its directory, and whoever has that may
   be waiting for the lock of a file.
4. One standstill at a time, so no two wait for each other.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Protocol, TypeVar

import trio

from incfs import fusext
from incfs.errors import Busy, LimitExceeded
from incfs.model import MapId

LIMIT_S: Final = 5.0
"""How long the first volume of a group waits for the last; then all go on, and it is tried again."""
TRIES: Final = 3
MAX_VOLUMES: Final = 2000
"""Volumes of one group that are open for writing: each holds a request here and a thread there."""

T = TypeVar("T")


class _Hold:
    """One try: which volumes have arrived, and what came of it."""

    def __init__(self, tables: Collection[MapId]) -> None:
        self.tables = frozenset(tables)
        self.missing = set(tables)
        self.error: Exception | None = None
        self.ended = trio.Event()
        self._first, self._all = trio.Event(), trio.Event()

    def arrive(self, table: MapId) -> None:
        self.missing.discard(table)
        self._first.set()
        if not self.missing:
            self._all.set()

    def give_up(self, error: Exception | None) -> None:
        """Wait for nobody any more: a volume will not arrive."""
        self.error = self.error or error
        self._first.set()
        self._all.set()

    async def wait_for_all(self) -> None:
        """Wait until all have arrived, one has failed, or the first has waited as long as it may."""
        await self._first.wait()
        with trio.move_on_after(LIMIT_S):
            await self._all.wait()


class Kernel(Protocol):
    """System calls on the mount, made by another process."""

    async def write_pages(self, files: Collection[tuple[Path, MapId]]) -> None:
        """Have changed pages of files written, while programs go on; as far as that is possible."""

    async def open_files(self, files: Collection[tuple[Path, MapId]]) -> list[int] | None:
        """Open files; None when one has another inode than was thought, or is not there."""

    async def sync_files(self, descriptors: list[int]) -> None:
        """Fsync them all at once, and close them; raises OSError at the first failure."""


class Standstill:
    """Brings volumes of a mount to a standstill.

    Args:
        kernel: Makes system calls that wait for our own answers.
        writers: Gives the volumes that somebody has open for writing.
        find_path: Gives the path of a volume in the mount; raises VolumeNotFound.

    Concurrency: the trio thread.
    """

    def __init__(
        self, kernel: Kernel, writers: Callable[[], Collection[MapId]], find_path: Callable[[MapId], Path]
    ) -> None:
        self._kernel = kernel
        self._writers = writers
        self._find_path = find_path
        self._turn = trio.Lock()
        self._hold: _Hold | None = None

    async def wait(self, table: MapId) -> None:
        """Wait, before FSYNC of a volume is answered, until no standstill needs the kernel's lock of it.

        Whoever sent it: the kernel sends one at a time for a file.
        """
        hold = self._hold
        if hold is not None and table in hold.tables:
            hold.arrive(table)
            await hold.ended.wait()

    async def do(self, tables: Collection[MapId], step: Callable[[], T]) -> T:
        """Do a step of the owner thread at a standstill of some volumes.

        Whatever was written to them through the mount and had returned is in the daemon then, but for what goes through
        shared mappings meanwhile.  A writer waits from when the kernel begins to write the last changed pages of its
        volume until after the step.

        Concurrency: may be cancelled until files are opened for it; then it is completed.

        Raises:
            Busy: A volume took longer than others may wait for it, each time.
            LimitExceeded: Too many are open for writing.
            IncfsError: The kernel could not write the pages of one, or what the step raises.
        """
        wanted = self._open_for_writing(tables)
        done: list[T] = []
        for _ in range(TRIES):
            if not wanted:
                return step()
            if len(wanted) > MAX_VOLUMES:
                raise LimitExceeded(
                    f"{len(wanted)} of the volumes are open for writing; one snapshot may be of {MAX_VOLUMES} such"
                )
            hold = _Hold(wanted)

            def step_if_still(hold: _Hold = hold) -> None:
                if not hold.missing and self._open_for_writing(tables) <= hold.tables:
                    done.append(step())

            await self._try(hold, step_if_still)
            if done:
                return done[0]
            # With all of them it does not matter any more who opens one meanwhile.
            wanted = set(tables) if len(tables) <= MAX_VOLUMES else wanted | self._open_for_writing(tables)
        names = ", ".join(sorted(self._find_path(table).name for table in hold.missing)) or "one"
        raise Busy(
            f"no snapshot was taken: {TRIES} times the pages that the kernel holds of {names} were not written within "
            f"{LIMIT_S:g} s, for which writers of the others wait; try again when less is written, or stop the writers"
        )

    def _open_for_writing(self, tables: Collection[MapId]) -> set[MapId]:
        return set(tables).intersection(self._writers())

    async def _try(self, hold: _Hold, step: Callable[[], None]) -> None:
        """Bring volumes to a standstill, do the step, and let them go on.

        Raises:
            Exception: Why there was none, or what the step raised.
        """
        await self._kernel.write_pages(self._files(hold))
        # What was opened over there has to be closed, which a task that is cancelled could not see to.
        with trio.CancelScope(shield=True):
            # The nursery waits until it is, when others have their turn.
            async with trio.open_nursery() as nursery, self._turn:
                await self._hold_for(hold, step, nursery)
        if hold.error is not None:
            raise hold.error

    def _files(self, hold: _Hold) -> list[tuple[Path, MapId]]:
        return [(self._find_path(table), table) for table in hold.tables]

    async def _hold_for(self, hold: _Hold, step: Callable[[], None], nursery: trio.Nursery) -> None:
        try:
            descriptors = await self._kernel.open_files(self._files(hold))
            if descriptors is None:
                return
            self._hold = hold
            fusext.leave_syncs(True)
            nursery.start_soon(self._sync, descriptors, hold)
            await hold.wait_for_all()
            if hold.error is None:
                step()
        except Exception as error:  # noqa: BLE001 - raised by who waits for the nursery, which would wrap it
            hold.give_up(error)
        finally:
            self._hold = None
            fusext.leave_syncs(False)
            hold.ended.set()

    async def _sync(self, descriptors: list[int], hold: _Hold) -> None:
        """Have FSYNC sent; it ends when all are answered, or with the first that fails."""
        error: Exception | None = None
        try:
            await self._kernel.sync_files(descriptors)
        except Exception as raised:  # noqa: BLE001 - as above
            error = raised
        if not hold.ended.is_set():
            hold.give_up(error)
