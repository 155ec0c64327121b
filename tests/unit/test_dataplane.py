"""The data plane alone: leases, new places for what is written again, seals."""

import pytest

from incfs.dataplane import DataPlane, LeaseExhausted, NotResident
from incfs.errors import ChecksumMismatch
from incfs.model import MapId, StorageId
from incfs.sealed import seal_pages

TABLE = MapId(1 << 32)
BASE = 1 << 48


class Blocks:
    """A storage volume in memory."""

    def __init__(self) -> None:
        self.data = bytearray(64 * 64)
        self.writes: list[tuple[int, int]] = []

    def read_blocks(self, block_index: int, block_count: int) -> bytes:
        return bytes(self.data[block_index * 64 : (block_index + block_count) * 64])

    def read_blocks_cached(self, block_index: int, block_count: int) -> bytes | None:
        return self.read_blocks(block_index, block_count)

    def write_blocks(self, block_index: int, data: bytes | memoryview) -> None:
        self.data[block_index * 64 : block_index * 64 + len(data)] = data
        self.writes.append((block_index, len(data) // 64))


def plane_with_a_page(leased: int = 8) -> tuple[DataPlane, Blocks]:
    blocks = Blocks()
    plane = DataPlane(64, {StorageId(1): blocks})
    plane.load(TABLE, 0, {})
    plane.grant(TABLE, BASE, leased)
    return plane, blocks


def test_nothing_changes_when_a_request_is_refused() -> None:
    plane, blocks = plane_with_a_page(leased=2)
    with pytest.raises(LeaseExhausted) as refused:
        plane.write(TABLE, 0, b"x" * 64 * 3)
    assert refused.value.block_count == 3
    with pytest.raises(NotResident):
        plane.write(TABLE, 511 * 64, b"x" * 128)
    assert (plane.leased_blocks(TABLE), plane.fresh_count, blocks.writes) == (2, 0, [])


def test_what_is_written_again_gets_another_place_and_only_fresh_blocks_are_used_again() -> None:
    plane, blocks = plane_with_a_page()
    for letter in b"abc":
        plane.write(TABLE, 3 * 64, bytes([letter]) * 64)
    assert blocks.writes == [(0, 1), (1, 1), (0, 1)]
    (sealed,) = plane.seal().tables
    assert (list(sealed.slots), list(sealed.addresses), list(sealed.old_addresses)) == ([3], [BASE], [0])
    plane.write(TABLE, 3 * 64, b"d" * 64)
    assert blocks.writes[-1] == (1, 1)
    plane.write(TABLE, 3 * 64, b"e" * 64)
    (sealed,) = plane.seal().tables
    assert (list(sealed.slots), list(sealed.addresses), list(sealed.old_addresses)) == ([3], [BASE + 2], [BASE])
    assert plane.seal().tables == []


def test_what_replaces_many_fresh_blocks_lies_together_too() -> None:
    plane, blocks = plane_with_a_page()
    for letter in b"abc":
        plane.write(TABLE, 0, bytes([letter]) * 4 * 64)
    assert blocks.writes == [(0, 4), (4, 4), (0, 4)]


def test_a_fresh_block_of_a_lease_that_was_taken_back_is_dropped() -> None:
    plane, _ = plane_with_a_page()
    plane.write(TABLE, 0, b"a" * 64)
    plane.revoke(TABLE)
    plane.grant(TABLE, BASE + 32, 2)
    plane.write(TABLE, 0, b"b" * 64)
    assert plane.leased_blocks(TABLE) == 1
    assert plane.seal().dropped == [BASE]
    plane.write(TABLE, 0, b"c" * 64)
    plane.discard(TABLE, 0, 1)
    assert plane.leased_blocks(TABLE) == 1
    assert plane.seal().dropped == []


def test_zeros_become_holes_and_give_fresh_blocks_back() -> None:
    plane, _ = plane_with_a_page()
    plane.write(TABLE, 0, b"a" * 64 + bytes(64) + b"b" * 64)
    assert plane.mapped_delta(TABLE) == 2
    plane.write(TABLE, 0, bytes(64))
    plane.discard(TABLE, 2, 1)
    batch = plane.seal()
    assert (batch.tables, batch.dropped, plane.leased_blocks(TABLE)) == ([], [], 8)
    assert plane.read(TABLE, 0, 3) == bytes(192)


def test_a_discard_of_a_sealed_block_is_appended() -> None:
    plane, _ = plane_with_a_page()
    plane.write(TABLE, 0, b"a" * 64)
    crc = plane.seal().tables[0].checksums[0]
    plane.discard(TABLE, 0, 2)
    expected = seal_pages(TABLE, [(0, {0: (0, 0)}, {0: (BASE, crc)})])
    assert plane.seal().tables == [expected._replace(runs=[0, 1, 0, b""])]


def test_neighbours_are_written_at_once() -> None:
    plane, blocks = plane_with_a_page()
    plane.write(TABLE, 0, b"a" * 64 * 3 + bytes(64) + b"b" * 128)
    assert blocks.writes == [(0, 3), (3, 2)]


def test_a_block_that_changed_on_disk_is_never_returned() -> None:
    plane, blocks = plane_with_a_page()
    plane.write(TABLE, 0, b"a" * 192)
    blocks.data[100] ^= 1
    assert plane.read(TABLE, 0, 1) == b"a" * 64
    with pytest.raises(ChecksumMismatch, match=r"virtual block 1 of table 1\.0"):
        plane.read(TABLE, 0, 3)


def test_pages_with_unsealed_mappings_stay_resident() -> None:
    plane, _ = plane_with_a_page()
    plane.write(TABLE, 0, b"a" * 64)
    for page_index in range(1, 5):
        plane.load(TABLE, page_index, {})
    plane.shrink(0)
    evicted = plane.shrink(0)
    assert plane.is_resident(TABLE, 0)
    assert len(evicted) == 4
    assert plane.page_count == 1


def test_unused_leases_come_back() -> None:
    plane, _ = plane_with_a_page()
    plane.write(TABLE, 0, b"a" * 64)
    assert plane.revoke() == list(range(BASE + 1, BASE + 8))
    assert plane.leased_blocks(TABLE) == 0
