"""``incfs stream``: info, verify, merge, token, apply.  Works on streams, without a pool."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from incfs.cli import output
from incfs.cli.options import Json, new_noun, table, verb
from incfs.cli.pipes import open_input, require_stream_output, write_stream
from incfs.documents import Document
from incfs.errors import StreamTruncated, UsageError
from incfs.rawfile import RawFile
from incfs.stream.encoder import DEFAULT_LEVEL, StreamEncoder
from incfs.stream.merge import merge, read_records
from incfs.stream.reader import StreamReader
from incfs.stream.records import Record, SnapBegin, SnapEnd, StreamBegin
from incfs.stream.token import encode_token
from incfs.units import format_time

_COLUMNS: Final = ("name", "uuid", "size_bytes", "data_bytes", "zero_bytes", "created")

Source = Annotated[str, typer.Argument(metavar="[STREAM]", help="A file that holds a stream; - is stdin.")]

app = new_noun("stream", "Send streams: look at them, prove them, join them, without a pool.")


@verb(app, "info")
@table
def info(
    source: Source = "-",
    *,
    style: output.TableStyle,
) -> None:
    """List the snapshots that a stream carries; reads and proves all of it."""
    output.print_list(_summary(source), "snapshots", _COLUMNS, style)


@verb(app, "verify")
def verify(source: Source = "-", as_json: Json = False) -> None:
    """Prove a stream: every checksum, count and digest, and that it is whole."""
    document = _summary(source)
    if as_json:
        output.print_json({"snapshot_count": len(document["snapshots"]), "is_whole": True})


@verb(app, "token")
def token(source: Source = "-", as_json: Json = False) -> None:
    """Print the token with which `incfs send --token` goes on where a cut-off stream ends."""
    reader = StreamReader()
    with open_input(source) as read:
        while data := read():
            for _ in reader.feed(data):
                pass
    if reader.has_ended:
        raise UsageError("the stream is whole: nothing is left to send")
    if reader.position is None:
        raise StreamTruncated("the stream ends before it says what it carries; send it again from the start")
    text = encode_token(reader.position)
    if as_json:
        output.print_json({"token": text})
    else:
        output.write_lines([text])


@verb(app, "merge")
def merge_(
    first: Annotated[str, typer.Argument(metavar="A", help="A stream of one step (send -i).")],
    others: Annotated[list[str], typer.Argument(metavar="B...", help="Those that follow it.")],
    level: Annotated[int, typer.Option("--level", min=0, max=19, help="Of zstd; 0: none.")] = DEFAULT_LEVEL,
) -> None:
    """Write one stream that leads from the start of the first to the end of the last."""
    require_stream_output()
    with open_input(first) as read:
        _merge_into_stdout(read, others, level)


def _merge_into_stdout(read: Callable[[], bytes], others: list[str], level: int) -> None:
    with open_input(others[0]) as read_next:
        is_last = len(others) == 1
        encoder = StreamEncoder(level=level if is_last else 0)
        merged = merge(read_records(read), read_records(read_next), encoder)
        if is_last:
            for data in merged:
                write_stream(data)
        else:
            _merge_into_stdout(lambda: next(merged, b""), others[1:], level)


@verb(app, "apply")
def apply(
    target: Annotated[Path, typer.Argument(metavar="FILE", help="An image of the volume; made when it is missing.")],
    source: Source = "-",
    *,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="UUID", help="The snapshot that FILE is known to hold, when no note says it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring a plain file to the snapshot that a stream leads to; FILE.incfs notes which it holds."""
    with open_input(source) as read:
        file = RawFile(target, base=base)
        try:
            file.apply(read_records(read))
        finally:
            file.close()
    if as_json:
        output.print_json({"snapshot": file.note.snapshot, "applied": file.applied})


def _summary(source: str) -> Document:
    with open_input(source) as read:
        return summarize(read_records(read))


def summarize(records: Iterator[Record]) -> Document:
    """Say what a whole stream carries."""
    begin = next(records, None)
    if not isinstance(begin, StreamBegin):
        raise StreamTruncated("the stream is empty")
    found: list[Document] = []
    snap: SnapBegin | None = None
    for record in records:
        if isinstance(record, SnapBegin):
            snap = record
        elif isinstance(record, SnapEnd) and snap is not None:
            found.append(_snapshot(begin, snap, record))
    return {
        "volumes": [{"name": member.name, "uuid": member.uuid} for member in begin.members],
        "step_count": len(begin.steps),
        "snapshots": found,
    }


def _snapshot(begin: StreamBegin, snap: SnapBegin, end: SnapEnd) -> dict[str, Any]:
    return {
        "name": f"{begin.members[snap.link.member].name}@{snap.name}",
        "uuid": snap.link.uuid,
        "base": snap.link.base,
        "created": format_time(snap.created_ns),
        "size_bytes": snap.size_bytes,
        "block_bytes": snap.block_bytes,
        "start_bytes": snap.start_bytes,
        "write_count": end.write_count,
        "zero_count": end.zero_count,
        "data_bytes": end.data_bytes,
        "zero_bytes": end.zero_bytes,
        "digest": end.digest.hex(),
    }
