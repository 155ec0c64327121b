"""The crash simulator: cuts the power at every moment of a recorded workload, recovers, compares.

A *state* is a media that a cut may leave: the content of every file.  States are counted once
for the whole run, however often they come up.  Each is judged by two recoveries, a check with
data and a comparison of everything in the pool, or found equal to one that was, in every byte
that those have read.  Of the states that were found equal one in ``CONTROL`` is recovered
nevertheless, as a proof of that.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from incfs.errors import IncfsError
from incfs.options import Options
from incfs.store import Store
from tests.support import pools
from tests.support.figures import FIGURES
from tests.support.likeness import Likeness, digest_of
from tests.support.media import Media, MemoryBacking
from tests.support.power import Machine
from tests.support.recorder import Cut, picture

CONTROL = 200
SECOND_CUT_LIMIT = 24
"""States of each cut during a recovery."""


@dataclass(slots=True)
class Outcome:
    """What became of a state."""

    found: bytes = b""
    """Picture of the pool."""
    problem: str = ""


class Simulator:
    """Judges states.

    Args:
        root: A directory in memory.
        options: How the pool is opened.
        name: The copy of its metadata by which it is opened.
    """

    def __init__(self, root: Path, options: Options, name: str = "pool") -> None:
        self.backing = MemoryBacking(root)
        self._options = options
        self._directory = root / name
        self._like: Likeness[Outcome] = Likeness()
        self._judged: dict[bytes, Outcome] = {}
        self._hits = 0

    def try_all(self, cuts: Iterator[Cut], limit: int, *, seed: int = 0, second_cut_every: int = 0) -> None:
        """Judge up to ``limit`` states of each cut, all of them where there are no more.

        Args:
            cuts: Where the power fails.
            limit: States of each.
            seed: Of what is chosen by chance.
            second_cut_every: After so many states one has its recovery cut off everywhere, too.

        Raises:
            AssertionError: One does not lead to an allowed commit point.
        """
        tried = 0
        for cut in cuts:
            where = f"event {cut.number} ({cut.event.kind} {cut.event.name} {cut.event.offset_bytes})"
            for media in cut.machine.cuts(limit, Random(f"{seed}.{cut.number}")):
                found = self._require(media, cut.allowed, where)
                tried += 1
                if second_cut_every and tried % second_cut_every == 0:
                    self.cut_recovery(media, found, SECOND_CUT_LIMIT)

    def _require(self, media: Media, allowed: frozenset[bytes], where: str) -> bytes:
        outcome = self.judge(media)
        assert not outcome.problem, f"{where}: {outcome.problem}"
        assert outcome.found in allowed, f"{where}: no allowed commit point"
        return outcome.found

    def cut_recovery(self, media: Media, expected: bytes, limit: int) -> None:
        """Cut the power during the recovery of a state, at each of its persistence points."""
        self.backing.load(media)
        with self.backing.recording_tables():
            self._open(lambda store: b"")
        machine, events = Machine(media), list(self.backing.events)
        for number, event in enumerate(events):
            machine.play(event)
            if number + 1 == len(events) or events[number + 1].kind == "sync":
                FIGURES["second cuts, during a recovery"] += 1
                for found in machine.cuts(limit, Random(number)):
                    self._require(found, frozenset([expected]), f"second cut, event {number} of the recovery")

    def judge(self, media: Media) -> Outcome:
        """Recover a state, or find that it is like one that was."""
        digest = digest_of(media)
        outcome = self._judged.get(digest)
        if outcome is None:
            FIGURES.count_once("crash states", digest)
            outcome = self._judged[digest] = self._find_like(media) or self._recover(media)
        return outcome

    def _find_like(self, media: Media) -> Outcome | None:
        known = self._like.find(media)
        if known is not None:
            self._hits += 1
            FIGURES["of them equal to another in all that recovery reads"] += 1
            if self._hits % CONTROL == 0:
                assert self._run(media) == known, "a state that was found equal is recovered differently"
        return known

    def _recover(self, media: Media) -> Outcome:
        FIGURES["of them recovered twice and checked"] += 1
        outcome = self._run(media)
        self._like.remember(media, self.backing.reads, outcome)
        return outcome

    def _run(self, media: Media) -> Outcome:
        self.backing.load(media)
        try:
            found = self._open(self._examine)
            again = self._open(picture)
        except (IncfsError, AssertionError) as error:
            return Outcome(problem=f"{type(error).__name__}: {error}")
        return Outcome(found, "" if found == again else "a second recovery gives something else")

    def _open(self, look: Callable[[Store], bytes]) -> bytes:
        store = pools.open_tiny(self._directory, self._options, self.backing)
        try:
            return look(store)
        finally:
            store.abandon()

    @staticmethod
    def _examine(store: Store) -> bytes:
        found = picture(store)
        pools.check_memory(store)
        report = pools.run_check(store)
        assert report.is_clean, report.problems
        return found
