"""Replication between pools: whatever the history, wherever it is cut off, the replica is the same."""

import itertools
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incfs import ranges, receiver, removal, snapshot, volume
from incfs.blocks import split_address
from incfs.errors import (
    BaseMismatch,
    Busy,
    ChecksumMismatch,
    NotFound,
    StreamError,
    StreamTruncated,
    TokenStale,
    UsageError,
)
from incfs.extents import page_entries
from incfs.healer import Healer
from incfs.model import PAGE_BLOCKS
from incfs.rawfile import RawFile
from incfs.rollback import roll_back
from incfs.sender import plan_resume, plan_send
from incfs.stream.encoder import StreamEncoder
from incfs.stream.merge import merge, read_records
from incfs.stream.token import decode_token, encode_token
from incfs.transfers import receiving
from tests.support.pools import (
    BLOCK,
    check_clean,
    crash,
    discard,
    make_pool,
    new_volume,
    open_tiny,
    read,
    reclaim,
    resize,
    write,
)
from tests.support.streams import boundaries_of, make_step, mutate, outcome
from tests.support.transfers import accept, contents, newest, receive, resume, send, send_all

SPAN = 40 * BLOCK

writes = st.tuples(
    st.just("write"),
    st.integers(0, SPAN),
    st.integers(1, 3 * BLOCK),
    st.sampled_from([b"\0", b"a", b"b", b"cd", b"efg"]),
)
discards = st.tuples(st.just("discard"), st.integers(0, SPAN), st.integers(1, 10 * BLOCK))
resizes = st.tuples(st.just("resize"), st.integers(0, SPAN + 3 * BLOCK))
histories = st.lists(st.lists(writes | discards | resizes, max_size=6), min_size=1, max_size=4)


def play(store, table, volume_id, operations):
    for operation in operations:
        match operation:
            case ("write", offset, length, pattern):
                write(store, table, offset, (pattern * length)[:length])
            case ("discard", offset, length):
                discard(store, table, offset, offset + length)
            case ("resize", size):
                resize(store, volume_id, size)


def grow_history(store, history, name="vol"):
    made = new_volume(store, name)
    for number, operations in enumerate(history):
        play(store, made.map_id, made.id, operations)
        snapshot.create(store, [(made.id, f"s{number}")])
    store.commit()
    return store.catalog.volume(made.id)


class Places:
    """Makes pools, and closes each once."""

    def __init__(self, make):
        self._make = make
        self._open = []

    def __call__(self, block_bytes=BLOCK):
        self._open.append(open_tiny(make_pool(self._make(), block_bytes=block_bytes)))
        return self._open[-1]

    def crash(self, store):
        self._open.remove(store)
        self._open.append(crash(store))
        return self._open[-1]

    def close(self, *stores):
        for store in stores or list(self._open):
            self._open.remove(store)
            store.abandon()


@pytest.fixture
def places(tmp_path_factory):
    made = Places(lambda: tmp_path_factory.mktemp("pool"))
    yield made
    made.close()


FUZZ_CASES = int(os.environ.get("INCFS_STREAM_CASES", "3000"))
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(history=histories, block_bytes=st.sampled_from([64, 64, 256]), every=st.booleans())
@quick
def test_what_is_received_is_what_was_sent_at_every_snapshot(places, history, block_bytes, every):
    here, there = places(), places(block_bytes)
    made = grow_history(here, history)
    if every:
        receive(there, send_all(here, made), step=997)
    else:
        for number in range(len(history)):
            wanted = [(made, here.catalog.snapshots(made.id)[number])]
            base = f"s{number - 1}" if number else None
            receive(there, send(here, plan_send(here, wanted, base=base)))
    assert contents(there, "vol") == contents(here, "vol")
    copy = there.catalog.volume_named("vol")
    assert read(there, copy.map_id) == read(here, here.catalog.snapshots(made.id)[-1].map_id)
    assert not copy.receive_lead
    check_clean(there)
    there = places.crash(there)
    assert contents(there, "vol") == contents(here, "vol")
    places.close(here, there)


def records_of(stream):
    parts = iter((stream, b""))
    return read_records(lambda: next(parts))


@given(history=histories)
@quick
def test_merged_streams_lead_where_the_parts_do(places, history):
    here, there = places(), places()
    made = grow_history(here, [[("write", 0, 700, b"base")], *history])
    snapshots = here.catalog.snapshots(made.id)
    receive(there, send(here, plan_send(here, [(made, snapshots[0])])))
    merged = None
    for older, newer in itertools.pairwise(snapshots):
        step = send(here, plan_send(here, [(made, newer)], base=older.name))
        merged = step if merged is None else b"".join(merge(records_of(merged), records_of(step), StreamEncoder()))
    assert merged is not None
    receive(there, merged)
    assert contents(there, "vol") == {
        key: value for key, value in contents(here, "vol").items() if key.endswith((" s0", f" {snapshots[-1].name}"))
    }
    direct = send(here, plan_send(here, [(made, snapshots[-1])], base="s0"))
    copy = there.catalog.volume_named("vol")
    assert outcome(direct) is None
    assert read(there, copy.map_id) == read(here, snapshots[-1].map_id)
    places.close()


HISTORY = [
    [("write", 0, 900, b"abc"), ("write", 1500, 400, b"d")],
    [("write", 64, 64, b"e"), ("discard", 1500, 200), ("resize", 1700), ("write", 640, 130, b"x")],
    [("resize", 2400), ("write", 2300, 100, b"f"), ("write", 0, 10, b"g")],
]


def cut_points(stream):
    return sorted({*boundaries_of(stream)[:-1], *range(3, len(stream), 151)})


@pytest.mark.parametrize("survives", [True, False], ids=["goes-on", "is-killed"])
def test_a_stream_cut_anywhere_is_gone_on_with_by_token(places, survives):
    here = places()
    made = grow_history(here, HISTORY)
    stream = send_all(here, made, checkpoint_bytes=1)
    for cut in cut_points(stream)[:: 1 if survives else 3]:
        there = places()
        with pytest.raises(StreamTruncated):
            receive(there, stream[:cut])
        if not survives:
            there = places.crash(there)
        try:
            state = receiving(there, there.catalog.volume_named("vol"))
        except NotFound:
            rest = stream
        else:
            if state is None:
                assert cut > boundaries_of(stream)[-3], "only STREAM_END was missing"
                rest = stream
            else:
                rest = resume(here, decode_token(encode_token(state.position)), checkpoint_bytes=1)
                assert len(rest) <= len(stream)
        receive(there, rest)
        assert contents(there, "vol") == contents(here, "vol")
        check_clean(there)
        places.close(there)


def test_what_was_never_proved_is_taken_back(places):
    """A stream that says something else of the same snapshot was cut off before its digest could tell."""
    content = b"x" * 64 + bytes(576)
    other = make_step([b"", content[:320] + b"y" * 64 + content[384:]], 0, full=True)
    there = places()
    with pytest.raises(StreamTruncated):
        receive(there, other[: boundaries_of(other)[-3]])
    receive(there, make_step([b"", content], 0, full=True))
    volume = there.catalog.volume_named("vol")
    assert read(there, there.catalog.snapshots(volume.id)[0].map_id) == content
    check_clean(there)
    places.close(there)


def test_the_same_stream_again_goes_on_too_and_a_third_time_changes_nothing(places):
    here = places()
    made = grow_history(here, HISTORY)
    stream = send_all(here, made, checkpoint_bytes=1)
    for cut in cut_points(stream)[::2]:
        there = places()
        with pytest.raises(StreamTruncated):
            receive(there, stream[:cut])
        receive(there, stream)
        assert receive(there, stream).published == []
        assert contents(there, "vol") == contents(here, "vol")
        places.close(there)


def group(store):
    first, second = new_volume(store, "a", 500), new_volume(store, "b", 900)
    for number in range(3):
        write(store, first.map_id, 64 * number, b"a" * 100)
        write(store, second.map_id, 128 * number, b"b" * 300)
        snapshot.create(store, [(first.id, f"g{number}"), (second.id, f"g{number}")])
        if number == 1:
            write(store, first.map_id, 300, b"alone" * 9)
            snapshot.create(store, [(first.id, "alone")])
    store.commit()


def test_a_group_is_published_whole_or_not_at_all_wherever_it_is_cut(places):
    here = places()
    group(here)
    plan = plan_send(here, newest(here, "ab"), every=True)
    assert [len(step) for step in plan.position.begin.steps] == [2, 2, 1, 2]
    stream = send(here, plan, checkpoint_bytes=1)
    for cut in cut_points(stream):
        there = places()
        with pytest.raises(StreamTruncated):
            receive(there, stream[:cut], "x", "y")
        there = places.crash(there)
        names = [
            [s.name for s in there.catalog.snapshots(v.id) if s.name != "alone"] for v in there.catalog.volumes.values()
        ]
        assert not names or names[0] == names[1], "published together"
        state = None
        if names:
            state = receiving(there, there.catalog.volume_named("y"))
        receive(there, stream if state is None else resume(here, state.position), "x", "y")
        assert list(contents(there, "x").values()) == list(contents(here, "a").values())
        assert contents(there, "y") == contents(here, "b")
        check_clean(there)
        places.close(there)


def test_an_abort_leaves_the_target_as_it_was(places):
    here, there = places(), places()
    made = grow_history(here, HISTORY)
    stream = send_all(here, made, checkpoint_bytes=1)
    with pytest.raises(StreamTruncated):
        receive(there, stream[:300])
    ranges.drive(there, lambda _: receiver.abort(there, "vol"))
    reclaim(there)
    assert not there.catalog.volumes
    first = send(here, plan_send(here, [(made, here.catalog.snapshots(made.id)[0])]))
    receive(there, first)
    before = read(there, there.catalog.volume_named("vol").map_id)
    rest = send_all(here, made, "s0", checkpoint_bytes=1)
    for cut in cut_points(rest)[::2]:
        with pytest.raises(StreamTruncated):
            receive(there, rest[:cut])
        target = there.catalog.volume_named("vol")
        if target.receive_lead:
            ranges.drive(there, lambda _: receiver.abort(there, "vol"))
            there.commit()
        snapshots = there.catalog.snapshots(target.id)
        if len(snapshots) == 1:
            assert read(there, target.map_id) == before
        assert read(there, target.map_id) == read(there, snapshots[-1].map_id)
        assert there.catalog.volume(target.id).size_bytes == snapshots[-1].size_bytes
        check_clean(there)
    receive(there, rest)
    assert contents(there, "vol") == contents(here, "vol")
    with pytest.raises(UsageError):
        receiver.abort(there, "vol")


def test_a_target_that_is_not_the_base_is_refused_and_not_touched(places):
    here, there = places(), places()
    made = grow_history(here, HISTORY)
    first = send(here, plan_send(here, [(made, here.catalog.snapshots(made.id)[0])]))
    rest = send_all(here, made, "s0")
    with pytest.raises(BaseMismatch, match="no volume"):
        receive(there, rest)
    receive(there, first)
    copy = there.catalog.volume_named("vol")
    write(there, copy.map_id, 0, b"changed")
    with pytest.raises(BaseMismatch, match="changed since"):
        receive(there, rest)
    snapshot.create(there, [(copy.id, "mine")])
    with pytest.raises(BaseMismatch, match="mine"):
        receive(there, rest)
    removal.remove(there, [there.catalog.snapshot(copy.id, "mine")])
    with pytest.raises(BaseMismatch, match="changed since"):
        receive(there, rest)
    there.commit()
    ranges.drive(there, lambda _: roll_back(there, copy.id, "s0"))
    receive(there, rest)
    assert contents(there, "vol") == contents(here, "vol")
    check_clean(there)


def test_meanwhile_the_volume_is_left_alone(places):
    here, there = places(), places()
    made = grow_history(here, HISTORY)
    receive(there, send(here, plan_send(here, [(made, here.catalog.snapshots(made.id)[0])])))
    rest = send_all(here, made, "s0", checkpoint_bytes=1)
    with pytest.raises(StreamTruncated):
        receive(there, rest[: boundaries_of(rest)[4]])
    copy = there.catalog.volume_named("vol")
    other = send_all(here, grow_history(here, HISTORY, "other"))
    refused = [
        lambda: snapshot.create(there, [(copy.id, "mine")]),
        lambda: removal.remove(there, there.catalog.snapshots(copy.id)),
        lambda: volume.resize(there, copy.id, 9999, shrink=False),
        lambda: volume.remove(there, copy.id, snapshots=True),
    ]
    for action in refused:
        with pytest.raises(Busy, match="receives a stream"):
            action()
    with pytest.raises(BaseMismatch, match="unfinished"):
        receive(there, other, "vol")
    with pytest.raises(TokenStale):
        plan_resume(there, receiving(there, copy).position)  # type: ignore[union-attr]
    assert contents(there, "vol") == {k: v for k, v in contents(here, "vol").items() if k.endswith(" s0")}


def damage(store, table, block_index):
    page, slot = divmod(block_index, PAGE_BLOCKS)
    storage_id, index = split_address(page_entries(store, table, page)[slot][0])
    store.pool.volume(storage_id).write_blocks(index, b"?" * BLOCK)


def test_damaged_blocks_are_healed_from_a_stream_of_the_same_snapshot_and_from_no_other(places):
    here, there = places(), places()
    made = grow_history(here, HISTORY)
    stream = send_all(here, made)
    receive(there, stream)
    copy = there.catalog.volume_named("vol")
    first = there.catalog.snapshots(copy.id)[0]
    for block_index in (0, 3, 25):
        damage(there, first.map_id, block_index)
    with pytest.raises(ChecksumMismatch):
        contents(there, "vol")
    other = places()
    receive(other, send_all(other, grow_history(other, HISTORY, "other")), "x")
    for source, healed in ((send_all(other, other.catalog.volume_named("x")), 0), (stream, 3), (stream, 0)):
        work = Healer(there, copy)
        try:
            for record in records_of(source):
                accept(there, work, record)
        except BaseMismatch:
            assert source is not stream
        assert (work.healed_blocks, work.lost_blocks) == (healed, 0)
    assert contents(there, "vol") == contents(here, "vol")
    check_clean(there)


def test_streams_of_a_pool_bring_a_plain_file_to_the_same_contents(places, tmp_path):
    here = places()
    made = grow_history(here, HISTORY)
    file = RawFile(tmp_path / "image")
    file.apply(records_of(send_all(here, made)))
    file.close()
    assert (tmp_path / "image").read_bytes() == read(here, here.catalog.snapshots(made.id)[-1].map_id)


@pytest.mark.timeout(600)
def test_hostile_streams_change_no_published_volume(tmp_path):
    """Each spoiled stream ends with exit code 14 or 12, or says the same; what was there stays."""
    here, there = (open_tiny(make_pool(tmp_path / name)) for name in ("here", "there"))
    made = grow_history(here, HISTORY)
    receive(there, send(here, plan_send(here, [(made, here.catalog.snapshots(made.id)[0])])))
    keep = new_volume(there, "keep", 640)
    write(there, keep.map_id, 0, b"keep" * 100)
    snapshot.create(there, [(keep.id, "s")])
    there.commit()
    rest = send_all(here, made, "s0", checkpoint_bytes=1)
    before, sent = (contents(there, "vol"), contents(there, "keep")), contents(here, "vol")
    copy = there.catalog.volume_named("vol")
    names = {v.name for v in there.catalog.volumes.values()}
    chance = random.Random(7)
    taken = 0
    codes: set[int] = set()
    for number in range(FUZZ_CASES):
        try:
            receive(there, mutate(rest, chance), commits=False)
            taken += 1
        except (StreamError, BaseMismatch) as error:
            codes.add(error.exit_code)
        if there.catalog.volume_named("vol").receive_lead and number % 20 == 0:
            ranges.drive(there, lambda _: receiver.abort(there, "vol"))
        if len(there.catalog.snapshots(copy.id)) > 1:
            assert contents(there, "vol").items() <= sent.items(), "what was published is what was sent"
            if there.catalog.volume_named("vol").receive_lead:
                ranges.drive(there, lambda _: receiver.abort(there, "vol"))
            ranges.drive(there, lambda _: roll_back(there, copy.id, "s0", force=True))
            reclaim(there)
        if number % 1000 == 0:
            assert before[0].items() <= contents(there, "vol").items()
            there.checkpoint()
    assert {v.name for v in there.catalog.volumes.values()} == names
    assert contents(there, "keep") == before[1]
    assert contents(there, "vol") == before[0]
    assert taken < FUZZ_CASES / 10
    assert codes <= {12, 14}
    check_clean(there)
    here.abandon()
    there.abandon()
