"""Bit sets, addresses, names: against the plainest version of each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incfs.blocks import address_runs, bit_mask, clear_runs, pack_address, set_runs, split_address, split_pages
from incfs.errors import InvalidName
from incfs.model import PAGE_BLOCKS, StorageId, map_id, split_map_id, validate_name

members = st.sets(st.integers(0, 40))


@given(members, st.integers(0, 45), st.integers(0, 45))
def test_clear_runs_are_found(present: set[int], start: int, limit: int) -> None:
    runs = list(clear_runs(sum(1 << member for member in present), start, limit))
    first, count = runs[0] if runs else (limit, 0)
    absent = [i for i in range(start, limit) if i not in present]
    assert [i for first, count in runs for i in range(first, first + count)] == absent
    if not absent:
        assert count == 0
        return
    run = 0
    while absent[0] + run in absent:
        run += 1
    assert (first, count) == (absent[0], run)


@given(members)
def test_runs_cover_a_set(present: set[int]) -> None:
    runs = list(set_runs(sum(1 << member for member in present)))
    assert {i for first, count in runs for i in range(first, first + count)} == present
    assert runs == list(address_runs(present))
    assert sum(bit_mask(*run) for run in runs) == sum(1 << member for member in present)


@given(st.integers(0, 5000), st.integers(0, 3000))
def test_ranges_are_cut_at_page_borders(first: int, count: int) -> None:
    parts = list(split_pages(first, count))
    blocks = [page * PAGE_BLOCKS + start + i for page, start, length in parts for i in range(length)]
    assert blocks == list(range(first, first + count))
    assert all(start + length <= PAGE_BLOCKS for _, start, length in parts)


@given(st.integers(1, 65535), st.integers(0, (1 << 48) - 1))
def test_addresses_survive_packing(storage: int, block: int) -> None:
    assert split_address(pack_address(StorageId(storage), block)) == (storage, block)


@given(st.integers(1, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_map_ids_survive_packing(volume: int, generation: int) -> None:
    assert split_map_id(map_id(volume, generation)) == (volume, generation)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a", "db 1", "Größe", "x" * 200, "a.b-c", "日本"])
def test_good_names(name: str) -> None:
    assert validate_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "x" * 201, "ä" * 101, "a/b", "a@b", "a#b", "a\0", "a\n", ".a", "-a", "\x7f", "a\u202e", "\udcff"]
)
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidName):
        validate_name(name)
