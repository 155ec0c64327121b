"""``pool check``: proves from the tables that every block has one owner or is free (I9).

Works on one read transaction, so it sees one checkpoint, also while the pool is in use.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from incfs.baseline import Baseline, BaselineFacts
from incfs.blocks import address_runs, set_runs, split_address
from incfs.catalog import KINDS, Catalog
from incfs.codec import Entries, checksum, decode_entries, entry_runs, open_value
from incfs.errors import FormatError, IncfsError
from incfs.groups import group_start, split_groups
from incfs.model import HOLE, PAGE_BLOCKS, Bookmark, Generation, Snapshot, StorageId, Volume, split_map_id
from incfs.overlay import TableKey
from incfs.storage import StorageVolume
from incfs.tables import Reader, page_key

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    kind: str
    """damage, or leak: space that nothing uses and nothing gives back."""
    where: str
    message: str


@dataclass(slots=True)
class CheckReport:
    """What a check found."""

    problems: list[Problem] = field(default_factory=list)
    volumes: int = 0
    snapshots: int = 0
    mapped_blocks: int = 0
    """Stored blocks of all tables together."""
    verified_blocks: int = 0
    """Blocks whose data was read and whose checksum was compared."""
    leaked_blocks: int = 0

    @property
    def is_damaged(self) -> bool:
        """Whether anything but a leak was found."""
        return any(problem.kind == "damage" for problem in self.problems)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def damage(self, where: str, message: str) -> None:
        """Note damage."""
        self.problems.append(Problem("damage", where, message))

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {**asdict(self), "is_clean": self.is_clean, "is_damaged": self.is_damaged}


class Checker:
    """One check of one checkpoint.  Any thread."""

    def __init__(
        self,
        reader: Reader,
        storages: dict[StorageId, StorageVolume],
        block_bytes: int,
        *,
        data: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._reader = reader
        self._storages = storages
        self._block_bytes = block_bytes
        self._data = data
        self._progress = progress or (lambda done, total: None)
        self._owned: dict[tuple[int, int], int] = {}
        self._catalog = Catalog()
        self._total_blocks = 0
        self.report = CheckReport()

    def run(self) -> CheckReport:
        """Check everything.

        Cost: proportional to the mappings; with ``data`` every live block is read.
        """
        self._prove_file()
        self._load_records()
        self._total_blocks = sum(bits.bit_count() for _, _, bits in self._space())
        for volume in self._catalog.volumes.values():
            self._check_volume(volume)
        self._check_strays()
        self._check_space()
        return self.report

    def _prove_file(self) -> None:
        try:
            self._reader.prove()
        except IncfsError as error:
            self.report.damage("tables", str(error))

    def _load_records(self) -> None:
        for kind in KINDS:
            for key, value in self._reader.items(kind):
                try:
                    self._catalog.load(kind, open_value(key, value))
                except FormatError as error:
                    self.report.damage(f"{kind} {key.hex()}", str(error))
        self.report.volumes = sum(bool(v.name) for v in self._catalog.volumes.values())
        names = [v.name for v in self._catalog.volumes.values() if v.name]
        for name in {name for name in names if names.count(name) > 1}:
            self.report.damage(f"volume {name}", "two volumes have this name")

    def _check_volume(self, volume: Volume) -> None:
        where = f"volume {volume.name or volume.id}"
        mapped = self._check_table(TableKey(volume.id), where)
        if volume.name and mapped != volume.mapped_blocks and not volume.rollback_to:
            self.report.damage(where, f"counts {volume.mapped_blocks} mapped blocks, but has {mapped}")
        snapshots = self._catalog.snapshots(volume.id, removed=True)
        self._check_origin(volume, where)
        newest = max((s.generation for s in snapshots), default=0)
        if (volume.newest_generation, max(newest, volume.last_generation)) != (newest, volume.last_generation):
            self.report.damage(where, f"newest snapshot is {newest}, the record says {volume.newest_generation}")
        for snapshot in snapshots:
            self._check_snapshot(volume, snapshot)
        for bookmark in self._catalog.bookmarks(volume.id, removed=True):
            self._check_bookmark(volume, bookmark)

    def _check_origin(self, volume: Volume, where: str) -> None:
        if not volume.origin:
            return
        origin_id, generation = split_map_id(volume.origin)
        if not origin_id:
            self._check_baseline(volume, where)
            return
        if origin_id >= volume.id or ("snapshot", (origin_id, generation)) not in self._catalog:
            self.report.damage(where, f"reads from snapshot {generation} of volume {origin_id}: not there")

    def _check_baseline(self, volume: Volume, where: str) -> None:
        try:
            baseline = Baseline(BaselineFacts.decode(volume.baseline), self._block_bytes)
            try:
                baseline.require_unchanged()
            finally:
                baseline.close()
        except IncfsError as error:
            self.report.damage(where, str(error))

    def _check_snapshot(self, volume: Volume, snapshot: Snapshot) -> None:
        where = f"snapshot {volume.name or volume.id}@{snapshot.name or snapshot.generation}"
        self.report.snapshots += bool(snapshot.name)
        held = self._check_table(TableKey(volume.id, snapshot.generation), where)
        if snapshot.name and held != snapshot.held_blocks:
            self.report.damage(where, f"counts {snapshot.held_blocks} held blocks, but has {held}")

    def _check_bookmark(self, volume: Volume, bookmark: Bookmark) -> None:
        where = f"bookmark {volume.name or volume.id}#{bookmark.name or bookmark.generation}"
        if bookmark.generation > volume.last_generation:
            self.report.damage(where, f"is of snapshot {bookmark.generation}: there never was one")
        own = self._catalog.get(("snapshot", (volume.id, bookmark.generation)))
        older = self._catalog.older_generation(volume.id, bookmark.generation)
        older = older if bookmark.names and older not in self._catalog.removed_generations(volume.id) else Generation(0)
        trail = TableKey(volume.id, bookmark.generation, is_trail=True)
        try:
            for page_index, noted in self._reader.pages(trail):
                if isinstance(own, Snapshot) and own.name:
                    self.report.damage(f"{where}, page {page_index}", "has a trail, though its snapshot is there")
                if older and not noted.keys() <= self._reader.page(TableKey(volume.id, older), page_index).keys():
                    self.report.damage(f"{where}, page {page_index}", f"increment {older} lacks blocks of the trail")
        except FormatError as error:
            self.report.damage(where, str(error))

    def _check_table(self, table: TableKey, where: str) -> int:
        mapped = 0
        database, first = page_key(table, 0)
        for key, value in self._reader.items(database, first, first[:-8]):
            page_index = int.from_bytes(key[-8:], "big")
            try:
                entries = decode_entries(open_value(key, value))
            except FormatError as error:
                self.report.damage(f"{where}, page {page_index}", str(error))
                continue
            mapped += self._check_page(entries, f"{where}, page {page_index}")
            if self._data:
                self._verify_page(entries, page_index, where)
        self.report.mapped_blocks += mapped
        return mapped

    def _check_page(self, entries: Entries, where: str) -> int:
        addresses = [address for address, _ in entries.values() if address > HOLE]
        for first, count in address_runs(addresses):
            storage_id, block_index = split_address(first)
            storage = self._storages.get(storage_id)
            if storage is None or block_index + count > storage.grown_blocks:
                self.report.damage(
                    where, f"names blocks {block_index}+{count} of storage volume {storage_id}: not there"
                )
                continue
            self._own(storage_id, block_index, count, where)
        if len(addresses) != len(set(addresses)):
            self.report.damage(where, "names a block twice")
        self._progress(self.report.mapped_blocks, self._total_blocks)
        return len(addresses)

    def _own(self, storage_id: int, block_index: int, count: int, where: str) -> None:
        for group, mask in split_groups(block_index, count):
            owned = self._owned.get((storage_id, group), 0)
            if owned & mask:
                self.report.damage(where, f"blocks near {block_index} of storage volume {storage_id} have two owners")
            self._owned[storage_id, group] = owned | mask

    def _verify_page(self, entries: Entries, page_index: int, where: str) -> None:
        for first, count, address in entry_runs(entries):
            storage_id, block_index = split_address(address)
            storage = self._storages.get(storage_id)
            if address <= HOLE or storage is None or block_index + count > storage.grown_blocks:
                continue
            virtual = page_index * PAGE_BLOCKS + first
            try:
                data = storage.read_blocks(block_index, count)
            except IncfsError as error:
                self.report.damage(f"{where}, block {virtual}", str(error))
                continue
            for i in range(count):
                block = data[i * self._block_bytes : (i + 1) * self._block_bytes]
                if checksum(block) != entries[first + i][1]:
                    place = f"block {block_index + i} of {storage.file.path}"
                    self.report.damage(f"{where}, block {virtual + i}", f"wrong checksum of {place}")
            self.report.verified_blocks += count

    def _check_strays(self) -> None:
        for database, size in (("map", 12), ("inc", 16), ("trail", 16)):
            for key, _ in self._reader.items(database):
                if len(key) != size or not self._has_table(database, key):
                    self.report.damage(f"{database} {key.hex()}", "page of a table that does not exist")

    def _has_table(self, database: str, key: bytes) -> bool:
        volume_id = int.from_bytes(key[:4], "big")
        if database == "map":
            return ("volume", (volume_id,)) in self._catalog
        kind = "bookmark" if database == "trail" else "snapshot"
        return (kind, (volume_id, int.from_bytes(key[4:8], "big"))) in self._catalog

    def _space(self) -> Iterator[tuple[int, int, int]]:
        try:
            yield from self._reader.space()
        except FormatError as error:
            self.report.damage("bitmaps", str(error))

    def _check_space(self) -> None:
        live = {(storage_id, group): bits for storage_id, group, bits in self._space()}
        for key in sorted(live.keys() | self._owned.keys()):
            storage_id, group = key
            stored, owned = live.get(key, 0), self._owned.get(key, 0)
            for first, count in set_runs(stored & ~owned):
                self.report.leaked_blocks += count
                where = f"storage volume {storage_id}, block {group_start(group) + first}"
                self.report.problems.append(Problem("leak", where, f"{count} blocks are in use, but nothing owns them"))
            for first, count in set_runs(owned & ~stored):
                where = f"storage volume {storage_id}, block {group_start(group) + first}"
                self.report.damage(where, f"{count} blocks are owned, but marked free")
