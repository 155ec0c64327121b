"""Inode numbers: stable, distinct, and taken apart again."""

from hypothesis import given
from hypothesis import strategies as st

from incfs import inodes
from incfs.inodes import Kind, kind_of
from incfs.model import Generation, VolumeId, map_id

volume_ids = st.integers(1, (1 << 32) - 1).map(VolumeId)
generations = st.integers(1, (1 << 32) - 2).map(Generation)


@given(volume_ids, generations)
def test_every_kind_is_recognised(volume_id, generation):
    volume = map_id(volume_id)
    snapshot = map_id(volume_id, generation)
    directory = inodes.snapshot_directory(volume_id)
    assert (kind_of(volume), kind_of(snapshot), kind_of(directory)) == (
        Kind.VOLUME,
        Kind.SNAPSHOT,
        Kind.SNAPSHOT_DIRECTORY,
    )
    assert {inodes.volume_of(inode) for inode in (volume, snapshot, directory)} == {volume_id}
    assert max(volume, snapshot, directory) < 1 << 64
    assert inodes.parent_of(snapshot) == directory
    assert inodes.parent_of(directory) == inodes.SNAPSHOTS
    assert inodes.parent_of(volume) == inodes.ROOT


@given(st.integers(0, (1 << 32) - 1))
def test_small_numbers_are_the_fixed_entries_or_nothing(inode):
    expected = {1: Kind.ROOT, 2: Kind.SNAPSHOTS, 3: Kind.STATUS, 4: Kind.STATUS_FILE, 5: Kind.STATUS_FILE}
    assert kind_of(inode) == expected.get(inode)


def test_the_fixed_numbers_are_part_of_the_interface():
    assert [(entry.inode, entry.name) for entry in inodes.root_directories()] == [(2, ".snapshots"), (3, ".incfs")]
    assert [(entry.inode, entry.name) for entry in inodes.status_entries()] == [(4, "stats.json"), (5, "metrics")]


@given(st.lists(st.integers(1, (1 << 32) - 1), unique=True))
def test_cookies_rise_with_the_ids_and_come_after_the_fixed_ones(identities):
    entries = [*inodes.dot_entries(1, 1), *inodes.root_directories()]
    entries += [inodes.id_entry(identity, identity << 32, str(identity)) for identity in sorted(identities)]
    cookies = [entry.cookie for entry in entries]
    assert cookies == sorted(set(cookies))
    assert all(0 < cookie < 1 << 63 for cookie in cookies)
