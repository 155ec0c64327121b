"""Asks the native data plane as hot threads do, without a mount: one request after the other."""

import ctypes
from collections.abc import Callable
from typing import Any

from incfs.model import MapId

_CAPSULE = b"incfs._dataplane.server"
_READ = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_bool,
    ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t),
)  # fmt: skip
_WRITE = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_size_t
)
_ROOM = 1 << 20


class _Waiter(ctypes.Structure):
    _fields_ = (("next", ctypes.c_void_p), ("inode", ctypes.c_uint64), ("gained_blocks", ctypes.c_bool))


_DONE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)
_REFUSED = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Answers(ctypes.Structure):
    _fields_ = (("done", _DONE), ("refused", _REFUSED))


_SYNC = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.POINTER(_Waiter), ctypes.c_bool, ctypes.POINTER(_Answers)
)


class _HotServer(ctypes.Structure):
    _fields_ = (
        ("plane", ctypes.c_void_p), ("read", _READ), ("write", _WRITE), ("stat", ctypes.c_void_p),
        ("set_modified", ctypes.c_void_p), ("sync", _SYNC),
    )  # fmt: skip


class Sync:
    """An fsync that waits for its answer."""

    def __init__(self, table: MapId) -> None:
        self.table = table
        self.waiter = _Waiter(inode=table)


class Served:
    """What a plane's own threads may read and write.

    Args:
        plane: The native one.
        answered: Called, in any thread, when an fsync is answered: with an errno, 0 for done, None for refused.
    """

    def __init__(self, plane: Any, answered: Callable[[Sync, int | None], None] = lambda *_: None) -> None:
        self._answered = answered
        self._syncs: dict[int, Sync] = {}
        # The thread that leads answers others with its own functions, so they are the same for all.
        self._answers = _Answers(_DONE(self._answer), _REFUSED(self._answer))
        self._capsule = plane.server()
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        self._server = ctypes.cast(pointer_of(self._capsule, _CAPSULE), ctypes.POINTER(_HotServer)).contents

    def read(self, table: MapId, offset_bytes: int, length_bytes: int) -> bytes | None:
        """Read a range; None when it is not served."""
        room = ctypes.create_string_buffer(_ROOM)
        start, count = ctypes.c_size_t(), ctypes.c_size_t()
        is_served = self._server.read(
            self._server.plane, table, offset_bytes, length_bytes, True, room, _ROOM, start, count
        )
        return room.raw[start.value : start.value + count.value] if is_served else None

    def write(self, table: MapId, offset_bytes: int, data: bytes) -> bool:
        """Write a range; False when it is not served."""
        return bool(self._server.write(self._server.plane, table, offset_bytes, data, len(data)))

    def sync(self, sync: Sync) -> bool:
        """Make durable what was written; ``answered`` hears whether it is, perhaps later.  False: it hears nothing."""
        address = ctypes.addressof(sync.waiter)
        self._syncs[address] = sync
        is_taken = bool(self._server.sync(self._server.plane, sync.waiter, True, self._answers))
        if not is_taken:
            del self._syncs[address]
        return is_taken

    def _answer(self, waiter: int, error: int | None = None) -> None:
        self._answered(self._syncs.pop(waiter), error)
