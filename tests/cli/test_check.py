"""``pool check``: what it says and its exit codes."""

import os
import pty
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from incfs.protocol import encode_frame
from incfs.service import open_service
from tests.support.cli import TIMEOUT_S, Cli, environment

REPORT = {"volumes": 1, "snapshots": 2, "mapped_blocks": 3, "verified_blocks": 0, "leaked_blocks": 7}
LEAK = {"kind": "leak", "where": "storage 1", "message": "7 blocks"}


def fill(pool: Path) -> None:
    """Write two MiB to a new volume."""

    async def write() -> None:
        async with open_service(pool) as service:
            volume = await service.create_volume("db", 1 << 30)
            await service.write(volume.map_id, 0, b"incfs test data " * (1 << 17))

    trio.run(write)


def test_clean(offline: Cli) -> None:
    assert offline.pool is not None
    fill(offline.pool)
    report = offline.json("pool", "check", "--data")["check"]
    assert report["is_clean"]
    assert report["mapped_blocks"] == report["verified_blocks"] == 512
    assert offline.ok("pool", "check").startswith("clean: 1 volumes, 0 snapshots, 512 blocks in use, 0 read")


def test_damaged_data_is_found_by_reading_it(offline: Cli) -> None:
    assert offline.pool is not None
    fill(offline.pool)
    extent = offline.json("volume", "map", "db")["extents"][0]
    (image,) = (offline.pool / "images").glob("*.img")
    data = bytearray(image.read_bytes())
    at = data.index(b"incfs test data ", extent["block"])
    data[at + 5000] ^= 1
    image.write_bytes(data)
    offline.ok("pool", "check")
    done = offline.run("pool", "check", "--data")
    assert done.returncode == 4
    assert "damaged: 1 problems" in done.stdout
    assert done.stderr == ""


@contextmanager
def answering(pool: Path, *replies: dict[str, Any], hold: threading.Event | None = None) -> Iterator[None]:
    """Play a daemon: it answers with the last reply, and until ``hold`` with the others again and again."""
    frames = [encode_frame(reply, limit_bytes=1 << 20) for reply in replies]

    def play() -> None:
        peer, _ = listening.accept()
        with peer:
            peer.recv(1 << 16)
            while hold is not None and not hold.wait(0.1):
                peer.sendall(b"".join(frames[:-1]))
            peer.sendall(frames[-1])

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(pool / "control.sock"))
        listening.listen()
        thread = threading.Thread(target=play)
        thread.start()
        yield
        thread.join(30)


def test_leaks_only(offline: Cli) -> None:
    assert offline.pool is not None
    report = {**REPORT, "problems": [LEAK], "is_clean": False, "is_damaged": False}
    with answering(offline.pool, {"result": {"check": report}}):
        done = offline.run("pool", "check")
    assert done.returncode == 5
    assert done.stdout.splitlines()[0] == "leak: storage 1: 7 blocks"
    assert done.stdout.splitlines()[1].startswith("leaks only: 7 blocks have no owner")


def test_sigusr1_tells_how_far_it_is(offline: Cli) -> None:
    assert offline.pool is not None
    hold = threading.Event()
    report = {**REPORT, "problems": [], "is_clean": True, "is_damaged": False}
    progress = {"progress": {"done": 40, "total": 100, "unit": "blocks"}}
    with answering(offline.pool, progress, {"result": {"check": report}}, hold=hold):
        process = subprocess.Popen(
            offline.command("pool", "check"), env=environment(), text=True, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        line = ""
        while "40" not in line:
            while not select.select([process.stderr], [], [], 0.1)[0]:  # it passes by before there is work
                if _handles_usr1(process.pid):
                    for _ in range(20):  # one came while another was answered, and ended the command with a traceback
                        process.send_signal(signal.SIGUSR1)
            line = process.stderr.readline()
        hold.set()
        process.communicate(timeout=TIMEOUT_S)
    assert line == "incfs: 40 of 100 blocks done\n"
    assert process.returncode == 0


def _handles_usr1(pid: int) -> bool:
    """Say whether the process has a handler for SIGUSR1 yet."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def test_bar_is_shown_on_a_terminal_only(offline: Cli) -> None:
    assert offline.pool is not None
    report = {**REPORT, "problems": [], "is_clean": True, "is_damaged": False}
    progress = {"progress": {"done": 40, "total": 100, "unit": "blocks"}}
    leader, follower = pty.openpty()
    for stderr in (follower, subprocess.PIPE):
        hold = threading.Event()
        with answering(offline.pool, progress, {"result": {"check": report}}, hold=hold):
            process = subprocess.Popen(
                offline.command("pool", "check"),
                env={**environment(), "TERM": "xterm"},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
            if stderr == follower:
                shown = b""
                while b"40%" not in shown:
                    shown += os.read(leader, 4096)
            else:
                time.sleep(1.5)
            hold.set()
            _, said = process.communicate(timeout=TIMEOUT_S)
            (offline.pool / "control.sock").unlink()
        assert process.returncode == 0
        assert not said
    os.close(leader)
    os.close(follower)
