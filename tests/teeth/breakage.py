"""What a breakage is: a small change that makes the product wrong, and the test that must notice."""

from dataclasses import dataclass
from pathlib import Path


class Misfit(Exception):
    """The code has changed: the breakage, or what it names, must follow it."""


@dataclass(frozen=True, slots=True)
class Breakage:
    """One way to break the product.

    Concerns one place of one file, so that others may change everything around it.
    """

    name: str
    rule: str
    """The rule of docs/SAFETY.md that it breaks; ``policy``: what docs/POLICY.md promises; ``waiting``: that
    a slow disk keeps only those waiting who need it."""
    file: str
    """Below the project's root."""
    old: str
    """Short, and in the file exactly once."""
    new: str
    test: str
    """The pytest id that must turn red; the cheapest that does."""

    @property
    def is_native(self) -> bool:
        """Whether the extension must be built anew."""
        return self.file.endswith((".c", ".h")) and not self.test.startswith("tests/native/")

    def _is_in(self, path: Path) -> bool:
        return path.suffix in (".py", ".c", ".h") and self.old in path.read_text()

    def broken_text(self, root: Path) -> str:
        """Give the text of the file, broken.

        Raises:
            Misfit: The old text is not there exactly once, or the new one is no Python.
        """
        text = (root / self.file).read_text()
        found = text.count(self.old)
        if found != 1:
            now = [str(p.relative_to(root)) for p in (root / "incfs").rglob("*.[pch]*") if self._is_in(p)]
            raise Misfit(
                f"{self.name}: its old text is {found} times in {self.file}, expected once; update the breakage "
                f"(files that have it: {', '.join(now) or 'none'})"
            )
        broken = text.replace(self.old, self.new)
        if self.file.endswith(".py"):
            try:
                compile(broken, self.file, "exec")
            except SyntaxError as error:
                raise Misfit(f"{self.name}: {self.file} is no Python with it: {error}") from error
        return broken
