"""Carries out what the policy plans: the one executor, and the daemon's task that calls it.

``run_policy`` is the same in the daemon, at ``incfs policy run`` and in a dry run.  Every
action is an event with its reason, and so is every one that failed.
"""

import logging
from collections.abc import Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import trio

from incfs import replicator
from incfs.committer import offload
from incfs.errors import HookFailed, IncfsError, NotFound
from incfs.hooks import run_hook
from incfs.jobs import Request
from incfs.model import Snapshot, Volume
from incfs.mover import MoveReport
from incfs.policy.effective import rules_for
from incfs.policy.facts import POLICY_TAG, PoolFacts, ReplicaFacts, SnapshotFacts, VolumeFacts
from incfs.policy.plan import Action, Plan, Prune, TakeSnapshots, Work
from incfs.policy.planner import NO_PRUNE_UNTIL, FirstRun, first_runs, plan
from incfs.replication import DEFAULT_PROGRAM, ReplicaConfig

if TYPE_CHECKING:
    from incfs.service import Service

logger = logging.getLogger(__name__)

MAX_WAIT_S: Final = 600.0
"""A plan is made that often at least: the clock may have been set, space may have become short."""
MIN_WAIT_S: Final = 1.0

Item = dict[str, Any]
"""What became of an action, for people and ``--json``."""


# --------------------------------------------------------------------------------- facts


Replicas = dict[str, list[ReplicaConfig]]
"""UUID of a volume -> its replicas."""


def replicas_by_volume(service: "Service") -> Replicas:
    """Look all replicas up at once."""
    found: Replicas = {}
    for _, config in replicator.list_replicas(service):
        for uuid in config.volumes:
            found.setdefault(uuid, []).append(config)
    return found


def volume_facts(service: "Service", volume: Volume, now_ns: int, replicas: Replicas) -> VolumeFacts:
    """Give what plans need to know of a volume."""
    snapshots = tuple(_snapshot_facts(service, taken, now_ns) for taken in service.snapshots(volume.id))
    return VolumeFacts(volume.name, snapshots, tuple(_replica_facts(service, volume, replicas.get(volume.uuid, []))))


def _replica_facts(service: "Service", volume: Volume, known: list[ReplicaConfig]) -> Iterator[ReplicaFacts]:
    """Give what is known of each target without asking it: it may be away."""
    keeps = {rule.to: rule.keep for rule in rules_for(service.policies.document, volume.name).replicate}
    for config in known:
        common = dict(zip(config.volumes, config.common, strict=False)).get(volume.uuid)
        yield ReplicaFacts(config.target, common, keeps.pop(config.target, None))
    for target, keep in keeps.items():
        yield ReplicaFacts(target, None, keep)


async def replica_for(service: "Service", volume: Volume, target: str) -> str:
    """Name the replica of a volume at a target, of a group if there is one; added when there is none."""
    known = [config for _, config in replicator.list_replicas(service) if config.target == target]
    found = max((config for config in known if volume.uuid in config.volumes), key=_member_count, default=None)
    if found is not None:
        return found.name
    mark = blake2b(f"{volume.uuid} {target}".encode(), digest_size=6).hexdigest()
    made = await replicator.add(
        service, [volume], target, name=f"policy-{mark}", names=[volume.name], program=DEFAULT_PROGRAM
    )
    return made.name


def _member_count(config: ReplicaConfig) -> int:
    return len(config.volumes)


def _snapshot_facts(service: "Service", taken: Snapshot, now_ns: int) -> SnapshotFacts:
    return SnapshotFacts(
        taken.name,
        taken.uuid,
        taken.created_ns,
        taken.generation,
        taken.held_blocks * service.block_bytes,
        is_policy=taken.tag == POLICY_TAG,
        holds=tuple(sorted(taken.holds_at(now_ns))),
        clones=tuple(clone.name or "a volume that is being removed" for clone in service.clones(taken)),
    )


async def pool_facts(service: "Service", now_ns: int) -> PoolFacts:
    """Give what plans need to know of a pool; others run between two volumes."""
    replicas = replicas_by_volume(service)
    volumes = []
    for volume in service.volumes():
        volumes.append(volume_facts(service, volume, now_ns, replicas))
        await trio.lowlevel.checkpoint()
    facts = service.facts()
    stored = service.policies.stored
    return PoolFacts(tuple(volumes), facts["free_bytes"], facts["capacity_bytes"], stored.runs, stored.set_ns)


# ------------------------------------------------------------------------------ executor


class Executor:
    """Carries out one plan."""

    def __init__(self, service: "Service", *, may_hook: bool) -> None:
        self._service = service
        self._may_hook = may_hook
        self._failed_volumes: set[str] = set()
        self.items: list[Item] = []

    async def run(self, action: Action) -> None:
        """Carry out an action; that it fails is an event and an item."""
        item = describe(action)
        try:
            item["result"] = await self._carry_out(action, item)
            self._service.policies.note_success(subject_of(action))
        except IncfsError as error:
            item |= {"result": "failed", "error": str(error)}
            self._service.policies.note_failure(subject_of(action), action.reason, error)
            if isinstance(action, TakeSnapshots):
                self._failed_volumes.update(action.volumes)
        self.items.append(item)

    async def _carry_out(self, action: Action, item: Item) -> str:
        match action:
            case TakeSnapshots():
                return await self._take(action, item)
            case Prune():
                return await self._prune(action)
            case Work():
                return await self._work(action, item)

    async def _take(self, action: TakeSnapshots, item: Item) -> str:
        wanted = []
        for name in action.volumes:
            try:
                volume = self._service.volume(name)
            except NotFound:
                continue  # removed since the plan was made
            if (refusal := self._service.snapshot_refusal(volume.id)) is not None:
                self._failed_volumes.add(name)
                self._service.policies.note_failure(f"volume {name}", action.reason, refusal)
                item.setdefault("refused", []).append({"volume": name, "error": str(refusal)})
                continue
            wanted.append((volume.id, action.name))
        if wanted:
            await self._take_between_hooks(action, wanted)
            self._note("policy-snapshot", action, action.reason, name=action.name)
        return "done" if len(wanted) == len(action.volumes) else "partly"

    async def _take_between_hooks(self, action: TakeSnapshots, wanted: list[Any]) -> None:
        hooks = action.hooks
        facts = {
            "INCFS_POOL": str(self._service.directory),
            "INCFS_SNAPSHOT": action.name,
            "INCFS_VOLUMES": "\n".join(action.volumes),
        }
        if hooks and not self._may_hook:
            raise HookFailed(
                "this host has not agreed to run the policy's hooks: mount with -o hooks, or use policy run --hooks"
            )
        try:
            await self._before(action, facts)
            await self._service.create_snapshots(wanted, tag=POLICY_TAG)
        finally:
            # Whatever came of it: what was frozen must be thawed, also when the daemon is ending.
            with trio.CancelScope(shield=True):
                if hooks.after:
                    await self._after(action, facts)

    async def _before(self, action: TakeSnapshots, facts: dict[str, str]) -> None:
        if not action.hooks.before:
            return
        try:
            await run_hook(action.hooks.before, facts, action.hooks.timeout_s)
        except HookFailed as error:
            if action.hooks.failure == "abort":
                raise
            self._note("policy-hook-failed", action, f"the snapshot is taken all the same; {error}")

    async def _after(self, action: TakeSnapshots, facts: dict[str, str]) -> None:
        try:
            await run_hook(action.hooks.after, facts, action.hooks.timeout_s)
        except HookFailed as error:
            self._note("policy-hook-failed", action, str(error))

    async def _prune(self, action: Prune) -> str:
        service = self._service
        if action.volume in self._failed_volumes:
            return "skipped"  # the plan counted on a snapshot that was not taken
        volume = service.volume(action.volume)
        taken = service.snapshot(volume.id, action.name)
        if taken.uuid != action.uuid:
            return "skipped"  # another one of that name
        await service.remove_snapshots([taken])
        self._note("policy-prune", action, action.reason, freed_bytes=action.freed_bytes)
        return "done"

    async def _work(self, action: Work, item: Item) -> str:
        """Do one of the things that take long, unless it is still under way."""
        working, work = self._service.policies.working, f"{action.kind} {action.target}"
        if work in working:
            return "skipped"
        working.add(work)
        try:
            found = await (self._replicate(action) if action.kind == "replicate" else self._move(action))
        finally:
            working.discard(work)
        item |= found
        self._note(f"policy-{action.kind}", action, action.reason, **found)
        if found.get("lost_blocks"):
            return "damage"
        return "partly" if found.get("failed") else "done"

    async def _replicate(self, action: Work) -> Item:
        """Bring the target up to date, replica by replica; one that fails does not stop the others."""
        service, sent_bytes, failed = self._service, 0, []
        is_done: dict[str, bool] = {}
        if not self._may_hook:
            raise HookFailed(
                "this host has not agreed to reach other pools: mount with -o hooks, or use policy run --hooks"
            )
        for name in action.volumes:
            subject = f"volume {name}"
            try:
                volume = service.volume(name)
                if service.snapshots(volume.id):
                    replica = await replica_for(service, volume, action.target)
                    if replica not in is_done:
                        is_done[replica] = False
                        done = await replicator.run(service, replica, rate_bytes=action.rate_bytes)
                        is_done[replica] = True
                        sent_bytes += done["stream_bytes"]
                    if not is_done[replica]:
                        failed.append(name)
                        continue
                service.policies.note_success(subject)
            except NotFound:
                continue  # removed since the plan was made
            except IncfsError as error:
                failed.append(name)
                service.policies.note_failure(subject, action.reason, error)
        return {"target": action.target, "stream_bytes": sent_bytes, "failed": failed}

    async def _move(self, action: Work) -> Item:
        """Move data, or verify it; give what came of it."""
        service = self._service
        rate = {"rate_bytes": action.rate_bytes}
        if action.kind == "scrub":
            async with service.jobs.under_way(Request("pool.scrub", "pool", rate)) as tell:
                return await service.upkeep.mirrors.scrub(**rate, restart=False, progress=tell)
        if action.kind == "balance":
            async with service.jobs.under_way(Request("pool.balance", "pool", rate)) as tell:
                return (await service.upkeep.balance(**rate, progress=tell)).to_dict(service.block_bytes)
        total = MoveReport()
        for name in action.volumes:
            try:
                volume = service.volume(name)
            except NotFound:
                continue  # removed since the plan was made
            request = Request("volume.migrate", f"volume {name}", {"volume": f"uuid:{volume.uuid}", **rate})
            async with service.jobs.under_way(request) as tell:
                moved = await service.upkeep.migrate(volume.id, **rate, progress=tell)
            total.moved_blocks += moved.moved_blocks
            total.unreadable_blocks += moved.unreadable_blocks
            total.first_error = total.first_error or moved.first_error
        return total.to_dict(service.block_bytes)

    def _note(self, kind: str, action: Action, reason: str, **facts: Any) -> None:
        self._service.record_event(kind, subject_of(action), reason, **facts)


def subject_of(action: Action) -> str:
    """Name what an action is about."""
    match action:
        case Prune(volume=volume, name=name):
            return f"snapshot {volume}@{name}"
        case Work(volumes=()):
            return "pool"
        case TakeSnapshots(volumes=(volume,)) | Work(volumes=(volume,)):
            return f"volume {volume}"
        case TakeSnapshots(volumes=volumes) | Work(volumes=volumes):
            return f"volumes {', '.join(volumes[:5])}{' ...' if len(volumes) > 5 else ''}"


def describe(action: Action) -> Item:
    """Describe an action that has not been carried out."""
    item: Item = {"action": "", "subject": subject_of(action), "reason": action.reason, "result": "planned"}
    match action:
        case TakeSnapshots():
            return {**item, "action": "snapshot", "volumes": list(action.volumes), "name": action.name}
        case Prune():
            names = {"volumes": [action.volume], "name": action.name}
            return {**item, "action": "prune", **names, "freed_bytes": action.freed_bytes}
        case Work():
            return {**item, "action": action.kind, "volumes": list(action.volumes), "name": None}


# -------------------------------------------------------------------------------- engine


async def make_plan(service: "Service") -> Plan:
    """Plan what the policy wants done now."""
    now_ns = service.policies.now_ns()
    facts = await pool_facts(service, now_ns)
    document = service.policies.document
    return await offload(lambda: plan(document, facts, now_ns))


async def tell_first_runs(service: "Service") -> list[FirstRun]:
    """Tell when the policy will do for the first time what takes long."""
    now_ns = service.policies.now_ns()
    facts = await pool_facts(service, now_ns)
    return first_runs(service.policies.document, facts, now_ns)


async def run_policy(service: "Service", executor: Executor) -> Plan:
    """Do what the policy wants done now, but for works: they take hours, and the caller sees to them.

    That a work is due no more is on disk on return, so a crash does not begin it again and again.

    Raises:
        PoolReadOnly: The pool has failed.
    """
    async with service.policies.lock:
        made = await make_plan(service)
        if NO_PRUNE_UNTIL not in service.policies.stored.runs:
            for note in made.notes:
                service.record_event("policy-waits", "pool", note)
        for action in made.actions:
            if not isinstance(action, Work):
                await executor.run(action)
        await service.policies.note_runs(made.runs)
        return made


async def enforce(service: "Service") -> None:
    """Do what the policy wants, when it is due; never returns."""
    async with trio.open_nursery() as nursery:
        while True:
            changed = service.policies.changed
            wait_s = MAX_WAIT_S
            is_able = service.policies.failure is None and not service.facts()["read_only"]
            if is_able and service.policies.stored.text:
                wait_s = await _enforce_once(service, nursery)
            with trio.move_on_after(wait_s):
                await changed.wait()


async def _enforce_once(service: "Service", nursery: trio.Nursery) -> float:
    """Do what is due; give the seconds until something is again."""
    executor = Executor(service, may_hook=service.policies.may_hook)
    try:
        made = await run_policy(service, executor)
    except IncfsError as error:
        service.policies.note_failure("pool", "the policy is not carried out", error)
        return MAX_WAIT_S
    for action in made.actions:
        if isinstance(action, Work):
            nursery.start_soon(executor.run, action)
    return _seconds_until(made.next_due_ns, service.policies.now_ns())


def _seconds_until(due_ns: int | None, now_ns: int) -> float:
    if due_ns is None:
        return MAX_WAIT_S
    return min(MAX_WAIT_S, max(MIN_WAIT_S, (due_ns - now_ns) / 1e9))
