"""What the version of the running kernel decides.

Owns the only questions about a version.  A kernel of a distribution may have what a newer one brought: whoever asks
here is told the older behaviour then, which has to be right on both.
"""

import os
import re
from typing import Final

WRITES_IN_PLACE: Final = (6, 16)
"""Since then FUSE sends the pages themselves.  Before, it copied each one and said at once that it was written."""


def waits_for_pages(release: str | None = None) -> bool:
    """Tell whether ``sync_file_range`` on a FUSE file returns only when the daemon has answered the writes.

    Before 6.16 a page counts as written as soon as its copy is queued.  Only what takes the file's lock (fsync, close,
    truncate, copy_file_range) waits for the queue there.

    Args:
        release: As ``uname -r`` has it; the running kernel's by default.
    """
    return _version(os.uname().release if release is None else release) >= WRITES_IN_PLACE


def _version(release: str) -> tuple[int, int]:
    """Return the first two numbers; of what has none, those of the oldest kernel."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)
