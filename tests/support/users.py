"""Another user: a child that gave up all rights."""

import os
import traceback
from collections.abc import Callable
from typing import Any

NOBODY = 65534


def as_nobody(function: Callable[..., Any], *args: Any) -> int:
    """Call a function as another user in a child; give the errno that it failed with, 0 when it did not."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            function(*args)
            code = 0
        except OSError as error:
            code = error.errno or 255
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
