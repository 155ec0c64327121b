"""A unit of its own for a daemon in the background, where systemd runs the machine.

A daemon that stays where it was started ends with that: at a logout, or first of all at a shutdown, while filesystems
and databases above its mount still write.  So it asks PID 1 for a scope in ``system.slice`` that belongs to no
shutdown transaction: its mount is unmounted in there, in the mount's own turn, and what is left is told to end when
everybody else has been.

1. Nothing here raises: where there is no systemd, or it does not answer, the daemon stays where it is.
2. PID 1's own socket is used and not the bus, which is not there when fstab is mounted, nor needs it to be.
"""

import contextlib
import logging
import os
import re
import socket
import struct
import time
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

_RUNNING: Final = Path("/run/systemd/system")
"""There while systemd is PID 1 (sd_booted)."""
_SOCKET: Final = Path("/run/systemd/private")
_TIMEOUT_S: Final = 10.0
_MOVE_TIMEOUT_S: Final = 5.0
_METHOD_CALL, _METHOD_RETURN, _ERROR = 1, 2, 3
_MAX_MESSAGE_BYTES: Final = 1 << 20
_MAX_NAME: Final = 200
"""Of a unit's 255, less its ending."""


def leave_session(mountpoint: Path) -> None:
    """Move this process into a scope of its own below ``system.slice``; processes that it forks later are in it, too.

    Only root asks: the manager of another user ends with that user's last session, so its units would end no later.

    Concurrency: before the daemon forks and starts threads.
    """
    if os.geteuid() != 0 or not _RUNNING.is_dir():
        return
    name = scope_name(mountpoint, os.getpid())
    try:
        _call(encode_start(name, f"incfs mounted at {mountpoint}", os.getpid()))
        _await_move(name)
    except (OSError, ValueError) as error:
        logger.warning("the daemon stays in the unit that it was started from, and ends with it: %s", error)


def scope_name(mountpoint: Path, pid: int) -> str:
    """Return the name of the unit: the mount point, escaped as systemd does, and the process."""
    place = os.fsencode(mountpoint).strip(b"/") or b"/"
    escaped = re.sub(rb"[^A-Za-z0-9:_./]|^\.", lambda found: b"\\x%02x" % found[0][0], place).replace(b"/", b"-")
    return f"incfs-{escaped.decode()[:_MAX_NAME]}-{pid}.scope"


def _await_move(name: str) -> None:
    """Return once this process is in the unit: the answer says only that it will be."""
    deadline = time.monotonic() + _MOVE_TIMEOUT_S
    while name not in Path("/proc/self/cgroup").read_text(encoding="utf-8"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"systemd has not started {name}")
        time.sleep(0.01)


# ------------------------------------------------------------------------------ D-Bus, as much as that takes


def encode_start(name: str, description: str, pid: int) -> bytes:
    """Return the call of ``StartTransientUnit`` that puts a process into a new scope."""
    properties = _joined([
        _property("Description", "s", _string(_printable(description))),
        _property("Slice", "s", _string("system.slice")),
        _property("PIDs", "au", struct.pack("<II", 4, pid)),
        # Neither stopped at a shutdown before what needs it, nor when another target is isolated.
        _property("DefaultDependencies", "b", struct.pack("<I", 0)),
        _property("TimeoutStopUSec", "t", struct.pack("<Q", (1 << 64) - 1)),
        _property("CollectMode", "s", _string("inactive-or-failed")),
    ])  # fmt: skip
    body = _string(name)
    body += _pad(body, 4) + _string("fail")
    body += _pad(body, 4) + struct.pack("<I", len(properties))
    body += _pad(body, 8) + properties
    body += _pad(body, 4) + struct.pack("<I", 0)  # no further units
    return _message(body + _pad(body, 8))


def _message(body: bytes) -> bytes:
    fields = _joined([
        _field(1, "o", "/org/freedesktop/systemd1"),
        _field(2, "s", "org.freedesktop.systemd1.Manager"),
        _field(3, "s", "StartTransientUnit"),
        _field(6, "s", "org.freedesktop.systemd1"),
        struct.pack("<B", 8) + b"\1g\0" + b"\x10ssa(sv)a(sa(sv))\0",
    ])  # fmt: skip
    head = struct.pack("<cBBBIII", b"l", _METHOD_CALL, 0, 1, len(body), 1, len(fields)) + fields
    return head + _pad(head, 8) + body


def _field(code: int, signature: str, value: str) -> bytes:
    """Return one field of the header."""
    return struct.pack("<BB", code, 1) + signature.encode() + b"\0" + _string(value)


def _property(name: str, signature: str, value: bytes) -> bytes:
    """Return one (name, variant)."""
    entry = _string(name) + struct.pack("<B", len(signature)) + signature.encode() + b"\0"
    return entry + _pad(entry, {"s": 4, "b": 4, "t": 8, "au": 4}[signature]) + value


def _joined(structures: list[bytes]) -> bytes:
    """Return the elements of an array: each but the first begins at a multiple of 8, and nothing follows the last."""
    array = b""
    for structure in structures:
        array += _pad(array, 8) + structure
    return array


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<I", len(encoded)) + encoded + b"\0"


def _pad(written: bytes, alignment: int) -> bytes:
    return bytes(-len(written) % alignment)


def _printable(text: str) -> str:
    """Names of files may hold what no D-Bus string may."""
    return text.encode("utf-8", "backslashreplace").decode()


def _call(message: bytes) -> None:
    """Send a call to PID 1 and wait for its answer.

    Raises:
        OSError: It cannot be reached, or refuses.
        ValueError: Its answer is not understood.
    """
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)) as manager:
        manager.settimeout(_TIMEOUT_S)
        manager.connect(os.fspath(_SOCKET))
        manager.sendall(b"\0AUTH EXTERNAL %s\r\n" % str(os.geteuid()).encode().hex().encode())
        answered = _read_line(manager)
        if not answered.startswith(b"OK"):
            raise OSError(f"systemd does not let this user in: {answered.decode(errors='replace')}")
        manager.sendall(b"BEGIN\r\n" + message)
        while not _is_answer(manager):
            pass


def _read_line(manager: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\r\n"):
        line += _read(manager, 1)
    return line.strip()


def _is_answer(manager: socket.socket) -> bool:
    """Take one message; tell whether it answers the call, and not something else that systemd has to say."""
    head = _read(manager, 16)
    order, kind, body_bytes, fields_bytes = head[:1], head[1], *struct.unpack("<I4xI", head[4:])
    if order != b"l" or body_bytes + fields_bytes > _MAX_MESSAGE_BYTES:
        raise ValueError("systemd's answer is not understood")
    fields = _read(manager, fields_bytes + -fields_bytes % 8)
    body = _read(manager, body_bytes)
    if kind == _ERROR:
        raise OSError(f"systemd refuses: {(body[4:] or fields).rstrip(bytes(1)).decode(errors='replace')}")
    return kind == _METHOD_RETURN


def _read(manager: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = manager.recv(count - len(data))
        if not more:
            raise ConnectionResetError("systemd closed the connection")
        data += more
    return data
