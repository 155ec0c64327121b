"""The command as a process: exit codes, signals, what goes to which stream."""

import os
import pty
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from incfs.recovery import create_pool
from incfs.service import open_service
from tests.cli.conftest import serving
from tests.support.cli import TIMEOUT_S, Cli, environment


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["volume"],
        ["volume", "frobnicate"],
        ["volume", "list", "--frobnicate"],
        ["volume", "create", "x"],
        ["volume", "clone", "x"],
        ["send", "--rate", "much", "x@y"],
        ["debug", "map", "x", "-1"],
    ],
)
def test_usage_errors_exit_2(arguments: list[str], tmp_path: Path) -> None:
    done = Cli(tmp_path).run(*arguments)
    assert done.returncode == 2
    assert done.stdout == "" or done.stderr == ""


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C"}]
)
def test_names_are_utf8_whatever_the_locale(tmp_path: Path, locale: dict[str, str]) -> None:
    """A locale that could not say a name ended commands with a traceback, and made a mounted pool read-only."""
    Cli().ok("pool", "create", tmp_path / "pool")
    name = "b\u00e4nd-\u65e5\u672c".encode()
    command = [os.fsencode(part) for part in Cli(tmp_path / "pool").command("volume")]
    for arguments in ([b"create", name, b"1M"], [b"list", b"-H", b"-o", b"name"]):
        done = subprocess.run(
            [*command, *arguments], capture_output=True, env=environment() | locale, timeout=TIMEOUT_S, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == name + b"\n"


def test_a_stream_is_not_sent_into_a_closed_descriptor(offline: Cli) -> None:
    """What stands in for it takes everything: the stream would be lost, and the command content."""
    offline.ok("volume", "create", "db", "1M")
    offline.ok("snapshot", "create", "db@s")
    for arguments, closed in ((["send", "db@s"], ">&-"), (["receive", "copy"], "<&-")):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}', "sh", *offline.command(*arguments)],
            capture_output=True, text=True, env=environment(), timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "is closed" in done.stderr


def test_no_pool_named() -> None:
    assert "INCFS_POOL" in Cli().fails(2, "volume", "list")


def test_pool_from_the_environment(offline: Cli) -> None:
    done = subprocess.run(
        Cli().command("volume", "list", "--json"), env={**environment(), "INCFS_POOL": str(offline.pool)}, check=False
    )
    assert done.returncode == 0


@pytest.mark.parametrize("size", ["1X", "-1", "1.0001K", ""])
def test_bad_size(offline: Cli, size: str) -> None:
    done = offline.run("volume", "create", "db", "--", size)
    assert done.returncode == 2


def test_not_a_pool(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing", Path("/etc/passwd")):
        assert str(directory) in Cli(directory).fails(10, "volume", "list")
    assert list(tmp_path.iterdir()) == []


def test_pool_create_refuses_what_is_there(offline: Cli, tmp_path: Path) -> None:
    before = sorted(path.name for path in (tmp_path / "pool").iterdir())
    assert offline.run("pool", "create", tmp_path / "pool").returncode in (1, 2)
    assert sorted(path.name for path in (tmp_path / "pool").iterdir()) == before
    offline.ok("volume", "list")


@pytest.mark.parametrize("block_size", ["256", "3000", "128K", "x"])
def test_pool_create_refuses_block_sizes(tmp_path: Path, block_size: str) -> None:
    Cli().fails(2, "pool", "create", tmp_path / "p", "--block-size", block_size)
    assert not (tmp_path / "p").exists()


def test_pool_create_with_all_options(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    Cli().ok(
        "pool", "create", tmp_path / "p", "--block-size", "16K", "--capacity", "64M", "--journal-size", "1M",
        "--dir", tmp_path / "a", "--dir", tmp_path / "b",
    )  # fmt: skip
    cli = Cli(tmp_path / "p")
    assert cli.json("pool", "show")["pool"]["block_bytes"] == 16384
    assert len(cli.json("storage", "list")["storages"]) == 2


def test_locked_pool_without_a_daemon_names_the_pid(offline: Cli) -> None:
    assert offline.pool is not None
    with serving(offline.pool) as daemon:
        (offline.pool / "control.sock").unlink()
        assert str(daemon.pid) in offline.fails(11, "--wait", "0", "volume", "list")


def test_killed_daemon_leaves_nothing_in_the_way(offline: Cli) -> None:
    assert offline.pool is not None
    with serving(offline.pool) as daemon:
        offline.ok("volume", "create", "db", "1G")
        daemon.kill()
        daemon.wait()
    assert stat.S_ISSOCK((offline.pool / "control.sock").stat().st_mode)
    assert offline.run("volume", "list", "-H", "-o", "name").stdout == "db\n"
    with serving(offline.pool):
        assert offline.ok("volume", "list", "-H", "-o", "name") == "db\n"


def test_a_command_that_finds_the_daemon_dead_says_so(offline: Cli) -> None:
    """A snapshot that it takes lacks what only the daemon had; said once, for the pool is closed afterwards."""
    assert offline.pool is not None
    with serving(offline.pool) as daemon:
        offline.ok("volume", "create", "db", "1G")
        daemon.kill()
        daemon.wait()
    first = offline.run("snapshot", "create", "db@s")
    assert first.returncode == 0
    assert f"incfs: the daemon of {offline.pool} (process {daemon.pid}) ended without closing it" in first.stderr
    assert offline.run("snapshot", "create", "db@t").stderr == ""
    with serving(offline.pool):
        pass
    assert offline.run("snapshot", "create", "db@u").stderr == ""


def test_commands_wait_for_each_other(offline: Cli) -> None:
    running = [
        subprocess.Popen(offline.command("--wait", "60", "volume", "create", f"v{number}", "1G"), env=environment())
        for number in range(4)
    ]
    assert [process.wait(60) for process in running] == [0, 0, 0, 0]
    assert len(offline.json("volume", "list")["volumes"]) == 4


def test_daemon_that_speaks_nonsense(offline: Cli) -> None:
    assert offline.pool is not None
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(offline.pool / "control.sock"))
        listening.listen()
        process = subprocess.Popen(
            offline.command("volume", "list"), env=environment(), text=True, stderr=subprocess.PIPE
        )
        peer, _ = listening.accept()
        with peer:
            peer.sendall(b"\x05\x00\x00\x00hello")
            _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert stderr.startswith("incfs: ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "exit_code", "said"), [(signal.SIGINT, 130, ""), (signal.SIGTERM, -signal.SIGTERM, "")]
)
def test_interrupted_while_the_daemon_works(offline: Cli, number: int, exit_code: int, said: str) -> None:
    assert offline.pool is not None
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(offline.pool / "control.sock"))
        listening.listen()
        process = subprocess.Popen(
            offline.command("pool", "check"), env=environment(), text=True, stderr=subprocess.PIPE
        )
        peer, _ = listening.accept()
        with peer:
            peer.recv(1)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, stderr) == (exit_code, said)


def test_sigusr1_prints_a_line(offline: Cli) -> None:
    assert offline.pool is not None
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(offline.pool / "control.sock"))
        listening.listen()
        process = subprocess.Popen(
            offline.command("pool", "check"), env=environment(), text=True, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        peer, _ = listening.accept()
        with peer:
            peer.recv(1)
            process.send_signal(signal.SIGUSR1)
            assert process.stderr.readline() == "incfs: working\n"
            process.kill()
        process.communicate()


def test_reader_that_has_gone(offline: Cli) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        offline.command("pool", "show"), env=environment(), stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_full_stdout_is_an_error(offline: Cli) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            offline.command("pool", "show"), env=environment(), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"incfs: cannot write the output: No space left on device\n"


LONG = "x" * 5000


@pytest.mark.parametrize(
    "arguments",
    [
        ["-p", "POOL", "volume", "create", "v", "--origin", f"/{LONG}"],
        ["-p", f"/{LONG}", "volume", "list"],
        ["pool", "create", f"/{LONG}/x"],
        ["mount", "POOL", f"/{LONG}"],
    ],
    ids=["origin", "pool", "create", "mount"],
)
def test_a_path_that_the_host_refuses_is_a_sentence(offline: Cli, arguments: list[str]) -> None:
    said = Cli().run(*(str(offline.pool) if part == "POOL" else part for part in arguments))
    assert said.returncode in (1, 2, 10)
    assert re.fullmatch(r"incfs: .*too long.*\n", said.stderr), said.stderr[-300:]


async def test_a_volume_belongs_to_who_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were root's: a plain user could not use the volumes that he had made in a pool of his own."""
    create_pool(tmp_path / "pool")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 1001)
    async with open_service(tmp_path / "pool") as service:
        made = await service.create_volume("db", 1 << 20)
        given = await service.create_volume("other", 1 << 20, uid=7, gid=8)
    assert [(found.uid, found.gid) for found in (made, given)] == [(1000, 1001), (7, 8)]


def test_a_directory_that_this_user_may_not_enter_is_a_sentence(tmp_path: Path) -> None:
    """As a plain user everything in ``/root`` was a traceback."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make a directory of another user's")
    (tmp_path / "closed").mkdir(mode=0o700)
    os.chown(tmp_path / "closed", 65534, 65534)
    plain = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    for arguments in (["pool", "create", "DIR"], ["-p", "DIR", "volume", "list"]):
        command = [part.replace("DIR", str(tmp_path / "closed" / "x")) for part in arguments]
        done = subprocess.run(
            [*plain, *Cli().command(*command)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 1
        assert re.fullmatch(r"incfs: .*(Permission denied|may not).*\n", done.stderr), done.stderr[-300:]


def test_a_working_directory_that_is_gone_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = Cli().command("mount", "pool", "mnt")
    done = subprocess.run(
        ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', tmp_path / "gone", *command],
        capture_output=True, text=True, env=environment(), timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert (done.returncode, "working directory has been removed" in done.stderr) == (1, True)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_a_full_disk_for_help_is_a_sentence(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            Cli().command(*arguments), env=environment(), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"incfs: cannot write the output: No space left on device\n")


def test_table_on_a_terminal(offline: Cli) -> None:
    offline.ok("volume", "create", "[bold]db :smile:", "1536M")
    leader, follower = pty.openpty()
    done = subprocess.run(offline.command("volume", "list"), env=environment(), stdout=follower, check=False)
    os.close(follower)
    shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert done.returncode == 0
    assert "[bold]db :smile:" in shown
    assert "1.5 GiB" in shown


def test_other_users_may_not_administer(offline: Cli) -> None:
    assert offline.pool is not None
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    with serving(offline.pool):
        code = (
            "import os, socket, sys\nos.chdir(sys.argv[1])\nos.setgid(65534)\nos.setuid(65534)\n"
            "socket.socket(socket.AF_UNIX).connect('control.sock')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(offline.pool)], capture_output=True, text=True, check=False
        )
        assert "PermissionError" in done.stderr
