"""The muster: before anything of a pool is written, are all its parts there, and do they belong together (I14)?

Reads the stamp of every image and leg, compares it with what the directory says of itself, and then refuses, or leaves
a leg behind, or raises the epoch.  Nothing is written before all of it is decided.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from incfs.backing import File
from incfs.epoch import NEVER, START, UNSTAMPED, Fit, Point, Stamp, Standing, compare, is_within
from incfs.errors import BackingError, EpochMismatch, FormatError, ImageMismatch, IncfsError
from incfs.image import DATA_OFFSET_BYTES, read_stamp
from incfs.model import Storage, StorageId
from incfs.parts import Part, Raise, next_epoch, read_standing
from incfs.store import Store

_WAY_OUT = (
    "nothing was changed; bring back the one that is of the same time as the others, "
    "or, if what is newer may be lost, open it with --force-older (mount: -o force_older)"
)


@dataclass(slots=True)
class Expected:
    """What tables and journal expect of the images."""

    storages: dict[StorageId, Storage]
    """The records, once the journal is replayed."""
    folded: Point
    """The checkpoint that the tables are of."""
    reached: Point
    """The end of the journal."""
    needed_blocks: dict[StorageId, int] = field(default_factory=dict)
    """How far an image must reach at least."""

    def need(self, storage_id: StorageId, block_count: int) -> None:
        """Note that an image must reach that far."""
        self.needed_blocks[storage_id] = max(block_count, self.needed_blocks.get(storage_id, 0))


@dataclass(slots=True)
class _Present:
    """An image or a leg as it was found."""

    part: Part
    stamp: Stamp | None
    fit: Fit
    is_stale: bool
    """The record calls it so: it is left alone."""


def degrade(store: Store, error: IncfsError) -> None:
    """Go on without what is away, or wrong, if that is wanted: nothing is written then."""
    if not store.options.degraded:
        raise error
    store.fail(error)


def muster(store: Store, expected: Expected) -> None:
    """Prove that directory, images and legs belong together, and raise their epoch.

    Args:
        store: The pool; its records are those of the last checkpoint, nothing is attached.
        expected: What its tables and its journal say.

    Raises:
        EpochMismatch, ImageMismatch, FormatError: They do not; nothing was changed.
        BackingError, NoSpace: The host failed.
    """
    if store.options.salvage is not None:
        return
    standing = _standing(store)
    if standing is None:
        return
    present = [found for record in expected.storages.values() for found in _look(store, record, standing, expected)]
    if standing.is_adopting:
        _adopt(present)
    _judge(store, expected, standing, present)
    if store.mismatch is not None:
        _adopt(present)  # what is read of them is compared with its checksum
    _leave(store, present)
    if store.failure is None:
        if standing.raising is None:
            store.pool.images.missing_stamp = Stamp(standing.settled, expected.folded)
        store.agree()
        if standing.is_adopting:
            _extend(store, expected, present)
        _raise(store, standing, present, expected.reached)


def differences(standing: Standing, parts: Sequence[Part], *, reached: Point) -> list[str]:
    """Say which of these parts do not belong to a directory: for whoever only looks."""
    found = ((part, compare(standing, _stamp_of(part.file), folded=START, reached=reached)) for part in parts)
    return [
        f"storage volume {part.storage_id}: compared with the directory, {part.file.path} is {fit.value}"
        for part, fit in found
        if fit is not Fit.FITS
    ]


def _standing(store: Store) -> Standing | None:
    """Read what the directory says of itself; None: nothing can be compared with it."""
    try:
        uuid = UUID(store.superblock.uuid)
        found = [read_standing(store.backing, path, uuid) for path in store.copies.current_directories]
        standing = max(found, key=lambda known: (known.newest.counter, known.settled.counter))
    except (FormatError, BackingError) as error:
        if not store.options.force_older:
            _note_mismatch(store, error)
            return None
        standing = Standing(NEVER)
    if store.options.force_older:
        standing = replace(standing, is_adopting=True)
    epoch = store.journal.segment.epoch
    if not (standing.is_adopting or is_within(epoch, standing)):
        mismatch = EpochMismatch(
            f"{store.directory} is at epoch {standing.newest}, but its journal was written in {epoch}: "
            f"its epoch file is older; {_WAY_OUT}",
            expected=str(standing.newest),
            found=str(epoch),
        )
        _note_mismatch(store, mismatch)
        return None
    return standing


def _note_mismatch(store: Store, error: IncfsError) -> None:
    degrade(store, error)
    store.mismatch = store.mismatch or error


def _look(store: Store, record: Storage, standing: Standing, expected: Expected) -> Iterator[_Present]:
    before = store.catalog.storages.get(record.id)
    for number, path in enumerate(store.pool.images.leg_paths(record)):
        try:
            file = store.pool.images.open_leg(record, path)
            store.pool.images.keep(path, file)
            stamp = _stamp_of(file)
        except (ImageMismatch, BackingError) as error:
            store.pool.images.absent[record.id, number] = error  # what was not looked at is not used
            continue
        # One that came, or was brought up to date, since the tables were written had not to be stamped for them.
        had = before is not None and number not in before.stale_legs
        fit = compare(standing, stamp, folded=expected.folded if had else START, reached=expected.reached)
        if fit is Fit.FITS and file.length_bytes() < _end_bytes(store, expected, record.id):
            fit = Fit.SHORT
        yield _Present(Part(record.id, number, file), stamp, fit, number in record.stale_legs)


def _stamp_of(file: File) -> Stamp | None:
    try:
        return read_stamp(file)
    except FormatError:
        return None


def _adopt(present: Sequence[_Present]) -> None:
    """Let what is there fit, of a mirror's legs the newest: somebody insists."""
    for storage_id in {found.part.storage_id for found in present}:
        legs = [found for found in present if found.part.storage_id == storage_id and not found.is_stale]
        newest = max((_age(found) for found in legs), default=None)
        for found in legs:
            found.fit = Fit.FITS if _age(found) == newest else Fit.OLDER


def _age(found: _Present) -> tuple[int, ...]:
    stamp = found.stamp or UNSTAMPED
    return stamp.epoch.counter, *stamp.point, stamp.epoch.nonce


def _judge(store: Store, expected: Expected, standing: Standing, present: Sequence[_Present]) -> None:
    """Refuse what cannot be opened as it is, or note it, if the pool is opened only to be looked at."""
    if not standing.is_adopting:
        for found in present:
            if found.fit is Fit.NEWER:
                _note_mismatch(store, _mismatch(store, expected, standing, found))
    for record in expected.storages.values():
        legs = [found for found in present if found.part.storage_id == record.id and not found.is_stale]
        if any(found.fit is Fit.FITS for found in legs):
            continue
        if not legs:
            _refuse_absent(store, record)
        elif all(found.fit is Fit.SHORT for found in legs):
            degrade(store, _mismatch(store, expected, standing, legs[0]))
        else:
            _note_mismatch(store, _mismatch(store, expected, standing, legs[0]))


def _refuse_absent(store: Store, record: Storage) -> None:
    """Say why nothing of a storage volume can be opened."""
    found = [error for (storage_id, _), error in store.pool.images.absent.items() if storage_id == record.id]
    if not record.mirrors:
        degrade(store, found[0])
        return
    why = "; ".join(map(str, found)) or "all are stale"
    degrade(store, ImageMismatch(f"storage volume {record.id}: no sound leg is there: {why}", storage=record.id))


def _mismatch(store: Store, expected: Expected, standing: Standing, found: _Present) -> IncfsError:
    path, stamp, storage_id = found.part.file.path, found.stamp, found.part.storage_id
    if found.fit is Fit.SHORT:
        return ImageMismatch(
            f"storage volume {storage_id}: {path} is truncated to {found.part.file.length_bytes()} bytes, "
            f"but block {expected.needed_blocks[storage_id] - 1} is in use",
            storage=storage_id,
        )
    if stamp is None:
        says = "has no epoch that can be read"
    elif stamp.epoch in standing.epochs:
        says = f"was last stamped at {_at(stamp.point)}, the directory ends at {_at(expected.reached)}"
    else:
        says = f"is at epoch {stamp.epoch}"
    return EpochMismatch(
        f"{store.directory} is at epoch {standing.newest}, but storage volume {storage_id}, {path}, {says}: "
        f"the image is {found.fit.value}; {_WAY_OUT}",
        storage=storage_id,
        path=str(path),
        expected=str(standing.newest),
        found=None if stamp is None else str(stamp.epoch),
    )


def _at(point: Point) -> str:
    return f"commit {point.sequence} of journal segment {point.segment}"


def _leave(store: Store, present: Sequence[_Present]) -> None:
    """Leave legs behind that do not fit: others do."""
    for found in present:
        if found.fit is not Fit.FITS and not found.is_stale:
            part, stamp = found.part, found.stamp
            says = "no epoch" if stamp is None else f"epoch {stamp.epoch}, {_at(stamp.point)}"
            if found.fit is Fit.SHORT:
                says = f"{part.file.length_bytes()} bytes long"
            reason = EpochMismatch(f"{part.file.path} is {found.fit.value} ({says}): it lacks everything")
            store.pool.images.unfit[part.storage_id, part.leg] = reason


def _extend(store: Store, expected: Expected, present: Sequence[_Present]) -> None:
    """Let adopted images reach as far as the tables expect: what they never had fails by its checksum."""
    for found in present:
        end = _end_bytes(store, expected, found.part.storage_id)
        if found.fit is Fit.FITS and not found.is_stale and found.part.file.length_bytes() < end:
            found.part.file.truncate(end)


def _end_bytes(store: Store, expected: Expected, storage_id: StorageId) -> int:
    return DATA_OFFSET_BYTES + expected.needed_blocks.get(storage_id, 0) * store.block_bytes


def _raise(store: Store, standing: Standing, present: Sequence[_Present], reached: Point) -> None:
    parts = [found.part for found in present if found.fit is Fit.FITS and not found.is_stale]
    uuid = UUID(store.superblock.uuid)
    directories = store.copies.current_directories
    begun = Raise(store.backing, uuid, directories, parts, reached, store.copies.leave_directory)
    begun.settle_host(store.journal.sync)
    if standing.raising is not None and not standing.is_adopting:
        standing, failed = begun.run(standing, standing.raising)  # it was cut off
        begun = replace(
            begun,
            directories=store.copies.current_directories,
            parts=[part for part in parts if part not in failed],
        )
        _leave_failed(store, failed)
    seen = [standing.newest, *(found.stamp.epoch for found in present if found.stamp is not None)]
    standing, failed = begun.run(standing, next_epoch(*seen))
    _leave_failed(store, failed)
    store.enter(standing)
    store.copies.settle()


def _leave_failed(store: Store, failed: Mapping[Part, IncfsError]) -> None:
    for part, error in failed.items():
        store.pool.images.unfit[part.storage_id, part.leg] = error
