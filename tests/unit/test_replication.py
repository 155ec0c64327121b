"""What is decided about a replica: a plan, or a conflict that says why."""

import re

import pytest

from incfs.errors import BaseMismatch, FormatError, ReplicaFailed, UsageError
from incfs.replication import (
    OurSnapshot,
    ReplicaConfig,
    ReplicaPlan,
    TargetFacts,
    decode_answer,
    plan_replica,
    target_command,
)

OURS = [OurSnapshot("a", 1), OurSnapshot("b", 2), OurSnapshot("c", 3)]


def there(*snapshots, is_replica=True, token=None):
    return TargetFacts(is_replica, token, list(snapshots))


@pytest.mark.parametrize(
    ("found", "plan"),
    [
        (None, ReplicaPlan(("c",), (None,))),
        (there("a"), ReplicaPlan(("c",), ("a",))),
        (there("c"), ReplicaPlan(("c",), ("c",))),
        (there("a", token="t"), ReplicaPlan(("c",), ("a",), "t")),
        (there(token="t", is_replica=True), ReplicaPlan(("c",), (None,), "t")),
    ],
)
def test_what_follows_the_newest_common_snapshot_is_sent(found, plan):
    assert plan_replica(["v"], [OURS], [found]) == plan
    assert plan.is_done == (found == there("c"))


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (there("a", is_replica=False), "promoted"),
        (there("a", "x"), "both have is a"),
        (there("x"), "none in common"),
        (there(), "none in common"),
    ],
)
def test_a_target_that_went_its_own_way_is_a_conflict(found, why):
    with pytest.raises(BaseMismatch, match=why):
        plan_replica(["v"], [OURS], [found])


def test_a_bookmark_is_a_base_and_never_a_goal():
    ours = [OurSnapshot("a", 1, is_there=False), OurSnapshot("b", 2), OurSnapshot("c", 3, is_there=False)]
    assert plan_replica(["v"], [ours], [there("a")]) == ReplicaPlan(("b",), ("a",))
    with pytest.raises(BaseMismatch, match="none in common"):
        plan_replica(["v"], [ours], [there("x")])


def test_a_group_goes_to_the_newest_snapshots_that_were_taken_together():
    other = [OurSnapshot("x", 1), OurSnapshot("y", 2), OurSnapshot("z", 4)]
    assert plan_replica(["v", "w"], [OURS, other], [there("a"), None]).goals == ("b", "y")
    with pytest.raises(BaseMismatch, match="together"):
        plan_replica(["v", "w"], [OURS, [OurSnapshot("z", 9)]], [None, None])
    with pytest.raises(BaseMismatch, match="no snapshot of v"):
        plan_replica(["v"], [[]], [None])


def test_a_volume_of_a_group_that_is_up_to_date_is_left_out():
    other = [OurSnapshot("x", 1), OurSnapshot("y", 2)]
    for of_first in (there("b"), there("a", "b", "c")):
        plan = plan_replica(["v", "w"], [OURS, other], [of_first, there("x")])
        assert plan == ReplicaPlan(("b", "y"), ("b", "x"))
        assert (plan.lacking, plan.is_done) == ([1], False)
    plan = plan_replica(["v", "w"], [OURS, other], [there("b"), there("x", token="t")])
    assert (plan.token, plan.receiving) == ("t", 1)
    assert plan_replica(["v", "w"], [OURS, other], [there("c", "b"), there("y")]).is_done


def test_a_volume_that_is_newer_than_what_was_taken_together_is_a_conflict():
    other = [OurSnapshot("x", 1), OurSnapshot("y", 2)]
    with pytest.raises(BaseMismatch, match="newer than the newest snapshots that were taken together"):
        plan_replica(["v", "w"], [OURS, other], [there("a", "c"), there("x")])


def test_an_answer_that_is_none_is_quoted():
    assert decode_answer("r", b"") == {}
    assert decode_answer("r", b'{"a": 1}\n') == {"a": 1}
    for answer in (b'Greetings from\n\nexample\n{"a": 1}', b"[1]", b"Greetings \xff", b"[" * 100_000):
        with pytest.raises(ReplicaFailed, match=re.escape(answer.split()[0].decode()[:10])):
            decode_answer("r", answer)


def config(target):
    return ReplicaConfig("r", target, ["u"], ["v"], "sudo incfs")


def test_the_command_at_the_target():
    ssh = target_command(config("ssh://me@host:22/srv/my pool"), ["receive", "v w"], ["ssh", "-F", "x"])
    assert ssh == [
        "ssh",
        "-F",
        "x",
        "-oBatchMode=yes",
        "-oConnectTimeout=60",
        "-oServerAliveInterval=15",
        "-oServerAliveCountMax=4",
        "-p",
        "22",
        "me@host",
        "sudo incfs -p '/srv/my pool' receive 'v w'",
    ]
    assert target_command(config("/pool"), ["receive"], [])[1:] == ["-m", "incfs", "-p", "/pool", "receive"]
    assert target_command(config("/pool/control.sock"), ["x"], [])[-2:] == ["/pool", "x"]


@pytest.mark.parametrize(
    "target", ["ssh://", "ssh://host", "http://host/pool", "ssh://-oProxyCommand=x/p", "ssh://-o@h/p", "ssh://h:x/p"]
)
def test_a_target_that_makes_no_sense(target):
    with pytest.raises(UsageError):
        target_command(config(target), [], ["ssh"])


def test_the_stored_text():
    assert ReplicaConfig.from_text(config("/p").to_text()) == config("/p")
    for text in ("", "[]", "{}", '{"name": 1, "x": 2}'):
        with pytest.raises(FormatError):
            ReplicaConfig.from_text(text)
    with pytest.raises(FormatError):
        TargetFacts.from_document({"is_replica": 1})
