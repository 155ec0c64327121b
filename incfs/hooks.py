"""Programs that a policy runs before and after a snapshot, for ``fsfreeze`` or a database.

A hook is a program with its arguments, never a shell's text.  It has a small environment of
its own, no standard input, and a time limit at which it is killed with its process group.
What it leaves behind on purpose when it ends (a database's lock, to be released by the hook
after the snapshot) goes on.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

import trio

from incfs.errors import HookFailed, InvalidPolicy
from incfs.policy.document import PolicyDocument
from incfs.surroundings import expose

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MAX_OUTPUT_BYTES: Final = 4096
_DRAIN_S: Final = 1.0


def require_hooks(policy: PolicyDocument) -> None:
    """Refuse a policy whose hooks are not on this host: it would be found out at the first snapshot, maybe at night.

    Raises:
        InvalidPolicy: A program is not there, or cannot be executed.
    """
    for section in (policy.pool, *policy.templates.values(), *policy.volumes):
        for key in ("before", "after"):
            found = section.values.get(key)
            if found and found.value and shutil.which(found.value[0], path=PATH) is None:
                raise InvalidPolicy(
                    f"line {found.line} of the policy: {key} names {found.value[0]}, which is no program of this host",
                    line=found.line,
                )


async def run_hook(command: Sequence[str], facts: Mapping[str, str], timeout_s: float) -> None:
    """Run a hook to its end.

    Args:
        command: The program's absolute path and its arguments.
        facts: What it finds in its environment beside ``PATH``.
        timeout_s: Time after which it is killed.

    Raises:
        HookFailed: It cannot be started, ends with anything but 0, or was killed; with what it said.

    Concurrency: cancelled, it is killed before this returns.
    """
    try:
        process = await trio.lowlevel.open_process(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={"PATH": PATH, "LANG": "C.UTF-8", **facts}, cwd="/", start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise HookFailed(f"hook {command[0]} cannot be started: {error}", command=list(command)) from error
    expose(process.pid)
    said, drained = bytearray(), trio.Event()
    try:
        with trio.move_on_after(timeout_s) as limit:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_read, process, said, drained)
                await process.wait()
                # What it left running in the background may hold the pipe open for ever.
                with trio.move_on_after(_DRAIN_S):
                    await drained.wait()
                nursery.cancel_scope.cancel()
    finally:
        await _end(process)
    _require_success(command, process.returncode, bytes(said), timeout_s, was_late=limit.cancelled_caught)


async def _read(process: trio.Process, said: bytearray, drained: trio.Event) -> None:
    """Take all that comes, and keep the first of it."""
    assert process.stdout is not None
    async for data in process.stdout:
        said += data[: _MAX_OUTPUT_BYTES - len(said)]
    drained.set()


async def _end(process: trio.Process) -> None:
    """Kill it with its process group, unless it has ended: then its number may be another's."""
    with trio.CancelScope(shield=True):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if process.stdout is not None:
            await process.stdout.aclose()


def _require_success(
    command: Sequence[str], returncode: int | None, said: bytes, timeout_s: float, *, was_late: bool
) -> None:
    words = " ".join(said.decode("utf-8", "replace").split())
    tail = f": {words}" if words else ""
    if was_late:
        raise HookFailed(
            f"hook {command[0]} took more than {timeout_s:g} s and was killed{tail}", command=list(command)
        )
    if returncode != 0:
        raise HookFailed(f"hook {command[0]} ended with {returncode}{tail}", command=list(command))
