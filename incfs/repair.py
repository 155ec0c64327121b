"""``pool repair --to``: saves what can be read of a damaged pool into a new one, never in place.

The damaged pool is only read: its metadata is copied and worked on in the new directory, its
images are opened read-only, and what a journal record would write into them stays in memory.
Each way of opening is tried after the ones that lose less.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import uuid as uuids
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from incfs import bookmarks, copies, extents, ranges, snapshot, volume
from incfs.backing import Backing, ReadingBacking, translate
from incfs.blocks import address_runs, pack_address, split_address
from incfs.builder import MetadataBuilder
from incfs.catalog import record_from
from incfs.codec import Entries, checksum, decode_entries, unpack
from incfs.errors import AlreadyExists, Damaged, FormatError, IncfsError, NotFound, PoolLocked
from incfs.image import read_header
from incfs.journal import journal_paths
from incfs.lock import LOCK_NAME
from incfs.metadata import TABLES_NAME
from incfs.model import HOLE, PAGE_BLOCKS, Bookmark, MapId, Snapshot, Storage, StorageId, Volume, VolumeId, split_map_id
from incfs.muster import differences
from incfs.options import Options, Salvage
from incfs.overlay import TableKey
from incfs.parts import read_standing
from incfs.recovery import DEFAULT_JOURNAL_BYTES, UNLIMITED_BLOCKS, create_pool, open_store
from incfs.store import Store
from incfs.superblock import SUPERBLOCK_NAME, Superblock, read_superblock, write_superblock
from incfs.tables import DATABASES, LMDB_LIB_VERSION
from incfs.tablesfile import salvage

logger = logging.getLogger(__name__)

_LOST_ID = StorageId(65535)
"""Stands for the blocks of damaged map pages: whatever reads one fails."""
_COMMIT_BYTES = 16 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Loss:
    """A range that could not be saved: it is a hole in the new pool."""

    name: str
    offset_bytes: int
    length_bytes: int
    reason: str


@dataclass(slots=True)
class RepairReport:
    """What was saved and what was not."""

    saved: list[dict[str, Any]] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is lost without a range: commits, tables, storage volumes."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing was lost."""
        return not self.losses and not self.notes

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {**asdict(self), "is_complete": self.is_complete}


def repair(
    damaged: Path,
    target: Path,
    *,
    images: Mapping[int, Path] | None = None,
    directories: Sequence[Path] = (),
    progress: Progress | None = None,
) -> RepairReport:
    """Save every volume and snapshot that can be saved into a new pool.

    Args:
        damaged: The old pool's directory; nothing in it is changed.
        target: The new pool's directory, which must not exist or be empty.
        images: Where images of the old pool are, if not where it says.
        directories: Where the new pool's images go.
        progress: Called with bytes done and in all.

    Raises:
        AlreadyExists: The target is not empty.
        PoolLocked: The old pool is in use.
        IncfsError: Nothing at all could be read, or the new pool could not be written.
    """
    if target.exists() and any(target.iterdir()):
        raise AlreadyExists(f"{target} is not empty; choose another directory", path=str(target))
    report = RepairReport()
    scratch = target.with_name(f"{target.name}.salvage-{os.getpid()}")
    try:
        with _locked(damaged), _salvaged(damaged, scratch, images or {}, report) as old:
            create_pool(target, block_bytes=old.block_bytes, directories=directories)
            with open_store(target) as new:
                copier = _Copier(old, new, report, progress or (lambda done, total: None))
                if old.catalog.policy is not None:
                    with new.step():
                        new.add(old.catalog.policy)
                for found in sorted(old.catalog.volumes.values(), key=lambda v: v.name):
                    if found.name:
                        copier.copy(found)
                _copy_metadata(new)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return report


def _copy_metadata(new: Store) -> None:
    """The new pool, too, has its metadata beside its images; that this fails harms nothing else."""
    new.checkpoint()
    try:
        copies.write(new)
    except IncfsError as error:
        logger.warning("the copy of the metadata beside the images could not be written: %s", error)


@contextlib.contextmanager
def _locked(damaged: Path) -> Iterator[None]:
    """Have the pool's lock without writing to its file."""
    path = damaged / LOCK_NAME
    if not path.exists():
        yield
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise PoolLocked(f"pool {damaged} is in use; unmount it first") from error
    finally:
        os.close(fd)


# ---------------------------------------------------------------------- opening what is left


@contextlib.contextmanager
def _salvaged(damaged: Path, scratch: Path, images: Mapping[int, Path], report: RepairReport) -> Iterator[Store]:
    """Open a copy of the metadata over the old images, by the first way that works."""
    superblock = _find_superblock(damaged, images, report)
    failures: list[str] = []
    for way in (_as_it_is, _with_cut_journal, _with_salvaged_tables, _with_salvaged_tables_alone):
        shutil.rmtree(scratch, ignore_errors=True)
        attempt = _Attempt(damaged, scratch, superblock, images)
        try:
            store = way(attempt)
        except IncfsError as error:
            logger.info("%s: %s", way.__name__, error)
            failures.append(str(error))
            continue
        report.notes += [*failures[:1], *attempt.notes]
        report.notes += parts_apart(damaged, store)
        for storage in store.pool.volumes.values():
            if storage.state != "online" and storage.record.id != _LOST_ID:
                report.notes.append(f"storage volume {storage.record.id} is {storage.state}: {storage.file.path}")
        try:
            yield store
        finally:
            store.abandon()
        return
    raise Damaged(f"nothing of {damaged} can be read: {failures[-1]}; if there is a dump, try `incfs pool restore`")


def parts_apart(damaged: Path, store: Store) -> list[str]:
    """Say which images are of another time than the directory: of what they do not share, ranges are lost."""
    try:
        standing = read_standing(ReadingBacking(), damaged, UUID(store.superblock.uuid))
    except IncfsError as error:
        return [str(error)]
    if standing.is_adopting:
        return []
    parts = [part for part in store.pool.parts() if store.pool.volumes[part.storage_id].state == "online"]
    return differences(standing, parts, reached=store.point)


def _find_superblock(damaged: Path, images: Mapping[int, Path], report: RepairReport) -> Superblock:
    """Read the superblock, or make one of what an image's header says."""
    backing = ReadingBacking()
    try:
        return read_superblock(backing, damaged)
    except (FormatError, NotFound) as error:
        failure = error
    for path in [*images.values(), *sorted(damaged.rglob("*.img"))]:
        with contextlib.suppress(IncfsError), contextlib.closing(backing.open(path)) as file:
            header = read_header(file)
            report.notes.append(f"{failure}; the header of {path} was used instead")
            first, _ = journal_paths(damaged)
            size = first.stat().st_size if first.exists() else DEFAULT_JOURNAL_BYTES
            return Superblock(str(header.pool_uuid), header.block_bytes, size, LMDB_LIB_VERSION, 0)
    raise failure


@dataclass(slots=True)
class _Attempt:
    """One way of opening the old pool: a copy of its metadata, and what is known to be lost."""

    damaged: Path
    scratch: Path
    superblock: Superblock
    images: Mapping[int, Path]
    notes: list[str] = field(default_factory=list)

    def copy(self, *names: str) -> None:
        """Copy metadata files."""
        Backing().make_directory(self.scratch)
        for name in names:
            try:
                shutil.copyfile(self.damaged / name, self.scratch / name)
            except OSError as error:
                raise translate(error, self.damaged / name, "copy") from error

    def open(self, *, cut_journal: bool) -> Store:
        """Open the copy."""
        if not (self.scratch / SUPERBLOCK_NAME).exists():
            write_superblock(Backing(), self.scratch, self.superblock)
        paths = {StorageId(number): path for number, path in self.images.items()}
        options = Options(
            degraded=True, dump_interval_s=None, salvage=Salvage(self.damaged, paths, cut_journal=cut_journal)
        )
        return open_store(self.scratch, options, ReadingBacking(self.scratch))


_JOURNAL_NAMES = ("journal.0", "journal.1")


def _as_it_is(attempt: _Attempt) -> Store:
    attempt.copy(TABLES_NAME, *_JOURNAL_NAMES)
    return attempt.open(cut_journal=False)


def _with_cut_journal(attempt: _Attempt) -> Store:
    attempt.copy(TABLES_NAME, *_JOURNAL_NAMES)
    store = attempt.open(cut_journal=True)
    attempt.notes.append(f"the journal is damaged: changes after commit {store.durable_sequence} are lost")
    return store


def _with_salvaged_tables(attempt: _Attempt) -> Store:
    """New tables of the sound values, and the journal over them."""
    builder, facts = _rebuild(attempt)
    if facts is None:
        builder.abandon()
        raise FormatError("the tables do not say where the journal begins")
    builder.finish_tables(last_volume=facts["last_volume"], sequence=facts["sequence"], segment=facts["segment"])
    attempt.copy(*_JOURNAL_NAMES)
    store = attempt.open(cut_journal=True)
    attempt.notes.append(f"changes after commit {store.durable_sequence}, if there were any, are lost")
    return store


def _with_salvaged_tables_alone(attempt: _Attempt) -> Store:
    builder, _ = _rebuild(attempt)
    builder.finish(last_volume=0, with_images=False)
    attempt.notes.append("the journal cannot be used: changes since the last checkpoint are lost")
    return attempt.open(cut_journal=True)


def _rebuild(attempt: _Attempt) -> tuple[MetadataBuilder, dict[str, int] | None]:
    """Put the sound values into new tables; where a map page is damaged, blocks that cannot be read."""
    file = ReadingBacking(attempt.scratch).open(attempt.damaged / TABLES_NAME)
    try:
        found = list(salvage(file, DATABASES))
    finally:
        file.close()
    builder = MetadataBuilder(attempt.superblock, attempt.scratch, {}, Backing())
    builder.add_record(_lost_storage(attempt.scratch))
    _add_records(builder, found, attempt.notes)
    lost_blocks = 0
    for database, key, body in found:
        if database not in {"map", "inc"} or len(key) not in {12, 16}:
            continue
        table = TableKey(int.from_bytes(key[:4], "big"), int.from_bytes(key[4:-8], "big"))
        page_index = int.from_bytes(key[-8:], "big")
        try:
            builder.add_page(table, page_index, decode_entries(body) if body is not None else _lost_page(lost_blocks))
        except FormatError as error:
            attempt.notes.append(str(error))
        lost_blocks += 0 if body is not None else PAGE_BLOCKS
    _drop_incomplete(builder, attempt.notes)
    facts = next((_facts(body) for name, key, body in found if name == "meta" and key == b"checkpoint"), None)
    return builder, facts


def _facts(body: bytes | None) -> dict[str, int] | None:
    value = unpack(body) if body is not None else None
    match value:
        case {"sequence": int(sequence), "segment": int(segment), "last_volume": int(last_volume)}:
            return {"sequence": sequence, "segment": segment, "last_volume": last_volume}
    return None


def _lost_storage(scratch: Path) -> Storage:
    path = str(scratch / "damaged map page")
    return Storage(_LOST_ID, str(uuids.UUID(int=0)), path, UNLIMITED_BLOCKS, 0)


def _lost_page(first_block: int) -> Entries:
    address = pack_address(_LOST_ID, first_block)
    return {index: (address + index, 0) for index in range(PAGE_BLOCKS)}


def _add_records(builder: MetadataBuilder, found: list[tuple[str, bytes, bytes | None]], notes: list[str]) -> None:
    for kind in ("storage", "volume", "snapshot", "bookmark", "policy"):
        for database, key, body in found:
            if database != kind:
                continue
            try:
                if body is None:
                    raise FormatError(f"the record of {kind} {int.from_bytes(key, 'big')} is damaged")
                builder.add_record(record_from(kind, unpack(body)))
            except FormatError as error:
                notes.append(str(error))


def _drop_incomplete(builder: MetadataBuilder, notes: list[str]) -> None:
    """Without a part of its increment a snapshot, and each older one, would read what is newer: not saved."""
    for (kind, numbers), count in sorted(builder.missing_blocks().items()):
        if count < 0:
            continue  # damaged pages count as full ones
        volume_id = VolumeId(numbers[0])
        name = builder.catalog.volume(volume_id).name
        if kind == "volume" and name:
            notes.append(f"volume {name}: {count} blocks are lost, it is not known which; they read as zeros")
        for older in builder.catalog.snapshots(volume_id) if kind == "snapshot" else ():
            if older.generation <= numbers[1]:
                notes.append(f"snapshot {name}@{older.name} is not saved: a part of what it needs is lost")
                builder.catalog.put(replace(older, name=""))
    _drop_orphans(builder, notes)


def _drop_orphans(builder: MetadataBuilder, notes: list[str]) -> None:
    """A clone whose origin is lost would read what is newer: not saved.  Origins are older, so they come first."""
    catalog = builder.catalog
    for volume_id, clone in sorted(catalog.volumes.items()):
        origin = catalog.get(("snapshot", split_map_id(clone.origin))) if clone.origin else None
        if clone.origin and clone.name and not clone.baseline and not (isinstance(origin, Snapshot) and origin.name):
            notes.append(f"volume {clone.name} is not saved: a part of its origin is lost")
            catalog.put(replace(clone, name=""))
            for taken in catalog.snapshots(volume_id):
                catalog.put(replace(taken, name=""))


# --------------------------------------------------------------------------------- copying


class _Copier:
    """Copies volumes with their snapshots, oldest first, each as a change to the one before."""

    def __init__(self, old: Store, new: Store, report: RepairReport, progress: Progress) -> None:
        self._old = old
        self._new = new
        self._report = report
        self._progress = progress
        self._total = old.pool.used_blocks() * old.block_bytes
        self._done = self._pending = 0

    def copy(self, found: Volume) -> None:
        """Copy one volume."""
        old, new = self._old, self._new
        made = volume.create(new, found.name, 0, mode=found.mode, uid=found.uid, gid=found.gid)
        volume.set_xattrs(new, made.id, found.xattrs)
        before: MapId | None = None
        lost: set[int] = set()
        states: list[Snapshot | Volume] = [*old.catalog.snapshots(found.id), found]
        is_proved, before_all = _LOST_ID not in old.catalog.storages, len(self._report.losses)
        for state in states:
            name = f"{found.name}@{state.name}" if isinstance(state, Snapshot) else found.name
            losses = len(self._report.losses)
            ranges.drive(new, lambda _, size=state.size_bytes: volume.resize(new, made.id, size, shrink=True))  # type: ignore[misc]
            ranges.finish_trim(new, made.id)
            lost = self._copy_state(before, state, made.map_id, lost)
            self._note_lost(name, state.size_bytes, lost)
            if isinstance(state, Snapshot):
                (taken,) = snapshot.create(new, [(made.id, state.name)])
                with new.step():
                    new.amend(taken, created_ns=state.created_ns, tag=state.tag)
                if is_proved and len(self._report.losses) == before_all:
                    self._keep_identity(taken, state)
            self._report.saved.append(
                {"name": name, "size_bytes": state.size_bytes, "is_whole": losses == len(self._report.losses)}
            )
            before = state.map_id
        volume.set_attributes(new, made.id, modified_ns=found.modified_ns, accessed_ns=found.accessed_ns)
        self._note_bookmarks(found, made.id)
        new.checkpoint()

    def _keep_identity(self, taken: Snapshot, state: Snapshot) -> None:
        """Let a snapshot that is whole, and so is each before it, be the same one to replicas, with its bookmarks."""
        with self._new.step():
            same = self._new.amend(taken, uuid=state.uuid)
        known = self._old.catalog.get(("bookmark", (state.volume_id, state.generation)))
        for name in known.names if isinstance(known, Bookmark) else ():
            bookmarks.create(self._new, same, name)

    def _note_bookmarks(self, found: Volume, made_id: VolumeId) -> None:
        """Tell of bookmarks that are not saved: of one whose snapshot is gone nobody can say what was written since."""
        names = [name for bookmark in self._old.catalog.bookmarks(found.id) for name in bookmark.names]
        self._report.notes += [
            f"bookmark {found.name}#{name} is not saved, its snapshot is gone or not whole; send the next one whole"
            for name in names
            if not self._new.catalog.has_bookmark_name(made_id, name)
        ]

    def _copy_state(self, before: MapId | None, state: "Snapshot | Volume", target: MapId, lost: set[int]) -> set[int]:
        """Make the target what ``state`` is, from what ``before`` was; give the blocks that are lost."""
        catalog, log = self._old.catalog, self._old.log
        links = [*catalog.chain(state.map_id), *(catalog.chain(before) if before is not None else ())]
        end = -(-state.size_bytes // self._old.block_bytes)
        still_lost = {block for block in lost if block < end}
        for page in sorted({page for link in links for table in link for page in log.page_indexes(table)}):
            first = page * PAGE_BLOCKS
            count = min(PAGE_BLOCKS, end - first)
            if count <= 0:
                break
            wanted = self._entries(state.map_id, page)
            if wanted is None:
                self._clear(target, first, count)
                still_lost.update(range(first, first + count))
                continue
            known = self._entries(before, page) if before is not None else {}
            for index in range(count):
                entry = wanted.get(index, (0, 0))
                if known is None or known.get(index, (0, 0)) != entry:
                    still_lost.discard(first + index)
                    if not self._copy_block(target, first + index, *entry):
                        still_lost.add(first + index)
        return still_lost

    def _entries(self, table: MapId, page_index: int) -> Entries | None:
        try:
            return extents.page_entries(self._old, table, page_index)
        except IncfsError as error:
            logger.info("page %d of table %d: %s", page_index, table, error)
            return None

    def _copy_block(self, target: MapId, block: int, address: int, crc: int) -> bool:
        if address <= HOLE:
            self._clear(target, block, 1)
            return True
        storage_id, block_index = split_address(address)
        try:
            data = self._old.pool.volume(storage_id).read_blocks(block_index, 1)
        except IncfsError as error:
            logger.info("block %d of storage volume %d: %s", block_index, storage_id, error)
            data = b""
        if not data or checksum(data) != crc:
            self._clear(target, block, 1)
            return False
        size = self._new.block_bytes
        limit = self._new.catalog.size_bytes(target) - block * size
        ranges.drive(self._new, lambda wait: ranges.write(self._new, target, block * size, data[:limit], wait=wait))
        self._done += size
        self._pending += size
        if self._pending >= _COMMIT_BYTES or self._new.wants_checkpoint:
            self._pending = 0
            self._progress(self._done, self._total)
            self._new.checkpoint()
        return True

    def _clear(self, target: MapId, block: int, count: int) -> None:
        position, end = block * self._new.block_bytes, (block + count) * self._new.block_bytes
        while position < end:
            start = position
            position = ranges.drive(
                self._new,
                lambda wait, start=start: ranges.discard(self._new, target, start, end, wait=wait),  # type: ignore[misc]
            )

    def _note_lost(self, name: str, size_bytes: int, lost: set[int]) -> None:
        size = self._old.block_bytes
        for first, count in address_runs(lost):
            length = min(count * size, size_bytes - first * size)
            self._report.losses.append(Loss(name, first * size, length, "damaged, or its image is not there"))
