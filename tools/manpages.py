"""Man pages, made from the command tree: ``python tools/manpages.py DIR``, as ``make man`` does.

One page for ``incfs`` and one for each noun or command, ``incfs-volume.1``.  What they say is what ``--help`` says.
(``click-man`` does this for click; typer brings a click of its own, which it does not know.)
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import incfs
from incfs.cli import app

FOOTER = """.SH EXIT STATUS
0 done; 1 failed; 2 usage or configuration; 3 finished but some items were skipped; 4 damage; 5 leaks only;
10 not found; 11 locked, busy or held; 12 base mismatch or target changed; 13 no space or over quota;
14 stream corrupt, truncated or token stale; 128+N ended by signal N.
.SH ENVIRONMENT
.TP
.B INCFS_POOL
The pool, when
.B \\-p
names none.
"""


def pages() -> dict[str, str]:
    """Make all pages: file name -> text."""
    root: Any = typer.main.get_command(app)
    context = root.context_class(root, info_name="incfs")
    made = {"incfs.1": _root_page(root, context)}
    for name, command in _listed(root, context):
        made[f"incfs-{name}.1"] = _page(name, command, context)
    return made


def _listed(group: Any, context: Any) -> list[tuple[str, Any]]:
    found = ((name, group.get_command(context, name)) for name in group.list_commands(context))
    return [(name, command) for name, command in found if not command.hidden]


def _root_page(root: Any, context: Any) -> str:
    lines = [*_head("incfs", root), *_synopsis(root, context), *_options(root, context), ".SH COMMANDS"]
    for name, command in _listed(root, context):
        lines += [".TP", f".BR incfs\\-{name} (1)", _text(_first_line(command))]
    return "\n".join(lines) + "\n" + FOOTER


def _page(name: str, command: Any, parent: Any) -> str:
    context = command.context_class(command, info_name=name, parent=parent)
    lines = [*_head(f"incfs-{name}", command), *_synopsis(command, context)]
    if hasattr(command, "list_commands"):
        lines.append(".SH VERBS")
        for verb, inner in _listed(command, context):
            inside = inner.context_class(inner, info_name=verb, parent=context)
            usage = " ".join([verb, *inner.collect_usage_pieces(inside)])
            lines += [f".SS {_text(usage)}", *_paragraphs(inner.help or ""), *_records(inner, inside)]
    else:
        lines += _options(command, context)
    return "\n".join(lines) + "\n" + FOOTER + ".SH SEE ALSO\n.BR incfs (1)\n"


def _head(name: str, command: Any) -> Iterator[str]:
    yield f'.TH {_text(name.upper())} 1 "" "incfs {incfs.__version__}" "incfs"'
    yield from (".SH NAME", f"{_text(name)} \\- {_text(_first_line(command).rstrip('.'))}")


def _synopsis(command: Any, context: Any) -> Iterator[str]:
    yield ".SH SYNOPSIS"
    yield f".B {_text(context.command_path)}"
    yield _text(" ".join(command.collect_usage_pieces(context)))
    yield ".SH DESCRIPTION"
    yield from _paragraphs(command.help or "")


def _options(command: Any, context: Any) -> list[str]:
    return [".SH ARGUMENTS AND OPTIONS", *_records(command, context)]


def _records(command: Any, context: Any) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield from (".TP", f".B {_text(record[0])}", _text(record[1] or "See above."))


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(text.strip().split("\n\n")):
        if number:
            yield ".PP"
        yield _text(" ".join(paragraph.split()))


def _first_line(command: Any) -> str:
    return (command.help or "").strip().splitlines()[0]


def _text(text: str) -> str:
    """Escape what roff would take for something else."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + escaped if escaped.startswith((".", "'")) else escaped


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for file_name, content in pages().items():
        (target / file_name).write_text(content)
