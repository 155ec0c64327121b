"""The file of the tables is cut off, or its disk fails, under an open pool: an error, never the end of the process."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from incfs.errors import PoolReadOnly, TablesLost
from incfs.mapped import MappedFile
from incfs.metadata import TABLES_NAME
from incfs.options import Options
from incfs.recovery import open_store
from incfs.store import Store
from tests.support import pools
from tests.support.child import in_a_child
from tests.support.faulty_fs import Fault, faulty

PAGES = 200
SIZE = PAGES * 512 * pools.BLOCK


def filled(home: Path) -> Path:
    """Make a pool whose tables have many pages, also some that hold one value alone."""
    pool = pools.make_pool(home)
    with pools.open_tiny(pool) as store:
        volume = pools.new_volume(store, "v", SIZE)
        for page in range(PAGES):
            for index in range(0, 200, 2 if page % 2 else 200):
                pools.write(store, volume.map_id, (page * 512 + index) * pools.BLOCK, b"x" * pools.BLOCK)
            if page % 50 == 0:
                store.checkpoint()
    return pool


def in_an_open_pool(pool: Path, work: Callable[[Store], None]) -> None:
    """Work with an open pool in a process of its own, which SIGBUS would end."""

    def child() -> None:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        store = open_store(pool, Options(page_cache_pages=64, dump_interval_s=None))
        work(store)
        store.abandon()

    in_a_child(child)


def require_lost(work: Callable[[], object]) -> None:
    with pytest.raises(TablesLost, match=TABLES_NAME):
        work()


def read_tables(store: Store) -> int:
    with store.tables.reading() as reader:
        return sum(len(entries) for _, _, entries in reader.all_pages())


def read_somewhere(store: Store) -> None:
    """Read all of the volume: some of its map pages are not resident."""
    volume = store.catalog.volume_named("v")
    for page in range(PAGES):
        data = pools.read(store, volume.map_id, page * 512 * pools.BLOCK, pools.BLOCK)
        assert data == b"x" * pools.BLOCK, "wrong data"


@pytest.mark.parametrize("kept_pages", [0, 2, 10])
def test_tables_that_are_cut_off_under_an_open_pool(pool_home: Path, kept_pages: int) -> None:
    """The daemon ended by SIGBUS, and with it every volume that somebody had mounted."""

    def work(store: Store) -> None:
        made = pools.new_volume(store, "later")
        pools.write(store, made.map_id, 0, b"x" * pools.BLOCK)
        os.truncate(store.directory / TABLES_NAME, kept_pages * 4096)
        require_lost(lambda: read_somewhere(store))
        require_lost(lambda: read_tables(store))
        pools.write(store, made.map_id, 0, b"y" * pools.BLOCK)
        assert pools.read(store, made.map_id) == b"y" * pools.BLOCK
        store.commit()  # the journal goes on until the next checkpoint
        require_lost(store.checkpoint)
        try:
            pools.write(store, made.map_id, 0, b"z" * pools.BLOCK)
            store.commit()
        except PoolReadOnly:
            return
        raise AssertionError("the pool is written although its tables are lost")

    in_an_open_pool(filled(pool_home), work)


def test_a_checkpoint_into_tables_that_were_cut_off_commits_nothing(pool_home: Path) -> None:
    def work(store: Store) -> None:
        volume = store.catalog.volume_named("v")
        for page in range(0, PAGES, 7):
            pools.write(store, volume.map_id, (page * 512 + 300) * pools.BLOCK, b"z" * pools.BLOCK)
        size = os.path.getsize(store.directory / TABLES_NAME)
        os.truncate(store.directory / TABLES_NAME, size // 8192 * 4096)
        require_lost(store.checkpoint)

    in_an_open_pool(filled(pool_home), work)


def test_whatever_is_cut_off_is_an_error_or_right(pool_home: Path) -> None:
    """Zeros in the place of a page of LMDB's never read as fewer mappings than there are."""
    pool = filled(pool_home)
    whole = (pool / TABLES_NAME).read_bytes()
    for kept in range(len(whole) // 4096 - 1, 1, -max(1, len(whole) // 4096 // 12)):

        def work(store: Store, kept: int = kept) -> None:
            expected = read_tables(store)
            os.truncate(store.directory / TABLES_NAME, kept * 4096)
            for _ in range(2):
                try:
                    found = read_tables(store)
                except TablesLost:
                    continue
                assert found == expected

        in_an_open_pool(pool, work)
        (pool / TABLES_NAME).write_bytes(whole)


@pytest.mark.mount
def test_tables_whose_disk_fails_to_read_under_an_open_pool(pool_home: Path, tmp_path: Path) -> None:
    """A bad sector under a page that LMDB has mapped, and that is in no cache."""
    (pool_home / "disk").mkdir()
    (tmp_path / "disk").mkdir()
    filled(pool_home / "disk")
    with faulty(pool_home / "disk", tmp_path / "disk", pool_home / "switch") as switch:

        def work(store: Store) -> None:
            fd = os.open(store.directory / TABLES_NAME, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            switch.arm(Fault("tables", "read", 0, host_errno=errno.EIO, lasts=True))
            require_lost(lambda: read_somewhere(store))
            assert switch.met
            switch.heal()
            require_lost(lambda: read_tables(store))  # what was read once as something else is not believed again

        in_an_open_pool(tmp_path / "disk" / "pool", work)


def test_a_fault_elsewhere_ends_the_process_as_before(tmp_path: Path) -> None:
    import mmap  # here: it is what is tested

    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as stream:
        guarded, other = (mmap.mmap(stream.fileno(), 8192) for _ in range(2))
    mapped = MappedFile(path, b"")
    mapped.look()
    mapped.close()
    os.truncate(path, 0)
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        other[0]
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS
    mapped.look()
    assert guarded[0] == other[5000] == 0
    assert mapped.fault_count == 2
    mapped.close()
    assert mapped.fault_count == 2


def test_a_range_that_nobody_released_does_not_count_for_who_is_mapped_there_now(tmp_path: Path) -> None:
    """A pool that was not closed: the faults of the next one at its addresses were counted for it, and not believed."""
    import mmap  # here: it is what is tested

    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as stream:
        mapping = mmap.mmap(stream.fileno(), 8192)
    former, now = MappedFile(path, b""), MappedFile(path, b"")
    former.look()
    now.look()
    os.truncate(path, 0)
    assert mapping[0] == 0
    assert (former.fault_count, now.fault_count) == (0, 1)
    former.close()
    assert mapping[5000] == 0
    assert now.fault_count == 2
    now.close()
