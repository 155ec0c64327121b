"""What a policy says of a volume's data, seen through the mount: zeros that are kept, reads that are not verified."""

import ctypes
import errno
import os

import pytest

from tests.mount.conftest import mounted_pool
from tests.mount.test_names import errno_of

BLOCK = 4096
RULES = """
[volume."thick*"]
zero_elision = false
[volume."unverified*"]
verify = "never"
"""


@pytest.fixture(params=["native", "python"])
def pool(request, tmp_path):
    options = f"cache=none,data_plane={request.param}"
    with mounted_pool(tmp_path, options) as pool:
        pool.options = options
        pool.command("policy", "set", "-", input=RULES)
        yield pool


def allocated(fd):
    os.fsync(fd)
    return os.fstat(fd).st_blocks * 512


def test_zeros_are_stored_where_the_policy_keeps_them(pool):
    thin, thick = (os.open(pool / name, os.O_RDWR | os.O_CREAT) for name in ("thin", "thick"))
    for fd in (thin, thick):
        os.ftruncate(fd, 64 * BLOCK)
        assert os.pwrite(fd, bytes(16 * BLOCK), 0) == 16 * BLOCK
        os.pwrite(fd, bytes(100), 20 * BLOCK + 50)
    assert (allocated(thin), allocated(thick)) == (0, 17 * BLOCK)
    assert os.lseek(thick, 0, os.SEEK_HOLE) == 16 * BLOCK
    assert os.pread(thick, 16 * BLOCK, 0) == bytes(16 * BLOCK)
    # A discard is no write: it gives space back whatever the policy says, in parts of a block, too.
    os.pwrite(thick, b"x" * BLOCK, 0)
    for part in ((0, BLOCK // 2), (BLOCK // 2, 4 * BLOCK)):
        punch(thick, *part)
    assert allocated(thick) == 13 * BLOCK
    for fd in (thin, thick):
        os.close(fd)


def punch(fd, offset, length):
    libc = ctypes.CDLL(None, use_errno=True)
    keep_size_and_punch = 3
    assert libc.fallocate64(fd, keep_size_and_punch, ctypes.c_int64(offset), ctypes.c_int64(length)) == 0


def test_rules_change_while_a_file_is_open(pool):
    """Another policy, and another name that other rules fit, hold from the next request on."""
    fd = os.open(pool / "plain", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, bytes(4 * BLOCK), 0)
    assert allocated(fd) == 0
    os.rename(pool / "plain", pool / "thick2")
    os.pwrite(fd, bytes(4 * BLOCK), 0)
    assert allocated(fd) == 4 * BLOCK
    pool.command("policy", "set", "-", input="[pool]\n")
    os.pwrite(fd, bytes(4 * BLOCK), 0)
    assert allocated(fd) == 0
    os.close(fd)


def test_a_damaged_block_under_each_way_to_verify(pool):
    data = {name: os.urandom(16 * BLOCK) for name in ("verified", "unverified")}
    for name, content in data.items():
        (pool / name).write_bytes(content)
        (pool / f".snapshots/{name}/s").touch()
    pool.stop()
    image = next(path for path in pool.pool.rglob("*.img"))
    raw = image.read_bytes()
    places = {name: raw.index(content[3 * BLOCK : 4 * BLOCK]) for name, content in data.items()}
    overwrite(image, dict.fromkeys(places.values(), b"DAMAGED!"))
    pool.start(pool.options)
    pool.expected_log = ["."]
    for way in ("{}", ".snapshots/{}/s"):
        assert errno_of((pool / way.format("verified")).read_bytes) == errno.EIO
        expected = bytearray(data["unverified"])
        expected[3 * BLOCK : 3 * BLOCK + 8] = b"DAMAGED!"
        assert (pool / way.format("unverified")).read_bytes() == expected
    # Damage is never copied into a block with a checksum of its own: what is made from it asks for the checksum.
    fd = os.open(pool / "unverified", os.O_RDWR)
    assert errno_of(os.pwrite, fd, b"x", 3 * BLOCK + 100) == errno.EIO
    os.close(fd)
    refused = pool.command("export", "unverified@s", pool.path.parent / "out", check=False)
    assert refused.returncode == 4
    assert "CRC32C" in refused.stderr
    assert pool.command("pool", "check", "--data", check=False).returncode == 4
    pool.command("policy", "set", "-", input='[volume."*"]\nverify = "always"\n')
    assert errno_of((pool / "unverified").read_bytes) == errno.EIO
    overwrite(image, {place: raw[place : place + 8] for place in places.values()})


def overwrite(path, pieces):
    with open(path, "r+b") as stream:
        for place, piece in pieces.items():
            stream.seek(place)
            stream.write(piece)
