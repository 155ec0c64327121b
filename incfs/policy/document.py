"""A policy's text, read into sections.  Pure.

Every error says on which line; nothing unknown is accepted (I11).
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from incfs.errors import InvalidPolicy, UsageError
from incfs.model import MAX_POLICY_BYTES
from incfs.policy.lines import Path, key_lines
from incfs.policy.readers import texts
from incfs.policy.rules import POOL_KEYS, VOLUME_KEYS, Key


@dataclass(frozen=True, slots=True)
class Value:
    """One key of a section."""

    value: Any
    """As it was read."""
    written: Any
    """As it stands in the text."""
    line: int


@dataclass(frozen=True, slots=True)
class Section:
    """``[pool]``, ``[template.NAME]`` or ``[volume."GLOB"]``."""

    name: str
    line: int = 0
    uses: tuple[str, ...] = ()
    """Templates, in order."""
    values: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PolicyDocument:
    """A whole policy."""

    pool: Section = field(default_factory=lambda: Section("pool"))
    templates: Mapping[str, Section] = field(default_factory=dict)
    volumes: tuple[Section, ...] = ()
    """In the order of the text."""


def parse_policy(text: str) -> PolicyDocument:
    """Read a policy.

    Raises:
        InvalidPolicy: It is no TOML, has an unknown section or key, or a bad value; says where.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_POLICY_BYTES:
        raise InvalidPolicy(f"a policy may have {MAX_POLICY_BYTES} bytes; this one has more")
    try:
        return _Reader(tomllib.loads(text), key_lines(text)).read()
    except tomllib.TOMLDecodeError as error:
        raise InvalidPolicy(f"the policy is not valid TOML: {error}") from error
    except RecursionError as error:
        raise InvalidPolicy("the policy is nested too deeply") from error


class _Reader:
    """Reads a parsed text, knowing the lines of its keys."""

    def __init__(self, parsed: dict[str, Any], lines: Mapping[Path, int]) -> None:
        self._parsed = parsed
        self._lines = lines

    def read(self) -> PolicyDocument:
        for name in self._parsed:
            if name not in ("pool", "template", "volume"):
                raise self._error((name,), f"unknown section {name!r}; known are pool, template and volume")
        templates = {name: self._section(("template", name), VOLUME_KEYS) for name in self._tables("template")}
        volumes = tuple(self._section(("volume", glob), VOLUME_KEYS, templates) for glob in self._tables("volume"))
        pool = self._section(("pool",), POOL_KEYS) if "pool" in self._parsed else Section("pool")
        return PolicyDocument(pool, templates, volumes)

    def _tables(self, kind: str) -> list[str]:
        found = self._parsed.get(kind, {})
        if not isinstance(found, dict):
            raise self._error((kind,), f'{kind} is not a section; write [{kind}."NAME"]')
        return list(found)

    def _section(
        self, path: tuple[str, ...], keys: Mapping[str, Key], templates: Mapping[str, Section] | None = None
    ) -> Section:
        table: Any = self._parsed
        for part in path:
            table = table[part]
        name = path[0] if len(path) == 1 else f'{path[0]} "{path[1]}"'
        if not isinstance(table, dict):
            raise self._error(path, f"{name} is not a section")
        values: dict[str, Value] = {}
        uses: tuple[str, ...] = ()
        for key, written in table.items():
            if key == "use" and templates is not None:
                uses = self._uses((*path, key), written, templates)
            else:
                values[key] = self._value((*path, key), keys, written, name)
        return Section(path[-1], self._line(path), uses, values)

    def _value(self, path: Path, keys: Mapping[str, Key], written: Any, section: str) -> Value:
        key = keys.get(str(path[-1]))
        if key is None:
            raise self._error(path, f"unknown key {path[-1]!r} in {section}; known are {', '.join(keys)}")
        try:
            return Value(key.read(written), written, self._line(path))
        except UsageError as error:
            raise self._error(path, f"{path[-1]} in {section}: {error}") from error

    def _uses(self, path: Path, written: Any, templates: Mapping[str, Section]) -> tuple[str, ...]:
        try:
            uses = texts(written)
        except UsageError as error:
            raise self._error(path, f"use: {error}") from error
        for name in uses:
            if name not in templates:
                raise self._error(path, f"there is no template {name!r}; there are: {', '.join(templates) or 'none'}")
        return uses

    def _line(self, path: Path) -> int:
        return self._lines[path]

    def _error(self, path: Path, message: str) -> InvalidPolicy:
        line = self._line(path)
        return InvalidPolicy(f"line {line} of the policy: {message}", line=line)
