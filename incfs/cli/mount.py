"""``incfs mount`` and ``incfs umount``."""

from pathlib import Path
from typing import Annotated

import typer

from incfs.cli.options import FORCE_OLDER


def mount_command(
    context: typer.Context,
    pool: Annotated[Path, typer.Argument(metavar="POOL", help="The pool's directory.")],
    mountpoint: Annotated[Path, typer.Argument(metavar="MNT", help="Where its volumes shall appear.")],
    *,
    options: Annotated[
        list[str] | None, typer.Option("-o", metavar="OPT,...", help="Mount options, as for mount(8); repeatable.")
    ] = None,
    foreground: Annotated[bool, typer.Option("-f", "--foreground", help="Stay in the foreground.")] = False,
) -> None:
    """Mount a pool; returns when the mount answers."""
    from incfs.mount import mount_pool  # late: other commands need no FUSE

    forced = ["force_older"] if context.meta.get(FORCE_OLDER) else []
    mount_pool(pool.absolute(), mountpoint.absolute(), ",".join([*(options or []), *forced]), foreground=foreground)


def umount_command(
    mountpoint: Annotated[Path, typer.Argument(metavar="MNT", help="Where a pool is mounted.")],
) -> None:
    """Unmount; returns when everything is on disk."""
    from incfs.unmount import unmount  # late: other commands need no FUSE

    unmount(mountpoint.absolute())
