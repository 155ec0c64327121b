"""Streams of each released format version are read for ever, and made byte for byte while it is the current one.

``stream-1-*.incfs`` were made by ``tests.support.streams.make_step``; ``stream-1-zstd`` may differ from what
today's zstd makes, and is only read.
"""

from pathlib import Path

import pytest

from incfs.stream.encoder import StreamEncoder
from incfs.stream.merge import merge, read_records
from tests.support.streams import apply_to, make_step, read_all

HERE = Path(__file__).parent
CHAIN = [
    b"a" * 130 + bytes(62) + b"b" * 70,
    b"c" * 64 + bytes(64),
    bytes(64) + b"d" * 300,
    b"d" * 364,
]


def stored(name):
    return (HERE / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "chain", "first", "full"),
    [("stream-1-full.incfs", [b"", *CHAIN[:1]], 0, True), ("stream-1-chain.incfs", CHAIN, 1, False)],
)
def test_a_golden_stream_is_made_byte_for_byte_and_read(name, chain, first, full):
    assert make_step(chain, first, level=0, checkpoint_bytes=4200, full=full) == stored(name)
    assert apply_to(chain[0], read_all(stored(name))) == chain[-1]


def test_a_golden_compressed_stream_is_read():
    assert apply_to(b"", read_all(stored("stream-1-zstd.incfs"))) == b"zstd " * 1000


def test_the_golden_merge_is_that_of_its_parts():
    parts = [make_step(CHAIN[i : i + 2], i + 1, level=0) for i in range(2)]
    feeds = [iter((part, b"")) for part in parts]
    one, two = (read_records(lambda feed=feed: next(feed)) for feed in feeds)  # type: ignore[misc]
    assert b"".join(merge(one, two, StreamEncoder(level=0))) == stored("stream-1-merged.incfs")
