"""Lets something else happen at a task's n-th await; the sibling of ``cancelling``."""

from collections.abc import Awaitable, Callable

import trio


class _ActAtStep(trio.abc.Instrument):
    """Acts when a task has given up the processor for the n-th time, before anybody else goes on."""

    def __init__(self, task: trio.lowlevel.Task, act: Callable[[], None], step: int) -> None:
        self._task = task
        self._act = act
        self._left = step
        self.has_acted = False
        self.error: BaseException | None = None

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count the awaits of the one task at which it really waited."""
        if task is not self._task:
            return
        self._left -= 1
        if self._left == 0:
            self.has_acted = True
            try:
                self._act()
            except BaseException as error:  # trio would only log it
                self.error = error


async def act_at(step: int, function: Callable[[], Awaitable[object]], act: Callable[[], None]) -> bool:
    """Run a function and let ``act``, one step of the owner thread, happen at its ``step``-th await, from 1 on.

    Returns:
        Whether it had that many, so that a larger step may say more.
    """
    instrument = _ActAtStep(trio.lowlevel.current_task(), act, step)
    trio.lowlevel.add_instrument(instrument)
    try:
        await function()
    finally:
        trio.lowlevel.remove_instrument(instrument)
    if instrument.error is not None:
        raise instrument.error
    return instrument.has_acted
