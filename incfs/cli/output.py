"""What a command prints: a JSON document, a table, facts, or lines.  Data only, on stdout."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from incfs.documents import Document
from incfs.errors import BackingError, UsageError
from incfs.units import format_size

OUTPUT_VERSION: Final = 1
_SIZE_SUFFIX: Final = "_bytes"
_COUNT_SUFFIX: Final = "_count"
_TIMES: Final = frozenset({"created", "modified", "changed", "accessed", "expires", "since", "ends"})
_NUMBERS: Final = ("_bytes", "_count", "id", "generation", "offset", "length", "block")


@dataclass(frozen=True, slots=True)
class TableStyle:
    """How the user asked for a list."""

    json: bool
    no_header: bool
    exact: bool
    columns: str | None


def shown(text: str) -> str:
    """Give a text without what a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_json(document: Document) -> None:
    """Print one document with its version."""
    write(json.dumps({"output_version": OUTPUT_VERSION, **document}, indent=2, default=_plain) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def print_list(
    document: Document, key: str, columns: Sequence[str], style: TableStyle, *, further: Sequence[str] = ()
) -> None:
    """Print ``document[key]``, a list of rows, as the user asked.

    Args:
        document: What the pool answered.
        key: Where in it the rows are.
        columns: The keys that are shown unless others are asked for.
        style: What the user asked for.
        further: The other keys, for a list without rows.
    """
    if style.json:
        print_json(document)
        return
    rows: list[Document] = document[key]
    chosen = _choose_columns(list(rows[0]) if rows else [*columns, *further], columns, style.columns)
    cells = [[_cell(column, row.get(column), exact=style.exact) for column in chosen] for row in rows]
    header = [] if style.no_header else [_title(column) for column in chosen]
    if style.no_header:
        write_lines("\t".join(row) for row in cells)
    elif sys.stdout.isatty():
        _write_rich_table(header, cells, chosen)
    else:
        _write_plain_table(header, cells, chosen)


def _title(key: str) -> str:
    if key.endswith(_COUNT_SUFFIX):
        return key.removesuffix(_COUNT_SUFFIX).upper() + "S"
    return key.removesuffix(_SIZE_SUFFIX).upper()


def _choose_columns(known: Sequence[str], columns: Sequence[str], wanted: str | None) -> Sequence[str]:
    """Return the keys of the columns to show; ``size`` may be written for ``size_bytes``."""
    if wanted is None:
        return columns
    chosen = []
    for name in wanted.split(","):
        key = next((k for k in (name, name + _SIZE_SUFFIX) if k in known), None)
        if key is None:
            raise UsageError(f"no column {name!r}; there are: {', '.join(known)}")
        chosen.append(key)
    return chosen


def _cell(key: str, value: object, *, exact: bool) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and key.endswith(_SIZE_SUFFIX) and not exact:
        return format_size(value)
    if isinstance(value, str) and key in _TIMES and not exact:
        return value.partition(".")[0] + "Z"
    return _nested(key, value, exact=exact)


def _nested(key: str, value: object, *, exact: bool) -> str:
    if isinstance(value, list):
        return ",".join(_cell(key, item, exact=exact) for item in value) or "-"
    if isinstance(value, dict):
        return " ".join(f"{name}={_cell(name, item, exact=exact)}" for name, item in value.items()) or "-"
    return str(value)


def _is_number(key: str) -> bool:
    return key.endswith(_NUMBERS)


def _write_plain_table(header: list[str], cells: list[list[str]], keys: Sequence[str]) -> None:
    table = [header, *cells]
    widths = [max(len(row[column]) for row in table) for column in range(len(keys))]
    right = [_is_number(key) for key in keys]
    write_lines(
        "  ".join(
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in table
    )


def _write_rich_table(header: list[str], cells: list[list[str]], keys: Sequence[str]) -> None:
    from rich.console import Console  # late: scripts never need it
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, key in zip(header, keys, strict=True):
        table.add_column(title, justify="right" if _is_number(key) else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(text) for text in row))
    Console(highlight=False).print(table)


def print_facts(document: Document, key: str, *, as_json: bool) -> None:
    """Print ``document[key]``, the facts of one thing, one per line."""
    if as_json:
        print_json(document)
        return
    facts: Document = document[key]
    lines = {name.removesuffix(_SIZE_SUFFIX): _fact(name, value) for name, value in _flat(facts)}
    width = max(map(len, lines), default=0)
    write_lines(f"{name.ljust(width)}  {text}" for name, text in lines.items())


def _flat(facts: Document, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _fact(key: str, value: object) -> str:
    text = _cell(key, value, exact=False)
    if isinstance(value, int) and key.endswith(_SIZE_SUFFIX) and value >= 1024:
        return f"{text} ({value} bytes)"
    return text


def print_move(document: Document, *, as_json: bool) -> None:
    """Print what a move, or a copy, came to, or would come to."""
    plan: Document | None = document.get("plan")
    if as_json:
        print_json(document)
    elif plan is None:
        print_facts(document, "move", as_json=False)
    else:
        word, size_bytes = ("move", plan["moved_bytes"]) if "moved_bytes" in plan else ("copy", plan["copied_bytes"])
        write(f"would {word} {format_size(size_bytes)} ({size_bytes} bytes): {plan['reason']}\n")


def print_removal(document: Document, *, as_json: bool) -> None:
    """Print what a removal would free; a real one is silent but in JSON."""
    removal: Document = document["removal"]
    if as_json:
        print_json(document)
    elif removal["dry_run"]:
        for item in removal["items"]:
            size = format_size(item["freed_bytes"])
            write(f"would remove {item['name']}: {size}, {item['reason']}\n")
        write(f"would free {format_size(removal['freed_bytes'])}\n")


def print_records(records: Iterable[Document]) -> None:
    """Print records as lines of ``key=value``."""
    write_lines(" ".join(f"{key}={_record_value(value)}" for key, value in r.items()) for r in records)


def _record_value(value: object) -> str:
    if isinstance(value, str) and value and value.isprintable() and " " not in value:
        return value
    return json.dumps(value, default=_plain, separators=(",", ":"))


def write_lines(lines: Iterable[str]) -> None:
    """Write each line to stdout."""
    write("".join(line + "\n" for line in lines))


def write(text: str) -> None:
    """Write text to stdout.

    Raises:
        BackingError: Stdout cannot take it.
        SystemExit: Its reader has gone: 128 + SIGPIPE, as other commands end.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
        sys.exit(141)
    except OSError as error:
        discard_stdout()
        raise BackingError(f"cannot write the output: {error.strerror}") from error


def discard_stdout() -> None:
    """Keep the interpreter from failing again when it flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
