"""What is asked of a kernel, and what is not, because it would not wait."""

import os
from pathlib import Path
from typing import Any

import pytest

from incfs.kernel_hook import KernelHook
from incfs.kernels import waits_for_pages


class Inside:
    """Makes the calls here and now."""

    def __init__(self):
        self.called = []

    async def run(self, function, *args):
        self.called.append(function.__name__)
        return function(*args)


def hook(directory: Path, release: str = "6.18.1"):
    inside: Any = Inside()
    return KernelHook(directory, inside, list, str, release)


@pytest.mark.parametrize(
    ("release", "waits"),
    [
        ("5.15.0-100-generic", False),
        ("6.1.0-56-cloud-amd64", False),
        ("6.12.94+deb13-amd64", False),
        ("6.15.11", False),
        ("6.16", True),
        ("6.16.0-rc1", True),
        ("6.18.44", True),
        ("7.0.0", True),
        ("nobody knows", False),
    ],
)
def test_which_kernels_wait_for_the_pages_of_a_mount(release, waits):
    assert waits_for_pages(release) is waits


async def test_a_kernel_that_would_not_wait_is_not_asked_to_write_back(tmp_path):
    (tmp_path / "v").touch()
    inode = os.stat(tmp_path / "v").st_ino
    assert await hook(tmp_path).write_back("v", inode)
    assert not await hook(tmp_path, "6.12.94").write_back("v", inode)


async def test_another_file_that_took_the_name_is_not_taken_for_the_volume(tmp_path):
    (tmp_path / "v").write_bytes(b"12345")
    inode = os.stat(tmp_path / "v").st_ino
    assert await hook(tmp_path).size_of("v", inode) == 5
    assert await hook(tmp_path).size_of("v", inode + 1) is None
    assert not await hook(tmp_path).write_back("v", inode + 1)
    assert await hook(tmp_path).size_of("w", inode) is None
