"""A daemon with a bug: reading block 100 of any volume raises what nobody expects.  Called as: POOL MNT [-o OPTS]."""

import sys
from pathlib import Path

from incfs.mount import mount_pool
from incfs.service import Service

BAD_OFFSET = 100 * 4096
_read = Service.read_for_user


async def read(self, table, offset, length):
    if offset <= BAD_OFFSET < offset + length:
        raise ZeroDivisionError("the bug\nthat nobody knew")
    return await _read(self, table, offset, length)


setattr(Service, "read_for_user", read)  # noqa: B010 - mypy refuses the plain assignment
mount_pool(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4] if len(sys.argv) > 4 else "", foreground=True)
