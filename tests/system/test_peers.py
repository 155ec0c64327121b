"""Programs of others on a volume: fio, SQLite, qemu-img, dd.  (rsync and cp are in test_copy_out.)"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import MountedPool, mounted_pool
from tests.support.cli import environment
from tests.support.loop import filesystem, loop_device, run

MIB = 1 << 20
pytestmark = pytest.mark.mount


@pytest.fixture(params=["writeback", "none"])
def mounted(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MountedPool]:
    with mounted_pool(tmp_path, f"cache={request.param}") as pool:
        yield pool


@pytest.fixture
def options(request: pytest.FixtureRequest) -> str:
    """The options that the pool was mounted with."""
    return f"cache={request.node.callspec.params['mounted']}"


# ------------------------------------------------------------------------------------- fio


@pytest.mark.parametrize(
    "how",
    [
        ("--direct=1", "--ioengine=libaio", "--iodepth=16", "--bs=4k"),
        ("--direct=0", "--ioengine=psync", "--bsrange=512-64k", "--fsync=64"),
    ],
    ids=["direct", "buffered"],
)
def test_fio_finds_what_it_wrote(mounted: MountedPool, options: str, how: tuple[str, ...]) -> None:
    mounted.command("volume", "create", "db", 48 * MIB)
    job = (
        "fio",
        "--name=job",
        f"--filename={mounted / 'db'}",
        "--size=48m",
        "--rw=randwrite",
        "--randseed=1",
    )
    run(*job, *how, "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--do_verify=1")
    mounted.remount(options)
    run(*job, *how, "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--verify_only")


# ------------------------------------------------------------------------------------- SQLite

INSERT = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute(f"PRAGMA journal_mode = {sys.argv[2]}")
# FULL does not sync the directory after the rollback journal's unlink, which is the commit: EXTRA does.
database.execute("PRAGMA synchronous = EXTRA")
database.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, data BLOB)")
number = database.execute("SELECT coalesce(max(n), 0) FROM t").fetchone()[0]
while True:
    number += 1
    database.execute("BEGIN")
    database.execute("INSERT INTO t VALUES (?, randomblob(?))", (number, number * 37 % 9000))
    database.execute("UPDATE t SET data = randomblob(500) WHERE n = ?", (number // 2,))
    database.execute("COMMIT")
    print(number, flush=True)
"""


def insert_until_killed(database: Path, mode: str, mounted: MountedPool, seconds: float) -> int:
    """Insert rows and kill the daemon; return the last row whose COMMIT returned."""
    process = subprocess.Popen(
        [sys.executable, "-c", INSERT, str(database), mode],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.readline()
    time.sleep(seconds)
    mounted.kill()
    # The kernel may go on from its page cache; what returns from now on promises nothing that was not synced.
    try:
        rest, _ = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        rest, _ = process.communicate()
    assert process.returncode != 0
    return int((said + rest).split()[-1])


def integrity(database: Path) -> int:
    """Have SQLite check the database, which recovers it first; return the newest row."""
    said = run("sqlite3", database, "PRAGMA integrity_check; SELECT max(n) FROM t;").stdout.split()
    assert said[0] == "ok", said
    return int(said[1])


@pytest.mark.loop
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_sqlite_in_ext4_survives_the_kill_of_the_daemon(
    mounted: MountedPool, options: str, tmp_path: Path, mode: str
) -> None:
    rng, committed = random.Random(mode), 0
    mounted.command("volume", "create", "db", 64 * MIB)
    run("mkfs.ext4", "-q", mounted / "db")
    for _ in range(3):
        try:
            with loop_device(mounted / "db") as device, filesystem(device, tmp_path / "fs") as root:
                if committed:
                    assert integrity(root / "rows") >= committed
                committed = insert_until_killed(root / "rows", mode, mounted, rng.uniform(0.1, 0.6))
                raise KilledError
        except KilledError:
            pass
        mounted.start(options)
    mounted.expected_log.append("detaching the dead mount")
    with loop_device(mounted / "db") as device:
        with filesystem(device, tmp_path / "fs") as root:
            assert integrity(root / "rows") >= committed
        run("e2fsck", "-fn", device)


class KilledError(Exception):
    """The daemon is dead: what is on it is taken away by force."""


# ------------------------------------------------------------------------------------- qemu-img, dd


def test_qemu_img_there_and_back(mounted: MountedPool, tmp_path: Path) -> None:
    plain, rng = tmp_path / "plain", random.Random(5)
    with open(plain, "wb") as file:
        for offset in (0, 5 * MIB, 31 * MIB + 512, 63 * MIB):
            file.seek(offset)
            file.write(rng.randbytes(700_000))
        file.truncate(64 * MIB)
    volume, qcow2 = mounted / "disk", tmp_path / "disk.qcow2"
    convert = ("qemu-img", "convert", "-t", "none", "-T", "none")
    run(*convert, "-f", "raw", "-O", "raw", plain, volume)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", plain, volume)
    assert os.stat(volume).st_blocks * 512 < 4 * MIB
    run(*convert, "-f", "raw", "-O", "qcow2", volume, qcow2)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", volume, qcow2)
    run(*convert, "-f", "qcow2", "-O", "raw", qcow2, mounted / "copy")
    run("cmp", plain, mounted / "copy")


def test_dd_is_durable_when_it_returns(mounted: MountedPool, options: str, tmp_path: Path) -> None:
    data = random.Random(6).randbytes(9 * MIB + 777)
    (tmp_path / "source").write_bytes(data)
    run("dd", f"if={tmp_path / 'source'}", f"of={mounted / 'v'}", "bs=64k", "conv=fsync", "status=none")
    mounted.kill()
    mounted.expected_log.append("detaching the dead mount")
    mounted.start(options)
    assert (mounted / "v").read_bytes() == data
    run("dd", f"if={mounted / 'v'}", f"of={tmp_path / 'back'}", "bs=1M", "iflag=fullblock", "status=none")
    assert (tmp_path / "back").read_bytes() == data
