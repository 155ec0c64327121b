"""A snapshot is one point in time: also of what only the kernel holds, and over all volumes of a group."""

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, closing

import pytest

from tests.mount.conftest import mounted_pool
from tests.support.cli import environment
from tests.support.instants import SLOT_BYTES, Writer, judge, writing
from tests.support.loop import filesystem, loop_device, run

ROUNDS = int(os.environ.get("INCFS_INSTANT_ROUNDS", "3"))
"""Group snapshots of each test; hundreds in a long run."""
SLOTS = 4096
"""Of each volume."""
NAMES = ("data", "wal")


PROGRAM = """
import sqlite3, sys
databases = [sqlite3.connect(f"{root}/db", isolation_level=None) for root in sys.argv[1:]]
for database in databases:
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE numbers (number INTEGER PRIMARY KEY, filler BLOB)")
for number in range(1, 1_000_000):
    for database in databases:
        database.execute("INSERT INTO numbers VALUES (?, randomblob(3000))", (number,))
    if number == 10:
        print("under way", flush=True)
"""
"""Transactions in turn in each database: the second has the first's number once that has committed."""


def quarter(number):
    return range(SLOTS // 4 * number, SLOTS // 4 * (number + 1))


@pytest.mark.timeout(300 + 20 * ROUNDS)
@pytest.mark.parametrize(
    ("cache", "plane"),
    [("writeback", "auto"), ("writeback", "python"), ("writethrough", "auto"), ("none", "auto")],
)
def test_a_group_snapshot_under_writers_is_one_point_in_time(tmp_path, cache, plane):
    """Writers go through the page cache, past it, and through loop devices, all at once."""
    with mounted_pool(tmp_path, f"cache={cache},data_plane={plane}") as mnt, ExitStack() as stack:
        volumes = [mnt / name for name in NAMES]
        for name in NAMES:
            mnt.command("volume", "create", name, SLOTS * SLOT_BYTES)
            (mnt / name).write_bytes(bytes(SLOTS * SLOT_BYTES))
        devices = [stack.enter_context(loop_device(volume)) for volume in volumes]
        writers = [
            Writer(0, volumes, quarter(0), burst=50, pause_s=0.005),
            Writer(1, volumes, quarter(1)),
            Writer(2, volumes, quarter(2), is_direct=True),
            Writer(3, devices, quarter(3), is_direct=True),
        ]
        times = []
        with writing(tmp_path, writers) as notes:
            for number in range(ROUNDS):
                asked_ns = time.monotonic_ns()
                mnt.command("snapshot", "create", *(f"{name}@{number}" for name in NAMES))
                times.append((asked_ns, time.monotonic_ns()))
        for number, (asked_ns, taken_ns) in enumerate(times):
            snapshots = [mnt / ".snapshots" / name / str(number) for name in NAMES]
            found = judge(writers, notes, snapshots, asked_ns, taken_ns)
            print(f"{number}: {found}")
            assert found.is_instant, f"{number}: {found}"


@pytest.mark.loop
@pytest.mark.timeout(600)
def test_a_filesystem_on_a_loop_device_keeps_the_order_of_its_programs(tmp_path):
    """SQLite in ext4 on each of two volumes: of a group snapshot, taken as they run, both replay and agree."""
    with mounted_pool(tmp_path) as mnt:
        with ExitStack() as stack:
            roots = []
            for name in NAMES:
                mnt.command("volume", "create", name, "64M")
                device = stack.enter_context(loop_device(mnt / name))
                run("mkfs.ext4", "-q", device)
                roots.append(stack.enter_context(filesystem(device, tmp_path / name)))
            program = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *roots], stdout=subprocess.PIPE, text=True, env=environment()
            )
            stack.callback(program.communicate)
            stack.callback(program.kill)
            assert program.stdout is not None
            assert program.stdout.readline() == "under way\n"
            for number in range(ROUNDS):
                mnt.command("snapshot", "create", *(f"{name}@{number}" for name in NAMES))
            assert program.poll() is None
        for number in range(ROUNDS):
            first, second = (last_number(mnt, tmp_path, f"{name}@{number}") for name in NAMES)
            assert first - second in (0, 1), f"snapshot {number}: {first} and {second} transactions"
            assert second >= 10


def last_number(mnt, directory, snapshot):
    """Give the last transaction in a database, after its filesystem and it have replayed their journals."""
    mnt.command("volume", "clone", snapshot, "clone")
    with loop_device(mnt / "clone") as device:
        with (
            filesystem(device, directory / "clone") as root,
            closing(sqlite3.connect(root / "db")) as database,
        ):
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            (last,) = database.execute("SELECT max(number) FROM numbers").fetchone()
        run("e2fsck", "-fn", device)
    mnt.command("volume", "remove", "clone")
    return last
