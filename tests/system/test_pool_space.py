"""A pool that looks after itself, on real filesystems: growth, full, mirrors, evacuation with a kill in the middle."""

import errno
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mount.conftest import END_TIMEOUT_S, START_TIMEOUT_S, MountedPool, mounted_pool, wait_for
from tests.support.faulty_fs import Fault, faulty
from tests.support.loop import allocated_bytes, filesystem, loop_device, run

MIB = 1 << 20
DATA_OFFSET = 65536
BLOCK = 4096

pytestmark = [pytest.mark.loop, pytest.mark.slow, pytest.mark.timeout(600)]


@contextmanager
def small_disks(home: Path, count: int, size_bytes: int) -> Iterator[list[Path]]:
    """Filesystems of their own, each with a directory for an image."""
    with ExitStack() as stack:
        places = []
        for number in range(count):
            image = home / f"disk{number}.img"
            with image.open("wb") as file:
                file.truncate(size_bytes)
            run("mkfs.ext4", "-q", "-m", "0", image)
            device = stack.enter_context(loop_device(image))
            mountpoint = stack.enter_context(filesystem(device, home / f"disk{number}"))
            places.append(mountpoint / "images")
            places[-1].mkdir()
        yield places


def document(mounted: MountedPool, *command: str) -> Any:
    return json.loads(mounted.command(*command, "--json").stdout)


def kinds(mounted: MountedPool) -> list[str]:
    return [event["kind"] for event in document(mounted, "events", "-n", "1000")["events"]]


def storages(mounted: MountedPool) -> dict[int, dict[str, Any]]:
    return {s["id"]: s for s in document(mounted, "storage", "list")["storages"]}


def used_of_first(mounted: MountedPool) -> int:
    """Look through the mount: a command may take longer to start than what is looked at takes."""
    found = re.search(r'incfs_storage_used_bytes\{storage="1"\} (\d+)', (mounted / ".incfs/metrics").read_text())
    assert found
    return int(found[1])


def host_free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def noise(seed: int, length: int = MIB) -> bytes:
    return random.Random(seed).randbytes(length)


def test_storage_volumes_come_in_before_a_write_fails_and_space_comes_back(tmp_path: Path) -> None:
    """Three disks of 80 MiB and a volume of 1 GiB with ext4 on it."""
    with small_disks(tmp_path, 3, 80 * MIB) as places:
        free_before = [host_free_bytes(place) for place in places]
        with mounted_pool(tmp_path, "", "--dir", str(places[0])) as mounted:
            policy = tmp_path / "policy.toml"
            policy.write_text(
                f'[pool]\nlow_water = "20%"\nextend_by = "8M"\nwhen_full = "queue:10s"\n'
                f"directories = {json.dumps([str(place) for place in places])}\n"
                f'[template.wide]\nstripe_columns = 3\nstripe_unit = "1M"\n[volume."*"]\nuse = ["wide"]\n'
            )
            mounted.command("policy", "set", str(policy))
            mounted.command("volume", "create", "db", "1G")
            with loop_device(mounted / "db") as device:
                run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", device)
                with filesystem(device, tmp_path / "files") as files:
                    written = fill_until_third(mounted, files)
                    assert len(storages(mounted)) == 3
                    events = kinds(mounted)
                    assert events.count("image-added") == 2
                    assert "full" not in events
                    for path in files.glob("[0-9]*"):
                        assert path.read_bytes() == noise(int(path.name)), path
                    written = fill_until_full(mounted, written)
                    for path in sorted(files.glob("[0-9]*")):
                        assert path.read_bytes() == noise(int(path.name)), path
                    for number in range(0, written, 2):
                        (files / str(number)).unlink(missing_ok=True)
                    run("sync", "-f", files)
                    run("fstrim", files)
                    for path in files.glob("[0-9]*"):
                        assert path.read_bytes() == noise(int(path.name)), path
                run("fstrim", "-v", files, check=False)
            os.unlink(mounted / "db")
            os.unlink(mounted / "filler")
            wait_for(lambda: all(s["used_bytes"] == 0 for s in storages(mounted).values()))
            wait_for(lambda: host_free_bytes(places[2]) > 0.9 * free_before[2], 2 * START_TIMEOUT_S)
            mounted.expected_log.append("the pool is full")
        print(f"\nfree on the three disks: before {free_before}, at the end {[host_free_bytes(p) for p in places]}")


def fill_until_third(mounted: MountedPool, files: Path) -> int:
    number = 0
    while len(storages(mounted)) < 3:
        assert number < 400, "the third storage volume did not come in"
        for _ in range(8):
            (files / str(number)).write_bytes(noise(number))
            number += 1
        run("sync", "-f", files)
    return number


def fill_until_full(mounted: MountedPool, written: int) -> int:
    """Fill up through a volume of its own, for ext4 takes ENOSPC of its disk ill."""
    descriptor = os.open(mounted / "filler", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        waited_s = refused_after(descriptor)
    finally:
        os.close(descriptor)
    assert 9 < waited_s < 100
    events = kinds(mounted)
    assert "queue" in events
    assert "full" in events
    return written


def refused_after(descriptor: int) -> float:
    """Write until there is no space; tell how long the last one took."""
    for number in range(1000):
        started = time.monotonic()
        try:
            os.write(descriptor, noise(number + 10_000))
            os.fsync(descriptor)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return time.monotonic() - started
            raise
    raise AssertionError("the pool is never full")


def mirrored(mounted: MountedPool, legs: list[Path]) -> None:
    mounted.command("storage", "add", str(legs[0]), "--mirror", str(legs[1]))
    mounted.command("storage", "evacuate", "1")
    mounted.command("storage", "remove", "1")


def test_a_mirror_heals_what_is_spoiled_under_load_and_resilvers_what_changed(tmp_path: Path) -> None:
    with small_disks(tmp_path, 2, 200 * MIB) as places, mounted_pool(tmp_path, "cache=none") as mounted:
        mirrored(mounted, places)
        (first,) = places[0].glob("*.img")
        (second,) = places[1].glob("*.img")
        mounted.command("volume", "create", "db", "64M")
        expected = [noise(number) for number in range(64)]
        (mounted / "db").write_bytes(b"".join(expected))
        run("sync", mounted / "db")
        wrong = random.Random(5).sample(stored_blocks(mounted, "db"), 1000)
        stop = threading.Event()
        failures: list[str] = []

        def load() -> None:
            order = random.Random(threading.get_ident())
            with (mounted / "db").open("rb", buffering=0) as file:
                while not stop.is_set():
                    number = order.randrange(64)
                    try:
                        found = os.pread(file.fileno(), MIB, number * MIB)
                    except OSError as error:
                        failures.append(str(error))
                    else:
                        failures.extend([] if found == expected[number] else [f"{number} is wrong"])

        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        spoil(first, wrong)
        (mounted / "db").read_bytes()
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures
        assert (mounted / "db").read_bytes() == b"".join(expected)
        healed = storages(mounted)[2]["healed_blocks"]
        scrub = document(mounted, "pool", "scrub")["scrub"]
        assert (healed, scrub["wrong_blocks"], scrub["lost_blocks"]) == (1000, 0, 0)
        assert scrub["verified_blocks"] == 2 * 64 * MIB // BLOCK
        metrics = (mounted / ".incfs" / "metrics").read_text()
        assert "incfs_checksum_errors_total 1000" in metrics
        mounted.stop()
        second.rename(second.with_suffix(".away"))
        mounted.start("cache=none")
        changed = noise(99, 4 * MIB)
        with (mounted / "db").open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), changed, 7 * MIB)
            os.fsync(file.fileno())
        second.with_suffix(".away").rename(second)
        moved = document(mounted, "storage", "resilver", "2")["resilver"]["copied_bytes"]
        print(f"\nresilver copied {moved} bytes after a change of {len(changed)} in {64 * MIB}")
        assert len(changed) <= moved <= len(changed) + MIB
        spoil(first, list(range(80 * MIB // BLOCK)))
        content = bytearray(b"".join(expected))
        content[7 * MIB : 11 * MIB] = changed
        assert (mounted / "db").read_bytes() == bytes(content)
        mounted.expected_log.append("leg")
        assert not document(mounted, "pool", "scrub")["scrub"]["lost_blocks"]


def stored_blocks(mounted: MountedPool, volume: str) -> list[int]:
    """List where a volume's blocks lie in the only storage volume."""
    extents = document(mounted, "volume", "map", volume)["extents"]
    return [e["block"] + i for e in extents if e["kind"] == "data" for i in range(e["length"] // BLOCK)]


def spoil(image: Path, blocks: list[int]) -> None:
    """Overwrite blocks of an image, as far as it is that long."""
    end = image.stat().st_size
    with image.open("r+b") as file:
        for block in blocks:
            offset = DATA_OFFSET + block * BLOCK
            if offset + BLOCK <= end:
                os.pwrite(file.fileno(), os.urandom(BLOCK), offset)


def test_an_evacuation_under_load_survives_a_kill_and_goes_on(tmp_path: Path) -> None:
    with mounted_pool(tmp_path, "cache=none") as mounted:
        mounted.command("volume", "create", "db", "128M")
        expected = [noise(number) for number in range(128)]
        (mounted / "db").write_bytes(b"".join(expected))
        run("sync", mounted / "db")
        mounted.command("snapshot", "create", "db@s")
        mounted.command("storage", "add", str(tmp_path / "second.img"))
        evacuation = threading.Thread(
            target=lambda: mounted.command("storage", "evacuate", "1", "--rate", "20M", check=False)
        )
        evacuation.start()
        wait_for(lambda: used_of_first(mounted) < 110 * MIB)
        with (mounted / "db").open("r+b", buffering=0) as file:
            for number in range(20):
                expected[number] = noise(number + 500)
                os.pwrite(file.fileno(), expected[number], number * MIB)
            os.fsync(file.fileno())
        assert used_of_first(mounted), "the evacuation ended before it could be cut off"
        assert mounted.process is not None
        os.kill(mounted.process.pid, signal.SIGKILL)
        evacuation.join()
        mounted.process.wait()
        mounted.take_down()
        mounted.start("cache=none")
        assert (mounted / "db").read_bytes() == b"".join(expected)
        wait_for(lambda: "job-ended" in kinds(mounted))
        assert kinds(mounted).count("job-resumed") == 1
        assert not storages(mounted)[1]["used_bytes"]
        mounted.command("storage", "remove", "1")
        assert list(storages(mounted)) == [2]
        assert (mounted / "db").read_bytes() == b"".join(expected)
        found = (mounted / ".snapshots" / "db" / "s").read_bytes()
        assert found == b"".join(noise(number) for number in range(128))
        print(f"\nthe image occupies {allocated_bytes(tmp_path / 'second.img') // MIB} MiB")


@pytest.mark.parametrize("leg", [0, 1])
def test_a_leg_that_fails_in_the_middle_of_a_write_is_left_behind_and_brought_back(tmp_path: Path, leg: int) -> None:
    """In the C data plane, whose threads write to both legs: half of a write is done when the disk fails for good."""
    for name in ("sound", "real"):
        (tmp_path / name).mkdir()
    with (
        faulty(tmp_path / "real", tmp_path / "failing", tmp_path / "switch") as switch,
        mounted_pool(tmp_path, "cache=none,data_plane=native") as mounted,
    ):
        places = [tmp_path / "sound"]
        places.insert(leg, tmp_path / "failing")
        mirrored(mounted, places)
        mounted.command("volume", "create", "db", "16M")
        expected = [noise(number) for number in range(16)]
        (mounted / "db").write_bytes(b"".join(expected))
        run("sync", mounted / "db")
        switch.arm(Fault("image", "write", 20, host_errno=errno.EIO, lasts=True, partly=True))
        failures: list[BaseException] = []

        def overwrite(first: int) -> None:
            try:
                with (mounted / "db").open("r+b", buffering=0) as file:
                    for number in range(first, first + 8):
                        expected[number] = noise(number + 100)
                        for at in range(0, MIB, 65536):
                            assert (
                                os.pwrite(file.fileno(), expected[number][at : at + 65536], number * MIB + at) == 65536
                            )
                    os.fsync(file.fileno())
            except BaseException as error:
                failures.append(error)

        writers = [threading.Thread(target=overwrite, args=(first,)) for first in (0, 8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert not failures
        assert switch.met
        assert (mounted / "db").read_bytes() == b"".join(expected)
        assert kinds(mounted).count("leg-failed") == 1
        assert not document(mounted, "pool", "show")["pool"]["read_only"]
        switch.heal()
        lacking = document(mounted, "storage", "resilver", "2")["resilver"]
        assert lacking["copied_bytes"] >= 8 * MIB
        assert not lacking["lost_blocks"]
        (image,) = (tmp_path / "sound").glob("*.img")
        spoil(image, list(range(80 * MIB // BLOCK)))
        assert (mounted / "db").read_bytes() == b"".join(expected)
        mounted.expected_log.append("leg")


DIES_BEFORE_PUNCHING = (
    "from tests.support.failpoints import arm; arm('free.ended', 1, 0); from incfs.cli import main; main()"
)


def test_what_a_kill_kept_from_being_punched_goes_back_after_the_next_mount(tmp_path: Path) -> None:
    """The checkpoint that frees a removed snapshot's blocks is durable when the daemon dies."""
    with mounted_pool(tmp_path) as mounted:
        mounted.command("volume", "create", "db", "32M")
        for round_ in (0, 100):
            (mounted / "db").write_bytes(b"".join(noise(number + round_) for number in range(32)))
            run("sync", mounted / "db")
            mounted.command("snapshot", "create", f"db@{round_}")
        mounted.stop()
        (image,) = (tmp_path / "pool" / "images").glob("*.img")
        before = allocated_bytes(image)
        mounted.start("", [sys.executable, "-c", DIES_BEFORE_PUNCHING, "mount", "--foreground"])
        mounted.command("snapshot", "remove", "db@0")
        wait_for(lambda: storages(mounted)[1]["used_bytes"] == 32 * MIB)
        mounted.command("pool", "dump", str(tmp_path / "dump"), check=False)
        assert mounted.process is not None
        mounted.process.wait(END_TIMEOUT_S)
        mounted.take_down()
        assert allocated_bytes(image) >= before
        mounted.start()
        wait_for(lambda: before - allocated_bytes(image) >= 31 * MIB)
        assert (mounted / "db").read_bytes() == b"".join(noise(number + 100) for number in range(32))
        assert "clean" in mounted.command("pool", "check", "--data").stdout
        mounted.expected_log.append("the daemon kills itself")
