"""A standstill of volumes, with a kernel of the test's own: what is held is answered whatever happens."""

from collections.abc import Collection, Iterator
from contextlib import nullcontext
from itertools import cycle, repeat
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from incfs import fusext
from incfs.errors import BackingError, Busy, LimitExceeded, VolumeNotFound
from incfs.model import MapId
from incfs.standstill import LIMIT_S, MAX_VOLUMES, TRIES, Standstill

DATA, WAL, IDLE = MapId(1 << 32), MapId(2 << 32), MapId(3 << 32)


class Kernel:
    """Files with a lock each, which fsync holds until it is answered."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.names = {DATA: "data", WAL: "wal", IDLE: "idle"}
        self.locks = {table: trio.Lock() for table in self.names}
        self.writers: Iterator[set[MapId]] = repeat({DATA, WAL})
        """Each time that somebody asks."""
        self.flush_s = {DATA: 0.1, WAL: 0.2, IDLE: 0.0}
        self.broken: set[MapId] = set()
        self.opened: list[MapId] = []
        """Not closed yet."""
        self.standstill = Standstill(self, lambda: next(self.writers), self.find_path)

    def find_path(self, table: MapId) -> Path:
        if table not in self.names:
            raise VolumeNotFound("it was removed")
        return Path("/mnt") / self.names[table]

    async def write_pages(self, files: Collection[tuple[Path, MapId]]) -> None:
        await trio.sleep(0.5)

    async def open_files(self, files: Collection[tuple[Path, MapId]]) -> list[int] | None:
        await trio.sleep(0.01)
        if any(path.name != self.names.get(table) for path, table in files):
            return None
        self.opened += [table for _, table in files]
        return [table for _, table in files]

    async def sync_files(self, descriptors: list[int]) -> None:
        """Return when all are answered, or with the first that fails."""
        send, outcomes = trio.open_memory_channel[bool](len(descriptors))
        for table in descriptors:
            self._nursery.start_soon(self._sync, MapId(table), send)
        for _ in descriptors:
            if not await outcomes.receive():
                raise BackingError("EIO")

    async def _sync(self, table: MapId, send: "trio.MemorySendChannel[bool]") -> None:
        if table not in self.broken:
            await self.sync(table)
        self.opened.remove(table)
        await send.send(table not in self.broken)

    async def sync(self, table: MapId) -> None:
        async with self.locks[table]:
            await trio.sleep(self.flush_s[table])
            await self.standstill.wait(table)

    async def write(self, table: MapId) -> float:
        """Write; returns how long that took."""
        begun = trio.current_time()
        async with self.locks[table]:
            return trio.current_time() - begun


@pytest.fixture
async def kernel(nursery: trio.Nursery) -> Kernel:
    return Kernel(nursery)


async def test_the_step_is_done_while_the_locks_of_all_that_are_open_for_writing_are_held(
    kernel: Kernel, autojump_clock: MockClock
) -> None:
    held = await kernel.standstill.do(
        {DATA, WAL, IDLE}, lambda: {table for table, lock in kernel.locks.items() if lock.locked()}
    )
    assert held == {DATA, WAL}
    assert not kernel.opened
    assert await kernel.write(DATA) == await kernel.write(WAL) == 0


@pytest.mark.parametrize("broken", [set(), {WAL}], ids=["sound", "broken"])
async def test_hot_threads_leave_fsyncs_to_python_just_while_answers_are_held(
    kernel: Kernel, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, broken: set[MapId]
) -> None:
    """One of theirs would let writers go on before all the others have arrived."""
    are_left: list[bool] = []
    at_sync: list[list[bool]] = []
    sync_files = kernel.sync_files

    async def sync_and_note(descriptors: list[int]) -> None:
        at_sync.append(are_left.copy())
        await sync_files(descriptors)

    monkeypatch.setattr(fusext, "leave_syncs", are_left.append)
    monkeypatch.setattr(kernel, "sync_files", sync_and_note)
    kernel.broken = broken
    with pytest.raises(BackingError) if broken else nullcontext():
        await kernel.standstill.do({DATA, WAL}, lambda: None)
    assert at_sync == [[True]]
    assert are_left == [True, False]


async def test_nothing_is_asked_of_the_kernel_when_nobody_may_have_written(
    kernel: Kernel, autojump_clock: MockClock
) -> None:
    kernel.writers = repeat({WAL})
    with trio.fail_after(0):
        assert await kernel.standstill.do({DATA, IDLE}, lambda: "done") == "done"


async def test_somebody_elses_fsync_holds_the_lock_as_well(
    kernel: Kernel, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """It may come first, and then ours waits for its answer: both would wait for ever."""
    kernel.flush_s[WAL] = 1.0
    nursery.start_soon(kernel.standstill.do, {DATA, WAL}, lambda: None)
    await trio.sleep(0.505)
    begun = trio.current_time()
    await kernel.sync(DATA)
    assert 0.9 < trio.current_time() - begun < 1.5


async def test_a_volume_that_is_late_lets_the_others_go_on_and_is_tried_again(
    kernel: Kernel, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    kernel.flush_s[WAL] = 2 * LIMIT_S
    taken = []
    nursery.start_soon(kernel.standstill.do, {DATA, WAL}, lambda: taken.append(trio.current_time()))
    await trio.sleep(1.0)
    assert LIMIT_S - 1 < await kernel.write(DATA) < LIMIT_S + 0.1
    kernel.flush_s[WAL] = 0.2  # what was changed has become less
    await wait_all_tasks_blocked()
    await trio.sleep(2 * LIMIT_S)
    assert len(taken) == 1
    assert not kernel.opened


async def test_a_volume_that_is_late_each_time_is_no_snapshot_and_is_named(
    kernel: Kernel, autojump_clock: MockClock
) -> None:
    kernel.flush_s[WAL] = 2 * LIMIT_S
    with pytest.raises(Busy, match=rf"{TRIES} times .* of wal were not written within 5 s"):
        await kernel.standstill.do({DATA, WAL}, lambda: pytest.fail("it was no point in time"))
    assert await kernel.write(DATA) == 0
    assert not kernel.opened


async def test_one_volume_alone_has_all_the_time_that_it_needs(kernel: Kernel, autojump_clock: MockClock) -> None:
    kernel.flush_s[WAL] = 100 * LIMIT_S
    assert await kernel.standstill.do({WAL, IDLE}, lambda: "done") == "done"


async def test_a_volume_that_is_opened_for_writing_meanwhile_is_held_in_the_next_try(
    kernel: Kernel, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """What it has written before the others were held may have returned, and may be with the kernel still."""

    async def open_idle() -> None:
        await trio.sleep(0.6)
        kernel.writers = repeat({DATA, WAL, IDLE})

    nursery.start_soon(open_idle)
    assert await kernel.standstill.do({DATA, WAL, IDLE}, kernel.locks[IDLE].locked)


async def test_volumes_that_are_opened_and_closed_all_the_time_do_not_prevent_it(
    kernel: Kernel, autojump_clock: MockClock
) -> None:
    kernel.writers = cycle([{DATA}, {DATA, WAL}])
    assert await kernel.standstill.do({DATA, WAL, IDLE}, kernel.locks[WAL].locked)


async def test_the_first_volume_that_fails_ends_it_and_is_told(kernel: Kernel, autojump_clock: MockClock) -> None:
    kernel.broken = {WAL}
    began = trio.current_time()
    with pytest.raises(BackingError, match="EIO"):
        await kernel.standstill.do({DATA, WAL}, lambda: pytest.fail("a write is missing"))
    assert trio.current_time() - began < LIMIT_S
    assert await kernel.write(DATA) <= kernel.flush_s[DATA]
    assert not kernel.opened


async def test_what_the_step_raises_is_raised_and_all_go_on(kernel: Kernel, autojump_clock: MockClock) -> None:
    with pytest.raises(ZeroDivisionError):
        await kernel.standstill.do({DATA, WAL}, lambda: 1 // 0)
    assert await kernel.write(DATA) == await kernel.write(WAL) == 0
    assert not kernel.opened


async def test_a_cancelled_caller_leaves_nothing_held_and_nothing_open(
    kernel: Kernel, autojump_clock: MockClock
) -> None:
    for delay_s in (0.1, 0.505, 0.55, 0.65):
        with trio.move_on_after(delay_s):
            await kernel.standstill.do({DATA, WAL}, lambda: None)
        assert await kernel.write(DATA) == await kernel.write(WAL) == 0
        assert not kernel.opened


async def test_two_at_once_of_the_same_volumes_take_turns(kernel: Kernel, autojump_clock: MockClock) -> None:
    done = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kernel.standstill.do, (DATA, WAL), lambda: done.append(1))
        nursery.start_soon(kernel.standstill.do, (WAL, DATA), lambda: done.append(2))
        nursery.start_soon(kernel.standstill.do, (WAL,), lambda: done.append(3))
    assert sorted(done) == [1, 2, 3]


async def test_a_volume_renamed_meanwhile_is_found_and_a_removed_one_is_told(
    kernel: Kernel, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async def rename() -> None:
        await trio.sleep(0.505)
        kernel.names[WAL] = "log"

    nursery.start_soon(rename)
    assert await kernel.standstill.do({DATA, WAL}, kernel.locks[WAL].locked)
    del kernel.names[WAL]
    with pytest.raises(VolumeNotFound):
        await kernel.standstill.do({DATA, WAL}, lambda: None)
    assert await kernel.write(DATA) == 0


async def test_more_volumes_than_there_are_threads_for_are_refused(kernel: Kernel, autojump_clock: MockClock) -> None:
    many = {MapId(number << 32) for number in range(1, MAX_VOLUMES + 2)}
    kernel.writers = repeat(many)
    with pytest.raises(LimitExceeded, match="2001 of the volumes are open for writing"):
        await kernel.standstill.do(many, lambda: None)
