"""The send stream: what is made is what is read, whatever else comes is refused."""

import random
import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from incfs.codec import checksum, pack
from incfs.errors import (
    BaseMismatch,
    LimitExceeded,
    StreamCorrupt,
    StreamError,
    StreamTruncated,
    StreamUnsupported,
    TokenStale,
    UsageError,
)
from incfs.stream.chain import count_present
from incfs.stream.encoder import StreamEncoder
from incfs.stream.frames import OPTIONAL, PREAMBLE_BYTES, RecordType, make_frame
from incfs.stream.merge import merge, read_records
from incfs.stream.ranges import CHUNK_BYTES, join_ranges
from incfs.stream.reader import Position, StreamReader
from incfs.stream.records import (
    MAX_BODY_BYTES,
    Checkpoint,
    Link,
    Member,
    Range,
    SnapBegin,
    SnapEnd,
    StreamBegin,
    StreamEnd,
    Write,
    Zero,
)
from incfs.stream.token import decode_token, encode_token
from tests.support.streams import (
    BLOCK,
    VOLUME,
    apply_to,
    boundaries_of,
    frames_of,
    join_frames,
    make_step,
    mutate,
    outcome,
    read_all,
    snapshot_uuid,
)

# A few kinds of blocks, so that zeros and repetitions are frequent.
blocks = st.sampled_from([bytes(BLOCK), b"a" * BLOCK, b"b" * BLOCK, bytes(range(BLOCK)), b"\0" * (BLOCK - 1) + b"z"])


@st.composite
def contents(draw, most=8):
    whole = b"".join(draw(st.lists(blocks, max_size=most)))
    return whole + draw(st.sampled_from([b"", b"t" * 7, bytes(5), b"u" * (BLOCK - 1)]))


def merged(first, second, level=1):
    def feed(stream):
        parts = iter((stream, b""))
        return read_records(lambda: next(parts))

    return b"".join(merge(feed(first), feed(second), StreamEncoder(level=level)))


@given(st.lists(contents(), min_size=2, max_size=4), st.integers(1, 300), st.sampled_from([0, 1]), st.booleans())
def test_a_stream_read_in_pieces_leads_from_the_first_contents_to_the_last(chain, step, level, often):
    stream = make_step(chain, 0, level=level, checkpoint_bytes=1 if often else 1 << 30)
    assert apply_to(chain[0], read_all(stream, step)) == chain[-1]


@given(contents(), contents(), contents(), contents())
@settings(max_examples=300)
def test_merging_is_applying_one_after_the_other_and_associative(a, b, c, d):
    one, two, three = make_step([a, b], 0), make_step([b, c], 1), make_step([c, d], 2)
    assert apply_to(a, read_all(merged(one, two))) == c
    left, right = merged(merged(one, two), three), merged(one, merged(two, three))
    assert left == right
    assert apply_to(a, read_all(left)) == d


@given(st.lists(contents(), min_size=2, max_size=3), st.booleans())
@settings(max_examples=20)
def test_a_stream_cut_anywhere_is_truncated_and_its_token_says_what_is_left(chain, often):
    stream = make_step(chain, 0, checkpoint_bytes=1 if often else 1 << 30)
    for cut in range(0, len(stream), 3):
        reader = StreamReader()
        list(reader.feed(stream[:cut]))
        with pytest.raises(StreamTruncated):
            reader.close()
        if reader.position is not None and reader.position.link is not None:
            assert decode_token(encode_token(reader.position)) == reader.position


def test_any_number_of_snapshots_and_volumes_of_a_group_follow_each_other():
    members = (Member(VOLUME, "a"), Member(snapshot_uuid(900), "b"))
    step = (Link(0, None, snapshot_uuid(1)), Link(1, None, snapshot_uuid(2)))
    begin = StreamBegin(members, (step,), done_count=1)
    encoder = StreamEncoder()
    stream = encoder.begin(begin) + encoder.begin_snapshot(SnapBegin(step[1], "s", 0, 640, BLOCK, 5, "tagged"))
    stream += encoder.add(Write(64, b"x" * 64)) + encoder.end_snapshot() + encoder.end()
    found = read_all(stream)
    assert found[0] == begin
    assert found[1] == SnapBegin(step[1], "s", 0, 640, BLOCK, 5, "tagged")
    assert found[-1] == StreamEnd(1, found[-1].digest)  # type: ignore[union-attr]


def test_the_digest_of_a_resumed_snapshot_is_the_same_as_of_a_whole_one():
    link = Link(0, None, snapshot_uuid(1))
    begin = StreamBegin((Member(VOLUME, "v"),), ((link,),))
    parts: list[Range] = [Write(0, b"a" * 64), Zero(64, 64), Write(192, b"b" * 64)]
    encoder = StreamEncoder(checkpoint_bytes=1)
    whole = encoder.begin(begin) + encoder.begin_snapshot(SnapBegin(link, "s", 0, 256, BLOCK, 5))
    whole += b"".join(encoder.add(part) for part in parts) + encoder.end_snapshot() + encoder.end()
    records = read_all(whole)
    first = next(record for record in records if isinstance(record, Checkpoint))
    encoder = StreamEncoder()
    rest = encoder.begin(begin) + encoder.begin_snapshot(
        SnapBegin(link, "s", 0, 256, BLOCK, 5, "", first.offset_bytes, first.digest)
    )
    rest += b"".join(encoder.add(part) for part in parts[1:]) + encoder.end_snapshot() + encoder.end()
    digests = [r.digest for stream in (whole, rest) for r in read_all(stream) if isinstance(r, SnapEnd)]
    assert digests[0] == digests[1]


def test_ranges_have_one_canonical_form():
    data = bytes(range(256)) * (CHUNK_BYTES // 128)
    pieces = [Write(i, data[i : i + 1000]) for i in range(0, len(data), 1000)]
    joined = list(join_ranges(pieces))
    assert [len(r.data) for r in joined if isinstance(r, Write)] == [CHUNK_BYTES, CHUNK_BYTES]
    assert list(join_ranges([Zero(0, 64), Zero(64, 64), Zero(256, 64)])) == [Zero(0, 128), Zero(256, 64)]


# What is refused

SAMPLE = make_step(
    [b"", b"a" * 300 + bytes(200), b"b" * 128 + b"a" * 172 + b"c" * 100], 0, checkpoint_bytes=1, full=True
)


def spoil(index, body, kind=None):
    frames = frames_of(SAMPLE)
    frames[index] = (kind or frames[index][0], 0, body)
    return join_frames(SAMPLE, frames)


def test_an_optional_record_of_unknown_type_is_skipped_and_another_refused():
    for flags, expected in ((OPTIONAL, None), (0, StreamUnsupported)):
        frames = frames_of(SAMPLE)
        frames.insert(3, (99, flags, b"from the future"))
        assert outcome(join_frames(SAMPLE, frames)) is expected


def test_a_newer_version_or_feature_is_unsupported():
    for at in (8, 12):
        preamble = bytearray(SAMPLE[:PREAMBLE_BYTES])
        preamble[at] = 2
        preamble[-4:] = checksum(bytes(preamble[:-4])).to_bytes(4, "little")
        assert outcome(bytes(preamble) + SAMPLE[PREAMBLE_BYTES:]) is StreamUnsupported


@pytest.mark.parametrize(
    ("index", "body"),
    [
        (0, pack([[], [], 0])),
        (0, pack([[[bytes(16), "v"]], [[[0, None, bytes(16)]], [[0, bytes(16), bytes(16)]]], 0])),
        (0, pack([[[bytes(16), "../v"]], [[[0, None, bytes(16)]]], 0])),
        (1, pack([0, None, bytes(15) + b"\1", "s", 0, 1 << 63, 64, 0, "", 0, b""])),
        (3, pack([-64, 64, 0, b"x" * 64])),
        (3, pack([0, 65, 0, b"x" * 65])),
        (3, pack([0, 1 << 30, 1, zstandard.compress(bytes(1 << 24))])),
        (3, pack([0, 64, 1, zstandard.compress(bytes(1 << 24))])),
        (3, pack([0, 64, 1, zstandard.compress(bytes(64)) + b"more"])),
        (3, pack([0, 64, 2, b"x" * 64])),
        (3, pack([0, 0, 0, b""])),
        (2, pack([12345])),
        (4, pack([64, bytes(32)])),
        (2, b"\xdd\xff\xff\xff\xff"),
    ],
)
def test_hostile_values_under_right_checksums_are_refused(index, body):
    assert outcome(spoil(index, body)) is StreamCorrupt


def test_a_length_beyond_the_limit_is_refused_before_anything_is_kept():
    header = make_frame(RecordType.STREAM_BEGIN, 0, bytes(MAX_BODY_BYTES + 1))[:100]
    with pytest.raises(StreamCorrupt, match="limit"):
        list(StreamReader().feed(SAMPLE[:PREAMBLE_BYTES] + header))


def test_bytes_behind_the_end_are_refused():
    assert outcome(SAMPLE + b"x") is StreamCorrupt
    reader = StreamReader()
    list(reader.feed(SAMPLE))
    with pytest.raises(StreamCorrupt):
        list(reader.feed(b"x"))


def test_a_chain_too_long_for_one_stream_is_refused():
    links = [Link(0, None if not i else snapshot_uuid(i), snapshot_uuid(i + 1)) for i in range(40_000)]
    with pytest.raises(LimitExceeded):
        StreamEncoder().begin(StreamBegin((Member(VOLUME, "v"),), tuple((link,) for link in links)))


@pytest.mark.parametrize(("count", "is_measured"), [(17_000, False), (200, True)])
def test_spoiled_streams_are_refused_with_a_typed_error_in_bounded_memory(count, is_measured):
    chance = random.Random(20_260)
    survived = 0
    if is_measured:
        tracemalloc.start()
    try:
        for _ in range(count):
            try:
                read_all(mutate(SAMPLE, chance), chance.choice((64, 1 << 20)))
            except StreamError:
                continue
            # What is taken says the same: an optional record more, or the same bytes put in again.
            survived += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20, peak
    assert survived < count / 20


def test_streams_that_do_not_follow_each_other_are_not_merged():
    a, b, c = b"a" * 64, b"b" * 64, b"c" * 64
    one, later, chain = make_step([a, b], 0), make_step([b, c], 5), make_step([a, b, c], 0)
    with pytest.raises(BaseMismatch):
        merged(one, later)
    with pytest.raises(UsageError):
        merged(one, chain)
    with pytest.raises(StreamTruncated):
        merged(one, b"")
    with pytest.raises(StreamTruncated):
        merged(one, make_step([b, c], 1)[: boundaries_of(make_step([b, c], 1))[-2]])


@pytest.mark.parametrize("text", ["", "nonsense", "incfs1-", "incfs1-AAAA", "incfs1-é", "incfs1-" + "A" * 4_000_000])
def test_a_damaged_token_is_stale(text):
    with pytest.raises(TokenStale):
        decode_token(text)


def test_a_token_with_one_character_changed_is_stale():
    text = encode_token(
        Position(StreamBegin((Member(VOLUME, "v"),), ((Link(0, None, snapshot_uuid(1)),),)), 64, bytes(32))
    )
    assert decode_token(f" {text}\n").offset_bytes == 64
    for at in range(7, len(text) - 2, 5):
        with pytest.raises(TokenStale):
            decode_token(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])


def test_a_target_skips_what_it_has_and_refuses_half_a_group():
    steps = tuple((Link(0, snapshot_uuid(i), snapshot_uuid(i + 1)),) for i in range(3))
    begin = StreamBegin((Member(VOLUME, "v"),), steps)
    assert count_present(begin, lambda link: False) == 0
    assert count_present(begin, lambda link: link.uuid == snapshot_uuid(2)) == 2
    both = (Link(0, None, snapshot_uuid(1)), Link(1, None, snapshot_uuid(2)))
    group = StreamBegin((Member(VOLUME, "a"), Member(snapshot_uuid(9), "b")), (both,))
    with pytest.raises(BaseMismatch):
        count_present(group, lambda link: link.member == 0)
