"""Image files: where they are, made, opened and proved to be the right ones, deleted."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import UUID

from incfs.backing import Backing, File
from incfs.epoch import UNSTAMPED, Stamp
from incfs.errors import BackingError, EpochMismatch, ImageMismatch, IncfsError
from incfs.image import ImageHeader, read_header, read_stamp, write_header
from incfs.mirror import MirroredFile
from incfs.model import Storage, StorageId


class Images:
    """The image files of one pool's storage volumes."""

    def __init__(self, directory: Path, uuid: UUID, block_bytes: int, backing: Backing) -> None:
        self._directory = directory
        self._uuid = uuid
        self._block_bytes = block_bytes
        self._backing = backing
        self.moved: Mapping[StorageId, Path] = {}
        """Images that are not where their records say."""
        self.unfit: dict[tuple[StorageId, int], IncfsError] = {}
        """Legs that do not belong to the pool as it is, found when it was opened: they are not read."""
        self.absent: dict[tuple[StorageId, int], IncfsError] = {}
        """Legs that could not be looked at then: they are not opened before a resilver does it."""
        self.missing_stamp: Stamp | None = None
        """What a leg that was missing then must at least say of itself to need only what it lacks since."""
        self._kept: dict[Path, File] = {}

    def path(self, record: Storage) -> Path:
        """Resolve a storage volume's path."""
        return self.moved.get(record.id, self._directory / record.path)

    def leg_paths(self, record: Storage) -> list[Path]:
        """Resolve the paths of a storage volume's legs."""
        return [self.path(record), *(self._directory / path for path in record.mirrors)]

    def create(self, record: Storage, stamp: Stamp) -> None:
        """Make the image files of a storage volume, with their headers.

        Durability: files, headers and names are durable on return.
        """
        for path in self.leg_paths(record):
            self.create_leg(record, path, stamp)

    def create_leg(self, record: Storage, path: Path, stamp: Stamp = UNSTAMPED) -> None:
        """Make one image file with its header; by default it is of no epoch until it is filled.

        Durability: as ``create``.
        """
        file = self._backing.create(path)
        file.keep_in_place()
        try:
            write_header(file, self._header(record), stamp)
        finally:
            file.close()
        self._backing.sync_directory(path.parent)

    def _header(self, record: Storage) -> ImageHeader:
        return ImageHeader(self._uuid, UUID(record.uuid), record.id, self._block_bytes)

    def open(self, record: Storage) -> File:
        """Open the image, or the legs of a mirror, and prove that it is the one.

        A leg that is missing or another's is left behind, as long as a sound one is there.

        Raises:
            ImageMismatch: Missing, truncated, damaged, or of another storage volume.
        """
        paths = self.leg_paths(record)
        if len(paths) == 1:
            return self.open_leg(record, paths[0])
        legs, reasons = self._open_legs(record, paths)
        if all(leg is None or number in record.stale_legs for number, leg in enumerate(legs)):
            for leg in legs:
                if leg is not None:
                    leg.close()
            why = "; ".join(str(reason) for reason in reasons.values()) or "all are stale"
            raise ImageMismatch(f"storage volume {record.id}: no sound leg is there: {why}", storage=record.id)
        mirror = MirroredFile(paths[0], legs, record.stale_legs)
        mirror.failed.update({number: str(why) for number, why in reasons.items() if number in mirror.failed})
        for number, leg in enumerate(legs):
            stamp = read_stamp(leg) if leg is not None else self.missing_stamp
            if stamp is not None and (record.id, number) not in self.unfit:
                mirror.stamps[number] = stamp
        return mirror

    def _open_legs(self, record: Storage, paths: Sequence[Path]) -> tuple[list[File | None], dict[int, IncfsError]]:
        legs: list[File | None] = []
        reasons: dict[int, IncfsError] = {}
        for number, path in enumerate(paths):
            try:
                found = self.unfit.get((record.id, number)) or self.absent.get((record.id, number))
                if found is not None and number not in record.stale_legs:
                    raise found
                legs.append(self.open_leg(record, path))
            except (ImageMismatch, EpochMismatch, BackingError) as error:
                legs.append(None)
                reasons[number] = error
        return legs, reasons

    def keep(self, path: Path, file: File) -> None:
        """Let an open image wait for whoever opens it next: its lock is not let go meanwhile."""
        self._kept[path] = file

    def close_kept(self) -> None:
        """Close what nobody opened."""
        while self._kept:
            self._kept.popitem()[1].close()

    def open_leg(self, record: Storage, path: Path) -> File:
        """Open an image file and prove that it is of a storage volume.

        Raises:
            ImageMismatch: Missing, truncated, damaged, or of another storage volume.
        """
        kept = self._kept.pop(path, None)
        if kept is not None:
            return kept
        if os.path.lexists(path) and not os.path.isfile(path):  # opening a device may do harm, a pipe may hang
            raise ImageMismatch(f"storage volume {record.id}: {path} is not an ordinary file", storage=record.id)
        if not os.path.exists(path):
            raise ImageMismatch(
                f"storage volume {record.id}: image {path} is missing; mount its disk or restore it; "
                f"to read what is on the others, mount with -o degraded",
                storage=record.id,
            )
        file = self._backing.open(path)
        try:
            header, expected = read_header(file), self._header(record)
            if header != expected:
                raise ImageMismatch(
                    f"storage volume {record.id}: {path} is the image of {header}, expected {expected}",
                    storage=record.id,
                )
            file.lock()  # a pool restored elsewhere over the same images would write into them, too
        except BaseException:
            file.close()
            raise
        return file

    def open_unproved(self, record: Storage) -> File:
        """Open an image whatever its header says: checksums tell what in it is sound.

        Raises:
            BackingError: It cannot be opened.
        """
        return self._backing.open(self.path(record))

    def delete_left(self, path: Path, storage_uuid: str) -> bool:
        """Delete an image file of a storage volume that is the pool's no more; False when it is not there.

        Durability: its name is gone on return.

        Raises:
            ImageMismatch: The file is another's; it stays.
        """
        if not path.is_file():
            return False
        file = self._backing.open(path)
        try:
            header = read_header(file)
        finally:
            file.close()
        if (header.pool_uuid, header.storage_uuid) != (self._uuid, UUID(storage_uuid)):
            raise ImageMismatch(f"{path} is the image of {header}; it is not deleted")
        self._backing.remove(path)
        self._backing.sync_directory(path.parent)
        return True

    def delete(self, record: Storage) -> None:
        """Delete the image files of a storage volume.

        Durability: their names are gone on return.
        """
        for path in self.leg_paths(record):
            self._backing.remove(path)
            self._backing.sync_directory(path.parent)
