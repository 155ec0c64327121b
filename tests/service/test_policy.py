"""The policy of an open pool: stored, carried out, with hooks, across crashes."""

import gzip
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from incfs import metrics
from incfs.enforcer import Executor, enforce, run_policy
from incfs.errors import HookFailed, InvalidPolicy, NoSpace
from incfs.hooks import run_hook
from incfs.model import StoredPolicy
from incfs.policy.facts import POLICY_TAG
from incfs.policy.plan import Work
from incfs.recovery import create_pool, open_store
from incfs.repair import repair
from incfs.restore import open_dump, restore
from incfs.service import Service, open_service
from incfs.store import Store
from tests.support import pools

HOURLY = '[volume."db*"]\nschedule = "hourly"\nkeep = { last = 2 }\n'
HOUR_NS = 3600 * 10**9
DAY_NS = 24 * HOUR_NS


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    create_pool(tmp_path / "pool")
    async with open_service(tmp_path / "pool") as opened:
        await opened.create_volume("db1", 1 << 20)
        await opened.create_volume("web", 1 << 20)
        yield opened


def set_clock(service: Service, now_ns: int) -> None:
    """Let the pool have another time."""
    store: Store = service._store
    store.clock = lambda: now_ns


async def run(service: Service, *, may_hook: bool = False) -> list[tuple[str, str]]:
    """Do what is due; give what became of it."""
    executor = Executor(service, may_hook=may_hook)
    made = await run_policy(service, executor)
    for action in made.actions:
        if isinstance(action, Work):
            await executor.run(action)
    return [(item["action"], item["result"]) for item in executor.items]


def kinds(service: Service) -> list[str]:
    """List the kinds of the policy's events."""
    return [event["kind"] for event in service.events() if event["kind"].startswith("policy")]


def names(service: Service, volume: str = "db1") -> list[str]:
    """List a volume's snapshots."""
    return [s.name for s in service.snapshots(service.volume(volume).id)]


async def test_snapshots_are_taken_and_pruned_and_told(service: Service) -> None:
    await service.policies.set(HOURLY)
    start = 1_800_000_000 * 10**9
    for hour in range(4):
        set_clock(service, start + hour * HOUR_NS)
        assert ("snapshot", "done") in await run(service)
        assert await run(service) == []
    assert names(service) == ["auto-2027-01-15T1000Z", "auto-2027-01-15T1100Z"]
    assert names(service, "web") == []
    assert {s.tag for s in service.snapshots(service.volume("db1").id)} == {POLICY_TAG}
    assert kinds(service).count("policy-snapshot") == 4
    assert kinds(service).count("policy-prune") == 2
    assert "no rule keeps it" in [event["reason"] for event in service.events()]


async def test_held_and_own_snapshots_stay(service: Service) -> None:
    await service.policies.set(HOURLY)
    volume = service.volume("db1")
    await service.create_snapshots([(volume.id, "mine")])
    start = 1_800_000_000 * 10**9
    for hour in range(5):
        set_clock(service, start + hour * HOUR_NS)
        await run(service)
        if hour == 0:
            await service.branches.hold([(volume.id, "auto-2027-01-15T0800Z")], "backup")
    assert names(service) == [
        "mine", "auto-2027-01-15T0800Z", "auto-2027-01-15T1100Z", "auto-2027-01-15T1200Z",
    ]  # fmt: skip


async def test_a_refused_policy_leaves_the_old_one(service: Service) -> None:
    await service.policies.set(HOURLY)
    with pytest.raises(InvalidPolicy):
        await service.policies.set("[pool]\nfoo = 1")
    assert service.policies.stored.text == HOURLY


async def test_settings_follow_at_once(service: Service) -> None:
    await service.policies.set('[volume."db*"]\nsnapshot_max = 1\n')
    volume = service.volume("db1")
    await service.create_snapshots([(volume.id, "one")])
    assert service.snapshot_refusal(volume.id) is not None
    assert service.snapshot_refusal(service.volume("web").id) is None


async def test_a_volume_at_its_limit_does_not_keep_the_others_from_theirs(service: Service) -> None:
    await service.policies.set('[volume."*"]\nschedule = "hourly"\n[volume."web"]\nsnapshot_max = 1\n')
    await service.create_snapshots([(service.volume("web").id, "mine")])
    assert await run(service) == [("snapshot", "partly")]
    assert len(names(service)) == 1
    assert names(service, "web") == ["mine"]
    assert "policy-failed" in kinds(service)


async def test_scrub_reads_everything(service: Service) -> None:
    await service.policies.set('[pool]\nscrub = "monthly"\n')
    volume = service.volume("db1")
    await service.write(volume.map_id, 0, b"x" * 8192)
    assert await run(service) == []  # what was missed before there was a rule is not caught up
    set_clock(service, time.time_ns() + 32 * DAY_NS)
    assert await run(service) == [("scrub", "done")]
    assert await run(service) == []
    (scrubbed,) = [e["facts"] for e in service.events() if e["kind"] == "policy-scrub"]
    assert (scrubbed["verified_blocks"], scrubbed["lost_blocks"]) == (2, 0)


async def test_data_moves_to_where_the_rules_want_it(tmp_path: Path, service: Service) -> None:
    volume = service.volume("db1")
    await service.write(volume.map_id, 0, b"x" * 65536)
    await service.commit()
    await service.upkeep.add_storage(str(tmp_path / "fast.img"), storage_class="ssd")
    await service.policies.set(
        '[pool]\nbalance = "yearly"\nmove_rate = "1G"\n[volume."db*"]\nplace = ["class=ssd"]\nmigrate = "weekly"\n'
    )
    assert await run(service) == []
    set_clock(service, time.time_ns() + 367 * DAY_NS)
    assert await run(service) == [("balance", "done"), ("migrate", "done")]
    moved = [e["facts"]["moved_bytes"] for e in service.events() if e["kind"] == "policy-migrate"]
    assert moved == [65536]
    assert {e["storage"] for e in await service.inspection.extents(volume.map_id, 0, 9)} == {2, None}
    assert await service.read(volume.map_id, 0, 65536) == b"x" * 65536


async def test_copies_want_a_mirror(tmp_path: Path, service: Service) -> None:
    volume = service.volume("db1")
    await service.policies.set('[volume."db*"]\ncopies = 2\nmigrate = "weekly"\n')
    with pytest.raises(NoSpace, match="copies=2"):
        await service.write(volume.map_id, 0, b"x" * 4096)
    await service.write(service.volume("web").map_id, 0, b"x" * 4096)
    for leg in ("a", "b"):
        (tmp_path / leg).mkdir()
    await service.upkeep.add_storage(str(tmp_path / "a/1.img"), mirrors=[str(tmp_path / "b/1.img")], force=True)
    await service.write(volume.map_id, 0, b"x" * 4096)
    assert {e["storage"] for e in await service.inspection.extents(volume.map_id, 0, 9)} == {2, None}


async def test_a_target_that_was_away_gets_what_it_needs(tmp_path: Path, service: Service) -> None:
    there = tmp_path / "there"
    rule = f'replicate = [{{ to = "{there}", every = "hourly", keep = {{ hourly = 2 }} }}]'
    await service.policies.set(f'[volume."db1"]\nschedule = "hourly"\nkeep = {{ last = 1 }}\n{rule}\n')
    volume = service.volume("db1")
    start = 1_800_000_000 * 10**9
    assert ("replicate", "failed") in await run(service), "this host has not agreed"
    create_pool(there)
    results = []
    for hour in range(1, 6):
        set_clock(service, start + hour * HOUR_NS)
        await service.write(volume.map_id, 0, bytes([hour]) * 4096)
        if hour == 2:
            there.rename(tmp_path / "away")
        if hour == 5:
            (tmp_path / "away").rename(there)
        results.append(dict(await run(service, may_hook=True))["replicate"])
    assert results == ["done", "partly", "partly", "partly", "done"]
    assert "incfs_replica_last_success_timestamp_seconds{replica=" in metrics.render(service)
    async with open_service(there) as target:
        copy = target.volume("db1")
        assert await target.read(copy.map_id, 0, 4096) == bytes([5]) * 4096
        # The newest common one, and of those since then what the target's rules want of them at that time.
        assert len(names(target)) >= 3
    assert names(service)[-1] == "auto-2027-01-15T1300Z"


def hooked(before: list[str], after: list[str], more: str = "") -> str:
    """Write a policy with hooks."""
    lists = [str(words).replace("'", '"') for words in (before, after)]
    return f'[volume."db*"]\nschedule = "hourly"\nbefore = {lists[0]}\nafter = {lists[1]}\n{more}'


async def test_hooks_run_around_the_snapshot(tmp_path: Path, service: Service) -> None:
    script, seen = tmp_path / "hook", tmp_path / "seen"
    script.write_text(f'#!/bin/sh\necho "$1 $INCFS_VOLUMES $INCFS_SNAPSHOT $INCFS_POOL $HOME" >> {seen}\n')
    script.chmod(0o755)
    await service.policies.set(hooked([str(script), "before"], [str(script), "after"]))
    set_clock(service, 1_800_000_000 * 10**9)
    assert await run(service, may_hook=True) == [("snapshot", "done")]
    rest = f"db1 auto-2027-01-15T0800Z {service.directory}"
    assert [line.rstrip() for line in seen.read_text().splitlines()] == [f"before {rest}", f"after {rest}"]


async def test_hooks_need_the_consent_of_the_host(service: Service) -> None:
    await service.policies.set(hooked(["/bin/true"], []))
    assert await run(service) == [("snapshot", "failed")]
    assert names(service) == []
    assert any("has not agreed" in event["reason"] for event in service.events())


async def test_what_counted_on_a_snapshot_that_failed_is_not_pruned(service: Service) -> None:
    start = 1_800_000_000 * 10**9
    await service.policies.set('[volume."db*"]\nschedule = "hourly"\nkeep = { last = 1 }\n')
    set_clock(service, start)
    await run(service)
    await service.policies.set(hooked(["/bin/false"], [], "keep = { last = 1 }\n"))
    set_clock(service, start + HOUR_NS)
    assert await run(service, may_hook=True) == [("snapshot", "failed"), ("prune", "skipped")]
    assert names(service) == ["auto-2027-01-15T0800Z"]


@pytest.mark.parametrize(
    ("failing", "limit_s"), [(["/bin/false"], 60), (["/nonexistent/program"], 60), (["/bin/sleep", "1000"], 5)]
)
@pytest.mark.parametrize(("mode", "taken"), [("abort", 0), ("continue", 1)])
async def test_a_hook_that_fails(
    tmp_path: Path, service: Service, failing: list[str], limit_s: int, mode: str, taken: int
) -> None:
    thawed = tmp_path / "thawed"
    more = f'hook_failure = "{mode}"\nhook_timeout = "{limit_s}s"\n'  # of the hook that thaws, too
    await service.policies.set(hooked(failing, ["/bin/touch", str(thawed)], more))
    await run(service, may_hook=True)
    assert len(names(service)) == taken
    assert thawed.exists(), "what may have been frozen is thawed"
    assert {"policy-failed", "policy-hook-failed"} & set(kinds(service))


async def test_a_hook_that_fails_afterwards_is_told_and_the_snapshot_stays(service: Service) -> None:
    await service.policies.set(hooked([], ["/bin/false"]))
    assert await run(service, may_hook=True) == [("snapshot", "done")]
    assert "policy-hook-failed" in kinds(service)


async def test_a_hook_says_why_and_is_not_believed_without_end() -> None:
    with pytest.raises(HookFailed, match="ended with 3: no such database"):
        await run_hook(["/bin/sh", "-c", "echo no such database >&2; exit 3"], {}, 60)
    with pytest.raises(HookFailed, match="took more than 1 s and was killed") as caught:
        await run_hook(["/bin/sh", "-c", "yes"], {}, 1)
    assert len(str(caught.value)) < 5000


async def test_what_a_hook_leaves_behind_goes_on(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    await run_hook(["/bin/sh", "-c", f"sleep 1000 & echo $! > {started}"], {}, 60)
    pid = int(started.read_text())
    with trio.fail_after(60):
        while Path(f"/proc/{pid}/comm").read_text() != "sleep\n":  # its own name as soon as it has been executed
            await trio.sleep(0.01)
    await trio.run_process(["kill", str(pid)])


async def test_the_engine_does_what_a_new_policy_wants_at_once(service: Service) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(enforce, service)
        await trio.testing.wait_all_tasks_blocked()
        await service.policies.set(HOURLY)
        with trio.fail_after(60):
            while not names(service):
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_what_cannot_be_read_any_more_does_nothing_and_is_told(tmp_path: Path) -> None:
    create_pool(tmp_path / "pool")
    with open_store(tmp_path / "pool") as store:
        with store.step():
            store.add(StoredPolicy('[pool]\ntimezone = "Mars/Base"\n[volume."*"]\nschedule = "hourly"\n', 1))
        store.checkpoint()
    async with open_service(tmp_path / "pool") as opened:
        await opened.create_volume("db1", 1 << 20)
        with pytest.raises(InvalidPolicy, match="line 2"):
            await run(opened)
        assert kinds(opened) == ["policy-invalid"]
        assert "Mars" in opened.policies.stored.text
        await opened.policies.set(HOURLY)
        assert await run(opened) == [("snapshot", "done")]


async def test_the_same_failure_is_told_once(service: Service) -> None:
    await service.policies.set('[volume."db*"]\nschedule = "hourly"\nkeep = { last = 1 }\n')
    start = 1_800_000_000 * 10**9
    for hour in range(2):
        set_clock(service, start + hour * HOUR_NS)
        if hour:
            (first,) = service.snapshots(service.volume("db1").id)
            service.handles.open(first.map_id, "cp")
        await run(service)
    assert await run(service) == [("prune", "failed")]
    assert await run(service) == [("prune", "failed")]
    assert kinds(service).count("policy-failed") == 1
    service.handles.close(first.map_id)
    assert await run(service) == [("prune", "done")]


def test_it_is_there_after_a_crash_a_checkpoint_a_restore_and_a_repair(tmp_path: Path) -> None:
    store = pools.open_tiny(pools.make_pool(tmp_path))
    stored = StoredPolicy(HOURLY, 7, {"snapshot hourly": 9})
    with store.step():
        store.add(stored)
    store.commit()
    store = pools.crash(store)
    assert store.catalog.policy == stored
    with store.step():
        later = store.amend(stored, runs={"snapshot hourly": 10})
    store.checkpoint()
    store = pools.crash(store)
    assert store.catalog.policy == later
    pools.check_clean(store)
    from incfs.dump import write_dump

    write_dump(store, tmp_path / "dump.gz")
    store.abandon()
    assert '"record":"policy"' in gzip.decompress((tmp_path / "dump.gz").read_bytes()).decode()
    repair(tmp_path / "pool", tmp_path / "repaired")
    with open_store(tmp_path / "repaired") as repaired:
        assert repaired.catalog.policy == later
    with open_dump(tmp_path / "dump.gz") as lines:
        restore(lines, tmp_path / "restored", images={1: tmp_path / "pool/images" / _image(tmp_path)})
    with open_store(tmp_path / "restored") as restored:
        assert restored.catalog.policy == later


def _image(tmp_path: Path) -> str:
    (image,) = (tmp_path / "pool/images").glob("*.img")
    return image.name
