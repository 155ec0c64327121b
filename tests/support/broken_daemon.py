"""A daemon with a bug: block 100 of a volume raises what nobody expects.  Called as: POOL MNT [-o OPTS]."""

import sys
from pathlib import Path

from incfs.mount import mount_pool
from incfs.service import Service

BAD_OFFSET = 100 * 4096
_read, _write = Service.read_for_user, Service.write


async def read(self, table, offset, length):
    if offset <= BAD_OFFSET < offset + length:
        raise ZeroDivisionError("the bug\nthat nobody knew")
    return await _read(self, table, offset, length)


async def write(self, table, offset, data):
    if offset <= BAD_OFFSET < offset + len(data):
        raise ZeroDivisionError("the bug\nthat nobody knew")
    return await _write(self, table, offset, data)


setattr(Service, "read_for_user", read)  # noqa: B010 - mypy refuses the plain assignment
setattr(Service, "write", write)  # noqa: B010
mount_pool(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4] if len(sys.argv) > 4 else "", foreground=True)
