"""What commands share: the pool they work on and the options that shape their output."""

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, cast

import typer

from incfs.cli.output import TableStyle
from incfs.errors import UsageError
from incfs.units import parse_size

POOL_VARIABLE: Final = "INCFS_POOL"
WAIT_S: Final = "incfs.wait_s"
LOCK_WAIT_S: Final = 2.0
"""How long a command waits for another one, or for a daemon that is just starting or ending."""
FORCE_OLDER: Final = "incfs.force-older"
"""Where a command's context has the option of that name."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
NoHeader = Annotated[bool, typer.Option("-H", "--no-header", help="No header, tabs between columns.")]
# The same letter names the pool before the noun; after the verb it has the meaning that
# scripts know from zfs and others.
Exact = Annotated[bool, typer.Option("-p", "--exact", help="Exact numbers: bytes.")]
Columns = Annotated[str | None, typer.Option("-o", "--columns", metavar="COLUMN,...", help="Print these columns.")]
DryRun = Annotated[bool, typer.Option("-n", "--dry-run", help="Change nothing; say what would be freed and why.")]
DryMove = Annotated[bool, typer.Option("-n", "--dry-run", help="Change nothing; say how much would move and why.")]
Rate = Annotated[int | None, typer.Option(parser=parse_size, metavar="SIZE", help="At most so many bytes a second.")]
Size = Annotated[int, typer.Argument(parser=parse_size, metavar="SIZE")]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def pool_directory(context: typer.Context) -> Path:
    """Return the directory of the pool that the command is about.

    Raises:
        UsageError: None was named.
    """
    directory = context.obj
    if not isinstance(directory, Path):
        raise UsageError(f"no pool named: write incfs -p DIR ..., or set {POOL_VARIABLE}")
    return directory.absolute()


def new_noun(name: str, text: str) -> typer.Typer:
    """Return the command group of a noun."""
    return typer.Typer(
        name=name,
        help=text,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def verb(
    app: typer.Typer, name: str, *aliases: str, context_settings: dict[str, Any] | None = None
) -> Callable[[_Command], _Command]:
    """Register a function as a verb of a noun; aliases work and are not listed."""

    def register(function: _Command) -> _Command:
        app.command(name, context_settings=context_settings)(function)
        for alias in aliases:
            app.command(alias, hidden=True, context_settings=context_settings)(function)
        return function

    return register


_TABLE_OPTIONS: Final = {
    "as_json": (Json, False),
    "no_header": (NoHeader, False),
    "exact": (Exact, False),
    "columns": (Columns, None),
}


def table(function: _Command) -> _Command:
    """Give a verb that lists something the options of a list; it gets them as its argument ``style``."""
    signature = inspect.signature(function, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "style"]
    options = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _TABLE_OPTIONS.items()
    ]

    @functools.wraps(function)
    def listed(**arguments: Any) -> Any:
        style = TableStyle(*(arguments.pop(name) for name in _TABLE_OPTIONS))
        return function(**arguments, style=style)

    # What typer reads: the signature, and the hints beside it.
    listed.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    listed.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *options]}
    return cast("_Command", listed)
