"""A pool made anew from a dump: ``pool restore``.

Nothing in the dump is trusted (I11): lines are capped, its end is proved, each value is looked at
here or by the ``MetadataBuilder``.  What it names outside of the pool holds only with somebody's ``Consent``.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import IO, Any

from incfs.backing import Backing, translate
from incfs.builder import MetadataBuilder
from incfs.catalog import KINDS, Record, record_from
from incfs.codec import Entries, decode_trail
from incfs.consent import Claim, Consent, admit, claims
from incfs.dump import DUMP_VERSION
from incfs.errors import AlreadyExists, FormatError, NamesOutside, UnsupportedFormat, UsageError
from incfs.model import HOLE, PAGE_BLOCKS, Storage
from incfs.overlay import TableKey
from incfs.superblock import FORMAT_VERSION, SUPERBLOCK_NAME, Superblock, decode_fields
from incfs.validation import validate

MAX_LINE_BYTES = 1 << 20
MAX_JOURNAL_BYTES = 1 << 30
_GZIP_MAGIC = b"\x1f\x8b"


@contextmanager
def open_dump(path: Path) -> Iterator[Iterator[bytes]]:
    """Give the lines of a dump file, decompressed if need be.

    Raises:
        FormatError: A line is too long, or the compression is damaged.
        BackingError: The file cannot be read.
    """
    try:
        plain = path.open("rb")
    except OSError as error:
        raise translate(error, path, "open") from error
    with closing(plain):
        is_packed = plain.read(2) == _GZIP_MAGIC
        plain.seek(0)
        yield _lines(gzip.GzipFile(fileobj=plain) if is_packed else plain, path)


def _lines(stream: "IO[bytes] | gzip.GzipFile", path: Path) -> Iterator[bytes]:
    try:
        while line := stream.readline(MAX_LINE_BYTES):
            if not line.endswith(b"\n"):
                raise FormatError(f"{path}: a line is longer than {MAX_LINE_BYTES} bytes, or cut off")
            yield line
    except (EOFError, gzip.BadGzipFile) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise translate(error, path, "read") from error
    except Exception as error:
        if type(error).__module__ == "zlib":
            raise FormatError(f"{path} is damaged: {error}") from error
        raise


@dataclass(frozen=True, slots=True)
class Named:
    """What a dump names of the host."""

    claims: tuple[Claim, ...]
    """What needs somebody's agreement, each once."""
    images: tuple[tuple[int, str], ...]
    """(storage volume, path) of each image and leg."""


def names(lines: Iterable[bytes]) -> Named:
    """List what a dump names of the host, without opening any of it.

    Raises:
        FormatError, UnsupportedFormat: As ``restore``; only the records are read, not the pages behind them.
    """
    documents = _checked_documents(lines)
    _read_head(next(documents, {}))
    records, _ = _take_records(documents)
    images = [(record.id, path) for record in records if isinstance(record, Storage) for path in record.leg_paths]
    return Named(tuple(_claims_of(records)), tuple(images))


def _claims_of(records: Sequence[Record]) -> dict[Claim, None]:
    return {claim: None for record in records for claim in claims(record)}


def _take_records(documents: Iterator[Any]) -> tuple[list[Record], Any]:
    """Read the records, which come first, and the document behind them; None at the end."""
    records: list[Record] = []
    for document in documents:
        match document:
            case {"record": str(kind), "value": dict(value)} if kind in KINDS:
                records.append(record_from(kind, _from_text(value)))
            case _:
                return records, document
    return records, None


def restore(
    lines: Iterable[bytes],
    directory: Path,
    *,
    images: Mapping[int, Path] | None = None,
    consent: Consent | None = None,
    leaves_out: bool = False,
    backing: Backing | None = None,
) -> dict[str, Any]:
    """Make a pool's metadata in ``directory`` from a dump, over the images that exist.

    Args:
        lines: Of the dump.
        directory: Where the pool directory shall be; empty.
        images: Where images are now.
        consent: What of the things that it names outside of the pool may hold.
        leaves_out: Go on without the others.
        backing: The host's files, unless a test brings its own.

    Durability: durable on return.
    Atomicity: until the superblock is written, last, the directory is not a pool.

    Returns:
        Facts: uuid, the dump's time and sequence, how many volumes and snapshots, what was left out.

    Raises:
        FormatError: The dump is damaged, cut off or impossible.
        UnsupportedFormat: A newer incfs wrote it.
        NamesOutside: It names what nobody agreed to.
        AlreadyExists: The directory is not empty.
        ImageMismatch: An image is missing, too short or another one.
        UsageError: Something was agreed to that it does not name.
    """
    if (directory / SUPERBLOCK_NAME).exists():
        raise AlreadyExists(f"{directory} is a pool already", path=str(directory))
    documents = _checked_documents(lines)
    head: dict[str, Any] = next(documents, {})
    superblock, last_volume = _read_head(head)
    records, behind = _take_records(documents)
    for record in records:
        validate(record, superblock.block_bytes)  # as they came: what is left out must be sound, too
    consent = consent or Consent()
    left_out = _require_consent(records, consent, images or {}, leaves_out=leaves_out)
    builder = MetadataBuilder(superblock, directory, images or {}, backing or Backing())
    try:
        for record in records:
            builder.add_record(admit(record, consent, directory))
        for document in documents if behind is None else chain((behind,), documents):
            _add_page(builder, document)
    except BaseException:
        builder.abandon()
        raise
    builder.finish(last_volume=last_volume)
    volumes = [volume for volume in builder.catalog.volumes.values() if volume.name]
    return {
        "directory": str(directory),
        "uuid": superblock.uuid,
        "dump_created_ns": head["created_ns"],
        "dump_sequence": head["sequence"],
        "volume_count": len(volumes),
        "snapshot_count": sum(len(builder.catalog.snapshots(volume.id)) for volume in volumes),
        "left_out": [claim.what for claim in left_out],
    }


def _require_consent(
    records: Sequence[Record], consent: Consent, images: Mapping[int, Path], *, leaves_out: bool
) -> list[Claim]:
    """Refuse what nobody agreed to, and agreements to what is not there; give what is left out."""
    found = _claims_of(records)
    unknown = set(images) - {record.id for record in records if isinstance(record, Storage)}
    if unknown:
        raise UsageError(f"the dump has no storage volume {min(unknown)}")
    unused = [f"{option} {value}" for option, value in consent.others - {(c.option, c.value) for c in found}]
    unused += [f"a baseline of {name}" for name in consent.baselines.keys() - {c.subject for c in found}]
    if unused:
        raise UsageError(f"the dump does not name {min(unused)}")
    refused = [claim for claim in found if not consent.covers(claim)]
    if refused and not leaves_out:
        raise NamesOutside(
            f"the dump names what is outside of its pool: {'; '.join(map(str, refused))}. Say the option of each "
            f"that you want to hold, and --leave-out to do without the others",
            claims=[claim.what for claim in refused],
        )
    return refused


def _checked_documents(lines: Iterable[bytes]) -> Iterator[Any]:
    """Yield the documents before the end, and prove the end."""
    digest = blake2b(digest_size=16)
    counts = {"records": 0, "pages": 0}
    stream = iter(lines)
    for number, line in enumerate(stream, 1):
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"line {number} of the dump is not JSON") from error
        if not isinstance(document, dict):
            raise FormatError(f"line {number} of the dump is not a document")
        if "end" in document:
            if document["end"] != {**counts, "digest": digest.hexdigest()} or next(stream, None) is not None:
                raise FormatError("the dump is damaged: its end does not match what came before")
            return
        digest.update(line)
        counts["records"] += "record" in document
        counts["pages"] += "page" in document or "trail" in document
        yield document
    raise FormatError("the dump is cut off: it has no end")


def _read_head(head: Any) -> tuple[Superblock, int]:
    match head:
        case {"dump": int(version), "format": int(written), "pool": dict(fields), "last_volume": int(last_volume),
              "created_ns": int(_), "sequence": int(_)}:  # fmt: skip
            pass
        case _:
            raise FormatError("this is no dump of an incfs pool")
    if version > DUMP_VERSION or written > FORMAT_VERSION:
        raise UnsupportedFormat(f"the dump has version {version} of format {written}; use a newer incfs")
    superblock = decode_fields(json.dumps(fields).encode(), Path("the dump's header"))
    if not (65536 <= superblock.journal_bytes <= MAX_JOURNAL_BYTES) or superblock.journal_bytes % 4096:
        raise FormatError(f"the dump has a journal size of {superblock.journal_bytes} bytes")
    if not 0 <= last_volume < 1 << 32:
        raise FormatError(f"the dump has a last volume id of {last_volume}")
    return superblock, last_volume


def _add_page(builder: MetadataBuilder, document: Any) -> None:
    match document:
        case {"page": [int(volume), int(generation), int(page_index)], "runs": list(runs)}:
            builder.add_page(TableKey(volume, generation), page_index, _entries(runs))
        case {"trail": [int(volume), int(generation), int(page_index)], "blocks": str(blocks)}:
            builder.add_page(TableKey(volume, generation, is_trail=True), page_index, _noted(blocks))
        case _:
            raise FormatError(f"the dump has an unknown document, or a record behind its pages: {str(document)[:80]}")


def _from_text(value: dict[str, Any]) -> dict[str, Any]:
    xattrs = value.get("xattrs")
    if not isinstance(xattrs, dict):
        return value
    try:
        return {**value, "xattrs": {name: bytes.fromhex(content) for name, content in xattrs.items()}}
    except (TypeError, ValueError) as error:
        raise FormatError("the dump has an extended attribute that is not hexadecimal") from error


def _noted(blocks: str) -> Entries:
    try:
        return decode_trail(bytes.fromhex(blocks))
    except ValueError as error:
        raise FormatError("the dump has blocks of a trail that are not hexadecimal") from error


def _entries(runs: list[Any]) -> Entries:
    entries: Entries = {}
    for run in runs:
        match run:
            case [int(first), int(count), int(address), str(crcs)]:
                pass
            case _:
                raise FormatError(f"the dump has a run that is none: {str(run)[:80]}")
        stored = address > HOLE
        if first < 0 or not 0 < count <= PAGE_BLOCKS - first or not 0 <= address < 1 << 64:
            raise FormatError(f"the dump has a run out of range: {str(run)[:80]}")
        try:
            checksums = bytes.fromhex(crcs)
        except ValueError as error:
            raise FormatError("the dump has checksums that are not hexadecimal") from error
        if len(checksums) != (4 * count if stored else 0):
            raise FormatError("the dump has a run with the wrong number of checksums")
        for i in range(count):
            if first + i in entries:
                raise FormatError("the dump has a page with two mappings of one block")
            crc = int.from_bytes(checksums[4 * i : 4 * i + 4], "big") if stored else 0
            entries[first + i] = (address + i if stored else address, crc)
    return entries
