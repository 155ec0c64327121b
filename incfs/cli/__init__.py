"""The command line: ``incfs [-p POOL] NOUN VERB ...``.

One module per noun; ``session`` reaches the pool, ``output`` renders, ``options`` holds what
commands share.  This is the boundary where an error becomes one line on stderr and an exit
code; a traceback here is a bug of ours.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

import incfs
from incfs.cli import (
    bookmark,
    debug,
    events,
    mount,
    output,
    policy,
    pool,
    raw,
    replica,
    snapshot,
    storage,
    stream,
    top,
    transfer,
    volume,
)
from incfs.cli.options import FORCE_OLDER, LOCK_WAIT_S, POOL_VARIABLE, WAIT_S
from incfs.errors import NO_ROOM, IncfsError
from incfs.surroundings import settle

app = typer.Typer(
    name="incfs",
    help="A pool of storage volumes, mounted as sparse files with instant snapshots.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _noun in (pool, storage, volume, snapshot, bookmark, policy, replica, stream, debug):
    app.add_typer(_noun.app)

_COMMANDS: Final[dict[str, Callable[..., None]]] = {
    "events": events.events_command,
    "top": top.top_command,
    "send": transfer.send_command,
    "receive": transfer.receive_command,
    "import": raw.import_command,
    "export": raw.export_command,
    "mount": mount.mount_command,
    "umount": mount.umount_command,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)

logger = logging.getLogger(__name__)

_LONG_PATH: Final = 200

NOUNS: Final = frozenset(
    {"pool", "storage", "volume", "snapshot", "bookmark", "policy", "replica", "stream", "debug", *_COMMANDS}
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave the process with its exit code."""
    if arguments is None:
        settle()
    logging.basicConfig(level=logging.WARNING, format="incfs: %(message)s")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=as_mount_helper(given), prog_name="incfs")
    except IncfsError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        logger.debug("unforeseen", exc_info=True)
        print_error(describe(error))
        output.discard_stdout()
        sys.exit(IncfsError.exit_code)


def as_mount_helper(arguments: list[str]) -> list[str]:
    """Turn ``POOL MNT -o opts``, as mount(8) and fstab call us, into the ``mount`` command."""
    if not arguments or arguments[0] in NOUNS or arguments[0].startswith("-"):
        return arguments
    # A path that does not exist is still meant as a pool: the message should say so.
    if "/" in arguments[0] or Path(arguments[0]).is_dir():
        return ["mount", *arguments]
    return arguments


def describe(error: OSError) -> str:
    """Say what the host refused that nobody foresaw: a path that may not be looked at, or is too long."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        path = os.fsdecode(error.filename)
        return f"{path if len(path) <= _LONG_PATH else path[:_LONG_PATH] + '...'}: {reason}"
    if isinstance(error, FileNotFoundError) and not _has_working_directory():
        return "the working directory has been removed; change to another one, or name files from the root"
    return f"cannot write the output: {reason}" if error.errno in NO_ROOM else reason


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def print_error(text: str) -> None:
    """Write an error as one line, whatever a path in it contains."""
    line = " ".join(text.split())
    with contextlib.suppress(OSError):  # the exit code says it, too
        print(f"incfs: {output.shown(line)}", file=sys.stderr, flush=True)  # noqa: T201


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"incfs {incfs.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    pool_directory: Annotated[
        Path | None,
        typer.Option("-p", "--pool", metavar="DIR", envvar=POOL_VARIABLE, help="The pool."),
    ] = None,
    force_older: Annotated[
        bool,
        typer.Option(
            "--force-older",
            help="Open the pool although its parts are of different times; what is newer is lost.",
        ),
    ] = False,
    wait_s: Annotated[
        float,
        typer.Option("--wait", metavar="SECONDS", min=0, help="How long to wait for a pool that another process has."),
    ] = LOCK_WAIT_S,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    del version
    context.obj = pool_directory
    context.meta[FORCE_OLDER] = force_older
    context.meta[WAIT_S] = wait_s
