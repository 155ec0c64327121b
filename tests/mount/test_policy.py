"""The policy in the daemon: snapshots with a filesystem frozen around them, crashes, an end in the middle."""

import time

import pytest

from tests.mount.conftest import mounted_pool, wait_for
from tests.support.loop import filesystem, loop_device, run

MIB = 1 << 20


def set_policy(pool, text):
    pool.command("policy", "set", "-", input=text)


def snapshots(pool, volume):
    return [line.split("\t")[0] for line in pool.command("snapshot", "list", volume, "-H").stdout.splitlines()]


@pytest.mark.loop
def test_a_filesystem_is_frozen_around_its_snapshot(tmp_path):
    with mounted_pool(tmp_path, "hooks") as pool:
        pool.command("volume", "create", "db", "64M")
        with loop_device(pool / "db") as device:
            run("mkfs.ext4", "-q", device)
            with filesystem(device, tmp_path / "data") as data:
                (data / "news").write_text("not synced by its writer")
                set_policy(
                    pool,
                    f"""
                    [volume."db"]
                    schedule = "yearly"
                    before = ["/usr/sbin/fsfreeze", "--freeze", "{data}"]
                    after = ["/usr/sbin/fsfreeze", "--unfreeze", "{data}"]
                    """,
                )
                wait_for(lambda: snapshots(pool, "db"))
                (data / "later").write_text("it is thawed")
        (name,) = snapshots(pool, "db")
        file = pool / f".snapshots/db/{name.partition('@')[2]}"
        # A journal that would have to be replayed could not be: the snapshot is read-only.
        with loop_device(file, "--read-only") as device, filesystem(device, tmp_path / "old", "-o", "ro") as old:
            assert (old / "news").read_text() == "not synced by its writer"
            assert not (old / "later").exists()
        wait_for(lambda: "policy-snapshot" in pool.command("events").stdout)


def test_policy_and_last_runs_outlive_a_killed_daemon(tmp_path):
    with mounted_pool(tmp_path) as pool:
        pool.command("volume", "create", "db", "1M")
        set_policy(pool, '[volume."*"]\nschedule = "yearly"\n')
        wait_for(lambda: snapshots(pool, "db"))
        # Taking is one commit, remembering it another: this command waits for both.
        pool.command("policy", "run")
        pool.kill()
        run("umount", "--lazy", pool.path)
        pool.start()
        assert pool.command("policy", "run", "-n", "--json").stdout.count('"action"') == 0
        assert len(snapshots(pool, "db")) == 1
        assert "yearly" in pool.command("policy", "show").stdout


def test_an_unmount_does_not_wait_for_a_hook_and_thaws(tmp_path):
    thawed = tmp_path / "thawed"
    with mounted_pool(tmp_path, "hooks") as pool:
        pool.command("volume", "create", "db", "1M")
        started = tmp_path / "started"
        script = tmp_path / "hook"
        script.write_text(f"#!/bin/sh\ntouch {started}\nexec sleep 1000\n")
        script.chmod(0o755)
        set_policy(
            pool,
            f"""
            [volume."*"]
            schedule = "yearly"
            before = ["{script}"]
            after = ["/usr/bin/touch", "{thawed}"]
            hook_timeout = "15m"
            """,
        )
        wait_for(started.exists)
        begun = time.monotonic()
        pool.stop()
        assert time.monotonic() - begun < 60
        assert thawed.exists()
        pool.start()
