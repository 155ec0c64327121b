"""What the native data plane does for its own threads, without a mount: only what the control plane allows."""

import os
from typing import Any

import pytest

from incfs.errors import IncfsError
from incfs.model import Facts, StorageId

nativeplane = pytest.importorskip("incfs.nativeplane", reason="the C data plane was not built")
from tests.support.served import Served  # noqa: E402
from tests.unit.test_planes import BLOCK, TABLES, make_images  # noqa: E402

FACTS = Facts(0o600, 0, 0, 1, 0, 0, 0, 0)


@pytest.fixture
def native(pool_home):
    """A native plane with a page and a lease of the first table, which is served."""
    images = make_images(pool_home)
    plane = nativeplane.NativePlane(BLOCK, images)
    plane.load(TABLES[0], 0, {})
    plane.grant(TABLES[0], (1 << 48) + 1, 10)
    plane.serve(TABLES[0], 4 * BLOCK, FACTS, is_writable=True)
    plane.images = images
    yield plane
    for image in images.values():
        image.file.close()


def redirect(plane: Any, path: str) -> None:
    target = os.open(path, os.O_RDWR)
    os.dup2(target, plane.images[StorageId(1)].file.fileno())
    os.close(target)


def test_only_what_is_allowed_is_served(native):
    served = Served(native)
    assert served.write(TABLES[0], BLOCK, b"a" * BLOCK)
    assert served.read(TABLES[0], BLOCK + 3, 10) == b"a" * 10
    # Behind the end it may not be written, and nothing is read.
    assert not served.write(TABLES[0], 3 * BLOCK, b"a" * 2 * BLOCK)
    assert served.read(TABLES[0], 4 * BLOCK, BLOCK) == b""
    assert served.read(TABLES[0], 3 * BLOCK, 2 * BLOCK) == bytes(BLOCK)
    assert served.read(TABLES[1], 0, BLOCK) is None
    native.serve(TABLES[0], 4 * BLOCK, FACTS, is_writable=False)
    assert not served.write(TABLES[0], 0, b"b" * BLOCK)
    native.serve(TABLES[0], 4 * BLOCK, FACTS, is_writable=True)
    native.unserve(TABLES[0])
    assert not served.write(TABLES[0], 0, b"b" * BLOCK)
    assert served.read(TABLES[0], BLOCK, BLOCK) is None
    native.serve(TABLES[0], 4 * BLOCK, FACTS, is_writable=True)
    native.freeze()
    assert not served.write(TABLES[0], 0, b"b" * BLOCK)
    assert served.read(TABLES[0], 0, 2 * BLOCK) == bytes(BLOCK) + b"a" * BLOCK


def test_a_served_write_that_fails_is_told_and_not_tried_again(native, tmp_path):
    """The caller asks Python next; that must not hide the failure by a write that works (I10)."""
    served = Served(native)
    path = native.images[StorageId(1)].file.path
    read_only = os.open(path, os.O_RDONLY)
    os.dup2(read_only, native.images[StorageId(1)].file.fileno())
    os.close(read_only)
    assert not served.write(TABLES[0], 0, b"a" * BLOCK)
    redirect(native, path)
    assert not served.write(TABLES[0], 0, b"a" * BLOCK)
    with pytest.raises(IncfsError):
        native.write(TABLES[0], 0, b"a" * BLOCK)


def test_a_served_write_without_room_harms_nothing(native):
    served = Served(native)
    path = native.images[StorageId(1)].file.path
    redirect(native, "/dev/full")
    assert not served.write(TABLES[0], 0, b"a" * BLOCK)
    redirect(native, path)
    assert served.write(TABLES[0], 0, b"a" * BLOCK)
    assert served.read(TABLES[0], 0, BLOCK) == b"a" * BLOCK
