"""What one volume held is never seen in another: blocks are reused in every way, and every byte is looked at."""

from pathlib import Path
from random import Random

import pytest

from incfs import removal
from incfs import snapshot as snapshots
from incfs import volume as volumes
from incfs.errors import NoSpace
from incfs.model import Volume
from incfs.options import Options
from incfs.planes import HAS_NATIVE, PlaneKind
from incfs.recovery import create_pool, open_store
from incfs.store import Store
from tests.support.pools import check_clean, discard, new_volume, read, reclaim, resize, write

BLOCK = 512
BLOCKS = 96
MARK = b"SECRET-"
SECRET = (MARK * (BLOCK * BLOCKS // len(MARK) + 1))[: BLOCK * BLOCKS]
PLANES: list[PlaneKind] = ["python", "native"] if HAS_NATIVE else ["python"]
WAYS = ("remove", "shrink", "discard", "rewrite", "snapshot", "crash")


def free_secret(store: Store, secret: Volume, way: str) -> Store:
    """Make the blocks that hold the secret free; give the store, which one way opens anew."""
    match way:
        case "remove":
            volumes.remove(store, secret.id, snapshots=False)
        case "shrink":
            resize(store, secret.id, 0)
        case "discard":
            discard(store, secret.map_id, 0, BLOCK * BLOCKS)
        case "rewrite":
            write(store, secret.map_id, 0, bytes(BLOCK * BLOCKS))
        case "snapshot":
            snapshots.create(store, [(secret.id, "s")])
            discard(store, secret.map_id, 0, BLOCK * BLOCKS)
            removal.remove(store, [store.catalog.snapshot(secret.id, "s")])
        case "crash":  # written, never committed: the blocks were leased only
            options = store.options
            store.abandon()
            return open_store(store.directory, options)
    reclaim(store)
    store.checkpoint()
    return store


class Probe:
    """A new volume and what it must hold."""

    def __init__(self, store: Store, chance: Random) -> None:
        self.store, self.chance = store, chance
        self.volume = new_volume(store, "probe")
        self.model = bytearray()
        self.taken: dict[str, bytes] = {}

    def step(self) -> None:
        chance, store, volume = self.chance, self.store, self.volume
        size = len(self.model)
        start = chance.randrange(BLOCK * BLOCKS)
        length = min(chance.choice([1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK]), BLOCK * BLOCKS - start)
        match chance.choice(["write", "write", "write", "extend", "resize", "discard", "leases", "snapshot", "seal"]):
            case "write" if start < size:
                self.write(start, length)
            case "extend" | "write":
                self.write(size, min(length, BLOCK * BLOCKS - size))
            case "resize":
                resize(store, volume.id, start)
                self.model[start:] = bytes(max(0, start - size))
            case "discard" if size:
                end = min(size, start + length)
                discard(store, volume.map_id, min(start, end), end)
                self.model[min(start, end) : end] = bytes(end - min(start, end))
            case "leases":
                store.reclaim_leases()
            case "snapshot" if len(self.taken) < 3:
                name = f"s{len(self.taken)}"
                snapshots.create(store, [(volume.id, name)])
                self.taken[name] = bytes(self.model)
            case _:
                store.checkpoint()

    def write(self, start: int, length: int) -> None:
        data = bytes([self.chance.randrange(1, 256)]) * length
        try:
            write(self.store, self.volume.map_id, start, data)
        except NoSpace:
            return
        self.model[len(self.model) :] = bytes(max(0, start + length - len(self.model)))
        self.model[start : start + length] = data

    def look(self) -> None:
        """Every byte is what was written to this volume; nothing else shows when it grows."""
        store, size = self.store, len(self.model)
        assert read(store, self.volume.map_id) == self.model
        resize(store, self.volume.id, size + 2 * BLOCK)
        assert read(store, self.volume.map_id) == self.model + bytes(2 * BLOCK)
        resize(store, self.volume.id, size)
        for name, content in self.taken.items():
            assert read(store, store.catalog.snapshot(self.volume.id, name).map_id) == content


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plane", PLANES)
def test_a_new_volume_shows_nothing_of_what_its_blocks_held(plane: PlaneKind, way: str, pool_home: Path) -> None:
    create_pool(pool_home / "pool", block_bytes=BLOCK, capacity_bytes=BLOCK * (BLOCKS + 8), journal_bytes=1 << 16)
    options = Options(
        reserve_blocks=0, extend_bytes=BLOCK * BLOCKS, host_reserve_bytes=0, dump_interval_s=None, data_plane=plane
    )
    store = open_store(pool_home / "pool", options)
    try:
        secret = new_volume(store, "secret")
        if way == "crash":
            store.commit()
        write(store, secret.map_id, 0, SECRET)
        if way != "crash":
            store.checkpoint()
        store = free_secret(store, secret, way)
        image = next((pool_home / "pool/images").glob("*.img")).read_bytes()
        probe = Probe(store, Random(way))
        for number in range(150):
            probe.step()
            if number % 10 == 0:
                probe.look()
        probe.look()
        check_clean(store)
        assert MARK * 8 in image or way in ("remove", "shrink", "discard", "snapshot", "rewrite")  # punched, perhaps
    finally:
        store.abandon()


@pytest.mark.parametrize("plane", PLANES)
def test_one_byte_in_each_reused_block(plane: PlaneKind, pool_home: Path) -> None:
    """Blocks too few to be punched out keep the secret in the image until a new mapping names them."""
    create_pool(pool_home / "pool", block_bytes=BLOCK, capacity_bytes=BLOCK * BLOCKS, journal_bytes=1 << 16)
    options = Options(
        reserve_blocks=0, extend_bytes=BLOCK * BLOCKS, host_reserve_bytes=0, dump_interval_s=None, data_plane=plane
    )
    store = open_store(pool_home / "pool", options)
    try:
        secret, kept = new_volume(store, "secret"), new_volume(store, "kept")
        for index in range(BLOCKS - 2):  # alternating owners: no whole chunk becomes free
            owner = secret if index % 2 else kept
            write(store, owner.map_id, index * BLOCK, SECRET[: BLOCK - 1] if index % 2 else b"k" * BLOCK)
            store.commit()
        volumes.remove(store, secret.id, snapshots=False)
        reclaim(store)
        store.checkpoint()
        assert MARK * 8 in next((pool_home / "pool/images").glob("*.img")).read_bytes(), "nothing to find"
        probe = new_volume(store, "probe")
        written = 0
        for index in range(BLOCKS // 2 - 2):
            write(store, probe.map_id, index * BLOCK + index % BLOCK, b"1")
            written += 1
        resize(store, probe.id, BLOCKS * BLOCK)
        content = read(store, probe.map_id)
        assert content.count(0) == len(content) - written
        check_clean(store)
    finally:
        store.abandon()
