"""Work in a process of its own."""

import os
import traceback
from collections.abc import Callable


def in_a_child(work: Callable[[], None]) -> None:
    """Run in a forked process, where what others allocated or limited does not count; an exception fails the test."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
