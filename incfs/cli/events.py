"""``incfs events``: what the pool did by itself, and why."""

from dataclasses import replace
from typing import Annotated, Final

import trio
import typer

from incfs.cli import output
from incfs.cli.options import table
from incfs.cli.session import Admin, run

_COLUMNS: Final = ("number", "time", "kind", "subject", "reason")
_FOLLOW_EVERY_S: Final = 1.0


@table
def events_command(
    context: typer.Context,
    *,
    limit: Annotated[int, typer.Option("-n", "--lines", metavar="N", help="Show the newest N.")] = 50,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with new ones.")] = False,
    style: output.TableStyle,
) -> None:
    """Show what the pool did by itself, and why."""

    async def show(admin: Admin) -> None:
        document = await admin.call("events.list", limit=limit)
        output.print_list(document, "events", _COLUMNS, style, further=("facts",))
        seen = document["events"][-1]["number"] if document["events"] else 0
        while follow:
            await trio.sleep(_FOLLOW_EVERY_S)
            document = await admin.call("events.list", since=seen)
            if document["events"]:
                output.print_list(document, "events", _COLUMNS, replace(style, no_header=True))
                seen = document["events"][-1]["number"]

    run(context, "events.list", show)
