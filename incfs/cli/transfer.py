"""``incfs send`` and ``incfs receive``: snapshots as streams on stdout and stdin."""

from typing import Annotated

import typer

from incfs.channel import Channel
from incfs.cli import output
from incfs.cli.options import DryRun, Json
from incfs.cli.pipes import put_stdout, require_stream_input, require_stream_output, take_nothing, take_stdin
from incfs.cli.session import call, transfer
from incfs.documents import Document
from incfs.errors import Damaged, UsageError
from incfs.stream.encoder import DEFAULT_LEVEL
from incfs.units import format_size, parse_size


async def _put_nothing(data: bytes) -> None:
    del data


def send_command(
    context: typer.Context,
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="VOL@SNAP...", help="Snapshots, each of another volume.")
    ] = None,
    *,
    base: Annotated[
        str | None,
        typer.Option("-i", metavar="BASE", help="Send what changed since this snapshot or #BOOKMARK."),
    ] = None,
    chain_base: Annotated[
        str | None, typer.Option("-I", metavar="BASE", help="The same, with every snapshot between.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Send every snapshot up to this one.")] = False,
    token: Annotated[
        str | None, typer.Option("--token", metavar="TOKEN", help="Go on where a receiver, or a cut-off stream, ends.")
    ] = None,
    rate: Annotated[
        int | None, typer.Option("--rate", parser=parse_size, metavar="SIZE", help="At most so much in a second.")
    ] = None,
    level: Annotated[int, typer.Option("--level", min=0, max=19, help="Of zstd; 0: none.")] = DEFAULT_LEVEL,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a stream of snapshots to stdout."""
    if base is not None and chain_base is not None:
        raise UsageError("-i sends one step and -I every snapshot between: say one of them")
    if not dry_run:
        require_stream_output()
        if as_json:
            raise UsageError("stdout is for the stream; --json goes with -n")
    document = transfer(
        context,
        "transfer.send",
        Channel(put_stdout, take_nothing),
        targets=targets or [],
        base=base or chain_base,
        every=every or chain_base is not None,
        token=token,
        level=level,
        rate_bytes=rate,
        dry_run=dry_run,
    )
    if dry_run and as_json:
        output.print_json(document)
    elif dry_run:
        stream = document["stream"]
        names = [f"would send {snapshot['name']}" for snapshot in stream["snapshots"]]
        output.write_lines(
            [*names, f"would send {format_size(stream['stream_bytes'])} ({stream['stream_bytes']} bytes)"]
        )


def receive_command(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VOL...]", help="Targets, in the order of the stream; named as at the sender without."),
    ] = None,
    *,
    replica: Annotated[bool, typer.Option("--replica", help="Keep them read-only until they are promoted.")] = False,
    token: Annotated[
        bool, typer.Option("--token", help="Print the token with which `incfs send` goes on; read nothing.")
    ] = False,
    abort: Annotated[
        bool, typer.Option("--abort", help="End an unfinished receive; VOL is as it was before. Read nothing.")
    ] = False,
    heal: Annotated[
        bool, typer.Option("--heal", help="Only write damaged blocks of VOL's snapshots again, from a stream of them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Take a stream from stdin; each snapshot appears once it is complete and proved."""
    chosen = names or []
    if (token or abort or heal) and (len(chosen) != 1 or token + abort + heal > 1):
        raise UsageError("name one volume, and one of --token, --abort and --heal")
    if heal:
        require_stream_input()
        document = transfer(context, "transfer.heal", Channel(_put_nothing, take_stdin), volume=chosen[0])
        _report_healed(document, as_json=as_json)
        return
    if token or abort:
        document = call(context, "transfer.token" if token else "transfer.abort", volume=chosen[0])
        if token and not as_json:
            output.write_lines([document["token"]])
    else:
        require_stream_input()
        document = transfer(
            context,
            "transfer.receive",
            Channel(_put_nothing, take_stdin),
            names=chosen,
            replica=replica,
        )
    if as_json:
        output.print_json(document)


def _report_healed(document: Document, *, as_json: bool) -> None:
    healed = document["healed"]
    if as_json:
        output.print_json(document)
    else:
        output.write_lines([f"healed {format_size(healed['healed_bytes'])}"])
    if healed["lost_bytes"]:
        raise Damaged(f"{format_size(healed['lost_bytes'])} stay damaged: the stream has other data there")
