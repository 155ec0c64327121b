"""``incfs policy``: show, set, check, run, explain."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from incfs.cli import output
from incfs.cli.options import Json, new_noun, table, verb
from incfs.cli.session import call
from incfs.documents import Document
from incfs.errors import BackingError, InvalidPolicy
from incfs.model import MAX_POLICY_BYTES
from incfs.policy.document import parse_policy

EXIT_SKIPPED: Final = 3
_EFFECTIVE: Final = ("key", "value", "from")
_EXPLAINED: Final = ("name", "created", "held_bytes", "kept", "reasons")
_ACTIONS: Final = ("action", "result", "subject", "name", "reason")

File = Annotated[str, typer.Argument(metavar="FILE", help="A policy in TOML; - for standard input.")]

app = new_noun("policy", "Rules that the pool follows by itself.")


@verb(app, "show")
@table
def show(
    context: typer.Context,
    *,
    effective: Annotated[
        str | None, typer.Option("--effective", metavar="VOL", help="What holds for a volume, and where it is said.")
    ] = None,
    style: output.TableStyle,
) -> None:
    """Print the policy as it was set."""
    document = call(context, "policy.show", effective=effective)
    if style.json or effective is None:
        _print_text(document, style.json)
        return
    for row in document["effective"]:
        row["value"] = json.dumps(row["value"])
    output.print_list(document, "effective", _EFFECTIVE, style)


def _print_text(document: Document, as_json: bool) -> None:
    if as_json:
        output.print_json(document)
    else:
        output.write(document["policy"]["text"])


@verb(app, "set")
def set_(context: typer.Context, file: File, as_json: Json = False) -> None:
    """Let another policy rule from now on; one with an error, or a hook that is not there, is refused.

    Scrubs and moves that are new begin when they are due next, not at once.
    """
    text = _read(file)
    parse_policy(text)
    document = call(context, "policy.set", text=text)
    if as_json:
        output.print_json(document)
    else:
        output.write_lines(f"{first['task']}: first at {first['due']}" for first in document["first_runs"])


@verb(app, "check")
def check(file: File, as_json: Json = False) -> None:
    """Look for errors in a policy; needs no pool."""
    found = parse_policy(_read(file))
    if as_json:
        names = {"templates": list(found.templates), "volumes": [section.name for section in found.volumes]}
        output.print_json({"check": {"is_valid": True, **names}})


@verb(app, "run")
@table
def run(
    context: typer.Context,
    *,
    dry_run: Annotated[bool, typer.Option("-n", "--dry-run", help="Change nothing; say what is due, and why.")] = False,
    hooks: Annotated[bool, typer.Option("--hooks", help="Run the programs that the policy names.")] = False,
    style: output.TableStyle,
) -> None:
    """Do once what is due by the policy."""
    document = call(context, "policy.run", dry_run=dry_run, hooks=hooks)
    done: dict[str, Any] = document["run"]
    for note in done["notes"]:
        typer.echo(f"incfs: {note}", err=True)
    if style.json:
        output.print_json(document)
    elif done["actions"]:
        output.print_list(done, "actions", _ACTIONS, style)
    for item in done["actions"]:
        for error in [item.get("error"), *(refused["error"] for refused in item.get("refused", ()))]:
            if error and not style.json:
                typer.echo(f"incfs: {item['subject']}: {error}", err=True)
    if any(item["result"] not in {"done", "planned"} for item in done["actions"]):
        raise typer.Exit(EXIT_SKIPPED)


@verb(app, "explain")
@table
def explain(
    context: typer.Context,
    volume: Annotated[str, typer.Argument(metavar="VOL", help="A volume: its name, or uuid:UUID.")],
    *,
    style: output.TableStyle,
) -> None:
    """Tell for each snapshot of a volume whether it stays, and why."""
    document = call(context, "policy.explain", volume=volume)
    output.print_list(document, "snapshots", _EXPLAINED, style)
    for note in document["notes"] if not style.json else ():
        typer.echo(f"incfs: {note}", err=True)


def _read(name: str) -> str:
    try:
        data = sys.stdin.buffer.read(MAX_POLICY_BYTES + 1) if name == "-" else _read_file(Path(name))
        return data.decode()
    except OSError as error:
        raise BackingError(f"cannot read the policy {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidPolicy(f"the policy is not UTF-8: {error.reason} at byte {error.start}") from error


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_POLICY_BYTES + 1)
