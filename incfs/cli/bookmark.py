"""``incfs bookmark``: create, list, remove."""

from typing import Annotated, Final

import typer

from incfs.cli import output
from incfs.cli.options import DryRun, Json, new_noun, table, verb
from incfs.cli.session import call

_COLUMNS: Final = ("name", "uuid", "size_bytes", "snapshot", "taken", "created")
_FURTHER: Final = ("volume", "bookmark", "generation")

app = new_noun("bookmark", "Points of volumes that increments start from when their snapshots are gone.")


@verb(app, "create")
def create(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="VOL@SNAP", help="A snapshot, or uuid:UUID.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The bookmark's name, MARK or VOL#MARK.")],
    as_json: Json = False,
) -> None:
    """Bookmark a snapshot: `send -i '#MARK'` starts from it also when the snapshot is removed. It holds no data."""
    document = call(context, "bookmark.create", target=target, name=name)
    if as_json:
        output.print_json(document)


@verb(app, "list", "ls")
@table
def list_(
    context: typer.Context,
    volume: Annotated[str | None, typer.Argument(metavar="VOL", help="Only this volume's bookmarks.")] = None,
    *,
    style: output.TableStyle,
) -> None:
    """List the bookmarks, oldest first; `snapshot` is empty when it is gone."""
    output.print_list(call(context, "bookmark.list", volume=volume), "bookmarks", _COLUMNS, style, further=_FURTHER)


@verb(app, "remove", "rm")
def remove(
    context: typer.Context,
    targets: Annotated[list[str], typer.Argument(metavar="VOL#MARK...", help="Bookmarks.")],
    *,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Forget bookmarks, all or none of them."""
    document = call(context, "bookmark.remove", targets=targets, dry_run=dry_run)
    if as_json:
        output.print_json(document)
    elif dry_run:
        output.write_lines(f"would forget {name}: a bookmark holds no data" for name in document["would_remove"])
