"""A daemon that an error ends while a standstill waits for an answer of its own mount.

Called as: WHO POOL MNT [-o OPTS].  WHO has met the error: a "reader" of the kernel's requests, or other "work".
"""

import sys
from pathlib import Path
from typing import Any

import trio

from incfs.kernel_hook import KernelHook
from incfs.mount import mount_pool

WHO = sys.argv[1]
open_files = KernelHook.open_files


async def open_unserved(self: KernelHook, *args: Any) -> list[int] | None:
    readers = trio.lowlevel.current_task().parent_nursery  # a handler is a task beside them
    assert readers is not None
    failing = readers if WHO == "reader" else readers.parent_task.child_nurseries[-2]
    failing.cancel_scope.cancel()
    await trio.sleep(0.2)  # who serves has gone
    return await open_files(self, *args)


setattr(KernelHook, "open_files", open_unserved)  # noqa: B010 - mypy refuses the plain assignment
mount_pool(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[5] if len(sys.argv) > 5 else "", foreground=True)
