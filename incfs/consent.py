"""What records from elsewhere name of this host, and what somebody agreed to.

A dump is text that anybody may have written.  A raw image below a volume would be read with the daemon's rights and
shown to whoever the volume belongs to; programs would run, targets would get data, images would be made in
directories.  Each of these is named by a *claim*, which holds only if it was agreed to by itself.  Images need no
agreement: an image says in its header whose it is, and that is proved before it is used.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from incfs.baseline import BaselineFacts
from incfs.catalog import Record
from incfs.errors import InvalidPolicy
from incfs.model import NO_ORIGIN, StoredPolicy, Volume
from incfs.policy.document import Section, parse_policy
from incfs.replication import DEFAULT_PROGRAM, ReplicaConfig

BASELINE: Final = "--baseline"
TARGET: Final = "--target"
PROGRAM: Final = "--program"
HOOK: Final = "--hook"
DIRECTORY: Final = "--directory"
_NOTHING: Final = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing outside of the pool that a record names."""

    option: str
    """What agrees to it; nothing does where this is empty."""
    value: str
    what: str
    """Who wants it for what."""
    subject: str = ""
    """The volume, for whom alone the agreement is."""

    def __str__(self) -> str:
        remedy = f" ({shlex.join([self.option, self.value])})" if self.option else ""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{self.what}{remedy}")


@dataclass(frozen=True, slots=True)
class Consent:
    """What somebody agreed to."""

    baselines: Mapping[str, Path] = field(default_factory=dict)
    """Volume -> the raw image that it lies over, whatever its record says."""
    others: frozenset[tuple[str, str]] = frozenset()
    """Option and value of other claims."""

    def covers(self, claim: Claim) -> bool:
        """Tell whether a claim holds."""
        if claim.option == BASELINE:
            return claim.subject in self.baselines
        return (claim.option, claim.value) in self.others


def claims(record: Record) -> list[Claim]:
    """List what a record names outside of its pool.

    Raises:
        FormatError: A part of it cannot be read.
    """
    if isinstance(record, Volume):
        return [*_baseline_claims(record), *(claim for text in record.replicas.values() for claim in _replica(text))]
    if isinstance(record, StoredPolicy):
        return _policy_claims(record)
    return []


def _baseline_claims(volume: Volume) -> list[Claim]:
    if not volume.baseline or not volume.name:
        return []
    path = BaselineFacts.decode(volume.baseline).path
    owner = f"mode {volume.mode & 0o777:03o}, owner {volume.uid}:{volume.gid}"
    what = f"volume {volume.name} ({owner}) shows what is in {path}"
    return [Claim(BASELINE, f"{volume.name}={path}", what, volume.name)]


def _replica(text: str) -> Iterator[Claim]:
    config = ReplicaConfig.from_text(text)
    yield Claim(TARGET, config.target, f"replica {config.name} sends to {config.target}")
    if config.program != DEFAULT_PROGRAM:
        yield Claim(PROGRAM, config.program, f"replica {config.name} runs {config.program}")


def _policy_claims(record: StoredPolicy) -> list[Claim]:
    try:
        document = parse_policy(record.text)
    except InvalidPolicy as error:
        return [Claim(_NOTHING, "", f"the policy cannot be read here: {error}")] if record.text else []
    sections = [document.pool, *document.templates.values(), *document.volumes]
    return [claim for section in sections for claim in _section_claims(section)]


def _section_claims(section: Section) -> Iterator[Claim]:
    for key, found in section.values.items():
        where = f"the policy's {key} in {section.name}, line {found.line},"
        value: Any = found.value
        if key in ("before", "after") and value:
            yield Claim(HOOK, shlex.join(value), f"{where} runs {shlex.join(value)}")
        elif key == "replicate":
            yield from (Claim(TARGET, rule.to, f"{where} sends to {rule.to}") for rule in value)
        elif key == "directories":
            yield from (Claim(DIRECTORY, d.path, f"{where} makes images in {d.path}") for d in value)


def admit(record: Record, consent: Consent, home: Path) -> Record:
    """Give a record with those of its claims alone that hold.

    Without its baseline a volume stays, and what it has of its own is read; where the baseline would be read there
    is an error.  A policy goes as a whole.

    Args:
        record: From elsewhere.
        consent: What somebody agreed to.
        home: The pool's directory.
    """
    if isinstance(record, StoredPolicy):
        return record if all(map(consent.covers, claims(record))) else replace(record, text="", runs={})
    if not isinstance(record, Volume):
        return record
    replicas = {name: text for name, text in record.replicas.items() if all(map(consent.covers, _replica(text)))}
    if not record.baseline:
        return replace(record, replicas=replicas)
    if not record.name:  # it is being removed: nobody reads it any more
        return replace(record, replicas=replicas, baseline={}, origin=NO_ORIGIN)
    facts = BaselineFacts.decode(record.baseline)
    path = consent.baselines.get(record.name, home / f"baseline-{facts.id}-left-out")
    return replace(record, replicas=replicas, baseline=replace(facts, path=path).encode())
