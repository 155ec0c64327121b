"""``incfs storage``: add, list, evacuate, remove."""

from pathlib import Path
from typing import Annotated, Final

import typer

from incfs.cli import output
from incfs.cli.options import DryMove, DryRun, Json, Rate, new_noun, table, verb
from incfs.cli.session import call
from incfs.errors import UsageError
from incfs.health import protection
from incfs.units import parse_size

EXIT_SKIPPED: Final = 3
_COLUMNS: Final = (
    "id",
    "path",
    "capacity_bytes",
    "grown_bytes",
    "used_bytes",
    "free_bytes",
    "class",
    "redundancy",
    "state",
    "job",
)

StorageNumber = Annotated[int, typer.Argument(metavar="ID", help="A storage volume's id.")]

app = new_noun("storage", "Storage volumes: the image files that hold the data.")


@verb(app, "add")
def add(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="The image file to create, or a directory for it.")],
    *,
    capacity: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="Most that it may grow to."),
    ] = None,
    storage_class: Annotated[
        str, typer.Option("--class", metavar="NAME", help="A name for placement rules: ssd, hdd.")
    ] = "",
    redundancy: Annotated[
        str, typer.Option(metavar="KIND", help="What lies below: none, raid1, raid5, raid6, raid10.")
    ] = "none",
    mirrors: Annotated[
        list[Path] | None,
        typer.Option("--mirror", metavar="PATH", help="Another image with the same contents; repeatable, up to 3."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also with legs on one filesystem.")] = False,
    as_json: Json = False,
) -> None:
    """Add an image file that the pool may grow into."""
    document = call(
        context,
        "storage.add",
        path=str(path.absolute()),
        capacity_bytes=capacity,
        storage_class=storage_class,
        redundancy=redundancy,
        mirrors=[str(leg.absolute()) for leg in mirrors or []],
        force=force,
    )
    if as_json:
        output.print_json(document)
    elif (warning := document["metadata_warning"]) is not None:
        typer.echo(f"incfs: warning: {warning}", err=True)


@verb(app, "list", "ls")
@table
def list_(
    context: typer.Context,
    *,
    style: output.TableStyle,
) -> None:
    """List the storage volumes."""
    document = call(context, "storage.list")
    if not style.json:
        for row in document["storages"]:
            row["redundancy"] = protection(row)
            row["legs"] = [f"{leg['path']} ({leg['state']})" for leg in row["legs"]]
    output.print_list(document, "storages", _COLUMNS, style)


@verb(app, "evacuate")
def evacuate(
    context: typer.Context,
    storage: StorageNumber,
    *,
    rate: Rate = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Let it get new data again.")] = False,
    dry_run: DryMove = False,
    as_json: Json = False,
) -> None:
    """Move everything off a storage volume, online; interrupted, it goes on when it is asked for again."""
    if cancel and dry_run:
        raise UsageError("--cancel moves nothing; leave out -n")
    if cancel:
        call(context, "storage.keep", storage=storage)
        return
    document = call(context, "storage.evacuate", storage=storage, rate_bytes=rate, dry_run=dry_run)
    output.print_move(document, as_json=as_json)
    if not dry_run and document["move"]["unreadable_blocks"]:
        raise typer.Exit(EXIT_SKIPPED)


@verb(app, "remove", "rm")
def remove(context: typer.Context, storage: StorageNumber, *, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Take an empty storage volume out of the pool and delete its image."""
    document = call(context, "storage.remove", storage=storage, dry_run=dry_run)
    if as_json:
        output.print_json(document)
    elif dry_run:
        output.write_lines(f"would delete {output.shown(path)}: it holds no data" for path in document["images"])


@verb(app, "resilver")
def resilver(
    context: typer.Context,
    storage: StorageNumber,
    *,
    replace: Annotated[
        int | None, typer.Option("--replace", metavar="LEG", help="Put an empty file in the place of this leg first.")
    ] = None,
    path: Annotated[Path | None, typer.Option("--path", help="That file, or a directory for it.")] = None,
    rate: Rate = None,
    as_json: Json = False,
) -> None:
    """Bring the stale legs of a mirror up to date: what changed while they were away."""
    if (replace is None) != (path is None):
        raise UsageError("--replace names the leg, --path its new file: give both or none")
    if path is not None:
        call(context, "storage.replace", storage=storage, leg=replace, path=str(path.absolute()))
    document = call(context, "storage.resilver", storage=storage, rate_bytes=rate)
    output.print_facts(document, "resilver", as_json=as_json)
