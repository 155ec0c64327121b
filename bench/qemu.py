"""QEMU's storage daemon: a qcow2 file exported over FUSE, commanded through QMP."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any, Final

from bench.host import BenchError, Cleanup, end, is_mounted, run, spawn, unmount, wait_until

PROGRAMS: Final = ("qemu-storage-daemon", "qemu-img")


class StorageDaemon:
    """One daemon with one writable export.

    Its qcow2 file has the defaults of qemu-img, its cache those of the daemon (write-back, in the host's page
    cache), discard is passed on.

    Args:
        directory: Where its files go.
        name: Of the volume; one daemon has each name.
        size_bytes: Size of the disk.
        cleanup: Ends it.
    """

    def __init__(self, directory: Path, name: str, size_bytes: int, cleanup: Cleanup) -> None:
        self._directory, self._name = directory, name
        self.path = directory / f"{name}.export"
        self._socket = directory / f"{name}.qmp"
        self._images = [directory / f"{name}.qcow2"]
        self._nodes = ["disk"]
        self.path.touch()
        run(["qemu-img", "create", "-q", "-f", "qcow2", self._images[0], str(size_bytes)])
        self._forget_mount = cleanup.add(f"unmount {self.path}", lambda: unmount(self.path))
        log = directory / f"{name}.log"
        self._process = spawn(cleanup, self._command(), log)
        wait_until(lambda: self._is_up(log), f"the export {self.path}")
        self._connect()

    @staticmethod
    def missing() -> str | None:
        """Say which program is lacking."""
        lacking = [program for program in PROGRAMS if shutil.which(program) is None]
        return f"{' and '.join(lacking)} not found" if lacking else None

    def _command(self) -> list[str]:
        return [
            "qemu-storage-daemon",
            "--chardev",
            f"socket,id=control,path={self._socket},server=on,wait=off",
            "--monitor",
            "chardev=control",
            "--blockdev",
            f"driver=qcow2,node-name=disk,discard=unmap,"
            f"file.driver=file,file.filename={self._images[0]},file.discard=unmap",
            "--export",
            f"type=fuse,id=export,node-name=disk,mountpoint={self.path},writable=on",
        ]

    def _is_up(self, log: Path) -> bool:
        if self._process.poll() is not None:
            raise BenchError(f"qemu-storage-daemon ended: {log.read_text(errors='replace')[-2000:]}")
        return is_mounted(self.path) and self._socket.exists()

    def _connect(self) -> None:
        self._control = socket.socket(socket.AF_UNIX)
        self._control.settimeout(120)
        self._control.connect(str(self._socket))
        self._stream = self._control.makefile("rw", encoding="utf-8")
        self._stream.readline()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command.

        Raises:
            BenchError: QEMU refused it.
        """
        self._stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._stream.flush()
        while line := self._stream.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise BenchError(f"QMP {command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]
        raise BenchError(f"QMP {command}: the daemon is gone")

    def push_overlay(self, name: str) -> None:
        """Go on writing into a new qcow2 file on top of the present one."""
        base, image, node = self._images[-1], self._directory / f"{self._name}@{name}.qcow2", f"overlay-{name}"
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image])
        file: dict[str, Any] = {"driver": "file", "filename": str(image), "discard": "unmap"}
        self.execute("blockdev-add", **{"node-name": node, "driver": "qcow2", "file": file, "backing": None})
        self.execute("blockdev-snapshot", node=self._nodes[-1], overlay=node)
        self._images.append(image)
        self._nodes.append(node)

    def remove(self) -> None:
        """End it and delete its files."""
        self._stream.close()
        self._control.close()
        end(self._process)
        self._forget_mount()
        for path in (*self._images, self.path):
            path.unlink()
