"""``incfs snapshot``: create, list, show, remove, rename, hold, release, holds, bookmark, diff."""

from typing import Annotated, Any, Final

import typer

from incfs.cli import bookmark, output
from incfs.cli.options import DryRun, Json, new_noun, table, verb
from incfs.cli.session import Admin, call, run
from incfs.documents import Document
from incfs.units import parse_duration, parse_size

_COLUMNS: Final = ("name", "size_bytes", "mapped_bytes", "held_bytes", "created")
_FURTHER: Final = ("volume", "snapshot", "uuid", "generation", "tag", "clones", "holds")
_HOLD_COLUMNS: Final = ("name", "tag", "expires")
_DIFF_COLUMNS: Final = ("offset", "length", "kind")
_DIFF_FURTHER: Final = ("storage", "block")

Snapshot = Annotated[str, typer.Argument(metavar="VOL@SNAP", help="A snapshot, or uuid:UUID.")]

app = new_noun("snapshot", "Snapshots of volumes.")


@verb(app, "create")
def create(
    context: typer.Context,
    targets: Annotated[
        list[str],
        typer.Argument(metavar="VOL@SNAP...", help="The new snapshots; all show one point in time."),
    ],
    as_json: Json = False,
) -> None:
    """Take snapshots of one or several volumes, all or none of them."""
    document = call(context, "snapshot.create", targets=targets)
    if as_json:
        output.print_json(document)


@verb(app, "list", "ls")
@table
def list_(
    context: typer.Context,
    volume: Annotated[str | None, typer.Argument(metavar="VOL", help="Only this volume's snapshots.")] = None,
    *,
    style: output.TableStyle,
) -> None:
    """List the snapshots, oldest first."""
    document = call(context, "snapshot.list", volume=volume)
    output.print_list(document, "snapshots", _COLUMNS, style, further=_FURTHER)


@verb(app, "show")
def show(context: typer.Context, target: Snapshot, as_json: Json = False) -> None:
    """Show one snapshot's facts."""
    document = call(context, "snapshot.show", target=target)
    output.print_facts(document, "snapshot", as_json=as_json)


@verb(app, "remove", "rm")
def remove(
    context: typer.Context,
    targets: Annotated[
        list[str], typer.Argument(metavar="VOL@SNAP...", help="Snapshots; VOL@A%B are all from A to B.")
    ],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove snapshots, all or none of them; their space comes back in the background."""
    document = call(context, "snapshot.remove", targets=targets, dry_run=dry_run)
    output.print_removal(document, as_json=as_json)


@verb(app, "rename")
def rename(
    context: typer.Context,
    target: Snapshot,
    name: Annotated[str, typer.Argument(metavar="NEW", help="Its new name, SNAP or VOL@SNAP.")],
    as_json: Json = False,
) -> None:
    """Give a snapshot another name."""
    document = call(context, "snapshot.rename", target=target, name=name)
    if as_json:
        output.print_json(document)


Tag = Annotated[str, typer.Argument(metavar="TAG", help="Who or what needs the snapshots.")]
Targets = Annotated[list[str], typer.Argument(metavar="VOL@SNAP...", help="Snapshots.")]


@verb(app, "hold")
def hold(
    context: typer.Context,
    tag: Tag,
    targets: Targets,
    *,
    expires: Annotated[
        float | None,
        typer.Option("--expires", parser=parse_duration, metavar="TIME", help="End by itself: 90s, 30m, 1h, 7d."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Keep snapshots from being removed; a hold of the same tag is renewed."""
    document = call(context, "snapshot.hold", tag=tag, targets=targets, expires_s=expires)
    if as_json:
        output.print_json(document)


@verb(app, "release")
def release(context: typer.Context, tag: Tag, targets: Targets, as_json: Json = False) -> None:
    """End a hold."""
    document = call(context, "snapshot.release", tag=tag, targets=targets)
    if as_json:
        output.print_json(document)


@verb(app, "holds")
@table
def holds(
    context: typer.Context,
    target: Annotated[str | None, typer.Argument(metavar="VOL[@SNAP]", help="Only of these.")] = None,
    *,
    style: output.TableStyle,
) -> None:
    """List who holds which snapshot, and until when."""
    output.print_list(call(context, "snapshot.holds", target=target), "holds", _HOLD_COLUMNS, style)


verb(app, "bookmark")(bookmark.create)


@verb(app, "diff")
@table
def diff(
    context: typer.Context,
    target: Snapshot,
    *,
    from_snapshot: Annotated[
        str | None,
        typer.Option("--from", metavar="SNAP", help="The older snapshot, or #BOOKMARK; without it, nothing."),
    ] = None,
    start: Annotated[
        int | None, typer.Option("--start", parser=parse_size, metavar="OFFSET", help="Only ranges from here on.")
    ] = None,
    max_results: Annotated[
        int | None, typer.Option("--max-results", metavar="N", min=1, help="Stop after so many ranges.")
    ] = None,
    style: output.TableStyle,
) -> None:
    """List the ranges that differ between two snapshots of a volume.

    In JSON, `next_offset` is where a listing that stopped goes on with `--start`; it is null at the end.
    """

    async def collect(admin: Admin) -> Document:
        return await _all_ranges(admin, max_results, target=target, from_snapshot=from_snapshot, start_bytes=start or 0)

    output.print_list(run(context, "snapshot.diff", collect), "ranges", _DIFF_COLUMNS, style, further=_DIFF_FURTHER)


async def _all_ranges(admin: Admin, limit: int | None, **arguments: Any) -> Document:
    """Ask for the ranges, page after page, until there are ``limit``."""
    whole: Document = {}
    while True:
        left = {} if limit is None else {"max_results": limit - len(whole.get("ranges", ()))}
        page = await admin.call("snapshot.diff", **arguments, **left)
        for key in ("ranges", "block_metadata", "changed_bytes") if whole else ():
            page[key] = whole[key] + page[key]
        whole = page
        if page["next_offset"] is None or len(page["ranges"]) == limit:
            return whole
        arguments["start_bytes"] = page["next_offset"]
