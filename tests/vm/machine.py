"""A virtual machine: QEMU without acceleration, what its console says, commands in it, its power.

Its disk is an overlay over the root of the image, which the machine keeps over its boots.  QEMU holds the overlay's
own tables back until the guest flushes: what the guest wrote and did not flush may be lost when QEMU is ended.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.vm.image import Image

BOOT_TIMEOUT_S = 600
"""An idle machine needs half a minute."""
COMMAND_TIMEOUT_S = 300
_KERNEL_OPTIONS = (
    "console=ttyS0 quiet panic=-1 no_timer_check mitigations=off nowatchdog audit=0 apparmor=0 ipv6.disable=1 "
    "systemd.show_status=1 systemd.log_level=info fsck.mode=skip"
)
# QEMU 7.2 gets the flags of cmpxchg16b wrong where one processor is emulated: kernels die of it at once.
_PROCESSOR = ("-accel", "tcg", "-cpu", "max,cx16=off", "-smp", "1", "-m", "1024")


@dataclass(frozen=True)
class Outcome:
    """A command that has ended in the machine."""

    code: int
    output: str


class Machine:
    """One machine, from its first boot to its last.

    Args:
        image: What it is started from.
        directory: Its disk, sockets and logs.
    """

    def __init__(self, image: Image, directory: Path) -> None:
        self._image = image
        self._directory = directory
        self.disk = directory / "disk.qcow2"
        self.console_path = directory / "console"
        self.stamps_path = directory / "stamps"
        self._qemu: subprocess.Popen[bytes] | None = None
        self._agent: socket.socket | None = None
        self._received = b""
        self._number = 0
        self._boot_count = 0
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image.root.absolute(), self.disk], check=True
        )

    # ------------------------------------------------------------------- power

    @property
    def is_on(self) -> bool:
        """Whether it has been booted, and neither ended in order nor cut off."""
        return self._qemu is not None

    def boot(self) -> str:
        """Switch on, and wait until commands can be run; returns the release of its kernel."""
        assert self._qemu is None, "it is on"
        self._boot_count += 1
        self.console_path = self._directory / f"console-{self._boot_count}"
        self._qemu = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL)
        self._agent = self._connect()
        self._received = b""
        return str(self._hear(BOOT_TIMEOUT_S)["ready"])

    def power_off(self) -> str:
        """Have it shut down in order; returns what its console said meanwhile."""
        said = len(self.console())
        self.begin_power_off()
        self.wait_until_off()
        return self.console()[said:]

    def begin_power_off(self) -> None:
        """Ask for an orderly end."""
        self.run("systemctl --no-block poweroff")

    def wait_until_off(self) -> None:
        """Wait for an orderly end."""
        assert self._qemu is not None
        assert self._qemu.wait(BOOT_TIMEOUT_S) == 0
        self._close()

    def cut(self) -> None:
        """End it at once, as if the power failed."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
            self._close()

    def copy_disk(self, target: Path) -> str:
        """Copy the disk as a power cut would leave it now; returns the stamps that had arrived before."""
        assert self._qemu is not None
        self._qemu.send_signal(signal.SIGSTOP)
        try:
            while Path(f"/proc/{self._qemu.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
                time.sleep(0.01)
            shutil.copy(self.disk, target)
            return self.stamps_path.read_text()
        finally:
            self._qemu.send_signal(signal.SIGCONT)

    def _command(self) -> list[str]:
        drives = [f"file={self.disk},format=qcow2,cache=writeback", f"file={self._image.tree},format=raw,readonly=on"]
        words: list[object] = [
            "qemu-system-x86_64", *_PROCESSOR, "-nodefaults", "-display", "none", "-no-reboot",
            "-kernel", self._image.kernel, "-initrd", self._image.initrd, "-append", _KERNEL_OPTIONS,
            "-serial", f"file:{self.console_path}",
            "-serial", f"unix:{self._directory / 'agent'},server=on,wait=off", "-serial", f"file:{self.stamps_path}",
        ]  # fmt: skip
        return [*map(str, words), *(word for drive in drives for word in ("-drive", f"if=virtio,{drive}"))]

    def _connect(self) -> socket.socket:
        """Reach the agent's port, which is QEMU's own socket."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while True:
            agent = socket.socket(socket.AF_UNIX)
            try:
                agent.connect(os.fspath(self._directory / "agent"))
                return agent
            except OSError:
                agent.close()
                assert self._qemu is not None
                assert self._qemu.poll() is None, "QEMU has ended"
                assert time.monotonic() < deadline, "QEMU does not answer"
                time.sleep(0.1)

    def _close(self) -> None:
        self._qemu = None
        if self._agent is not None:
            self._agent.close()
        (self._directory / "agent").unlink(missing_ok=True)

    # ------------------------------------------------------------------- commands

    def run(self, command: str, timeout_s: int = COMMAND_TIMEOUT_S) -> Outcome:
        """Run a shell command as root, whatever its exit code."""
        assert self._agent is not None, "it is off"
        self._number += 1
        request = {"id": self._number, "command": command, "timeout_s": timeout_s}
        self._agent.sendall(json.dumps(request).encode() + b"\n")
        while (answer := self._hear(timeout_s + 60)).get("id") != self._number:
            pass
        return Outcome(int(str(answer["code"])), str(answer["output"]))

    def ok(self, command: str, timeout_s: int = COMMAND_TIMEOUT_S) -> str:
        """Run a shell command that must work; returns what it said."""
        outcome = self.run(command, timeout_s)
        assert outcome.code == 0, f"{command!r} ended with {outcome.code}: {outcome.output}"
        return outcome.output

    def write(self, path: str, text: str) -> None:
        """Make a file."""
        self.ok(f"mkdir -p $(dirname {path}) && cat >{path} <<'END OF FILE'\n{text}\nEND OF FILE")

    def _hear(self, timeout_s: float) -> dict[str, object]:
        """Return the next line of the agent."""
        assert self._agent is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            assert time.monotonic() < deadline, f"no answer in {timeout_s} s; the console:\n{self.console()[-3000:]}"
            self._agent.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                more = self._agent.recv(1 << 16)
            except TimeoutError:
                continue
            assert more, f"the machine is off; the console:\n{self.console()[-3000:]}"
            self._received += more
        line, self._received = self._received.split(b"\n", 1)
        heard: dict[str, object] = json.loads(line)
        return heard

    # ------------------------------------------------------------------- what it said

    def console(self) -> str:
        """Return what this boot has said so far: the kernel, systemd and the journal."""
        return self.console_path.read_text(errors="replace")

    def await_stamps(self, count: int) -> None:
        """Wait until so many lines more have been written to the third serial port."""
        wanted, deadline = self.stamps().count("\n") + count, time.monotonic() + COMMAND_TIMEOUT_S
        while self.stamps().count("\n") < wanted:
            assert time.monotonic() < deadline, f"no stamps; the console:\n{self.console()[-3000:]}"
            time.sleep(0.05)

    def stamps(self) -> str:
        """Return what was written to the third serial port so far."""
        return self.stamps_path.read_text(errors="replace")
