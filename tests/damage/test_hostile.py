"""Dumps that somebody made to do harm: a typed error, or a pool that ``check`` finds whole; bounded memory."""

import json
import os
import random
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from incfs import restore
from incfs.errors import FormatError, ImageMismatch, IncfsError
from incfs.recovery import open_store
from tests.damage.test_repair import change, hostile, lines_of
from tests.support import damage, pools
from tests.support.child import in_a_child

CASES = 20_000 if os.environ.get("INCFS_TEST_PROFILE") == "long" else 800
MEMORY_BYTES = 2 << 30
"""Address space beyond what is mapped already; LMDB's map takes half of it."""

VALUES: list[Any] = [
    None, True, -1, 0, 1, 2, 64, 511, 512, 2**31, 2**32 - 1, 2**32, 2**47,
    2**48, 2**48 + 1, 2**48 + 2**46, 2**63, 2**64, 2**70, 1.5, 1e300,
    "", "a", "/", "..", "../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/null",
    "a/b", "x\0", "x" * 300, "\ud800", "00", "zz",
    "00000000-0000-0000-0000-000000000000", [], [[]], [0, 1, 2, ""], {}, {"a": "00"}, {"user.x": "zz"}, {"a": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A dump of a small pool, whose images stay where they are."""
    home = tmp_path_factory.mktemp("hostile")
    damage.place(home / "pool", damage.build(tmp_path_factory.mktemp("built"), "journaled", 21).files)
    return [json.loads(line) for line in lines_of(home / "pool")[:-1]]


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a document."""
    found: list[tuple[Any, Any]] = []
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        found += [(value, key), *places_in(inner)]
    return found


def mutate(documents: list[dict[str, Any]], chance: random.Random) -> list[dict[str, Any]]:
    """Change one to three values, lose a document, double it or move it."""
    changed: list[dict[str, Any]] = json.loads(json.dumps(documents))
    for _ in range(chance.randint(1, 3)):
        kind = chance.random()
        number = chance.randrange(len(changed))
        if kind < 0.8:
            container, key = chance.choice(places_in(changed[number]))
            container[key] = chance.choice(VALUES)
        elif kind < 0.9:
            changed.insert(chance.randrange(len(changed) + 1), changed.pop(number))
        elif kind < 0.95:
            changed.insert(number, changed[number])
        elif len(changed) > 1:
            del changed[number]
    return changed


def in_a_small_child(work: Callable[[], None]) -> None:
    """Run in a process that may take little more memory."""

    def limited() -> None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, mapped + MEMORY_BYTES))
        work()

    in_a_child(limited)


def restore_and_use(lines: list[bytes], directory: Path) -> bool:
    """Restore, and if that is possible open, check and read the result."""
    try:
        restore.restore(lines, directory)
    except IncfsError:
        assert not (directory / "superblock").exists()
        return False
    store = open_store(directory, pools.tiny_options())
    try:
        store.checkpoint()
        report = pools.run_check(store, data=False)
        assert report.is_clean, report.problems
        for volume in list(store.catalog.volumes.values()):
            if volume.name:
                store.catalog.volume_named(volume.name)
            for snapshot in store.catalog.snapshots(volume.id):
                assert store.catalog.snapshot(volume.id, snapshot.name) == snapshot
    finally:
        store.abandon()
    return True


def test_mutated_dumps_give_a_typed_error_or_a_whole_pool(documents: list[dict[str, Any]], pool_home: Path) -> None:
    chance = random.Random(3)

    def work() -> None:
        restored = 0
        for number in range(CASES):
            lines = hostile(mutate(documents, chance))
            try:
                restored += restore_and_use(lines, pool_home / str(number))
            except BaseException:
                print(number, b"".join(lines).decode(errors="replace")[:4000])
                raise
        print(f"{CASES} hostile dumps: {restored} restored, {CASES - restored} refused")
        assert 0 < restored < CASES

    in_a_small_child(work)


def only(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(d for d in documents if d.get("record") == kind or kind in d)


def test_a_block_far_behind_the_images_end_takes_no_memory(documents: list[dict[str, Any]], pool_home: Path) -> None:
    """Bitmaps were made for all blocks up to it, 32 GiB of them, before the image's length was looked at."""
    changed = json.loads(json.dumps(documents))
    change(only(changed, "storage"), capacity_blocks=1 << 47)
    only(changed, "page")["runs"] = [[0, 1, (1 << 48) + (1 << 46), "00000000"]]

    def work() -> None:
        with pytest.raises(ImageMismatch, match="truncated"):
            restore.restore(hostile(changed), pool_home / "again")

    in_a_small_child(work)


@pytest.mark.parametrize("name", ["generation", "last_generation"])
def test_the_number_of_the_snapshot_directory_is_no_snapshots(
    name: str, documents: list[dict[str, Any]], pool_home: Path
) -> None:
    """Generation 2^32-1 stands for ``.snapshots/NAME`` among the inodes."""
    changed = json.loads(json.dumps(documents))
    only(changed, "snapshot" if name == "generation" else "volume")["value"][name] = 0xFFFFFFFF
    with pytest.raises(FormatError):
        restore.restore(hostile(changed), pool_home / "again")


def test_an_endless_line_is_not_read_to_its_end(pool_home: Path) -> None:
    (pool_home / "dump").write_bytes(b'{"dump":1,' + b" " * (3 << 20))
    with restore.open_dump(pool_home / "dump") as lines, pytest.raises(FormatError, match="longer than"):
        next(lines)


@pytest.mark.parametrize("kind", ["device", "fifo", "directory", "link", "loop", "missing", "dots", "long"])
def test_an_image_path_that_names_something_else(kind: str, documents: list[dict[str, Any]], pool_home: Path) -> None:
    """It is never written to, not even opened for writing when it is no ordinary file."""
    trap = pool_home / "trap"
    match kind:
        case "device":
            os.mknod(trap, stat.S_IFCHR | 0o666, os.makedev(1, 5))
        case "fifo":
            os.mkfifo(trap)
        case "directory":
            trap.mkdir()
        case "link":
            (pool_home / "target").write_bytes(b"precious" * 9000)
            trap.symlink_to(pool_home / "target")
        case "loop":
            trap.symlink_to(trap)
        case "dots":
            trap = pool_home / "a/../../../../../../../etc/passwd"
        case "long":
            trap = pool_home / ("x" * 300)
    changed = json.loads(json.dumps(documents))
    only(changed, "storage")["value"]["path"] = str(trap)
    with pytest.raises(IncfsError):
        restore.restore(hostile(changed), pool_home / "again")
    assert kind != "link" or (pool_home / "target").read_bytes() == b"precious" * 9000
