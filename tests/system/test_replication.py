"""A filesystem under load, replicated through ssh, cut off on either side: every snapshot is the same at the end.

``INCFS_REPLICA_MIB`` is the volume's size; 2048 for the long run.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from incfs.recovery import create_pool
from incfs.service import open_service
from tests.mount.conftest import INCFS, incfs, mounted_pool, wait_for
from tests.support.cli import environment
from tests.support.loop import filesystem, loop_device, run
from tests.support.sshd import ssh_server

MIB = 1 << 20
ZEROS = bytes(MIB)
SIZE_BYTES = int(os.environ.get("INCFS_REPLICA_MIB", "192")) * MIB
SNAPSHOTS = 20
LOAD = """
import pathlib, random, sqlite3, subprocess, sys
root, rng, number = pathlib.Path(sys.argv[1]), random.Random(1), 0
settings = ["user.name=t", "user.email=t@t", "gc.auto=0", "core.fsync=all"]
git = ["git", "-C", str(root / "repo"), *(word for setting in settings for word in ("-c", setting))]
(root / "repo").mkdir()
subprocess.run([*git, "init", "-q"], check=True)
subprocess.run(["sync", "-f", root], check=True)  # what git init does not sync a snapshot need not have
db = sqlite3.connect(root / "db")
db.execute("pragma journal_mode=wal")
db.execute("create table t (k integer primary key, v blob)")
while True:
    number += 1
    with db:
        db.executemany("replace into t values (?, ?)", [(rng.randrange(2000), rng.randbytes(900)) for _ in range(200)])
    (root / "repo" / f"f{rng.randrange(40)}").write_bytes(rng.randbytes(rng.randrange(90_000)))
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", str(number)], check=True)
    print(number, flush=True)
"""


def take_snapshots(mounted, root):
    """Take the snapshots while the load runs; some of its work lies between any two."""
    load = subprocess.Popen([sys.executable, "-c", LOAD, str(root)], stdout=subprocess.PIPE, text=True)
    try:
        for number in range(SNAPSHOTS):
            assert load.stdout is not None
            assert load.stdout.readline()
            mounted.command("snapshot", "create", f"vol@s{number}")
        assert load.poll() is None, "the load ended by itself"
    finally:
        load.kill()
        load.communicate()


def receiver_of(target):
    """The process that receives into a pool: this test's own, by the pool's path."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(target).encode() in words and b"receive" in words:  # ssh and shells have it as one word
            return int(entry.name)
    return None


def has_read(target, least_bytes):
    pid = receiver_of(target)
    try:
        text = Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return False
    return int(text.split()[1]) > least_bytes


def digests(pool):
    """Hash every snapshot of the volume; stretches of zeros are left out."""

    async def read_all():
        found = {}
        async with open_service(pool) as service:
            volume = service.volume("vol")
            for taken in service.snapshots(volume.id):
                hashed = hashlib.sha256(str(taken.size_bytes).encode())
                for start in range(0, taken.size_bytes, MIB):
                    data = await service.read(taken.map_id, start, MIB)
                    if data != ZEROS[: len(data)]:  # any() takes ten times as long
                        hashed.update(start.to_bytes(8, "little") + data)
                found[taken.name, taken.uuid] = hashed.hexdigest()
        return found

    return trio.run(read_all)


@pytest.mark.loop
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_filesystem_under_load_is_replicated_through_ssh_whoever_is_killed(tmp_path, monkeypatch):
    target = tmp_path / "target"
    create_pool(target)
    with ssh_server(tmp_path / "ssh") as (port, ssh):
        monkeypatch.setenv("INCFS_SSH", ssh)
        with mounted_pool(tmp_path) as mounted:
            mounted.command("volume", "create", "vol", SIZE_BYTES)
            with loop_device(mounted / "vol", "--direct-io=on") as device:
                run("mkfs.ext4", "-q", device)
                with filesystem(device, tmp_path / "fs") as root:
                    take_snapshots(mounted, root)
            root = Path(__file__).resolve().parents[2]
            program = f"env PYTHONPATH={root} {sys.executable} -m incfs"
            mounted.command(
                "replica", "add", "vol", "--to", f"ssh://root@127.0.0.1:{port}{target}", "--program", program
            )
            for victim in ("daemon", "receiver", "receiver"):
                cut_off(mounted, target, victim)
            mounted.command("replica", "run")
            copy = tmp_path / "copy"
            run("cp", "--sparse=always", mounted / ".snapshots" / "vol" / f"s{SNAPSHOTS - 1}", copy)
        assert (tmp_path / "ssh" / "log").read_text().count("Accepted") >= 4
    there = digests(target)
    assert len(there) == SNAPSHOTS
    assert len(set(there.values())) == SNAPSHOTS
    assert there == digests(mounted.pool)
    incfs("-p", target, "pool", "check", "--data")
    opens_clean(target, tmp_path)


def cut_off(mounted, target, victim):
    """Run, and kill one side in the middle."""
    command = [*map(str, INCFS), "-p", str(mounted.pool), "replica", "run", "--rate", "4M"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    wait_for(lambda: has_read(target, 4 * MIB) or running.poll() is not None)
    assert running.poll() is None, "it ended before it could be cut off"
    if victim == "daemon":
        mounted.kill()
        running.wait()
        mounted.start()
    else:
        pid = receiver_of(target)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert running.wait() == 1
    wait_for(lambda: receiver_of(target) is None)


def opens_clean(target, scratch):
    """Mount the replica's newest snapshot from a plain file and look at what lives in it."""

    async def export(path):
        async with open_service(target) as service:
            taken = service.snapshots(service.volume("vol").id)[-1]
            with open(path, "wb") as file:
                file.truncate(taken.size_bytes)
                for start in range(0, taken.size_bytes, MIB):
                    data = await service.read(taken.map_id, start, MIB)
                    if data != ZEROS[: len(data)]:  # any() takes ten times as long
                        os.pwrite(file.fileno(), data, start)

    trio.run(export, scratch / "replica.img")
    assert run("cmp", scratch / "copy", scratch / "replica.img").stdout == ""
    with loop_device(scratch / "replica.img") as device:
        with filesystem(device, scratch / "replayed") as root:
            assert run("sqlite3", root / "db", "pragma integrity_check").stdout == "ok\n"
            assert int(run("sqlite3", root / "db", "select count(*) from t").stdout) > 100
            run("git", "-c", f"safe.directory={root / 'repo'}", "-C", root / "repo", "fsck", "--full")
        run("e2fsck", "-fn", device)


@pytest.mark.slow
def test_a_policy_keeps_a_group_up_to_date_through_ssh(tmp_path, monkeypatch):
    """A group that was added by hand is brought up to date as one; no replica of one volume is made beside it."""
    source, target = tmp_path / "source", tmp_path / "target"
    for pool in (source, target):
        create_pool(pool)
    root = Path(__file__).resolve().parents[2]
    with ssh_server(tmp_path / "ssh") as (port, ssh):
        monkeypatch.setenv("INCFS_SSH", ssh)
        to = f"ssh://root@127.0.0.1:{port}{target}"
        for name in ("db", "log"):
            incfs("-p", source, "volume", "create", name, "1M")
        program = f"env PYTHONPATH={root} {sys.executable} -m incfs"
        incfs("-p", source, "replica", "add", "db", "log", "--to", to, "--program", program)
        rules = f'[volume."*"]\nschedule = "hourly"\nreplicate = [{{ to = "{to}", every = "1h" }}]\n'
        incfs("-p", source, "policy", "set", "-", input=rules)
        # The snapshots come first, and are what the replica gets in the same run.
        done = json.loads(incfs("-p", source, "policy", "run", "--hooks", "--json").stdout)["run"]
        assert [(item["action"], item["result"]) for item in done["actions"]] == [
            ("snapshot", "done"),
            ("replicate", "done"),
        ]
        assert len(json.loads(incfs("-p", source, "replica", "list", "--json").stdout)["replicas"]) == 1
        ours, theirs = (uuids(pool) for pool in (source, target))
        assert ours == theirs
        assert len(ours) == 2
        # A target that is away fails the group, and both volumes are told of.
        target.rename(tmp_path / "away")
        incfs("-p", source, "snapshot", "create", "db@x", "log@x")
        incfs("-p", source, "policy", "set", "-", input=rules.replace("1h", "2h"))
        refused = incfs("-p", source, "policy", "run", "--hooks", "--json", check=False)
    (item,) = json.loads(refused.stdout)["run"]["actions"]
    assert (refused.returncode, item["result"], item["failed"]) == (3, "partly", ["db", "log"])


def uuids(pool):
    found = json.loads(incfs("-p", pool, "snapshot", "list", "--json").stdout)["snapshots"]
    return {snapshot["name"]: snapshot["uuid"] for snapshot in found}
