"""A disk that hangs, or is full: everything else goes on, and what waits is told or comes right in the end."""

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, get_args

import pytest
import trio

from incfs import committer
from incfs.backing import File
from incfs.errors import MetadataFull, NoSpace
from incfs.metadata import TABLES_NAME
from incfs.model import PAGE_BLOCKS, Volume
from incfs.options import Options
from incfs.planes import HAS_NATIVE, PlaneKind
from incfs.recovery import create_pool
from incfs.reuse import CHUNK_BYTES
from incfs.service import Service, open_service
from incfs.tables import Tables

PLANES: list[PlaneKind] = [kind for kind in get_args(PlaneKind) if kind != "auto" and (HAS_NATIVE or kind != "native")]
PATIENCE_S = 60
DATA = Random(1).randbytes(3 * CHUNK_BYTES)
SMALL = Random(2).randbytes(40_000)
"""A record has it, with what it is part of."""
JOURNAL_BYTES = 1 << 20


class Hang:
    """One method of the host that blocks until it is released; with ``once`` only its first call does."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, suffix: str, *, once: bool = False
    ) -> None:
        self._entered = threading.Event()
        self._released = threading.Event()
        original: Callable[..., Any] = getattr(owner, method)

        def hang(receiver: Any, *arguments: Any, **options: Any) -> Any:
            path = receiver.path if isinstance(receiver, File) else receiver._path
            is_over = self._released.is_set() or (once and self._entered.is_set())
            if not is_over and path.name.endswith(suffix):
                self._entered.set()
                assert self._released.wait(PATIENCE_S), "nobody releases it"
            return original(receiver, *arguments, **options)

        monkeypatch.setattr(owner, method, hang)

    async def entered(self) -> None:
        """Wait until somebody hangs."""
        with trio.fail_after(PATIENCE_S):
            assert await trio.to_thread.run_sync(self._entered.wait, PATIENCE_S)

    def release(self) -> None:
        """Let it go on, and never hang again."""
        self._released.set()


def options(plane: PlaneKind, extend_bytes: int) -> Options:
    return Options(
        data_plane=plane,
        extend_bytes=extend_bytes,
        host_reserve_bytes=0,
        commit_interval_s=1e6,
        checkpoint_interval_s=1e6,
    )


@asynccontextmanager
async def two_volumes(
    home: Path, plane: PlaneKind = "python", extend_bytes: int = 8 * len(DATA)
) -> AsyncIterator[tuple[Service, Volume, Volume]]:
    if not (home / "pool").exists():
        create_pool(home / "pool", journal_bytes=JOURNAL_BYTES)
    async with open_service(home / "pool", options(plane, extend_bytes)) as service:
        if not service.volumes():
            for name in "ab":
                made = await service.create_volume(name, 4 * len(DATA))
                await service.write(made.map_id, 0, DATA)
            await service.checkpoint()
        first, second = service.volumes()
        yield service, first, second


async def give_back(service: Service) -> None:
    await service.checkpoint()
    await service._keeper.give_back_rest()


async def rewrite(service: Service, volume: Volume) -> None:
    await service.write(volume.map_id, 0, DATA[::-1])


HANGS: dict[str, tuple[type, str, str, Callable[[Service, Volume], Any]]] = {
    "record": (File, "sync", "journal.0", lambda s, v: s.commit()),
    "images": (File, "sync", ".img", lambda s, v: s.commit()),
    "segment": (File, "pwrite", "journal.1", lambda s, v: s.checkpoint()),
    "reserve": (File, "allocate", TABLES_NAME, lambda s, v: s.checkpoint()),
    "fold": (Tables, "write", TABLES_NAME, lambda s, v: s.checkpoint()),
    "punch": (File, "punch", ".img", lambda s, v: give_back(s)),
    "growth": (File, "allocate", ".img", lambda s, v: s.write(v.map_id, len(DATA), 8 * DATA)),
}


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("what", HANGS)
async def test_others_go_on_while_the_host_hangs(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch, what: str, plane: PlaneKind
) -> None:
    owner, method, suffix, operation = HANGS[what]
    with trio.fail_after(2 * PATIENCE_S):
        async with two_volumes(pool_home, plane) as (service, first, second), trio.open_nursery() as nursery:
            await rewrite(service, first)
            await service.write(second.map_id, 0, b"y" * 4096)  # leaves it with room for more
            hang = Hang(monkeypatch, owner, method, suffix)
            finished: list[str] = []
            nursery.start_soon(_run, finished, operation, service, first)
            await hang.entered()
            await go_on(service, first, second)
            assert not finished, "it said that it was done while the host hung"
            nursery.start_soon(_run, finished, lambda s, v: s.commit(), service, first)
            hang.release()
        assert len(finished) == 2
    monkeypatch.undo()
    async with two_volumes(pool_home, plane) as (service, first, second):
        await go_on(service, first, second)
        assert (await service.inspection.check(True)).is_clean


async def _run(finished: list[str], operation: Callable[..., Any], service: Service, volume: Volume) -> None:
    await operation(service, volume)
    finished.append(volume.name)


async def go_on(service: Service, first: Volume, second: Volume) -> None:
    """Read both volumes, and write what needs no more room."""
    with trio.fail_after(PATIENCE_S):
        assert await service.read(first.map_id, 0, len(DATA)) == DATA[::-1]
        assert (await service.read(second.map_id, 0, len(DATA)))[:4096] in (DATA[:4096], b"y" * 4096)
        await service.write(second.map_id, 0, b"y" * 4096)
        assert await service.read(second.map_id, 0, 4096) == b"y" * 4096
        assert await service.read(second.map_id, 4096, 4096) == DATA[4096:8192]
        assert [v.name for v in service.volumes()] == ["a", "b"]


async def test_a_read_that_hangs_holds_up_nobody_else(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_volumes(pool_home) as (service, first, second), trio.open_nursery() as nursery:
        hang = Hang(monkeypatch, File, "pread", ".img", once=True)
        cached = File.pread_cached
        cold = [True]

        monkeypatch.setattr(File, "pread_cached", lambda f, o, n: None if cold and cold.pop() else cached(f, o, n))
        finished: list[str] = []
        nursery.start_soon(_run, finished, lambda s, v: s.read(v.map_id, 0, 4096), service, first)
        await hang.entered()
        with trio.fail_after(PATIENCE_S):
            assert await service.read(second.map_id, 0, len(DATA)) == DATA
            await service.write(second.map_id, 0, b"z" * 4096)
            await service.commit()
        assert not finished
        hang.release()


def without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables cannot become longer, and nothing was set aside for them."""

    def reserve(tables: Tables, length_bytes: int) -> None:
        raise NoSpace(f"cannot grow {tables._path}: No space left on device", path=str(tables._path))

    monkeypatch.setattr(Tables, "reserve", reserve)


async def test_who_waits_for_a_checkpoint_is_told_that_there_is_no_room(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``pool check`` waited without end when the metadata's disk was full."""
    async with two_volumes(pool_home) as (service, first, _):
        await rewrite(service, first)
        without_room(monkeypatch)
        with trio.fail_after(PATIENCE_S):
            for ask in (
                service.checkpoint(),
                service.inspection.check(False),
                service.inspection.dump(pool_home / "dump"),
                service.checkpoint(),
            ):
                with pytest.raises(NoSpace, match="tables"):
                    await ask
            await service.commit()
            await service.write(first.map_id, len(DATA), DATA)
            assert await service.read(first.map_id, 0, 2 * len(DATA)) == DATA[::-1] + DATA
            assert not service.facts()["read_only"]
        monkeypatch.undo()
        with trio.fail_after(PATIENCE_S):
            await folded(service)
            assert (await service.inspection.check(True)).is_clean


def without_room_for_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the journal's files cannot become longer."""
    without_room(monkeypatch)
    original = File.pwrite

    def pwrite(file: File, offset: int, data: bytes | memoryview) -> None:
        if file.path.name.startswith("journal") and offset + len(data) > JOURNAL_BYTES:
            raise NoSpace(f"cannot write {file.path}: No space left on device", path=str(file.path))
        original(file, offset, data)

    monkeypatch.setattr(File, "pwrite", pwrite)


async def fill_journal(service: Service, volume: Volume) -> int:
    """Write and commit until the journal is full; give the number of the last commit."""
    for number in range(2 * JOURNAL_BYTES // len(SMALL)):
        try:
            await service.write(volume.map_id, 0, bytes([number]) + SMALL)
            await service.commit()
        except MetadataFull:
            return number - 1
        with suppress(NoSpace):
            await service.checkpoint()
    raise AssertionError("the journal does not get full")


async def test_a_full_journal_on_a_full_disk_refuses_writes_until_there_is_room(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It made the pool read-only until it was mounted again."""
    monkeypatch.setattr(committer, "_NO_SPACE_RETRY_S", 0.01)
    async with two_volumes(pool_home) as (service, first, second):
        (taken,) = await service.create_snapshots([(second.id, "s")])
        without_room_for_records(monkeypatch)
        with trio.fail_after(PATIENCE_S):
            acknowledged = await fill_journal(service, first)
            assert acknowledged > JOURNAL_BYTES // len(SMALL) // 2
            for refused in (
                lambda: service.write(first.map_id, 0, b"x"),
                lambda: service.create_volume("more"),
                lambda: service.create_snapshots([(first.id, "t")]),
            ):
                with pytest.raises(MetadataFull):
                    await refused()
            await service.remove_snapshot(second.id, taken.name)  # it has its room
            assert not service.facts()["read_only"]
            assert await service.read(second.map_id, 0, len(DATA)) == DATA
            number = (await service.read(first.map_id, 0, 1))[0]
            assert number in (acknowledged, acknowledged + 1)
        monkeypatch.undo()
        with trio.fail_after(PATIENCE_S):
            await folded(service)
            await service.write(first.map_id, 0, b"it goes on")
            await service.commit()
            assert (await service.inspection.check(True)).is_clean
    async with two_volumes(pool_home) as (service, first, _):
        assert await service.read(first.map_id, 0, 10) == b"it goes on"
        assert await service.read(first.map_id, 10, len(SMALL) - 9) == SMALL[9:]


async def test_a_crash_in_a_full_pool_leaves_what_was_acknowledged(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acknowledged = -1
    with suppress(ExceptionGroup), pytest.MonkeyPatch.context() as patched:
        async with two_volumes(pool_home) as (service, first, _):
            without_room_for_records(patched)
            acknowledged = await fill_journal(service, first)
            raise RuntimeError("the daemon ends here")
    assert acknowledged > 0
    async with two_volumes(pool_home) as (service, first, _):
        assert (await service.read(first.map_id, 0, 1))[0] == acknowledged
        assert await service.read(first.map_id, 1, len(SMALL)) == SMALL
        assert (await service.inspection.check(True)).is_clean


async def test_a_commit_that_found_no_room_waits_as_long_as_the_policy_says(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "_NO_SPACE_RETRY_S", 0.01)
    async with two_volumes(pool_home) as (service, first, _), trio.open_nursery() as nursery:
        without_room_for_records(monkeypatch)
        await fill_journal(service, first)
        service.apply_settings(replace(service._store.account.settings, queue_s=PATIENCE_S))
        ended: list[str] = []
        nursery.start_soon(_run, ended, lambda s, v: s.write(v.map_id, 0, b"later"), service, first)
        await trio.sleep(0.3)
        assert not ended
        monkeypatch.undo()
        with trio.fail_after(PATIENCE_S):
            while not ended:
                await trio.sleep(0.01)


def without_room_in_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for what was written before: the host writes elsewhere each time."""
    original = File.pwrite

    def pwrite(file: File, offset: int, data: bytes | memoryview) -> None:
        if file.path.name.startswith("journal"):
            raise NoSpace(f"cannot write {file.path}: No space left on device", path=str(file.path))
        original(file, offset, data)

    monkeypatch.setattr(File, "pwrite", pwrite)


@pytest.mark.parametrize("wants_checkpoint", [False, True])
async def test_a_record_without_room_fails_its_commit_and_is_written_later(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch, wants_checkpoint: bool
) -> None:
    monkeypatch.setattr(committer, "_NO_SPACE_RETRY_S", 0.01)
    async with two_volumes(pool_home) as (service, first, second):
        with trio.fail_after(PATIENCE_S):
            without_room_in_the_journal(monkeypatch)
            await service.write(first.map_id, 0, b"refused")
            for _ in range(2):
                with pytest.raises(MetadataFull):
                    await (service.checkpoint() if wants_checkpoint else service.commit())
            with pytest.raises(MetadataFull):
                await service.write(first.map_id, 0, b"more")
            with pytest.raises(MetadataFull):
                await service.inspection.check(False)
            assert await service.read(first.map_id, 0, 7) == b"refused"
            assert not service.facts()["read_only"]
            monkeypatch.undo()
            monkeypatch.setattr(committer, "_NO_SPACE_RETRY_S", 0.01)
            while service._store.refused is not None:  # somebody tries it by himself
                await trio.sleep(0.01)
            await service.write(second.map_id, 0, b"more")
            await service.checkpoint()
            assert (await service.inspection.check(True)).is_clean
        assert not service._store.has_unfolded
    async with two_volumes(pool_home) as (service, first, second):
        assert await service.read(first.map_id, 0, 7) == b"refused"
        assert await service.read(second.map_id, 0, 4) == b"more"


async def test_folding_needs_no_room_but_what_was_set_aside(pool_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint asked for room when it began; another program had taken it by then."""
    async with two_volumes(pool_home) as (service, first, _):

        def full(file: File, *_: Any, **__: Any) -> None:
            raise NoSpace(f"cannot grow {file.path}: No space left on device", path=str(file.path))

        monkeypatch.setattr(File, "allocate", full)
        with trio.fail_after(PATIENCE_S):
            for number in range(3):
                for page in range(40):
                    await service.write(first.map_id, page * PAGE_BLOCKS * 4096, bytes([number + 1]) * 4096)
                await service.checkpoint()
        assert not service._store.has_unfolded


async def folded(service: Service) -> None:
    """The checkpoint in the background tries again by itself."""
    while True:
        try:
            return await service.checkpoint()
        except NoSpace:
            await trio.sleep(0.05)


@pytest.mark.parametrize("is_waiting", [False, True])
async def test_closing_without_room_says_so_and_loses_nothing(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_waiting: bool
) -> None:
    """What was written after a checkpoint had begun to wait for room was lost at a clean end."""
    with trio.fail_after(PATIENCE_S):
        async with two_volumes(pool_home) as (service, first, _):
            without_room(monkeypatch)
            if is_waiting:
                await service.write(first.map_id, 0, b"earlier")
                with pytest.raises(NoSpace):
                    await service.checkpoint()
            await rewrite(service, first)
    assert "closed without a checkpoint" in caplog.text
    monkeypatch.undo()
    async with two_volumes(pool_home) as (service, first, _):
        assert await service.read(first.map_id, 0, len(DATA)) == DATA[::-1]
        assert (await service.inspection.check(True)).is_clean


async def test_an_error_while_a_checkpoint_waits_for_room_ends_the_pool(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``pool check`` of a pool that nobody has mounted did not return when the metadata's disk was full."""
    with trio.fail_after(PATIENCE_S), pytest.RaisesGroup(NoSpace, flatten_subgroups=True, allow_unwrapped=True):
        async with two_volumes(pool_home) as (service, first, _):
            await rewrite(service, first)
            without_room(monkeypatch)
            await service.inspection.check(False)


async def test_a_pool_without_room_for_its_recovery_opens_and_goes_on(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not be opened at all, not even to be read."""
    async with two_volumes(pool_home) as (service, first, _):
        without_room(monkeypatch)
        await rewrite(service, first)
        with pytest.raises(NoSpace):
            await service.checkpoint()
    for _ in range(2):
        with trio.fail_after(PATIENCE_S):
            async with two_volumes(pool_home) as (service, first, second):
                assert await service.read(first.map_id, 0, len(DATA)) == DATA[::-1]
                await service.write(second.map_id, 0, b"more")
                await service.commit()
                assert not service.facts()["read_only"]
    async with two_volumes(pool_home) as (service, first, second):
        monkeypatch.undo()
        with trio.fail_after(PATIENCE_S):
            await folded(service)
        assert await service.read(second.map_id, 0, 4) == b"more"
        assert (await service.inspection.check(True)).is_clean
        assert not service._store.has_unfolded


async def test_a_write_finds_room_by_growing_when_a_checkpoint_finds_none(
    pool_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was freed waits for a checkpoint that the full disk of the metadata holds up; the images have room."""
    async with two_volumes(pool_home, extend_bytes=len(DATA)) as (service, first, _):
        without_room(monkeypatch)
        with trio.fail_after(PATIENCE_S):
            for turn in range(6):
                await service.write(first.map_id, 0, DATA[::-1] if turn % 2 else DATA)
                await service.commit()
        assert await service.read(first.map_id, 0, len(DATA)) == DATA[::-1]
        monkeypatch.undo()
        await folded(service)
