"""Watches a directory: what of it is opened, by whichever process, made or changed."""

import ctypes
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_EVENT: Final = struct.Struct("iIII")
_LOOKED_AT: Final = 0x1 | 0x20  # IN_ACCESS, IN_OPEN
_CHANGED: Final = 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200  # modified, attributes, moved from and to, made, deleted
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class Watch:
    """What happens in directories, not below them, while this is open."""

    def __init__(self, *directories: Path) -> None:
        self._fd = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0, os.strerror(ctypes.get_errno())
        self._places: dict[int, Path] = {}
        for directory in directories:
            number = _LIBC.inotify_add_watch(self._fd, os.fsencode(directory), _LOOKED_AT | _CHANGED)
            assert number > 0, os.strerror(ctypes.get_errno())
            self._places[number] = directory

    def take(self) -> tuple[set[str], set[str]]:
        """Give what was opened or read since the last call, and what was made or changed."""
        looked_at: set[str] = set()
        changed: set[str] = set()
        while True:
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return looked_at, changed
            position = 0
            while position < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, position)
                name = data[position + _EVENT.size : position + _EVENT.size + length].rstrip(b"\0")
                (changed if mask & _CHANGED else looked_at).add(str(self._places[number] / os.fsdecode(name)))
                position += _EVENT.size + length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._fd)
