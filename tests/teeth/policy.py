"""Breakages of the policy: what must not be pruned, clocks that jump, hooks."""

from typing import Final

from tests.teeth.breakage import Breakage

_NEVER = "tests/unit/test_policy_retention.py::test_a_hold_a_clone_origin_and_a_common_snapshot_are_never_pruned"

POLICY: Final = (
    Breakage(
        "held-snapshot-pruned",
        "policy",
        "incfs/policy/retention.py",
        '[f"held: {tag}" for tag in snapshot.holds] + ',
        "",
        _NEVER,
    ),
    Breakage(
        "clone-origin-pruned",
        "policy",
        "incfs/policy/retention.py",
        ' + [f"origin of {name}" for name in snapshot.clones]',
        "",
        _NEVER,
    ),
    Breakage(
        "latest-common-snapshot-pruned",
        "policy",
        "incfs/policy/retention.py",
        "    if common is not None:\n        yield common.uuid,",
        "    if common is not None and replica.keep is not None:\n        yield common.uuid,",
        _NEVER,
    ),
    Breakage(
        "protected-snapshot-pruned-when-space-is-short",
        "policy",
        "incfs/policy/retention.py",
        "    return [d for d in counted[:-newest] if not d.is_protected]",
        "    return list(counted[:-newest])",
        _NEVER,
    ),
    Breakage(
        "snapshots-of-others-pruned",
        "policy",
        "incfs/policy/retention.py",
        "    return None if snapshot.is_policy or prune_all else",
        "    return None if snapshot.is_policy or not prune_all else",
        "tests/unit/test_policy_retention.py::test_only_what_the_policy_made_is_counted_and_pruned",
    ),
    Breakage(
        "pruned-by-a-clock-that-went-ahead",
        "policy",
        "incfs/policy/planner.py",
        "    if now_ns > seen_ns + _JUMP_NS:\n        until_ns = now_ns + _DAY_NS\n",
        "",
        "tests/unit/test_policy_planner.py::"
        "test_a_clock_set_ahead_prunes_nothing_for_a_day_and_back_again_nothing_at_all",
    ),
    Breakage(
        "nothing-due-after-a-clock-set-back",
        "policy",
        "incfs/policy/planner.py",
        "            self.after[task] = min(last_ns, now_ns)\n",
        "            self.after[task] = last_ns\n",
        "tests/unit/test_policy_planner.py::test_a_clock_set_back_stops_nothing",
    ),
    Breakage(
        "pruned-although-the-snapshot-failed",
        "policy",
        "incfs/enforcer.py",
        "                self._failed_volumes.update(action.volumes)\n",
        "                self._failed_volumes.clear()\n",
        "tests/service/test_policy.py::test_what_counted_on_a_snapshot_that_failed_is_not_pruned",
    ),
    Breakage(
        "hooks-without-consent",
        "I11",
        "incfs/enforcer.py",
        "        if hooks and not self._may_hook:",
        "        if hooks and self._may_hook and False:",
        "tests/service/test_policy.py::test_hooks_need_the_consent_of_the_host",
    ),
    Breakage(
        "what-was-frozen-stays-frozen",
        "policy",
        "incfs/enforcer.py",
        "                if hooks.after:\n",
        "                if hooks.after and action.name in self.items:\n",
        "tests/service/test_policy.py::test_a_hook_that_fails",
    ),
)
