"""Each change that the owner thread makes, with a hot write and an fsync before each of its calls in turn."""

from collections.abc import Callable
from itertools import count

import pytest

pytest.importorskip("incfs._dataplane", reason="the C data plane was not built")

from tests.model.test_gremlin import SIZES, Around, GremlinMachine, during, story
from tests.support.gremlin import HotSync, HotWrite

MOST_CALLS = 24
"""What follows in a checkpoint is reading."""
Tell = Callable[[GremlinMachine, Around], None]
CHANGES: dict[str, Tell] = {
    "write": lambda m, around: m.write(around, 0, 1, 5, 4, part=True),
    "write that grows": lambda m, around: m.write(around, 0, 19, 5, 4),
    "discard": lambda m, around: m.discard(around, 0, 1, 3),
    "grow": lambda m, around: m.resize(around, 0, SIZES[2]),
    "shrink": lambda m, around: m.resize(around, 0, SIZES[0]),
    "snapshot": lambda m, around: m.take_snapshots(around, {0}, "u"),
    "remove the newest snapshot": lambda m, around: m.remove_snapshot(around, 0, 1),
    "remove the oldest snapshot": lambda m, around: m.remove_snapshot(around, 0, 0),
    "roll back": lambda m, around: m.roll_back(around, 0, 0),
    "clone": lambda m, around: m.clone(around, 0, 1, "b"),
    "rename": lambda m, around: m.rename(around, 0, "c"),
    "commit": lambda m, around: m.commit(around),
    "checkpoint": lambda m, around: m.checkpoint(around),
}


@pytest.mark.parametrize("tell", CHANGES.values(), ids=CHANGES.keys())
def test_a_hot_write_at_each_call(tell: Tell) -> None:
    for call in count():
        with story(taken=2) as machine:
            tell(machine, during((call, HotWrite(0, 0, 2, 1)), (call, HotSync(0, 2, 3))))
            made = len(machine.gremlin.calls)
            machine.reclaim(Around())
            machine.restart(0)
        if call + 1 >= min(made, MOST_CALLS):
            break
