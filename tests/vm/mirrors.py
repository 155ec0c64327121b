"""Debian's archives, as apt on this machine knows them: from where a root and its kernels come."""

import os
import subprocess
from pathlib import Path


def sources(suite: str, *, backports: bool = False) -> list[str]:
    """Return the lines of a ``sources.list`` for a suite, from the archives that this machine's apt uses.

    ``INCFS_VM_MIRROR`` names the archive on a machine whose apt has none of Debian's.
    """
    archives = _archives()
    main = os.environ.get("INCFS_VM_MIRROR") or archives.get("Debian")
    assert main, "apt on this machine knows no archive of Debian: name one in INCFS_VM_MIRROR"
    lines = [f"deb {main} {suite} main"]
    if backports:
        lines.append(f"deb {main} {suite}-backports main")
    if security := archives.get("Debian-Security"):
        lines.append(f"deb {security} {suite}-security main")
    return lines


def _archives() -> dict[str, str]:
    """Return the address of each archive by its label."""
    told = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL) $(SITE)", "Created-By: Packages"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return dict(line.split(maxsplit=1) for line in told.splitlines() if len(line.split()) == 2)


class Apt:
    """apt with lists of its own: what this machine has installed or pinned does not count.

    Args:
        directory: For the lists and what is downloaded.
        lines: Of ``sources.list``.
    """

    def __init__(self, directory: Path, lines: list[str]) -> None:
        self._directory = directory
        for name in ("lists/partial", "cache/archives/partial"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / "sources.list").write_text("\n".join(lines) + "\n")
        self._run("apt-get", "update", "-qq")

    def newest(self, meta_package: str, version_prefix: str) -> str:
        """Return the package that the newest version of a meta-package that begins so depends on."""
        stanzas = self._run("apt-cache", "show", meta_package).strip().split("\n\n")
        fields = [dict(line.split(": ", 1) for line in s.splitlines() if ": " in line) for s in stanzas]
        fitting = [f for f in fields if f["Version"].startswith(version_prefix)]
        assert fitting, f"no {meta_package} {version_prefix}: there are {[f['Version'] for f in fields]}"
        return fitting[0]["Depends"].split(" (")[0]  # apt lists the newest first

    def download(self, package: str) -> Path:
        """Return the package's file."""
        self._run("apt-get", "download", "-qq", package)
        return next(self._directory.glob(f"{package}_*.deb"))

    def _run(self, program: str, *words: str) -> str:
        options = {
            "Dir::Etc::SourceList": self._directory / "sources.list", "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State::Lists": self._directory / "lists", "Dir::Cache": self._directory / "cache",
            "Acquire::Languages": "none", "APT::Sandbox::User": "root",
        }  # fmt: skip
        told = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        done = subprocess.run(
            [program, *told, *words], cwd=self._directory, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{program} {words}: {done.stderr}"
        return done.stdout
