"""The C code for mappings, held against a few lines of Python."""

from array import array
from collections.abc import Sequence
from itertools import groupby

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incfs import _mappings, codec, groups
from incfs._mappings import Page
from incfs.blocks import stored_addresses
from incfs.codec import Entries
from incfs.errors import FormatError
from incfs.model import HOLE, INHERIT, PAGE_BLOCKS

slots = st.integers(0, PAGE_BLOCKS - 1)
addresses = st.one_of(
    st.sampled_from([INHERIT, HOLE]), st.integers(1 << 48, (1 << 48) + 900), st.integers(1 << 48, (1 << 64) - 1)
)
checksums = st.integers(0, (1 << 32) - 1)


def _with_checksums(page: dict[int, tuple[int, int]]) -> Entries:
    return {slot: (address, crc if address > HOLE else 0) for slot, (address, crc) in page.items()}


scattered = st.dictionaries(slots, st.tuples(addresses, checksums)).map(_with_checksums)
regular = st.builds(
    lambda first, step, address, jump: {i: (address + i * jump, i) for i in range(first, PAGE_BLOCKS, step)},
    slots, st.integers(1, 9), st.integers(1 << 48, 1 << 49), st.integers(1, 3),
)  # fmt: skip
entries = st.one_of(scattered, regular)
Columns = tuple["array[int]", "array[int]", "array[int]"]


def columns(page: Entries) -> Columns:
    order = sorted(page)
    return array("H", order), array("Q", (page[i][0] for i in order)), array("I", (page[i][1] for i in order))


@given(st.lists(st.tuples(st.booleans(), entries), max_size=5), entries)
def test_a_page_has_what_was_put_last(changes: list[tuple[bool, Entries]], below: Entries) -> None:
    page, expected = Page(), dict[int, tuple[int, int]]()
    for is_columns, change in changes:
        if is_columns:
            page.append(*columns(change), 0, len(change))
        else:
            page.update(dict(reversed(change.items())))
        expected.update(change)
    before = dict(below)
    assert page.over(below) == {**below, **expected}
    assert below == before
    assert len(page) == len(expected)
    assert Page(page).over({}) == expected == Page(expected).over({})


@given(entries, st.data())
def test_a_page_takes_a_part_of_columns(page: Entries, data: st.DataObject) -> None:
    first, end = sorted(data.draw(st.lists(st.integers(0, len(page)), min_size=2, max_size=2)))
    part = Page()
    part.append(*columns(page), first, end)
    assert part.over({}) == {slot: page[slot] for slot in sorted(page)[first:end]}


@given(st.none() | entries, entries, st.booleans())
def test_a_fold_is_what_is_stored_with_changes_above(
    stored: Entries | None, above: Entries, keep_inherited: bool
) -> None:
    body = codec.fold_entries(None, Page(stored or {}), keep_inherited=True)
    folded = codec.fold_entries(body, Page(above), keep_inherited=keep_inherited)
    expected = {**(stored or {}), **above}
    if not keep_inherited:
        expected = {slot: entry for slot, entry in expected.items() if entry[0] != INHERIT}
    assert (folded is None) == (not expected)
    assert (codec.decode_entries(folded) if folded else {}) == expected


@given(entries)
def test_few_runs_are_what_msgpack_makes_of_them(page: Entries) -> None:
    runs, flat = list(codec.entry_runs(page)), list[object]()
    for first, count, address in runs:
        crcs = array("I", (page[first + i][1] for i in range(count)) if address > HOLE else ())
        flat += (first, count, address, crcs.tobytes())
    body = codec.fold_entries(None, Page(page), keep_inherited=True)
    assert (body is None) == (not page)
    if body is None:
        return
    assert body[:1] == (b"\1" if len(runs) <= 96 else b"\2")
    assert len(runs) > 96 or body[1:] == msgpack.packb(flat)


@pytest.mark.parametrize(
    "flat",
    [
        [5, 1, 1 << 48, bytes(4), 5, 1, 1 << 50, bytes(4)],
        [5, 1, 1 << 48, bytes(4), 4, 1, 1 << 50, bytes(4)],
        [0, 3, 1 << 48, bytes(12), 2, 1, HOLE, b""],
    ],
)
def test_runs_out_of_order_are_refused(flat: list[object]) -> None:
    with pytest.raises(FormatError, match="order"):
        codec.decode_entries(b"\1" + msgpack.packb(flat))


@given(entries, st.sets(slots))
def test_replaced_mappings_go_into_the_increment_or_become_free(old: Entries, known: set[int]) -> None:
    kept, now_known, freed = _mappings.displace(codec.slot_set(known), *columns(old), 0, len(old))
    assert kept.over({}) == {slot: entry for slot, entry in old.items() if slot not in known}
    assert now_known == codec.slot_set(known | old.keys())
    assert [*array("Q", freed)] == [old[slot][0] for slot in sorted(old) if slot in known and old[slot][0] > HOLE]


block_addresses = st.one_of(
    st.integers(1 << 48, (1 << 48) + 70000), st.integers(2 << 48, (2 << 48) + 99), st.integers(2, (1 << 64) - 1)
)


@given(st.lists(block_addresses, unique=True, max_size=200), st.sampled_from([8, 24, 32768]))
def test_addresses_are_sorted_into_groups(found: list[int], group_blocks: int) -> None:
    def place(address: int) -> tuple[int, int]:
        return address >> 48, (address & (1 << 48) - 1) // group_blocks

    expected = [
        (*where, sum(1 << (address & (1 << 48) - 1) % group_blocks for address in members))
        for where, members in groupby(sorted(found), place)
    ]
    made = _mappings.groups(array("Q", found), group_blocks)
    assert [(storage, group, int.from_bytes(bits, "little")) for storage, group, bits in made] == expected


@pytest.mark.parametrize("found", [[9, 9], [9, 3, 9], [(1 << 48) + 5, 7, (1 << 48) + 5]])
def test_a_block_given_twice_is_noticed(found: list[int]) -> None:
    with pytest.raises(AssertionError, match="twice"):
        list(groups.by_group(found))


@given(st.lists(addresses))
def test_only_stored_blocks_have_addresses(found: list[int]) -> None:
    assert [*stored_addresses(array("Q", found))] == [address for address in found if address > HOLE]


@pytest.mark.parametrize(
    ("parts", "first", "end"),
    [
        ((array("H", [1, 1]), array("Q", [5, 5]), array("I", [0, 0])), 0, 2),
        ((array("H", [2, 1]), array("Q", [5, 5]), array("I", [0, 0])), 0, 2),
        ((array("H", [PAGE_BLOCKS]), array("Q", [5]), array("I", [0])), 0, 1),
        ((array("H", [1]), array("Q", [5]), array("I", [0])), 0, 2),
        ((array("H", [1]), array("Q", [5]), array("I", [0])), -1, 1),
        ((array("H", [1]), array("Q", [5]), array("I", [0])), 1, 0),
        ((array("H", [1, 2]), array("Q", [5]), array("I", [0, 0])), 0, 1),
        ((array("H", [1, 2]), array("Q", [5, 5]), array("I", [0])), 0, 1),
        ((array("H", range(PAGE_BLOCKS + 1)), array("Q", [5] * 513), array("I", [0] * 513)), 0, 513),
    ],
)
def test_columns_of_no_page_are_refused(parts: Columns, first: int, end: int) -> None:
    page = Page({3: (1 << 48, 1)})
    with pytest.raises(ValueError, match=r"page|columns"):
        page.append(*parts, first, end)
    with pytest.raises(ValueError, match=r"page|columns"):
        _mappings.displace(bytes(64), *parts, first, end)
    assert page.over({}) == {3: (1 << 48, 1)}


@pytest.mark.parametrize(
    "wrong",
    [{PAGE_BLOCKS: (5, 0)}, {-1: (5, 0)}, {0: (-1, 0)}, {0: (1 << 64, 0)}, {0: (5, 1 << 32)}, {0: 5}, {0: (5,)}],
)
def test_a_dict_of_no_page_is_refused(wrong: dict[int, tuple[int, int]]) -> None:
    with pytest.raises((ValueError, OverflowError)):
        Page(wrong)


@pytest.mark.parametrize("wrong", [[], None, "page"])
def test_what_holds_no_mappings_is_refused(wrong: Sequence[int]) -> None:
    with pytest.raises(TypeError):
        Page(wrong)  # type: ignore[arg-type]
