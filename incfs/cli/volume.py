"""``incfs volume``: create, verify, list, show, resize, rename, clone, rollback, remove, map."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from incfs.cli import output
from incfs.cli.options import DryMove, DryRun, Json, Rate, new_noun, table, verb
from incfs.cli.session import Admin, call, run
from incfs.documents import Document
from incfs.errors import UsageError
from incfs.model import IMPORTING_SUFFIX
from incfs.units import SizeChange, parse_size, parse_size_change

_COLUMNS: Final = ("name", "size_bytes", "mapped_bytes", "held_bytes", "snapshot_count", "created", "state")
_FURTHER: Final = (
    "uuid", "id", "is_replica", "is_receiving", "origin", "origin_digest", "flattened", "stripe_columns",
    "stripe_unit_bytes", "mode", "uid", "gid", "modified", "changed", "accessed",
)  # fmt: skip
_ADVICE: Final = {
    "receiving": (
        "{name} receives a stream: `incfs receive --token {name}` says with what `incfs send --token` goes on, "
        "`incfs receive --abort {name}` gives it up"
    ),
    "importing": (
        "{name} is being imported, or was: `incfs import {name} SOURCE` begins anew, "
        "`incfs volume remove {name}.importing` gives it up"
    ),
}
_MAP_COLUMNS: Final = ("offset", "length", "kind", "storage", "block")

Volume = Annotated[str, typer.Argument(metavar="VOL", help="A volume: its name, or uuid:UUID.")]
StripeColumns = Annotated[int | None, typer.Option(metavar="N", help="Let stripes rotate over N storage volumes.")]
StripeUnit = Annotated[
    int | None,
    typer.Option(parser=parse_size, metavar="SIZE", help="Length of a stripe in one of them.", show_default="1M"),
]

app = new_noun("volume", "Virtual volumes.")


@verb(app, "create")
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="VOL", help="The new volume's name.")],
    size: Annotated[int | None, typer.Argument(parser=parse_size, metavar="[SIZE]", help="Its size.")] = None,
    *,
    origin: Annotated[
        Path | None,
        typer.Option("--origin", metavar="FILE", help="Lie over this raw image or block device, which is only read."),
    ] = None,
    digest: Annotated[
        bool, typer.Option("--digest", help="Read FILE once and record a digest, for `volume verify`.")
    ] = False,
    image_format: Annotated[
        str | None, typer.Option("--format", metavar="raw", help="FILE is raw, although it looks like something else.")
    ] = None,
    stripe_columns: StripeColumns = None,
    stripe_unit: StripeUnit = None,
    as_json: Json = False,
) -> None:
    """Create an empty volume; it takes no space until it is written."""
    if size is None and origin is None:
        raise UsageError("say how large the volume is to be, or what it lies over (--origin FILE)")
    striping = _striping(stripe_columns, stripe_unit)
    below = None if origin is None else str(origin.absolute())
    arguments = {"size_bytes": size, "origin": below, "digest": digest, "image_format": image_format, **striping}
    _report(call(context, "volume.create", name=name, **arguments), as_json)


@verb(app, "verify")
def verify(
    context: typer.Context,
    volume: Volume,
    *,
    record: Annotated[bool, typer.Option("--record", help="Record the digest if there is none yet.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the raw image that a volume lies over with the digest that was recorded; exit 4 if it was changed."""
    output.print_facts(call(context, "volume.verify", volume=volume, record=record), "verified", as_json=as_json)


def _striping(columns: int | None, unit_bytes: int | None) -> dict[str, int]:
    given = {"stripe_columns": columns, "stripe_unit_bytes": unit_bytes}
    return {key: value for key, value in given.items() if value is not None}


@verb(app, "restripe")
def restripe(
    context: typer.Context,
    volume: Volume,
    *,
    stripe_columns: StripeColumns = None,
    stripe_unit: StripeUnit = None,
    new_only: Annotated[bool, typer.Option("--new-only", help="Leave what is stored where it is.")] = False,
    rate: Rate = None,
    dry_run: DryMove = False,
    as_json: Json = False,
) -> None:
    """Give a volume's new stripes other columns, and move what is stored there; it may be interrupted."""
    arguments = {**_striping(stripe_columns, stripe_unit), "new_only": new_only, "rate_bytes": rate}
    output.print_move(call(context, "volume.restripe", volume=volume, **arguments, dry_run=dry_run), as_json=as_json)


@verb(app, "migrate")
def migrate(
    context: typer.Context, volume: Volume, *, rate: Rate = None, dry_run: DryMove = False, as_json: Json = False
) -> None:
    """Move what a volume stores to where its placement rules want it; it may be interrupted."""
    output.print_move(call(context, "volume.migrate", volume=volume, rate_bytes=rate, dry_run=dry_run), as_json=as_json)


@verb(app, "list", "ls")
@table
def list_(
    context: typer.Context,
    *,
    style: output.TableStyle,
) -> None:
    """List the volumes, and what is being received or imported, with how to go on or to give up."""
    document = call(context, "volume.list")
    if style.json or style.no_header:
        output.print_list(document, "volumes", _COLUMNS, style, further=_FURTHER)
        return
    rows = sorted(document["volumes"] + document["incoming"], key=lambda row: str(row["name"]))
    output.print_list({"volumes": rows}, "volumes", _COLUMNS, style, further=_FURTHER)
    for row in rows:
        if row["state"] in _ADVICE:
            name = row["name"].removesuffix(IMPORTING_SUFFIX)
            typer.echo(f"incfs: {output.shown(_ADVICE[row['state']].format(name=name))}", err=True)


@verb(app, "show")
def show(context: typer.Context, volume: Volume, as_json: Json = False) -> None:
    """Show one volume's facts, its snapshots and who has it open."""
    output.print_facts(call(context, "volume.show", volume=volume), "volume", as_json=as_json)


# A change such as -5G is an argument, and no option.
@verb(app, "resize", context_settings={"ignore_unknown_options": True})
def resize(
    context: typer.Context,
    volume: Volume,
    size: Annotated[
        SizeChange,
        typer.Argument(parser=parse_size_change, metavar="[+|-]SIZE", help="Its size, or how much more or less."),
    ],
    shrink: Annotated[bool, typer.Option("--shrink", help="Allow a smaller size; what lies beyond is lost.")] = False,
    as_json: Json = False,
) -> None:
    """Set a volume's size; nobody may have open what is made smaller."""
    given = {"change_bytes" if size.is_relative else "size_bytes": size.size_bytes}
    _report(call(context, "volume.resize", volume=volume, **given, shrink=shrink), as_json)


@verb(app, "rename")
def rename(
    context: typer.Context,
    volume: Volume,
    name: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")],
    as_json: Json = False,
) -> None:
    """Give a volume another name; its snapshots follow."""
    _report(call(context, "volume.rename", volume=volume, name=name), as_json)


@verb(app, "clone")
def clone(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="VOL@SNAP", help="The snapshot it starts from.")],
    name: Annotated[str, typer.Argument(metavar="NEW", help="The new volume's name.")],
    as_json: Json = False,
) -> None:
    """Create a volume that starts as a snapshot; nothing is copied.  The snapshot stays while it has clones."""
    _report(call(context, "volume.clone", target=target, name=name), as_json)


@verb(app, "flatten")
def flatten(context: typer.Context, volume: Volume, *, dry_run: DryMove = False, as_json: Json = False) -> None:
    """Copy what a clone inherits, so that it needs its origin no more; interrupted, it goes on when called again.

    Snapshots of the clone may need the origin still: then it goes with the last of them.
    """
    document = call(context, "volume.flatten", volume=volume, dry_run=dry_run)
    if dry_run:
        output.print_move(document, as_json=as_json)
    else:
        _report(document, as_json)


@verb(app, "rollback")
def rollback(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="VOL@SNAP", help="The snapshot to go back to.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also remove newer snapshots, and also while the volume is open.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Let a volume be again what it was at a snapshot; what was written since is lost."""
    document = call(context, "volume.rollback", target=target, force=force, dry_run=dry_run)
    if dry_run or as_json:
        output.print_facts(document, "rollback", as_json=as_json)


@verb(app, "remove", "rm")
def remove(
    context: typer.Context,
    volume: Volume,
    snapshots: Annotated[bool, typer.Option("--snapshots", help="Remove its snapshots with it.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove a volume; its space comes back in the background."""
    document = call(context, "volume.remove", volume=volume, snapshots=snapshots, dry_run=dry_run)
    output.print_removal(document, as_json=as_json)


@verb(app, "map")
@table
def map_(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="VOL[@SNAP]", help="A volume or a snapshot.")],
    *,
    style: output.TableStyle,
) -> None:
    """Show where the data is: offset, length and kind of each extent, and its storage address."""

    async def collect(admin: Admin) -> Document:
        return await _all_extents(admin, target)

    output.print_list(run(context, "volume.map", collect), "extents", _MAP_COLUMNS, style)


async def _all_extents(admin: Admin, target: str) -> Document:
    """Ask for the extents of ``target``, page after page."""
    extents: list[dict[str, Any]] = []
    start_bytes: int | None = 0
    while start_bytes is not None:
        page = await admin.call("volume.map", target=target, start_bytes=start_bytes)
        extents += page["extents"]
        start_bytes = page["next_bytes"]
    return {"target": target, "extents": extents}


def _report(document: Document, as_json: bool) -> None:
    if as_json:
        output.print_json(document)
