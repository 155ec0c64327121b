"""An ssh server of a test's own, on a loopback port of its own, with keys of its own."""

import contextlib
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.loop import run

SSHD = "/usr/sbin/sshd"


@contextmanager
def ssh_server(directory: Path) -> Iterator[tuple[int, str]]:
    """Serve; give the port, and the ssh command that trusts and is trusted by this server."""
    directory.mkdir(mode=0o700)
    for name in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name)
    (directory / "authorized").write_text((directory / "user.pub").read_text())
    Path("/run/sshd").mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (directory / "known").write_text(f"[127.0.0.1]:{port} {(directory / 'host.pub').read_text()}")
    (directory / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/authorized\n"
        "PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\n"
    )
    options = ["-F", "none", "-i", str(directory / "user"), "-oIdentitiesOnly=yes"]
    command = ["ssh", *options, f"-oUserKnownHostsFile={directory / 'known'}", "-oGlobalKnownHostsFile=none"]
    with open(directory / "log", "wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(directory / "sshd_config")], stderr=log)
    try:
        _await(server, port)
        yield port, shlex.join(command)
    finally:
        server.terminate()
        server.wait()


def _await(server: subprocess.Popen[bytes], port: int) -> None:
    """Wait until it listens."""
    while True:
        assert server.poll() is None, "the ssh server has ended"
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
