"""Damaged pools: found out, or harmless, but never wrong data; and whole files that are missing or others."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import lmdb
import pytest
import trio

from incfs import snapshot
from incfs.backing import Backing, File
from incfs.codec import checksum
from incfs.errors import (
    BackingError,
    FormatError,
    ImageMismatch,
    IncfsError,
    JournalDamaged,
    NotAPool,
    PoolReadOnly,
    UnsupportedFormat,
)
from incfs.overlay import TableKey
from incfs.sealed import seal_pages
from incfs.service import open_service
from incfs.store import Store
from incfs.tables import LMDB_LIB_VERSION
from tests.support import damage, pools

CASES = int(os.environ.get("INCFS_DAMAGE_CASES", "1000"))
"""In all; `make damage-long` tries more."""
SHARES = {"tables": 30, "journal": 30, "incfs-": 30, "superblock": 10}


@pytest.mark.parametrize("state", damage.STATES)
@pytest.mark.parametrize("name", SHARES)
@pytest.mark.timeout(3600)
def test_damaged_regions_are_found_or_harmless(pool_home: Path, state: str, name: str) -> None:
    """In a process of its own: LMDB could kill it, which would be a failure, too."""
    count = max(1, CASES * SHARES[name] // 100 // len(damage.STATES))
    command = [sys.executable, "-m", "tests.damage.sweep", str(pool_home), state, "1", str(count), name]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]} ended the process with {done.returncode}: {done.stderr[-2000:]}"
    figures = json.loads(lines[-1])
    print(f"damage of {name} of a {state} pool: {figures}")
    assert not figures["wrong"], [line for line in lines if line.startswith("wrong")][:5]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> damage.Built:
    return damage.build(tmp_path_factory.mktemp("built"), "journaled", 7)


@pytest.fixture
def pool(pool_home: Path, built: damage.Built) -> Path:
    damage.place(pool_home / "pool", built.files)
    return pool_home / "pool"


def images(built: damage.Built) -> list[Path]:
    return [path for path in built.files if path.suffix == ".img"]


def every_byte_that_counts(built: damage.Built, pool: Path, path: Path) -> Iterator[int]:
    """Yield the offsets in an image at which a live block or the header is."""
    yield from range(52)
    store = pools.open_tiny(pool)
    number = images(built).index(path) + 1
    live = store.pool.volumes[number].live  # type: ignore[index]
    store.close()
    for group, bits in enumerate(live):
        for block in range(bits.bit_length()):
            if bits >> block & 1:
                start = 65536 + (group * 32768 + block) * pools.BLOCK
                yield from range(start, start + pools.BLOCK)


def test_each_flip_in_live_data_is_found_by_reading_and_by_check(pool: Path, built: damage.Built) -> None:
    path = images(built)[0]
    offsets = list(every_byte_that_counts(built, pool, path))
    assert len(offsets) > 1000
    files = damage.files_of(pool)
    closed = replace(built, files=files)
    for offset in Random(1).sample(offsets, 100):
        data = bytearray(files[path])
        data[offset] ^= 1 << offset % 8
        case = damage.Case("flip", path, bytes(data))
        assert damage.judge(pool, closed, case, damage.options(), 1) == "detected", offset


@pytest.mark.parametrize("name", ["journal.0", "journal.1", "tables.mdb", "superblock"])
def test_a_missing_file_is_reported(pool: Path, built: damage.Built, name: str) -> None:
    case = damage.Case("missing", Path(name), None)
    assert damage.judge(pool, built, case, damage.options()) == "detected"
    assert not (pool / name).exists()


@pytest.mark.parametrize("size", [0, 1, 4096, 8192, 20_000])
@pytest.mark.parametrize("name", ["tables.mdb", "journal.0", "journal.1", "superblock"])
def test_a_truncated_file_is_reported(pool: Path, built: damage.Built, name: str, size: int) -> None:
    data = built.files[Path(name)]
    case = damage.Case("truncate", Path(name), data[: size % len(data)])
    assert damage.judge(pool, built, case, damage.options()) == "detected"


@pytest.mark.parametrize("name", ["tables.mdb", "journal.0", "journal.1"])
def test_a_file_of_another_pool_is_reported(pool_home: Path, pool: Path, built: damage.Built, name: str) -> None:
    other = damage.build(pool_home / "other", "journaled", 8)
    case = damage.Case("swapped", Path(name), other.files[Path(name)])
    assert damage.judge(pool, built, case, damage.options()) == "detected"


def test_tables_of_an_earlier_time_are_reported(pool: Path, built: damage.Built) -> None:
    case = damage.Case("old", Path("tables.mdb"), built.old_files[Path("tables.mdb")])
    assert damage.judge(pool, built, case, damage.options()) == "detected"


def test_tables_of_an_earlier_time_are_refused_before_anything_is_written(pool_home: Path) -> None:
    """The journal's first records carry data for blocks that have been freed, and used again, since."""
    pool = pools.make_pool(pool_home, capacity_bytes=24 * 64)
    store = pools.open_tiny(pool, pools.tiny_options(small_commit_bytes=640))
    volume = pools.new_volume(store, "a", 6400)
    store.checkpoint()
    old = (pool / "tables.mdb").read_bytes()
    for fill, count in ((b"x", 8), (b"y", 8)):
        pools.write(store, volume.map_id, 0, fill * count * 64)
        store.commit()
    store.checkpoint()
    pools.write(store, volume.map_id, 640, b"z" * 15 * 64)
    store.commit()
    store.abandon()
    before = damage.files_of(pool)
    (pool / "tables.mdb").write_bytes(old)
    with pytest.raises(FormatError, match="older than the journal"):
        pools.open_tiny(pool)
    after = damage.files_of(pool)
    assert [path for path in before if path.suffix == ".img" and before[path] != after[path]] == []


def test_images_of_an_earlier_time_give_errors_but_no_old_data(pool: Path, built: damage.Built) -> None:
    path = images(built)[0]
    case = damage.Case("old", path, built.old_files[path])
    assert damage.judge(pool, built, case, damage.options()) == "detected"


def test_a_newer_format_is_refused(pool: Path) -> None:
    text = (pool / "superblock").read_text()
    (pool / "superblock").write_text(text.replace("incfs-pool 1", "incfs-pool 2"))
    with pytest.raises(UnsupportedFormat, match="newer incfs"):
        pools.open_tiny(pool)
    (pool / "superblock").write_text(text.replace("incfs-pool", "other-pool"))
    with pytest.raises(NotAPool):
        pools.open_tiny(pool)


# A storage volume is away


def remove_image(path: Path) -> None:
    path.unlink()


def cut_image(path: Path) -> None:
    os.truncate(path, 65536 + 640)


def spoil_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "state"), [(remove_image, "missing"), (cut_image, "truncated"), (spoil_header, "mismatch")]
)
def test_without_an_image_the_rest_can_be_read_if_wanted(
    pool: Path, built: damage.Built, spoil: Callable[[Path], None], state: str
) -> None:
    before = damage.files_of(pool)
    path = images(built)[0]
    spoil(pool / path)
    with pytest.raises(ImageMismatch):
        pools.open_tiny(pool)
    store = pools.open_tiny(pool, replace(damage.options(), degraded=True))
    assert [volume.state for volume in store.pool.volumes.values()] == [state, "online"]
    assert damage._compare(store, [built.state]) == "detected"
    with pytest.raises(PoolReadOnly):
        pools.new_volume(store, "more", 0)
    with pytest.raises(IncfsError):
        damage.contents(store)
    store.close()
    (pool / path).write_bytes(before[path])
    store = pools.open_tiny(pool)
    assert damage.contents(store) == built.state
    pools.check_clean(store)
    store.close()


def test_a_volume_on_another_image_is_whole_without_the_first(pool_home: Path) -> None:
    pool = pools.make_pool(pool_home, storages=2, capacity_bytes=20 * 64)
    store = pools.open_tiny(pool)
    for name in ("first", "second"):
        volume = pools.new_volume(store, name, 640)
        pools.write(store, volume.map_id, 0, name[:1].encode() * 640)
    store.close()
    next((pool / "disk0").iterdir()).unlink()
    store = pools.open_tiny(pool, replace(pools.tiny_options(), degraded=True))
    assert pools.read(store, store.catalog.volume_named("second").map_id) == b"s" * 640
    with pytest.raises(ImageMismatch, match="missing"):
        pools.read(store, store.catalog.volume_named("first").map_id)
    store.close()


# A map page is damaged: the others are not


def damage_page(pool: Path, marker: bytes) -> None:
    """Flip a bit wherever the tables hold ``marker``."""
    data = bytearray((pool / "tables.mdb").read_bytes())
    at = data.rindex(marker)
    while at >= 0:
        data[at] ^= 1
        at = data.rfind(marker)
    (pool / "tables.mdb").write_bytes(data)


def test_a_damaged_map_page_fails_alone(pool_home: Path) -> None:
    """Its volume's other pages and the other volumes are read and written."""
    pool = pools.make_pool(pool_home)
    store = pools.open_tiny(pool)
    volume, other = pools.new_volume(store, "a", 70_000), pools.new_volume(store, "b", 640)
    pools.write(store, volume.map_id, 0, b"x" * 64)
    pools.write(store, volume.map_id, 40_000, b"y" * 64)
    pools.write(store, other.map_id, 0, b"z" * 64)
    store.close()
    damage_page(pool, checksum(b"x" * 64).to_bytes(4, "little"))
    store = pools.open_tiny(pool)
    with pytest.raises(FormatError):
        pools.read(store, volume.map_id, 0, 64)
    with pytest.raises(FormatError):
        pools.write(store, volume.map_id, 0, b"n" * 64)
    assert pools.read(store, volume.map_id, 40_000, 64) == b"y" * 64
    pools.write(store, volume.map_id, 50_000, b"w" * 64)
    pools.write(store, other.map_id, 64, b"v" * 64)
    store.close()
    store = pools.open_tiny(pool)
    assert pools.read(store, volume.map_id, 50_000, 64) == b"w" * 64
    assert pools.read(store, other.map_id, 0, 128) == b"z" * 64 + b"v" * 64
    assert pools.run_check(store).is_damaged
    store.close()


def test_a_damaged_increment_leaves_the_live_volume_alone(pool_home: Path) -> None:
    """Sealing stopped halfway when the newest increment's page could not be read, and lost mappings."""
    pool = pools.make_pool(pool_home)
    store = pools.open_tiny(pool)
    volume = pools.new_volume(store, "a", 6400)
    pools.write(store, volume.map_id, 0, b"x" * 64)
    snapshot.create(store, [(volume.id, "s")])
    pools.write(store, volume.map_id, 0, b"y" * 64)
    store.close()
    damage_page(pool, checksum(b"x" * 64).to_bytes(4, "little"))
    store = pools.open_tiny(pool)
    pools.write(store, volume.map_id, 64, b"n" * 64)
    pools.write(store, volume.map_id, 0, b"m" * 64)
    store.close()
    store = pools.open_tiny(pool)
    assert pools.read(store, volume.map_id, 0, 128) == b"m" * 64 + b"n" * 64
    with pytest.raises(FormatError):
        pools.read(store, store.catalog.snapshot(volume.id, "s").map_id, 0, 64)
    store.close()


def test_tables_that_lack_a_page_are_refused(pool: Path) -> None:
    """Its blocks would read as zeros, and LMDB finds nothing wrong."""
    environment = lmdb.open(str(pool / "tables.mdb"), subdir=False, max_dbs=8, lib_version=LMDB_LIB_VERSION)
    database = environment.open_db(b"map")
    with environment.begin(write=True) as transaction, transaction.cursor(db=database) as cursor:
        assert cursor.first()
        assert cursor.delete()
    environment.close()
    with pytest.raises(FormatError, match="keys are missing"):
        pools.open_tiny(pool)


def test_check_finds_two_owners_and_leaks(pool_home: Path) -> None:
    with pools.open_tiny(pools.make_pool(pool_home)) as store:
        volume, other = pools.new_volume(store, "a", 640), pools.new_volume(store, "b", 640)
        pools.write(store, volume.map_id, 0, b"x" * 640)
        store.commit()
        address, crc = store.log.entries(TableKey(volume.id), 0)[3]
        store.log.append(0, seal_pages(other.map_id, [(0, {0: (address, crc)}, {})]))
        store.space.grant(volume.map_id, 1)
        store.pool.commit(store.plane.revoke(volume.map_id)[:1])
        store.checkpoint()
        report = pools.run_check(store)
    assert any("two owners" in problem.message for problem in report.problems), report.problems
    assert report.leaked_blocks == 1


# A disk that lies


class LyingFile(File):
    """Loses, misplaces or cuts short the write that it is told to, and says that all is well."""

    def __init__(self, path: Path, fd: int, liar: "LyingBacking") -> None:
        super().__init__(path, fd)
        self._liar = liar

    def pwrite(self, offset_bytes: int, data: bytes | memoryview) -> None:
        self._liar.count += 1
        if self._liar.count != self._liar.at:
            super().pwrite(offset_bytes, data)
            return
        self._liar.lied_about = self.path.name
        if self._liar.kind == "misdirected":
            super().pwrite(max(0, offset_bytes - 512 * self._liar.shift), data)
        elif self._liar.kind == "short" and len(data) > 64:
            super().pwrite(offset_bytes, bytes(data)[: len(data) // 2 // 64 * 64])


class LyingBacking(Backing):
    """Hands out files of which the n-th write of all is a lie."""

    def __init__(self, kind: str, at: int, shift: int) -> None:
        self.kind, self.at, self.shift = kind, at, shift
        self.count = 0
        self.lied_about = ""

    def _open(self, path: Path, flags: int) -> File:
        plain = super()._open(path, flags)
        fd = os.dup(plain.fileno())
        plain.close()
        return LyingFile(path, fd, self)


def run_lied_to(store: Store, seed: int) -> list[damage.State]:
    """Work until something is noticed; give the commit points."""
    work = damage.Workload(store, Random(seed))
    try:
        for number in range(40):
            work.step()
            if number % 3 == 0:
                work.commit()
            if number % 17 == 16:
                work.checkpoint()
    except IncfsError:
        return work.states
    return work.states


@pytest.mark.parametrize("kind", ["lost", "misdirected", "short"])
def test_a_lying_disk_is_found_out(pool_home: Path, kind: str) -> None:
    """What was lost at the journal's very end cannot be known; all else is."""
    tries = max(12, CASES // 25)
    figures = damage.Figures()
    for number in range(tries):
        home = pool_home / str(number)
        backing = LyingBacking(kind, Random(number).randrange(1, 90), Random(number).randrange(1, 8))
        pool = pools.make_pool(home, storages=2, capacity_bytes=1 << 20)
        store = pools.open_tiny(pool, damage.options(), backing)
        states = run_lied_to(store, number)
        store.abandon()
        figures.tried += 1
        try:
            store = pools.open_tiny(pool, damage.options())
        except IncfsError:
            figures.detected += 1
            continue
        verdict = damage._compare(store, [*reversed(states), {}])
        if pools.run_check(store).is_damaged:
            verdict = "detected"
        assert verdict != "older" or backing.lied_about.startswith("journal"), (number, backing.lied_about)
        setattr(figures, verdict, getattr(figures, verdict) + 1)
        store.abandon()
    print(f"{kind} writes: {figures}")


# Bugs that damage showed


def test_a_destroyed_last_record_is_not_taken_for_one_that_was_never_written(pool: Path, built: damage.Built) -> None:
    """A flipped bit in the journal's last record undid an acknowledged fsync without a word."""
    store = pools.open_tiny(pool)
    volume = pools.new_volume(store, "c", 640)
    store.checkpoint()
    pools.write(store, volume.map_id, 0, b"acknowledged" * 10)
    store.commit()
    end, path = store.journal.used_bytes, store.journal._file(store.journal.segment.number).path
    store.abandon()
    data = bytearray(path.read_bytes())
    data[end - 512 + 40] ^= 4
    path.write_bytes(data)
    with pytest.raises(JournalDamaged):
        pools.open_tiny(pool)


def test_missing_tables_are_not_made_anew(pool: Path) -> None:
    """LMDB made an empty file when it found none."""
    (pool / "tables.mdb").unlink()
    with pytest.raises(BackingError):
        pools.open_tiny(pool)
    assert not (pool / "tables.mdb").exists()


def test_what_was_removed_and_is_damaged_does_not_stop_the_pool(pool_home: Path) -> None:
    """Reclaiming a removed volume met its damaged map page, and the whole pool became read-only."""
    pool = pools.make_pool(pool_home)
    store = pools.open_tiny(pool)
    removed, other = pools.new_volume(store, "a", 640), pools.new_volume(store, "b", 640)
    pools.write(store, removed.map_id, 0, b"x" * 64)
    store.close()
    damage_page(pool, checksum(b"x" * 64).to_bytes(4, "little"))

    async def work() -> None:
        async with open_service(pool, damage.options()) as service:
            await service.remove_volume(removed.id)
            with trio.fail_after(60):
                await service.wait_reclaimed()
            await service.write(other.map_id, 0, b"goes on")
            await service.commit()
            assert not service.facts()["read_only"]

    trio.run(work)
