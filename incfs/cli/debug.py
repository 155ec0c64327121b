"""``incfs debug``: dump, map, log.  For people who look for a fault in incfs itself."""

from typing import Annotated

import typer

from incfs.cli import output
from incfs.cli.options import Json, new_noun, verb
from incfs.cli.session import call
from incfs.documents import Document

app = new_noun("debug", "What the tables and the journal hold.")


@verb(app, "dump")
def dump(context: typer.Context, as_json: Json = False) -> None:
    """Print every record of the tables."""
    _print(call(context, "debug.dump"), "records", as_json)


@verb(app, "map")
def map_(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="VOL[@SNAP]", help="A volume or a snapshot.")],
    page: Annotated[int, typer.Argument(metavar="PAGE", min=0, help="Index of the map page.")],
    as_json: Json = False,
) -> None:
    """Print the mappings of one map page (512 blocks)."""
    _print(call(context, "debug.map", target=target, page_index=page), "mappings", as_json)


@verb(app, "log")
def log(context: typer.Context, as_json: Json = False) -> None:
    """Print the journal's records that are not in the tables yet."""
    _print(call(context, "debug.log"), "records", as_json)


def _print(document: Document, key: str, as_json: bool) -> None:
    if as_json:
        output.print_json(document)
    else:
        output.print_records(document[key])
