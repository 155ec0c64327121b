"""A daemon that takes the kernel for one that waits for no page without the lock.  Called as: POOL MNT [-o OPTS]."""

import sys
from pathlib import Path

from incfs.mount import mount_pool
from tests.support.mishaps import wrap

wrap("kernel_hook:waits_for_pages", lambda _: lambda _release: False)
mount_pool(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4] if len(sys.argv) > 4 else "", foreground=True)
