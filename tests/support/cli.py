"""Runs the command line: as users do, in its own process, or quicker, in this one."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from incfs.cli import main

TIMEOUT_S = 60


@dataclass(frozen=True)
class Cli:
    """``incfs`` with a pool and a clean environment."""

    pool: Path | None = None

    def command(self, *arguments: object) -> list[str]:
        pool = [] if self.pool is None else ["-p", str(self.pool)]
        return [sys.executable, "-m", "incfs", *pool, *map(str, arguments)]

    def run(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command whatever its exit code; it must not print a traceback."""
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(),
            check=False, **options,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def ok(self, *arguments: object) -> str:
        """Run a command that must work and say nothing on stderr; return its stdout."""
        done = self.run(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), (arguments, done.stdout, done.stderr)
        return done.stdout

    def json(self, *arguments: object) -> dict[str, Any]:
        """Run a command that must work with ``--json``; return its document."""
        document: dict[str, Any] = json.loads(self.ok(*arguments, "--json"))
        assert document.pop("output_version") == 1
        return document

    def fails(self, exit_code: int, *arguments: object) -> str:
        """Run a command that must fail with one line on stderr and nothing on stdout; return the line."""
        done = self.run(*arguments)
        assert done.returncode == exit_code, (arguments, done.stdout, done.stderr)
        assert done.stdout == ""
        assert done.stderr.startswith("incfs: ")
        assert done.stderr.count("\n") == 1
        return done.stderr


@dataclass(frozen=True)
class InProcessCli(Cli):
    """The same without a process: half a second quicker a command."""

    capture: pytest.CaptureFixture[str] | None = None

    def run(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        assert self.capture is not None
        assert not options
        command = self.command(*arguments)
        self.capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(command[3:])
        said = self.capture.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(command, ended.value.code, said.out, said.err)


def environment() -> dict[str, str]:
    """Return this process's environment without what would change the output."""
    kept = {key: value for key, value in os.environ.items() if key not in ("INCFS_POOL", "COLUMNS")}
    root = Path(__file__).resolve().parents[2]
    return {**kept, "PYTHONPATH": str(root), "TERM": "dumb"}
