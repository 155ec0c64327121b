"""Runs commands for the host, one after the other: a line of JSON each way on the second serial port."""

import json
import os
import subprocess
import termios
import tty

fd = os.open("/dev/ttyS1", os.O_RDWR | os.O_NOCTTY)
tty.setraw(fd)
termios.tcflush(fd, termios.TCIFLUSH)
port = os.fdopen(fd, "r+b", buffering=0)


def tell(message):
    """Send a line."""
    left = json.dumps(message).encode() + b"\n"
    while left:
        left = left[port.write(left) :]


def run(command, timeout_s):
    """Run a command; its output and how it ended."""
    done = subprocess.run(
        ["bash", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=timeout_s, check=False,
    )  # fmt: skip
    return {"code": done.returncode, "output": done.stdout.decode(errors="replace")[-200_000:]}


tell({"ready": os.uname().release})
received = b""
while True:
    received += port.read(4096)
    while b"\n" in received:
        line, received = received.split(b"\n", 1)
        request = json.loads(line)
        try:
            answer = run(request["command"], request["timeout_s"])
        except subprocess.TimeoutExpired as error:
            answer = {"code": 124, "output": f"{error}: {(error.stdout or b'').decode(errors='replace')}"}
        tell({"id": request["id"], **answer})
