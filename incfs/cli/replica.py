"""``incfs replica``: add, list, status, run, remove, promote, demote, facts."""

from pathlib import Path
from typing import Annotated, Final

import typer

from incfs.cli import output
from incfs.cli.options import Json, new_noun, table, verb
from incfs.cli.session import call
from incfs.replication import DEFAULT_PROGRAM
from incfs.units import format_size, parse_size

_COLUMNS: Final = ("name", "volumes", "target", "last_success", "last_error")
_FURTHER: Final = ("names", "common")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A replica.")]
Volume = Annotated[str, typer.Argument(metavar="VOL", help="A volume.")]

app = new_noun("replica", "Copies of volumes in other pools, kept up to date by streams.")


@verb(app, "add")
def add(
    context: typer.Context,
    volumes: Annotated[list[str], typer.Argument(metavar="VOL...", help="Several are replicated as a group.")],
    target: Annotated[
        str, typer.Option("--to", metavar="TARGET", help="ssh://host/pool, or a pool's directory or socket.")
    ],
    *,
    name: Annotated[str | None, typer.Option("--name", help="What to call it; else as the first volume.")] = None,
    names: Annotated[
        list[str] | None, typer.Option("--as", metavar="VOL", help="A volume's name at the target; once for each.")
    ] = None,
    program: Annotated[str, typer.Option("--program", help="The incfs command at the target.")] = DEFAULT_PROGRAM,
    as_json: Json = False,
) -> None:
    """Keep where volumes are replicated to; `replica run` does it."""
    target = target if "://" in target else str(Path(target).absolute())
    document = call(
        context, "replica.add", volumes=volumes, target=target, name=name, names=names or None, program=program
    )
    if as_json:
        output.print_json(document)


@verb(app, "list", "ls")
@table
def list_(
    context: typer.Context,
    *,
    style: output.TableStyle,
) -> None:
    """List the replicas, with the time of the last success and the last error."""
    output.print_list(call(context, "replica.list"), "replicas", _COLUMNS, style, further=_FURTHER)


@verb(app, "status")
def status(context: typer.Context, name: Name, as_json: Json = False) -> None:
    """Show one replica."""
    document = call(context, "replica.list", name=name)
    output.print_facts({"replica": document["replicas"][0]}, "replica", as_json=as_json)


@verb(app, "run")
def run(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="All of them without.")] = None,
    *,
    rate: Annotated[
        int | None, typer.Option("--rate", parser=parse_size, metavar="SIZE", help="At most so much in a second.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring replicas up to date; goes on where an interrupted run ended."""
    document = call(context, "replica.run", names=names or [], rate_bytes=rate)
    if as_json:
        output.print_json(document)
    else:
        output.write_lines(f"{done['name']}: sent {format_size(done['stream_bytes'])}" for done in document["runs"])


@verb(app, "remove", "rm")
def remove(context: typer.Context, name: Name) -> None:
    """Forget a replica; the target stays as it is."""
    call(context, "replica.remove", name=name)


@verb(app, "promote")
def promote(context: typer.Context, volume: Volume) -> None:
    """Make a replica, in this pool, an ordinary volume that can be written."""
    call(context, "replica.promote", volume=volume)


@verb(app, "demote")
def demote(context: typer.Context, volume: Volume) -> None:
    """Make a volume, in this pool, a replica: read-only, changed by streams."""
    call(context, "replica.demote", volume=volume)


@verb(app, "facts")
def facts(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="VOL...", help="Volumes of this pool.")],
    as_json: Json = False,
) -> None:
    """Say what this pool, as a target, has of volumes; `replica run` asks this."""
    document = call(context, "replica.facts", names=names)
    if as_json:
        output.print_json(document)
    else:
        output.print_records(
            [{"volume": name, **(f or {})} for name, f in zip(names, document["volumes"], strict=True)]
        )
