"""What is done to a daemon of the tests before it mounts: functions of the product are wrapped in its process."""

import functools
import importlib
import itertools
import os
import time
from collections.abc import Callable
from typing import Any


def wrap(path: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace ``module:qualified name``, below ``incfs``."""
    module, _, qualified = path.partition(":")
    *owners, name = qualified.split(".")
    owner: Any = importlib.import_module(f"incfs.{module}")
    for step in owners:
        owner = getattr(owner, step)
    setattr(owner, name, wrapper(getattr(owner, name)))


def signal_at(path: str, number: int) -> None:
    """Have this process send itself a signal whenever a function is called."""

    def signalling(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            os.kill(os.getpid(), number)
            return function(*arguments, **named)

        return wrapped

    wrap(path, signalling)


def signal_in_the_first_flush(number: int) -> None:
    """Have the process outside send the daemon a signal in its first flush, and take a while for that one."""
    calls = itertools.count()

    def flushing(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(fd: int) -> None:
            if next(calls):
                function(fd)
                return
            os.kill(os.getppid(), number)
            time.sleep(0.3)
            function(fd)

        return wrapped

    wrap("kernel_hook:_sync_and_close", flushing)


def forget_flushes() -> None:
    """Have this process flush nothing and say that it did."""

    def forgetting(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*_: Any) -> None:
            return None

        return wrapped

    wrap("backing:File.sync", forgetting)
