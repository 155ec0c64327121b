"""``incfs top``: what a mounted pool is doing, again and again."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any, Final

import trio
import typer

from incfs.cli import output
from incfs.cli.options import Json
from incfs.cli.session import Admin, run
from incfs.documents import Document
from incfs.units import format_size

_CLEAR: Final = "\x1b[H\x1b[2J"
_MOST_VOLUMES: Final = 20


def top_command(
    context: typer.Context,
    *,
    interval: Annotated[
        float, typer.Option("-d", "--delay", metavar="SECONDS", min=0.1, max=3600, help="Time between two looks.")
    ] = 2.0,
    count: Annotated[
        int | None, typer.Option("-n", "--count", metavar="N", min=1, help="End after N looks; without it, by Ctrl-C.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a pool is doing: requests a second, how long they take, who grows."""

    async def show(admin: Admin) -> None:
        before: Document | None = None
        shown = 0
        while count is None or shown < count:
            if shown or before is not None:
                await trio.sleep(interval)
            now = await admin.call("pool.activity")
            if before is None and not as_json:
                before = now  # rates need two looks
                continue
            if as_json:
                output.print_json(now)
            elif before is not None:
                output.write(_CLEAR if sys.stdout.isatty() else "")
                output.write_lines(_screen(before["activity"], now["activity"]))
            before = now
            shown += 1

    run(context, "pool.activity", show)


def _screen(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    seconds = max(1e-3, now["uptime_s"] - before["uptime_s"])
    pool = now["pool"]
    state = f"read-only: {pool['failure']}" if pool["read_only"] else "sound"
    yield (
        f"{format_size(pool['used_bytes'])} used, {format_size(pool['free_bytes'])} free of "
        f"{format_size(pool['capacity_bytes'])}, journal {format_size(pool['journal_used_bytes'])}; {state}"
    )
    yield ""
    yield f"{'OPERATION':<16}{'A SECOND':>10}{'MEAN':>12}"
    for name, done, spent_s in _rates(before["operations"], now["operations"]):
        yield f"{name:<16}{done / seconds:>10.1f}{spent_s / done * 1e3:>9.3f} ms"
    for name, value in sorted(now["data_plane"].items()):
        change = value - before["data_plane"].get(name, 0)
        if change:
            yield f"{name:<16}{change / seconds:>10.1f}"
    yield ""
    yield f"{'VOLUME':<32}{'MAPPED':>12}{'GROWS A SECOND':>16}"
    earlier = {row["uuid"]: row["mapped_bytes"] for row in before["volumes"]}
    grown = [(row["mapped_bytes"] - earlier.get(row["uuid"], 0), row) for row in now["volumes"]]
    for change, row in sorted(grown, key=lambda pair: (-abs(pair[0]), -pair[1]["mapped_bytes"]))[:_MOST_VOLUMES]:
        yield f"{row['name']:<32}{format_size(row['mapped_bytes']):>12}{format_size(int(change / seconds)):>16}"


def _rates(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, int, float]]:
    for name, counted in sorted(now.items()):
        earlier = before.get(name, {"count": 0, "sum_s": 0.0})
        if done := counted["count"] - earlier["count"]:
            yield name, done, counted["sum_s"] - earlier["sum_s"]
