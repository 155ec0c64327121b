"""The policy of an open pool: its text, what it means, when its tasks last ran.

Owns nothing but references to the parts of an open pool; the trio thread.  The text is a
record of the catalog, so it goes through the journal like any other: it is there whole or not
at all, and moves with the pool.
"""

import logging
from collections.abc import Callable, Mapping

import trio

from incfs.committer import Committer
from incfs.errors import InvalidPolicy
from incfs.model import StoredPolicy
from incfs.policy.document import PolicyDocument, parse_policy
from incfs.policy.effective import settings_of
from incfs.settings import PoolSettings
from incfs.store import Store

logger = logging.getLogger(__name__)

NO_POLICY = StoredPolicy("", 0)


class Policies:
    """The policy of one pool.

    Args:
        store: The open pool.
        committer: What makes changes durable.
        apply: Takes the settings that follow from it.
    """

    def __init__(self, store: Store, committer: Committer, apply: Callable[[PoolSettings], None]) -> None:
        self._store = store
        self._committer = committer
        self._apply = apply
        self.may_hook = False
        """This host agrees to run the programs that the policy names."""
        self.lock = trio.Lock()
        """Held while a plan is made and carried out."""
        self.working: set[str] = set()
        """What is being done of the things that take long."""
        self.changed = trio.Event()
        """Set when another policy has come; then there is a new event."""
        self.failure: InvalidPolicy | None = None
        """Why what is stored cannot be read on this host."""
        self._document = PolicyDocument()
        self._told: set[tuple[str, str]] = set()

    @property
    def stored(self) -> StoredPolicy:
        """The record; an empty one without a policy."""
        return self._store.catalog.policy or NO_POLICY

    @property
    def document(self) -> PolicyDocument:
        """What rules now.

        Raises:
            InvalidPolicy: What is stored cannot be read on this host.
        """
        if self.failure is not None:
            raise self.failure
        return self._document

    def note_failure(self, subject: str, reason: str, error: Exception) -> None:
        """Record that an action failed; the same failure again and again is told once."""
        told = subject, str(error)
        if told not in self._told:
            self._told.add(told)
            self._store.events.record("policy-failed", subject, f"{reason}; {error}")

    def note_success(self, subject: str) -> None:
        """Tell the next failure of an action, whatever was told before."""
        self._told = {told for told in self._told if told[0] != subject}

    def load(self) -> None:
        """Let what is stored rule, once the pool is open."""
        if self._store.catalog.policy is None:
            return
        try:
            self._document = parse_policy(self.stored.text)
        except InvalidPolicy as error:
            self.failure = error
            # A time zone that this host does not know, or a key of a newer incfs: nothing is done by guess.
            self._store.events.record("policy-invalid", "pool", f"nothing is done by the policy: {error}")
            return
        self._apply(settings_of(self._document))

    async def set(self, text: str) -> StoredPolicy:
        """Let another policy rule from now on; tasks that both have keep their last run.

        Durability: durable on return.

        Raises:
            InvalidPolicy: It has an error; the old one goes on.
            PoolReadOnly: The pool has failed.
        """
        document = parse_policy(text)
        with self._store.step():
            stored = self._put(text)
        self._document, self.failure = document, None
        self._apply(settings_of(document))
        self.look_soon()
        await self._committer.commit()
        return stored

    def look_soon(self) -> None:
        """Let whoever carries the policy out look what is due: it is another one, or space is short."""
        self.changed.set()
        self.changed = trio.Event()

    def _put(self, text: str) -> StoredPolicy:
        stored = StoredPolicy(text, self._store.clock(), self.stored.runs)
        if self._store.catalog.policy is not None:
            return self._store.amend(self.stored, text=text, set_ns=stored.set_ns)
        self._store.add(stored)
        return stored

    async def note_runs(self, runs: Mapping[str, int]) -> None:
        """Remember when tasks last ran.

        Durability: durable on return.
        """
        if self._store.catalog.policy is None or self.stored.runs == runs:
            return
        with self._store.step():
            self._store.amend(self.stored, runs=dict(runs))
        await self._committer.commit()

    def now_ns(self) -> int:
        """Tell the time by the pool's clock."""
        return self._store.clock()
