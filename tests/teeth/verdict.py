"""How the named test ended, and what that says of a breakage."""

import re
from dataclasses import dataclass, replace

from tests.teeth.breakage import Breakage

_WRONG_REASON = re.compile(
    r"^E .*(\b(ImportError|ModuleNotFoundError|SyntaxError|NameError|UnboundLocalError|AttributeError|TypeError)\b"
    r"|fixture '\w+' not found)",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one test ended."""

    status: str
    """green, red or skipped; or why that is not known."""
    reason: str = ""
    """One line."""
    details: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one breakage."""

    breakage: Breakage
    outcome: Outcome
    duration_s: float

    @property
    def word(self) -> str:
        """``caught``; or, in capitals, what is wrong."""
        if self.outcome.status == "red":
            return "WRONG REASON" if _WRONG_REASON.search(self.outcome.details) else "caught"
        return "SURVIVED" if self.outcome.status == "green" else self.outcome.status.upper()

    @property
    def is_caught(self) -> bool:
        """Whether the test noticed."""
        return self.word == "caught"

    def line(self) -> str:
        """Give a line of the table."""
        breakage = self.breakage
        head = f"{self.word:<14} {breakage.rule:<3} {breakage.name:<46} {self.duration_s:5.1f} s"
        return f"{head}  {self.outcome.reason[:70]}"

    def given(self, unchanged: dict[str, Outcome]) -> "Verdict":
        """Give the verdict in view of how the test ended in an unchanged copy."""
        outcome = unchanged[self.breakage.test]
        if outcome.status == "green":
            return self
        return replace(self, outcome=replace(outcome, status=f"{outcome.status} without it"))
