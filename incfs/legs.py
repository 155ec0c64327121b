"""Legs of mirrors: left behind when they fail, healed when they are wrong, brought up to date again.

What a stale leg lacks is remembered in bitmaps, so that a resilver copies only that.  Each block is
verified on its way: a leg is never made from data that is not right.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from incfs import groups
from incfs.backing import File
from incfs.blocks import pack_address, split_address
from incfs.codec import checksum
from incfs.dataplane import LegFailed
from incfs.epoch import Epoch, Point, Stamp, is_behind
from incfs.errors import BackingError, ChecksumMismatch, IncfsError, NotFound, UsageError
from incfs.extents import page_entries
from incfs.image import DATA_OFFSET_BYTES, read_stamp, write_stamp
from incfs.memory import one_step
from incfs.mirror import MirroredFile
from incfs.model import HOLE, PAGE_BLOCKS, Storage, StorageId
from incfs.overlay import TableKey
from incfs.storage import StorageVolume
from incfs.store import Store


def mirror_of(store: Store, storage_id: StorageId) -> MirroredFile:
    """Look up the legs of a mirrored storage volume.

    Raises:
        StorageNotFound: No such storage volume.
        UsageError: It is not mirrored.
    """
    mirror = store.pool.volume(storage_id).mirror
    if mirror is None:
        raise UsageError(f"storage volume {storage_id} is not mirrored", storage=storage_id)
    return mirror


def leave(store: Store, refusal: LegFailed) -> None:
    """Leave a leg behind that the data plane could not write.

    Raises:
        BackingError: It was the last sound one; the pool is read-only.
    """
    mirror = mirror_of(store, refusal.storage_id)
    attached = store.pool.volume(refusal.storage_id).attached_legs  # a flush may have left one of them meanwhile
    reason = os.strerror(refusal.host_errno)
    if refusal.position < len(attached) and not mirror.leave(attached[refusal.position], reason):
        error = BackingError(f"cannot write {mirror.path}: {reason}", path=str(mirror.path), action="write")
        store.fail(error)
        raise error
    store.note_failed_legs()


Run = tuple[StorageId, int, list[int]]
"""(storage volume, first block, checksums) of stored blocks that follow each other."""
_MEND_BYTES = 1 << 20
"""What is put right at once: the largest request of the kernel."""


def plan_mend(store: Store, error: IncfsError, mended: set[object]) -> Callable[[], bool]:
    """Say how to put right what a request found wrong.  Owner thread.

    Args:
        store: The pool.
        error: What it found.
        mended: The blocks that it found wrong before: healing those did not help.

    Returns:
        What does it, in any thread, and tells whether to ask again; ``note_failed_legs`` follows, since the data plane
        must not read a leg that was left behind.
    """
    if error.facts.get("action") != "write" and store.note_failed_legs():
        return lambda: True  # somebody left the leg behind that the data plane still read
    place = error.facts.get("storage"), error.facts.get("block")
    if place in mended:
        return lambda: False
    mended.add(place)
    runs = _runs_behind(store, error)
    return lambda: heal(store, error, runs)


def _runs_behind(store: Store, error: IncfsError) -> list[Run]:
    """List the block that a read found wrong, and those that it meets next: of a leg that is wrong most are.

    Nothing where the page does not say any more what the read was told.
    """
    facts = error.facts
    if "virtual_block" not in facts or store.pool.volume(facts["storage"]).mirror is None:
        return []
    page_index, slot = divmod(facts["virtual_block"], PAGE_BLOCKS)
    try:
        entries = page_entries(store, facts["map_id"], page_index)
    except IncfsError:
        return []
    if entries.get(slot) != (pack_address(facts["storage"], facts["block"]), facts["expected"]):
        return []
    runs: list[Run] = []
    for index in range(slot, min(PAGE_BLOCKS, slot + max(1, _MEND_BYTES // store.block_bytes))):
        address, crc = entries.get(index, (HOLE, 0))
        if address <= HOLE:
            continue
        storage_id, block_index = split_address(address)
        if runs and (storage_id, block_index) == (runs[-1][0], runs[-1][1] + len(runs[-1][2])):
            runs[-1][2].append(crc)
        else:
            runs.append((storage_id, block_index, [crc]))
    return runs


def heal(store: Store, error: IncfsError, runs: Sequence[Run] = ()) -> bool:
    """Put right what a read found wrong; False when that cannot be.  Any thread; freed blocks stay unused meanwhile.

    Args:
        store: The pool.
        error: What it found.
        runs: The block, and others that may be wrong, too.
    """
    is_read = isinstance(error, ChecksumMismatch) or error.facts.get("action") == "read"
    volume = store.pool.volumes.get(StorageId(error.facts.get("storage", 0)))
    if not is_read or volume is None or volume.mirror is None or store.mismatch is not None:
        return False
    first = volume.mirror.sound_legs()[0][0]
    own, others = (runs[0][2], runs[1:]) if runs else ([error.facts.get("expected")], ())
    healed = volume.heal_run(error.facts["block"], own)
    for storage_id, block_index, expected in others:
        other = store.pool.volumes.get(storage_id)
        if other is not None:
            other.heal_run(block_index, expected)
    if healed or (healed == 0 and isinstance(error, ChecksumMismatch)):
        return True
    if volume.mirror.sound_legs()[0][0] != first:
        return True  # it could not be healed and is left behind
    # It cannot be rewritten, or another block of the same read is to blame: read another leg.
    sound = volume.mirror.sound_legs()
    return isinstance(error, BackingError) and volume.mirror.leave(sound[0][0], str(error))


# Resilver


def open_leg(store: Store, storage_id: StorageId, number: int) -> File:
    """Open a stale leg, as long as the others.  Any thread.

    Raises:
        NotFound: There is no such leg.
        ImageMismatch: The file is missing or another's.
        NoSpace: Its host has no room for it.
    """
    mirror, volume = mirror_of(store, storage_id), store.pool.volume(storage_id)
    if number >= len(mirror.legs):
        raise NotFound(f"storage volume {storage_id} has no leg {number}")
    images, record = store.pool.images, volume.record
    leg = mirror.legs[number] or images.open_leg(record, images.leg_paths(record)[number])
    mirror.legs[number] = leg
    if not _is_as_left(record, number, leg):
        mirror.unknown.add(number)
    missing = mirror.length_bytes() - leg.length_bytes()
    if missing > 0:
        leg.allocate(leg.length_bytes(), missing)
    return leg


def attach_leg(store: Store, storage_id: StorageId, number: int) -> File:
    """Let a stale leg that was opened be written again, not read; give its file."""
    mirror = mirror_of(store, storage_id)
    leg = mirror.legs[number]
    assert leg is not None
    leg.begin_anew()
    if number in mirror.unknown:
        mirror.unknown.discard(number)
        store.pool.lack_everything(storage_id)
    mirror.rebuilding.add(number)
    store.plane.attach(storage_id)
    store.reclaim_leases()  # what was written to the others only is among the changed blocks from now on
    store.pool.volume(storage_id).doubt()  # and this leg's host may not have what theirs have
    return leg


def _is_as_left(record: Storage, number: int, leg: File) -> bool:
    """Tell whether a leg is the one that was left behind, and not an older or another copy of it."""
    stamp, left = read_stamp(leg), next((left for left in record.left_legs if left[0] == number), None)
    if stamp is None or left is None:
        return False
    return stamp.epoch == Epoch(*left[1:3]) and not is_behind(stamp.point, Point(*left[3:]))


Lacking = list[tuple[int, int]]
"""(block index, checksum) of blocks that a leg lacks, ascending."""


def lacking(store: Store, table: TableKey, page_index: int, storage_id: StorageId, bits: dict[int, int]) -> Lacking:
    """Look up which blocks of a page are among those."""
    found = []
    for address, crc in store.log.entries(table, page_index).values():
        if address > HOLE and split_address(address)[0] == storage_id:
            block_index = split_address(address)[1]
            group_index, member = divmod(block_index, groups.GROUP_BLOCKS)
            if bits.get(group_index, 0) >> member & 1:
                found.append((block_index, crc))
    return sorted(found)


def copy_lacking(store: Store, storage_id: StorageId, number: int, lacks: Lacking) -> list[int]:
    """Copy blocks to a leg from the sound ones; give those that nobody has right.  Any thread."""
    volume, size = store.pool.volumes[storage_id], store.block_bytes
    mirror = mirror_of(store, storage_id)
    leg = mirror.legs[number]
    assert leg is not None
    wrong = []
    for run in _runs(lacks):
        data = bytearray(volume.read_blocks(run[0][0], len(run)))
        for i, (block_index, crc) in enumerate(run):
            span = slice(i * size, (i + 1) * size)
            if checksum(data[span]) != crc:
                volume.heal(block_index, crc)
                data[span] = volume.read_blocks(block_index, 1)
            if checksum(data[span]) != crc:
                wrong.append(block_index)
        leg.pwrite(DATA_OFFSET_BYTES + run[0][0] * size, bytes(data))
    return wrong


def _runs(blocks: Lacking) -> Iterator[list[tuple[int, int]]]:
    run: list[tuple[int, int]] = []
    for block in blocks:
        if run and block[0] != run[-1][0] + 1:
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def sync_leg(store: Store, storage_id: StorageId, number: int) -> None:
    """Make durable what was copied to a leg, and that it belongs to the pool from now on.  Any thread."""
    leg = mirror_of(store, storage_id).legs[number]
    assert leg is not None
    stamp = Stamp(store.standing.settled, store.point)
    write_stamp(leg, stamp)
    leg.sync()
    mirror_of(store, storage_id).stamps[number] = stamp


@one_step
def finish_resilver(store: Store, storage_id: StorageId, number: int) -> None:
    """Let a leg that was brought up to date, and synced, be read again; the caller commits."""
    mirror, record = mirror_of(store, storage_id), store.pool.volume(storage_id).record
    mirror.rebuilding.discard(number)
    mirror.stale.discard(number)
    store.amend(
        record,
        stale_legs=tuple(leg for leg in record.stale_legs if leg != number),
        left_legs=tuple(left for left in record.left_legs if left[0] != number),
    )
    store.plane.attach(storage_id)


def require_other_leg(store: Store, storage_id: StorageId, number: int) -> None:
    """Refuse to do without the only sound leg.

    Raises:
        UsageError: It is.
    """
    if [leg for leg, _ in mirror_of(store, storage_id).sound_legs()] == [number]:
        raise UsageError(f"leg {number} of storage volume {storage_id} is the only sound one", storage=storage_id)


@one_step
def replace_leg(store: Store, storage_id: StorageId, number: int, path: str) -> None:
    """Let another, empty file be a leg from now on; it lacks everything.

    The caller has made the file, and commits.
    """
    mirror, volume = mirror_of(store, storage_id), store.pool.volume(storage_id)
    record = volume.record
    paths = list(record.leg_paths)
    paths[number] = path
    mirror.leave(number, "it is replaced")
    mirror.failed.pop(number, None)
    mirror.legs[number] = None
    mirror.stamps.pop(number, None)
    stale = tuple(sorted({*record.stale_legs, number}))
    left = tuple(left for left in record.left_legs if left[0] != number)
    store.amend(record, path=paths[0], mirrors=tuple(paths[1:]), stale_legs=stale, left_legs=left)
    store.pool.lack_everything(storage_id)
    store.plane.attach(storage_id)


# Scrub


@dataclass(slots=True)
class Scrubbed:
    """What a look at some blocks came to."""

    verified_blocks: int = 0
    """Copies that were compared with their checksum."""
    wrong_blocks: int = 0
    healed_blocks: int = 0
    lost_blocks: int = 0
    """No copy is right."""

    def add(self, other: "Scrubbed") -> None:
        """Add another look's."""
        self.verified_blocks += other.verified_blocks
        self.wrong_blocks += other.wrong_blocks
        self.healed_blocks += other.healed_blocks
        self.lost_blocks += other.lost_blocks


def page_blocks(store: Store, table: TableKey, page_index: int) -> list[tuple[StorageId, int, int]]:
    """List (storage volume, block, checksum) of what a page names."""
    entries = store.log.entries(table, page_index).values()
    return sorted((*split_address(address), crc) for address, crc in entries if address > HOLE)


def scrub_blocks(store: Store, blocks: list[tuple[StorageId, int, int]]) -> Scrubbed:
    """Verify all copies of blocks on disk, and heal what can be.  Any thread."""
    result = Scrubbed()
    for storage_id, block_index, crc in blocks:
        volume = store.pool.volumes.get(storage_id)
        if volume is not None:
            _scrub_block(volume, block_index, crc, store.block_bytes, result)
    return result


def _scrub_block(volume: StorageVolume, block_index: int, crc: int, size: int, result: Scrubbed) -> None:
    mirror, offset = volume.mirror, DATA_OFFSET_BYTES + block_index * size
    files = [leg for _, leg in mirror.sound_legs()] if mirror is not None else [volume.file]
    right = 0
    for file in files:
        try:
            file.drop_cache(offset, size)
            right += checksum(file.pread(offset, size)) == crc
        except BackingError:
            continue
    result.verified_blocks += len(files)
    result.wrong_blocks += len(files) - right
    if right < len(files):
        result.healed_blocks += volume.heal(block_index, crc) or 0
        result.lost_blocks += not right
