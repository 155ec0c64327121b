"""Notices system calls on paths and files of the host that the owner thread makes.

Python's functions are wrapped, and what opens is heard through an audit hook; C code is not seen.  Reads that may not
wait (``preadv`` with RWF_NOWAIT) are no calls to the host, and neither is what reads the kernel's own filesystems.
"""

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import incfs
from incfs import backing

_FUNCTIONS = (
    *("stat", "lstat", "statvfs", "fstat", "fstatvfs", "open", "pread", "pwrite", "fdatasync", "fsync", "ftruncate"),
    *("truncate", "listdir", "scandir", "rename", "replace", "unlink", "remove", "mkdir", "rmdir", "readlink", "lseek"),
    *("chmod", "access", "posix_fadvise"),
)
_PACKAGE = str(Path(incfs.__file__).parent)
_KERNELS_OWN = ("/proc/", "/sys/", sys.prefix, sys.base_prefix, _PACKAGE)


class OwnerWatch:
    """What one thread has asked of the host."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._thread: int | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what this thread asks of the host meanwhile."""
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    def note(self, name: str, *arguments: Any) -> None:
        """Note a call, unless it is another thread's or none to the host."""
        if threading.get_ident() != self._thread:
            return
        if arguments and str(arguments[0]).startswith(_KERNELS_OWN):
            return
        where = []
        for frame, line in traceback.walk_stack(None):
            if frame.f_code.co_filename.startswith(_PACKAGE):
                where.append(f"{Path(frame.f_code.co_filename).name}:{line} {frame.f_code.co_name}")
        if not any(place.startswith("baseline.py") for place in where):  # bounded: see docs/CONCURRENCY.md
            self.calls.append(f"{name}({', '.join(map(str, arguments[:1]))}): {' < '.join(where[:4])}")


_active: list[OwnerWatch] = []


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _active if event == "open" else ():
        watch.note("open", arguments[0])


@contextmanager
def owner_watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnerWatch]:
    """Have a watch, which notes while it is told to."""
    watch = OwnerWatch()
    for name in _FUNCTIONS:
        monkeypatch.setattr(os, name, _noted(watch, name, getattr(os, name)))
    monkeypatch.setattr(backing.File, "_fallocate", _noted(watch, "fallocate", backing.File._fallocate))
    if not _heard_once:
        _heard_once.append(True)
        sys.addaudithook(_heard)
    _active.append(watch)
    try:
        yield watch
    finally:
        _active.remove(watch)


_heard_once: list[bool] = []


def _noted(watch: OwnerWatch, name: str, function: Any) -> Any:
    def noted(*arguments: Any, **keywords: Any) -> Any:
        watch.note(name, *arguments)
        return function(*arguments, **keywords)

    return noted
