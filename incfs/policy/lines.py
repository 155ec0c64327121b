"""On which line of a TOML text each key stands.  Pure.

``tomllib`` reads the text and says nothing of lines; ``tomlkit`` keeps comments but gives no
lines either.  So the keys are looked up here, in a text that ``tomllib`` has accepted: this
needs to be right for valid TOML only.
"""

import re
import tomllib
from typing import Final

Path = tuple[str | int, ...]
"""Keys, and indexes of arrays, from the top."""

_TOKEN: Final = re.compile(
    r'(?P<text>"""(?:\\.|[^\\])*?"{3,5}|' + r"'''.*?'{3,5}|" + r'"(?:\\.|[^"\\\n])*"|' + r"'[^'\n]*')"
    r"|(?P<mark>[\[\]{}=,.]|\n)"
    r"|(?P<bare>[^\s\[\]{}=,.#\"']+)"
    r"|(?P<skip>#[^\n]*|[^\S\n]+)",
    re.DOTALL,
)


def key_lines(text: str) -> dict[Path, int]:
    """Give the line, from 1, on which each key and each table of a valid TOML text is first named."""
    return _Scanner(text).lines


class _Scanner:
    """Walks over the tokens once."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Path, int] = {}
        self._tokens: list[tuple[str, str, int]] = []
        line = 1
        for match in _TOKEN.finditer(text.replace("\r\n", "\n")):
            if match.lastgroup != "skip":
                self._tokens.append((str(match.lastgroup), match[0], line))
            line += match[0].count("\n")
        self._tokens.append(("mark", "\n", line))
        self._at = 0
        table: Path = ()
        while self._at < len(self._tokens):
            if self._takes("\n"):
                continue
            if self._takes("["):
                self._takes("[")
                table = self._key(())
                while self._takes("]"):
                    pass
            else:
                self._pair(table)

    def _takes(self, mark: str) -> bool:
        found = self._at < len(self._tokens) and self._tokens[self._at][:2] == ("mark", mark)
        self._at += found
        return found

    def _key(self, prefix: Path) -> Path:
        """Take a dotted key, and note each part of it."""
        path = prefix
        while True:
            kind, token, line = self._tokens[self._at]
            self._at += 1
            path = (*path, tomllib.loads(f"k = {token}")["k"] if kind == "text" else token)
            self.lines.setdefault(path, line)
            if not self._takes("."):
                return path

    def _pair(self, table: Path) -> None:
        path = self._key(table)
        self._takes("=")
        self._value(path)

    def _value(self, path: Path) -> None:
        if self._takes("{"):
            self._members(path, "}")
        elif self._takes("["):
            self._members(path, "]")
        else:
            while self._tokens[self._at][:2] not in {("mark", m) for m in "\n,]}"}:
                self._at += 1

    def _members(self, path: Path, end: str) -> None:
        index = 0
        while not self._takes(end):
            if self._takes(",") or self._takes("\n"):
                continue
            if end == "}":
                self._pair(path)
            else:
                self.lines.setdefault((*path, index), self._tokens[self._at][2])
                self._value((*path, index))
                index += 1
