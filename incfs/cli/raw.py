"""``incfs import`` and ``incfs export``: raw images and block devices."""

from pathlib import Path
from typing import Annotated

import typer

from incfs.channel import Channel
from incfs.cli import output
from incfs.cli.options import DryMove, Json
from incfs.cli.pipes import put_stdout, require_stream_output, take_nothing
from incfs.cli.session import call, transfer
from incfs.errors import UsageError


def import_command(
    context: typer.Context,
    volume: Annotated[str, typer.Argument(metavar="VOL", help="The volume: new, or to be brought up to date.")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="An image or a block device.")],
    *,
    incremental: Annotated[
        bool, typer.Option("--incremental", help="Write only blocks that differ from what the volume has.")
    ] = False,
    changed: Annotated[
        Path | None,
        typer.Option("--changed", metavar="FILE", help="Read only these ranges: JSON as `snapshot diff --json` has."),
    ] = None,
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", metavar="SNAP", help="Name of the snapshot that is taken at the end.")
    ] = None,
    image_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="raw, qcow2, vmdk, vhd, vhdx, vdi, or auto; without it SOURCE must be raw and look so.",
        ),
    ] = None,
    dry_run: DryMove = False,
    as_json: Json = False,
) -> None:
    """Copy an image or block device into a volume, and take a snapshot of it.

    Formats other than raw are read by qemu-nbd.
    """
    document = call(
        context,
        "raw.import",
        volume=volume,
        path=str(source.absolute()),
        snapshot=snapshot,
        incremental=incremental,
        image_format=image_format,
        changed=None if changed is None else str(changed.absolute()),
        dry_run=dry_run,
    )
    if dry_run or as_json:
        output.print_move(document, as_json=as_json)


def export_command(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="VOL[@SNAP]", help="What to write; a volume as of now.")],
    path: Annotated[Path, typer.Argument(metavar="TARGET", help="A file, a block device, or - for standard output.")],
    *,
    incremental: Annotated[bool, typer.Option("--incremental", help="Write only what changed since --from.")] = False,
    from_snapshot: Annotated[
        str | None, typer.Option("--from", metavar="SNAP", help="The older snapshot, or #BOOKMARK, that TARGET holds.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that is there; write to a device that is in use.")
    ] = False,
    image_format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="raw, qcow2, vmdk, vhd, vhdx or vdi.")
    ] = "raw",
    as_json: Json = False,
) -> None:
    """Write a volume or a snapshot to an image, which is sparse, or to a block device.

    Formats other than raw are written by qemu-nbd.
    """
    if incremental != (from_snapshot is not None):
        raise UsageError("--incremental and --from go together")
    if str(path) == "-":
        if incremental or force or as_json or image_format != "raw":
            raise UsageError("stdout takes a whole raw image, and nothing else: - goes with no option")
        require_stream_output()
        transfer(context, "raw.stream", Channel(put_stdout, take_nothing), target=target)
        return
    document = call(
        context,
        "raw.export",
        target=target,
        path=str(path.absolute()),
        from_snapshot=from_snapshot,
        force=force,
        image_format=image_format,
    )
    if as_json:
        output.print_json(document)
