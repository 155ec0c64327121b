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
    Breakage(
        "daemon-ends-though-its-mount-is-in-use",
        "I1",
        "incfs/mount.py",
        "            self._say_for_whom(busy)\n            await self._make_durable()\n",
        "            self._say_for_whom(busy)\n            raise\n",
        "tests/mount/test_life.py::test_a_signal_while_files_are_open_is_obeyed_when_they_are_closed[TERM]",
    ),
    Breakage(
        "nothing-is-written-while-the-mount-is-in-use",
        "I1",
        "incfs/mount.py",
        "            self._say_for_whom(busy)\n            await self._make_durable()\n",
        "            self._say_for_whom(busy)\n",
        "tests/mount/test_life.py::test_what_is_written_after_a_signal_goes_to_disk_without_being_asked",
    ),
    Breakage(
        "daemon-stays-in-the-session",
        "I1",
        "incfs/mount.py",
        "        leave_session(mountpoint)\n",
        "",
        "tests/system/test_boots.py::test_each_daemon_has_a_unit_of_its_own",
    ),
    Breakage(
        "stray-signal-ends-the-daemon",
        "I1",
        "incfs/surroundings.py",
        "            signal.signal(number, _pass_by)\n    sys",
        "            pass\n    sys",
        "tests/mount/test_life.py::test_a_signal_that_means_no_end_ends_nothing",
    ),
    Breakage(
        "a-thread-without-memory-is-waited-for",
        "waiting",
        "incfs/surroundings.py",
        "    sys.unraisablehook = end_without_thread\n",
        "",
        "tests/unit/test_surroundings.py::"
        "test_a_thread_without_memory_to_begin_ends_the_daemon_instead_of_a_wait_for_ever[no-memory]",
    ),
    Breakage(
        "an-unserved-mount-is-waited-for",
        "waiting",
        "incfs/mount.py",
        "            if was_cancelled and is_cancelled:",
        "            if False:",
        "tests/mount/test_failures.py::test_a_daemon_that_an_error_ends_waits_for_no_answer_of_its_own_mount[reader-native]",
    ),
    Breakage(
        "a-mount-that-ends-is-given-up",
        "I1",
        "incfs/mount.py",
        "    except BaseException:\n        outside.give_up()\n        raise\n    finally:\n",
        "    finally:\n        outside.give_up()\n",
        "tests/mount/test_life.py::test_an_end_waits_for_who_unmounts",
    ),
    Breakage(
        "a-request-without-a-buffer-ends-the-daemon",
        "waiting",
        "incfs/_fusext_session.c",
        "        return -EINTR; /* on which pyfuse3",
        "        return -ENOMEM; /* on which pyfuse3",
        "tests/system/test_out_of_memory.py::test_requests_without_memory_to_receive_them_wait_for_some",
    ),
    Breakage(
        "a-missing-buffer-fills-the-log",
        "waiting",
        "incfs/_fusext_session.c",
        "    if (!buffer->mem && !has_memory()) {",
        "    if (!buffer->mem && has_memory() > 1) {",
        "tests/system/test_out_of_memory.py::test_requests_without_memory_to_receive_them_wait_for_some",
    ),
    Breakage(
        "closed-descriptors-are-given-away",
        "I1",
        "incfs/surroundings.py",
        "    _fill_standard()\n",
        "",
        "tests/mount/test_life.py::test_closed_descriptors_are_nobody_elses[(1,)]",
    ),
    Breakage(
        "unmounted-though-bound-elsewhere",
        "I1",
        "incfs/unmount.py",
        "        require_sole(mountpoint)\n",
        "",
        "tests/mount/test_life.py::test_umount_refuses_while_another_namespace_has_the_mount",
    ),
)
