"""Breakages of what is relied upon of the kernel, and of the daemon's life among those who use its mount."""

from typing import Final

from tests.teeth.breakage import Breakage

_HOOK = "tests/unit/test_kernel_hook.py::"

MOUNTED: Final = (
    Breakage(
        "seek-believes-a-kernel-that-does-not-wait",
        "I6",
        "incfs/kernel_hook.py",
        "        if not self._waits_for_pages:\n            return False\n",
        "",
        f"{_HOOK}test_a_kernel_that_would_not_wait_is_not_asked_to_write_back",
    ),
    Breakage(
        "seek-flushes-whoever-has-the-name-now",
        "I6",
        "incfs/kernel_hook.py",
        "    if found.st_ino != inode:",
        "    if not inode:",
        f"{_HOOK}test_another_file_that_took_the_name_is_not_taken_for_the_volume",
    ),
    Breakage(
        "seek-ends-where-the-daemon-thinks-the-file-ends",
        "I6",
        "incfs/fuse_files.py",
        "            if size_bytes is not None:\n                return size_bytes\n",
        "",
        "tests/mount/test_race.py::test_seek_finds_what_was_just_appended[unwaiting]",
    ),
)
