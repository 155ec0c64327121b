"""Listings: complete, without repetition, also while entries come and go."""

import os

COUNT = 600


def names_while(path, change):
    """Read a directory entry by entry; after the first hundred call ``change``."""
    names = []
    with os.scandir(path) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) == 100:
                change()
    return names


def test_dot_directories_are_listed(mnt):
    assert {".snapshots", ".incfs"} <= set(os.listdir(mnt.path))
    assert sorted(os.listdir(mnt / ".incfs")) == ["metrics", "stats.json"]


def test_a_listing_is_complete_while_volumes_come_and_go(mounted):
    for number in range(COUNT):
        (mounted / f"v{number:04}").touch()
    stay = {f"v{number:04}" for number in range(0, COUNT, 2)}

    def change():
        for number in range(1, COUNT, 2):
            (mounted / f"v{number:04}").unlink()
        for number in range(100):
            (mounted / f"new{number}").touch()
        os.rename(mounted / "v0000", mounted / "a-renamed")

    names = names_while(mounted.path, change)
    assert len(names) == len(set(names))
    assert stay - {"v0000"} <= set(names)
    assert len(os.listdir(mounted.path)) == COUNT // 2 + 100 + 2


def test_a_listing_of_snapshots_is_complete_while_they_come_and_go(mounted):
    (mounted / "db").write_bytes(b"x")
    directory = mounted / ".snapshots/db"
    for number in range(200):
        (directory / f"s{number:04}").touch()

    def change():
        for number in range(1, 200, 2):
            (directory / f"s{number:04}").unlink()

    names = names_while(directory, change)
    assert len(names) == len(set(names))
    assert {f"s{number:04}" for number in range(0, 200, 2)} <= set(names)


def test_rewinding_and_seeking_a_listing(mnt, volume):
    for number in range(50):
        (mnt / f"{volume.name}-{number}").touch()
    fd = os.open(mnt.path, os.O_RDONLY | os.O_DIRECTORY)
    first = os.listdir(fd)
    os.lseek(fd, 0, os.SEEK_SET)
    (mnt / f"{volume.name}-more").touch()
    again = os.listdir(fd)
    os.close(fd)
    assert set(again) - set(first) == {f"{volume.name}-more"}
