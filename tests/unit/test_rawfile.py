"""Streams onto a plain file: its note tells the truth wherever the work is cut off."""

from uuid import UUID

import pytest

from incfs.errors import BaseMismatch, FormatError, NotSupported, StreamTruncated
from incfs.rawfile import RawFile
from incfs.stream.merge import read_records
from tests.support.streams import boundaries_of, frames_of, join_frames, make_step, snapshot_uuid

CHAIN = [b"a" * 300, b"b" * 64 + bytes(100), b"c" * 500 + bytes(200), b"c" * 400 + b"d" * 100]


def apply(path, stream, **options):
    parts = iter((stream, b""))
    file = RawFile(path, **options)
    try:
        file.apply(read_records(lambda: next(parts)))
    finally:
        file.close()
    return file.applied


def test_a_stream_cut_at_every_record_boundary_and_elsewhere_goes_on(tmp_path):
    stream = make_step([b"", *CHAIN], 0, checkpoint_bytes=1, full=True)
    for number, cut in enumerate(sorted({*boundaries_of(stream)[:-1], *range(0, len(stream), 97)})):
        image = tmp_path / f"image{number}"
        with pytest.raises(StreamTruncated):
            apply(image, stream[:cut])
        apply(image, stream)
        assert image.read_bytes() == CHAIN[-1]
        assert apply(image, stream) == []


def test_a_file_between_two_snapshots_takes_no_other_stream(tmp_path):
    image = tmp_path / "image"
    apply(image, make_step([b"", CHAIN[0]], 0, full=True))
    one = make_step(CHAIN[:2], 1)
    with pytest.raises(StreamTruncated):
        apply(image, one[: boundaries_of(one)[3]])
    other = make_step(CHAIN[:2], 1).replace(UUID(snapshot_uuid(2)).bytes, UUID(snapshot_uuid(99)).bytes)
    with pytest.raises(BaseMismatch, match="half way"):
        apply(image, join_frames(other, frames_of(other)))
    assert apply(image, one) == [snapshot_uuid(2)]


def test_what_is_no_file_of_ours_is_refused(tmp_path):
    with pytest.raises(NotSupported):
        RawFile(tmp_path)
    image = tmp_path / "image"
    apply(image, make_step([b"", CHAIN[0]], 0, full=True))
    (tmp_path / "image.incfs").write_text("{}")
    with pytest.raises(FormatError):
        RawFile(image)
    (tmp_path / "image.incfs").write_bytes(b"\xff")
    with pytest.raises(FormatError):
        RawFile(image)
