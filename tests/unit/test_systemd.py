"""The one call to systemd, byte by byte; tests/vm has it answered by the real one."""

import os
import re
import socket
import struct
import threading
from pathlib import Path

import pytest

from incfs import systemd


@pytest.mark.parametrize(
    ("mountpoint", "name"),
    [
        ("/mnt/pool", "incfs-mnt-pool-7.scope"),
        ("/", "incfs---7.scope"),
        ("/srv/my pool-1", "incfs-srv-my\\x20pool\\x2d1-7.scope"),
        ("/.hidden/.x", "incfs-\\x2ehidden-.x-7.scope"),
        ("/ü", "incfs-\\xc3\\xbc-7.scope"),
    ],
)
def test_name_of_the_unit_is_escaped_as_systemd_does(mountpoint, name):
    assert systemd.scope_name(Path(mountpoint), 7) == name


def test_name_of_the_unit_is_never_too_long():
    assert len(systemd.scope_name(Path("/" + "x/" * 500), 1 << 22)) <= 255


def test_the_call_is_aligned_whatever_the_lengths_of_names():
    """Each string begins at a multiple of 4 from the message's start, each property at one of 8."""
    for length in range(1, 20):
        name = "n" * length
        message = systemd.encode_start(name, "d" * (20 - length), 4711)
        body_bytes, serial, fields_bytes = struct.unpack_from("<III", message, 4)
        body = message[16 + fields_bytes + -fields_bytes % 8 :]
        assert (message[:4], serial, len(body)) == (b"l\1\0\1", 1, body_bytes)
        offset = take_string(body, 0, name)
        offset = take_string(body, offset, "fail")
        (properties_bytes,) = struct.unpack_from("<I", body, offset + -offset % 4)
        start = offset + -offset % 4 + 4
        start += -start % 8
        rest = body[start + properties_bytes :]
        assert not any(rest)
        assert 4 <= len(rest) < 12
        assert len(body) % 8 == 0
        pids = body.index(b"\2au\0", start) + 4
        assert struct.unpack_from("<II", body, pids + -pids % 4) == (4, 4711)


def take_string(body, offset, expected):
    offset += -offset % 4
    (length,) = struct.unpack_from("<I", body, offset)
    assert body[offset + 4 : offset + 5 + length] == expected.encode() + b"\0"
    return offset + 5 + length


def answer(kind, text=b""):
    body = struct.pack("<I", len(text)) + text + b"\0"
    return struct.pack("<cBBBIII", b"l", kind, 0, 1, len(body), 1, 0) + body


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """Begin a manager that says these things, each when something was received; returns what it heard."""
    monkeypatch.setattr(systemd, "_RUNNING", tmp_path)
    monkeypatch.setattr(systemd, "_SOCKET", tmp_path / "private")
    monkeypatch.setattr(systemd, "_MOVE_TIMEOUT_S", 0.1)
    heard: list[bytes] = []

    def begin(*answers):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "private"))
        listener.listen()

        def serve():
            with listener, listener.accept()[0] as caller:
                for said in answers:
                    heard.append(caller.recv(1 << 16))
                    caller.sendall(said)

        threading.Thread(target=serve, daemon=True).start()
        return heard

    return begin


@pytest.mark.skipif(os.geteuid() != 0, reason="only root asks")
@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([b"OK 0123\r\n", answer(2)], "has not started"),
        ([b"OK 0123\r\n", answer(4) + answer(2)], "has not started"),
        ([b"OK 0123\r\n", answer(3, b"there is one")], "refuses: there is one"),
        ([b"REJECTED\r\n"], "does not let this user in"),
        ([b"OK 0123\r\n", b"nonsense of sixteen letters"], "not understood"),
        ([], "closed the connection|reset|Broken pipe"),
    ],
    ids=["silent", "signal first", "refused", "rejected", "nonsense", "closed"],
)
def test_whatever_systemd_says_the_daemon_goes_on(manager, answers, said, caplog):
    heard = manager(*answers)
    systemd.leave_session(Path("/mnt/pool"))
    assert "ends with it" in caplog.text
    assert re.search(said, caplog.text), caplog.text
    if answers:
        assert heard[0] == b"\0AUTH EXTERNAL 30\r\n"


def test_without_systemd_nothing_is_asked(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(systemd, "_RUNNING", tmp_path / "not there")
    systemd.leave_session(Path("/mnt/pool"))
    assert not caplog.text
