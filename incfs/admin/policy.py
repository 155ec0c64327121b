"""Verbs of the policy."""

from typing import TYPE_CHECKING, Final

from incfs.admin.verb import Verb
from incfs.committer import offload
from incfs.documents import Document
from incfs.enforcer import (
    Executor,
    describe,
    make_plan,
    replicas_by_volume,
    run_policy,
    tell_first_runs,
    volume_facts,
)
from incfs.hooks import require_hooks
from incfs.policy.document import parse_policy
from incfs.policy.effective import effective_volume, rules_for, rules_for_pool
from incfs.policy.periods import moment, nanoseconds
from incfs.policy.plan import Work
from incfs.policy.planner import decisions_for
from incfs.settings import VolumeSettings
from incfs.targets import find_volume
from incfs.units import format_time

if TYPE_CHECKING:
    from incfs.service import Service


async def policy_show(service: "Service", *, effective: str | None = None) -> Document:
    """Report the policy's text; with ``effective`` what holds for that volume and where it is said."""
    stored = service.policies.stored
    facts: Document = {"text": stored.text, "set": format_time(stored.set_ns) if stored.set_ns else None}
    if effective is None:
        return {"policy": facts}
    volume = find_volume(service, effective)
    rows = [
        {"key": key, "value": found.written, "from": found.source}
        for key, found in effective_volume(service.policies.document, volume.name).items()
    ]
    return {"policy": facts, "volume": volume.name, "effective": rows}


async def policy_set(service: "Service", *, text: str) -> Document:
    """Let another policy rule from now on; tell when what takes long will be done for the first time."""
    document = parse_policy(text)
    await offload(lambda: require_hooks(document))
    stored = await service.policies.set(text)
    first = [{"task": run.task, "due": format_time(run.due_ns)} for run in await tell_first_runs(service)]
    return {"policy": {"text": stored.text, "set": format_time(stored.set_ns)}, "first_runs": first}


async def policy_run(service: "Service", *, dry_run: bool = False, hooks: bool = False) -> Document:
    """Do what the policy wants done now; ``dry_run`` only says what that is."""
    if dry_run:
        made = await make_plan(service)
        items = [describe(action) for action in made.actions]
    else:
        executor = Executor(service, may_hook=hooks or service.policies.may_hook)
        made = await run_policy(service, executor)
        for action in made.actions:
            if isinstance(action, Work):
                await executor.run(action)
        items = executor.items
    due = None if made.next_due_ns is None else format_time(made.next_due_ns)
    return {"run": {"dry_run": dry_run, "actions": items, "notes": list(made.notes), "next_due": due}}


async def policy_explain(service: "Service", *, volume: str) -> Document:
    """Report for each snapshot of a volume whether it stays and why, and when the next is due."""
    found = find_volume(service, volume)
    document, now_ns = service.policies.document, service.policies.now_ns()
    rule, zone = rules_for(document, found.name), rules_for_pool(document).timezone
    decisions = decisions_for(rule, volume_facts(service, found, now_ns, replicas_by_volume(service)), zone, now_ns)
    rows = [
        {
            "name": f"{found.name}@{decision.snapshot.name}",
            "created": format_time(decision.snapshot.created_ns),
            "held_bytes": decision.snapshot.held_bytes,
            "kept": decision.is_kept,
            "reasons": list(decision.reasons),
        }
        for decision in decisions
    ]
    due = None if rule.schedule is None else rule.schedule.following(moment(now_ns), zone)
    return {
        "volume": found.name,
        "schedule": None if rule.schedule is None else rule.schedule.text,
        "next_due": None if due is None else format_time(nanoseconds(due)),
        "snapshots": rows,
        "notes": notes_on_data(rule.settings),
    }


def notes_on_data(settings: VolumeSettings) -> list[str]:
    """Say what a volume's rules mean for its data, where that is not what everybody expects."""
    notes = []
    if not settings.verifies_reads:
        notes.append(
            'verify = "never": reads do not compare checksums, so what a disk has damaged is returned as data, is not '
            "healed from a mirror, and counts as right once a program or the kernel's cache writes it back"
        )
    if not settings.zero_elision:
        notes.append("zero_elision = false: blocks of zeros that are written occupy space")
    return notes


VERBS: Final = {
    "policy.show": Verb(policy_show, is_read_only=True),
    "policy.set": Verb(policy_set, is_read_only=False),
    "policy.run": Verb(policy_run, is_read_only=False),
    "policy.explain": Verb(policy_explain, is_read_only=True),
}
