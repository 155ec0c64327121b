"""Steps of the owner thread: what the data plane's own threads do meanwhile comes behind their changes (I12)."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from incfs import rollback, snapshot, volume
from incfs.errors import IncfsError, NotFound, PoolReadOnly
from incfs.memory import one_step
from incfs.model import StorageId
from incfs.store import Store
from tests.support import pools
from tests.support.served import Served
from tests.unit.test_lane import new_volumes, opened

BLOCK = pools.BLOCK
SOURCES = sorted((Path(__file__).parents[2] / "incfs").rglob("*.py"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = opened(pools.make_pool(tmp_path))
    yield store
    store.abandon()


def before(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, act: Any) -> None:
    """Let something happen just before a method is called."""
    method = getattr(target, name)

    def acting(*args: Any, **named: Any) -> Any:
        act()
        return method(*args, **named)

    monkeypatch.setattr(target, name, acting)


def test_a_write_while_the_newest_snapshot_is_dropped_leaves_the_older_one_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was sealed into the increment of the one that was dropped in the same step, and was lost with it."""
    (table,) = new_volumes(store, "v")
    taken = store.catalog.volume_named("v").id
    snapshot.create(store, [(taken, "old")])
    pools.take_snapshots(store, [(taken, "new")])
    served = Served(store.plane)
    pools.remove_snapshot(store, taken, "new")
    before(monkeypatch, store, "evict", lambda: served.write(table, 0, b"x" * BLOCK))
    while not volume.reclaim(store, taken, 8):
        pass
    (old,) = store.catalog.snapshots(taken)
    assert pools.read(store, table, 0, BLOCK) == b"x" * BLOCK
    assert pools.read(store, old.map_id, 0, BLOCK) == bytes(BLOCK)
    pools.check_clean(store)


def test_a_write_while_a_volume_is_rolled_back_is_kept_from_the_step(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (table,) = new_volumes(store, "v")
    rolled = store.catalog.volume_named("v").id
    snapshot.create(store, [(rolled, "s")])
    served = Served(store.plane)
    before(monkeypatch, rollback, "require_newest", lambda: served.write(table, 0, b"x" * BLOCK))
    rollback.roll_back(store, rolled, "s")
    assert pools.read(store, table, 0, BLOCK) == bytes(BLOCK)
    pools.check_clean(store)


def test_nothing_is_sealed_within_a_step(store: Store) -> None:
    (table,) = new_volumes(store, "v")
    served = Served(store.plane)
    with store.step():
        assert served.write(table, 0, b"x" * BLOCK)
        store.absorb()
        store.reclaim_leases()
        assert store.plane.fresh_count == 1
    with pytest.raises(IncfsError, match="sealed within a step"), store.step():
        store.plane.seal()


def test_a_field_that_changed_meanwhile_stays(store: Store) -> None:
    """A leg that failed during an await lost its stale mark: the record that had been read before was put back."""
    record = store.catalog.storage(StorageId(1))
    store.touch(record, stale_legs=(1,))
    with store.step():
        store.amend(record, is_evacuating=True)
    assert store.catalog.storage(StorageId(1)).stale_legs == (1,)


def test_a_record_that_is_gone_is_not_put_back(store: Store) -> None:
    made = pools.new_volume(store, "v")
    with store.step():
        store.drop(("volume", (made.id,)))
    with pytest.raises(NotFound, match="removed meanwhile"), store.step():
        store.amend(made, mode=0)
    assert store.failure is None, "nothing was changed"


def test_a_step_that_ends_halfway_makes_the_pool_read_only(store: Store) -> None:
    made = pools.new_volume(store, "v")

    @one_step
    def end_halfway(store: Store) -> None:
        store.amend(made, mode=0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        end_halfway(store)
    with pytest.raises(PoolReadOnly, match="begun and not ended"):
        store.require_writable()


def is_step(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step"


def test_no_step_waits() -> None:
    """Another task, or a caller, would act within it."""
    found = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.With) and any(is_step(item.context_expr) for item in node.items):
                found += 1
                waits = [n for n in ast.walk(node) if isinstance(n, ast.Await | ast.Yield | ast.YieldFrom)]
                assert not waits, f"{path}:{waits[0].lineno}"
            if isinstance(node, ast.AsyncFunctionDef):
                assert not [d for d in node.decorator_list if getattr(d, "id", "") == one_step.__name__], path
    assert found > 5
