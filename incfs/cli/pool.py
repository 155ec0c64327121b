"""``incfs pool``: create, show, check, dump, restore, repair."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from incfs.cli import output
from incfs.cli.options import DryMove, Json, Rate, new_noun, pool_directory, table, verb
from incfs.cli.progress import ProgressDisplay
from incfs.cli.session import call
from incfs.errors import UsageError
from incfs.model import DEFAULT_BLOCK_BYTES
from incfs.units import parse_size

if TYPE_CHECKING:
    from incfs.restore import Named

MIN_POOL_BLOCK_BYTES: Final = 512
"""Smaller blocks are for the core's own tests: their metadata outgrows the data."""
EXIT_SKIPPED: Final = 3
EXIT_DAMAGE: Final = 4
EXIT_LEAKS: Final = 5
_COPY_COLUMNS: Final = ("copy", "path", "state", "reason")
_JOB_COLUMNS: Final = ("number", "job", "subject", "percent", "since", "rate_bytes", "ends")
_JOB_FURTHER: Final = ("done_bytes", "total_bytes")

app = new_noun("pool", "Pools.")


@verb(app, "create")
def create(
    places: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="Where the pool shall be; several with --mirror.")
    ],
    *,
    mirror: Annotated[
        bool,
        typer.Option("--mirror", help="Metadata in each DIR, and a first storage volume mirrored over all of them."),
    ] = False,
    metadata_mirrors: Annotated[
        list[Path] | None,
        typer.Option("--metadata-mirror", metavar="DIR", help="Another directory for the metadata; repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also with copies on one filesystem.")] = False,
    block_size: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="A power of two from 512 to 64K.", show_default="4K"),
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(parser=parse_size, metavar="SIZE", help="Most that it may store.")
    ] = None,
    directories: Annotated[
        list[Path] | None,
        typer.Option("--dir", metavar="PATH", help="A directory for an image file; repeatable."),
    ] = None,
    journal_size: Annotated[
        int | None, typer.Option(parser=parse_size, metavar="SIZE", help="Size of a journal file.", show_default="16M")
    ] = None,
    as_json: Json = False,
) -> None:
    """Create an empty pool in DIR."""
    # Late: other commands may need only the daemon.
    from incfs.recovery import DEFAULT_JOURNAL_BYTES, create_mirrored_pool, create_pool

    block_bytes = DEFAULT_BLOCK_BYTES if block_size is None else block_size
    if block_bytes < MIN_POOL_BLOCK_BYTES:
        raise UsageError(f"a block has at least {MIN_POOL_BLOCK_BYTES} bytes, not {block_bytes}")
    directory, *others = (path.absolute() for path in places)
    if mirror != bool(others):
        raise UsageError("--mirror takes two to four directories; without it a pool is in one")
    if mirror and (metadata_mirrors or directories):
        raise UsageError("--mirror says where metadata and images go; --metadata-mirror and --dir do not go with it")
    options: dict[str, Any] = {
        "block_bytes": block_bytes,
        "capacity_bytes": capacity,
        "directories": [path.absolute() for path in directories or []],
        "journal_bytes": DEFAULT_JOURNAL_BYTES if journal_size is None else journal_size,
    }
    others += [path.absolute() for path in metadata_mirrors or []]
    if others:
        create_mirrored_pool(directory, metadata_mirrors=others, with_images=mirror, force=force, **options)
    else:
        create_pool(directory, **options)
    if as_json:
        facts = {
            "directory": str(directory),
            "block_bytes": block_bytes,
            "metadata": [str(directory), *map(str, others)],
        }
        output.print_json({"pool": facts})


metadata_app = new_noun("metadata", "The directories that hold the pool's metadata.")
app.add_typer(metadata_app)


@verb(metadata_app, "list", "ls")
@table
def metadata_list(context: typer.Context, *, style: output.TableStyle) -> None:
    """List the copies of the metadata, and why one is not up to date."""
    output.print_list(call(context, "pool.metadata.list"), "copies", _COPY_COLUMNS, style)


@verb(metadata_app, "add")
def metadata_add(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory on another disk.")],
    *,
    force: Annotated[bool, typer.Option("--force", help="Also on the filesystem of another copy.")] = False,
) -> None:
    """Keep the metadata in DIR, too; or bring the copy that is there up to date."""
    call(context, "pool.metadata.add", path=str(directory.absolute()), force=force)


@verb(metadata_app, "remove", "rm")
def metadata_remove(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="One of the directories, also one that is lost.")],
) -> None:
    """Keep the metadata in DIR no more."""
    call(context, "pool.metadata.remove", path=str(directory.absolute()))


@verb(app, "show")
def show(context: typer.Context, as_json: Json = False) -> None:
    """Show how the pool is, and its facts: sizes, usage, format, state."""
    document = call(context, "pool.show")
    if not as_json:
        output.write_lines([f"health: {output.shown(document['pool'].pop('health')['line'])}"])
    output.print_facts(document, "pool", as_json=as_json)


@verb(app, "status")
def status(context: typer.Context, as_json: Json = False) -> None:
    """Say in one line how the pool is, for monitoring.

    Exit code 0: sound. 4: degraded. 13: full. 1: read-only.
    """
    document = call(context, "pool.status")
    if as_json:
        output.print_json(document)
    else:
        output.write_lines([f"health: {output.shown(document['health']['line'])}"])
    raise typer.Exit(document["health"]["exit_code"])


@verb(app, "check")
def check(
    context: typer.Context,
    data: Annotated[bool, typer.Option("--data", help="Read every stored block and verify its checksum, too.")] = False,
    as_json: Json = False,
) -> None:
    """Prove that each block has exactly one owner or is free.

    Exit code 4: damage. 5: nothing worse than blocks that no one owns. 0: clean.
    """
    document = call(context, "pool.check", data=data)
    report: dict[str, Any] = document["check"]
    if as_json:
        output.print_json(document)
    else:
        output.write_lines(f"{p['kind']}: {p['where']}: {p['message']}" for p in report["problems"])
        output.write_lines([_verdict(report)])
    if report["is_damaged"]:
        raise typer.Exit(EXIT_DAMAGE)
    if not report["is_clean"]:
        raise typer.Exit(EXIT_LEAKS)


@verb(app, "dump")
def dump(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Where to; compressed if named .gz.")] = None,
) -> None:
    """Write the pool's metadata as text, to FILE or to stdout.

    With it `pool restore` can make a lost or damaged pool directory again, over the images that exist.
    """
    if file is not None:
        call(context, "pool.dump", path=str(file.absolute()))
        return
    with tempfile.TemporaryDirectory(prefix="incfs-dump-") as directory:
        path = Path(directory) / "dump"
        call(context, "pool.dump", path=str(path))
        with path.open(encoding="ascii") as lines:
            for line in lines:
                output.write(line)


Images = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="ID=PATH", help="Where a storage volume's image is now; repeatable."),
]


def _repeatable(option: str, metavar: str, text: str) -> Any:
    return typer.Option(option, metavar=metavar, help=f"{text}; repeatable.")


@verb(app, "restore")
def restore(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the pool directory shall be; empty.")],
    *,
    source: Annotated[Path, typer.Option("--from", metavar="DUMP", help="A dump, or a copy found beside an image.")],
    images: Images = None,
    baselines: Annotated[
        list[str] | None, _repeatable("--baseline", "VOL=PATH", "The raw image that a volume lies over")
    ] = None,
    targets: Annotated[
        list[str] | None, _repeatable("--target", "TARGET", "A replica or the policy may send there")
    ] = None,
    programs: Annotated[
        list[str] | None, _repeatable("--program", "PROGRAM", "A replica may run this on its host")
    ] = None,
    hooks: Annotated[
        list[str] | None, _repeatable("--hook", "COMMAND", "The policy may run this around snapshots")
    ] = None,
    directories: Annotated[
        list[str] | None, _repeatable("--directory", "PATH", "The policy may make images there")
    ] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Do without what the dump names and none of these options does.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("-n", "--dry-run", help="Make nothing; list what the dump names of this host.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a pool directory from a dump, over the images that exist; they are not written to.

    What was written after the dump is not in it: such ranges read as they were, or as errors, never as wrong data.
    What it names outside of the pool holds only if you say so, item by item.
    """
    from incfs import restore as restores  # late: other commands may need only the daemon
    from incfs.consent import Consent

    if dry_run:
        with restores.open_dump(source) as lines:
            _print_names(restores.names(lines), as_json=as_json)
        return
    chosen = {"--target": targets, "--program": programs, "--hook": hooks, "--directory": directories}
    agreed = Consent(
        _parse_baselines(baselines),
        frozenset((option, value) for option, values in chosen.items() for value in values or ()),
    )
    with restores.open_dump(source) as lines:
        facts = restores.restore(
            lines, directory.absolute(), images=parse_images(images), consent=agreed, leaves_out=leave_out
        )
    if as_json:
        output.print_json({"restored": facts})
    else:
        output.write_lines(f"left out: {output.shown(what)}" for what in facts["left_out"])


def _print_names(named: "Named", *, as_json: bool) -> None:
    if as_json:
        claims = [{"what": c.what, "option": c.option, "value": c.value} for c in named.claims]
        images = [{"storage": number, "path": path} for number, path in named.images]
        output.print_json({"names": {"claims": claims, "images": images}})
        return
    output.write_lines(str(claim) for claim in named.claims)
    output.write_lines(output.shown(f"storage volume {number} is {path}") for number, path in named.images)


def _parse_baselines(values: list[str] | None) -> dict[str, Path]:
    found = {}
    for value in values or []:
        # A volume's name may hold "=", but no "/".
        name, mark, path = value.partition("=/") if "=/" in value else value.partition("=")
        if not (name and path):
            raise UsageError(f"--baseline takes VOL=PATH, not {value!r}")
        found[name] = Path(mark.removeprefix("=") + path).absolute()
    return found


@verb(app, "repair")
def repair(
    context: typer.Context,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="NEWDIR", help="Where the new pool shall be; empty.")],
    directories: Annotated[
        list[Path] | None,
        typer.Option("--dir", metavar="PATH", help="A directory for an image of the new pool; repeatable."),
    ] = None,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """Save what can be read of a damaged pool into a new one; the old one is not changed.

    Exit code 0: everything. 3: something is lost, and is listed.
    """
    from incfs import repair as repairs  # late: other commands may need only the daemon

    with ProgressDisplay() as progress:
        report = repairs.repair(
            pool_directory(context),
            to.absolute(),
            images=parse_images(images),
            directories=[path.absolute() for path in directories or []],
            progress=lambda done, total: progress(done, total, "bytes"),
        )
    if as_json:
        output.print_json({"repair": report.to_dict()})
    else:
        output.write_lines(
            f"lost: {loss.name}: {loss.length_bytes} bytes at {loss.offset_bytes}: {loss.reason}"
            for loss in report.losses
        )
        output.write_lines(f"lost: {note}" for note in report.notes)
        output.write_lines(
            f"saved: {item['name']}" + ("" if item["is_whole"] else ", but not whole") for item in report.saved
        )
    if not report.is_complete:
        raise typer.Exit(EXIT_SKIPPED)


def parse_images(values: list[str] | None) -> dict[int, Path]:
    """Return id -> path of options like ``2=/disks/b/pool.img``.

    Raises:
        UsageError: One is of another form.
    """
    found = {}
    for value in values or []:
        number, _, path = value.partition("=")
        if not (number.isascii() and number.isdigit() and path):
            raise UsageError(f"--image takes ID=PATH, not {value!r}")
        found[int(number)] = Path(path).absolute()
    return found


def _verdict(report: dict[str, Any]) -> str:
    found = (
        f"{report['volumes']} volumes, {report['snapshots']} snapshots, {report['mapped_blocks']} blocks in use, "
        f"{report['verified_blocks']} read and verified"
    )
    if report["is_damaged"]:
        return f"damaged: {len(report['problems'])} problems; {found}"
    if not report["is_clean"]:
        return f"leaks only: {report['leaked_blocks']} blocks have no owner; {found}"
    return f"clean: {found}"


@verb(app, "balance")
def balance(context: typer.Context, *, rate: Rate = None, dry_run: DryMove = False, as_json: Json = False) -> None:
    """Even out how full the storage volumes are; it may be interrupted."""
    output.print_move(call(context, "pool.balance", rate_bytes=rate, dry_run=dry_run), as_json=as_json)


@verb(app, "jobs")
@table
def jobs(
    context: typer.Context,
    *,
    stop: Annotated[int | None, typer.Option("--stop", metavar="N", help="Stop this one.")] = None,
    style: output.TableStyle,
) -> None:
    """List the long jobs that are under way: moves, resilvers, scrubs, flattening; how fast, and when they will end."""
    if stop is not None:
        call(context, "pool.stop", job=stop)
        return
    output.print_list(call(context, "pool.jobs"), "jobs", _JOB_COLUMNS, style, further=_JOB_FURTHER)


@verb(app, "scrub")
def scrub(
    context: typer.Context,
    *,
    rate: Rate = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, not where the last one was stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Verify every copy of every block on disk, and heal what can be; it may be interrupted."""
    document = call(context, "pool.scrub", rate_bytes=rate, restart=restart)
    output.print_facts(document, "scrub", as_json=as_json)
    if document["scrub"]["lost_blocks"]:
        raise typer.Exit(EXIT_DAMAGE)
