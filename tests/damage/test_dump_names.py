"""A dump is text that anybody may have written: whatever it names of the host is not touched unless somebody agreed.

The generator puts a path of the host into each text of each record, wherever it stands: also into one that comes later.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import trio

from incfs import consent as consents
from incfs import dump, restore
from incfs.admin import run_verb
from incfs.catalog import KINDS
from incfs.consent import Consent
from incfs.errors import FormatError, ImageMismatch, IncfsError, NamesOutside, UsageError
from incfs.service import Service, open_service
from tests.support import pools
from tests.support.cli import Cli
from tests.support.opened import Watch

BLOCK = pools.BLOCK
POLICY = """\
[pool]
directories = ["{made}", {{ path = "{made}", class = "ssd" }}]
low_water = "100%"
[template.db]
schedule = "1m"
before = ["{program}", "an argument"]
after = ["{program}"]
[volume."*"]
use = ["db"]
replicate = [{{ to = "{target}", every = "monthly" }}]
"""
NOT_BUILT = {
    # Of an unfinished receive: data of a stream, in base64, which tests/model/test_transfers.py makes hostile.
    ("volume", "receive_state"), ("volume", "receive_lead"),
    # Of a rollback, a shrink and a flattening under way: numbers.
    ("volume", "rollback_to"), ("volume", "rollback_mark"), ("volume", "trim_from_bytes"),
    ("volume", "flat_generation"), ("volume", "is_replica"), ("storage", "is_evacuating"),
    ("volume", "uid"), ("volume", "gid"), ("snapshot", "held_blocks"),
}  # fmt: skip


class Place:
    """A pool's dump, what it names of the host, and in a directory of its own a bait."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.mine, self.secrets = home / "mine", home / "secrets"
        self.made, self.target, self.raw = self.mine / "made", self.mine / "target", self.mine / "raw.img"
        self.program, self.bait = self.mine / "program", self.secrets / "bait"
        for directory in (self.mine, self.secrets, self.made, self.target):
            directory.mkdir()
        for program in (self.program, self.bait):
            program.write_text(f"#!/bin/sh\n: > {program}.ran\n".ljust(4 * BLOCK, "\n"))
            program.chmod(0o700)
            os.utime(program, ns=(1, 1))
        self.raw.write_bytes(b"r" * 4 * BLOCK)
        os.utime(self.raw, ns=(1, 1))
        self.documents = list(self._documents())

    def _documents(self) -> Iterator[Any]:
        pool = pools.make_pool(self.home)

        async def work() -> None:
            async with open_service(pool, pools.tiny_options(dump_interval_s=None)) as service:
                below = await service.branches.create_on_baseline("b", self.raw)
                made = await service.create_volume("v", 10 * BLOCK)
                await service.write(made.map_id, 0, b"x" * 3 * BLOCK)
                await service.set_xattr(made.id, "user.note", b"x")
                await service.create_snapshots([(made.id, "s"), (below.id, "s")], tag="t")
                await service.branches.hold([(made.id, "s")], "tag")
                await service.branches.bookmark(service.snapshot(made.id, "s"), "m")

        trio.run(work)
        store = pools.open_tiny(pool)
        lines = [line.encode() for line in dump.dump_lines(store)]
        store.abandon()
        policy = {
            "text": self.policy(),
            "set_ns": 1,
            "runs": {"scrub": 1, f"replicate to {self.target} monthly": 1 << 62},
        }
        found = [json.loads(line) for line in lines[:-1]]
        first_page = next(i for i, document in enumerate(found) if "page" in document)
        for document in [*found[:first_page], {"record": "policy", "value": policy}, *found[first_page:]]:
            match document:
                case {"record": "storage", "value": value}:
                    value["mirrors"], value["stale_legs"] = [f"{value['path']}.leg1"], [1]
                    value["left_legs"] = [[1, 1, 1, 1, 1]]
                    value["storage_class"] = "ssd"
                case {"record": "volume", "value": {"name": "v"} as value}:
                    value["replicas"] = {"r": self.replica(value["uuid"])}
                    value["stripes"] = [[1, 64, 1]]
            yield document

    def replica(self, uuid: str) -> str:
        """Make the text of a replica."""
        config = {
            "name": "r",
            "target": str(self.target),
            "volumes": [uuid],
            "names": ["w"],
            "program": str(self.program),
        }
        return json.dumps(config | {"common": [uuid], "last_error": "none"})

    def policy(self) -> str:
        """Make a policy that names everything that one can."""
        return POLICY.format(made=self.made, program=self.program, target=self.target)

    def agreed(self) -> Consent:
        """Agree to everything that the dump names."""
        claims = restore.names(lines_of(self.documents)).claims
        others = frozenset((c.option, c.value) for c in claims if c.option != consents.BASELINE)
        return Consent({"b": self.raw}, others)


@pytest.fixture
def place(pool_home: Path) -> Place:
    return Place(pool_home)


def lines_of(documents: list[Any]) -> list[bytes]:
    lines = [json.dumps(document).encode() + b"\n" for document in documents]
    digest = blake2b(b"".join(lines), digest_size=16).hexdigest()
    counts = {
        "records": sum("record" in d for d in documents),
        "pages": sum("page" in d or "trail" in d for d in documents),
    }
    return [*lines, json.dumps({"end": {**counts, "digest": digest}}).encode() + b"\n"]


Change = Callable[[str], str]


def changed(value: Any, change: Change, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield where each text of a value stands, and the value with that text, or name, changed."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from ((at, {**value, key: new}) for at, new in changed(below, change, f"{where}.{key}"))
            if where:
                yield f"{where}.{key} (name)", {change(k) if k == key else k: v for k, v in value.items()}
    elif isinstance(value, list):
        for i, below in enumerate(value):
            yield from ((at, [*value[:i], new, *value[i + 1 :]]) for at, new in changed(below, change, f"{where}.{i}"))
    elif isinstance(value, str):
        yield where, change(value)
        if value.startswith("{"):
            yield from ((at, json.dumps(new)) for at, new in changed(json.loads(value), change, where))
        for found in re.finditer(r'"([^"\n]*)"', value if where == ".text" else ""):
            yield f"{where}:{found.start()}", value[: found.start(1)] + change(found[1]) + value[found.end(1) :]


def hostile(place: Place) -> Iterator[tuple[str, list[Any]]]:
    """Yield dumps with the bait in one text more."""
    for number, document in enumerate(place.documents):
        for where, value in changed(document["value"], lambda _: str(place.bait)) if "record" in document else ():
            documents = [*place.documents]
            documents[number] = {**document, "value": value}
            yield f"{document['record']}{where}", documents


async def use(pool: Path) -> None:
    """Do with a pool what a host does that agrees to hooks: read all, run the policy, replicate."""
    async with open_service(pool, pools.tiny_options()) as service:
        service.policies.may_hook = True
        for volume in service.volumes():
            await attempt(lambda volume=volume: service.read(volume.map_id, 0, volume.size_bytes))  # type: ignore[misc]
        for verb, arguments in (("policy.run", {}), ("volume.verify", {"volume": "b"})):
            await attempt(lambda verb=verb, arguments=arguments: run(service, verb, arguments))  # type: ignore[misc]
        await attempt(service.checkpoint)


async def attempt(work: Callable[[], Any]) -> None:
    """Do it, or hear why not."""
    with contextlib.suppress(IncfsError):
        await work()


async def run(service: Service, verb: str, arguments: dict[str, Any]) -> None:
    await run_verb(service, verb, arguments, lambda *_: None)


def test_the_dump_has_every_field(place: Place) -> None:
    """A field that comes later must be in the dump of these tests, so that the generator sees it."""
    seen = {
        (document["record"], key)
        for document in place.documents
        if "record" in document
        for key, value in document["value"].items()
        if value
    }
    expected = {(kind, field.name) for kind, record in KINDS.items() for field in fields(record)}
    assert expected - seen <= NOT_BUILT
    assert not NOT_BUILT & seen


def test_nothing_that_any_text_of_a_dump_names_is_touched(place: Place) -> None:
    agreed, count, restored = place.agreed(), 0, 0
    with Watch(place.secrets) as watch:
        for count, (where, documents) in enumerate(hostile(place), 1):
            target = place.home / f"again-{count}"
            try:
                known = restore.names(lines_of(documents)).claims
                mine = Consent(agreed.baselines, agreed.others & {(claim.option, claim.value) for claim in known})
                restore.restore(lines_of(documents), target, consent=mine, leaves_out=True)
            except IncfsError:
                pass
            else:
                restored += 1
                trio.run(use, target)
            looked_at, touched = watch.take()
            assert not touched, where
            # An image says in its header whose it is: it is looked at, and nothing else is done to it.
            assert not looked_at or re.match(r"storage\.(path|mirrors)", where), (where, looked_at)
    assert count > 50
    assert restored > count / 4
    assert place.program.with_name("program.ran").exists()  # what was agreed to did happen meanwhile


def test_a_dump_that_names_things_outside_is_refused_with_each(place: Place) -> None:
    """It was obeyed: a file of root's was shown to whom the dump said."""
    lines, again = lines_of(place.documents), place.home / "again"
    with pytest.raises(NamesOutside) as refused:
        restore.restore(lines, again)
    for part in (f"--baseline b={place.raw}", f"--target {place.target}", f"--program {place.program}",
                 f"--hook {place.program}", f"--directory {place.made}", "mode 600", "line 2"):  # fmt: skip
        assert part in refused.value.message
    assert not again.exists()
    for claim in restore.names(lines).claims:
        rest = replace(place.agreed(), baselines={}) if claim.subject else place.agreed()
        rest = replace(rest, others=rest.others - {(claim.option, claim.value)})
        with pytest.raises(NamesOutside) as refused:
            restore.restore(lines, again, consent=rest)
        assert claim.what in refused.value.claims
    assert not again.exists()


def test_what_is_agreed_to_holds(place: Place) -> None:
    again = place.home / "again"
    assert restore.restore(lines_of(place.documents), again, consent=place.agreed())["left_out"] == []
    with pools.open_tiny(again) as store:
        b, v = (store.catalog.volume_named(name) for name in "bv")
        assert pools.read(store, b.map_id) == b"r" * 4 * BLOCK
        assert list(v.replicas) == ["r"]
        assert store.catalog.policy is not None
        assert store.catalog.policy.text == place.policy()


def test_what_is_left_out_is_told_and_the_rest_is_there(place: Place) -> None:
    again = place.home / "again"
    facts = restore.restore(lines_of(place.documents), again, leaves_out=True)
    assert len(facts["left_out"]) == len(restore.names(lines_of(place.documents)).claims)
    with pools.open_tiny(again) as store:
        b, v = (store.catalog.volume_named(name) for name in "bv")
        assert pools.read(store, v.map_id) == b"x" * 3 * BLOCK + bytes(7 * BLOCK)
        with pytest.raises(ImageMismatch, match="left-out"):
            pools.read(store, b.map_id)
        assert v.replicas == {}
        assert store.catalog.policy is not None
        assert store.catalog.policy.text == ""


def test_a_baseline_may_have_moved(place: Place) -> None:
    moved = place.mine / "moved.img"
    place.raw.rename(moved)
    restore.restore(
        lines_of(place.documents), place.home / "again", consent=replace(place.agreed(), baselines={"b": moved})
    )
    with pools.open_tiny(place.home / "again") as store:
        assert pools.read(store, store.catalog.volume_named("b").map_id) == b"r" * 4 * BLOCK


def test_two_volumes_share_a_baseline_or_have_two(place: Place) -> None:
    """The first one's would have been read for the second, too, which others may see."""
    number, document = next((i, d) for i, d in enumerate(place.documents) if d.get("value", {}).get("name") == "b")
    other = {**document["value"], "id": 9, "name": "c", "uuid": "00000000-0000-0000-0000-000000000009"}
    other |= {"newest_generation": 0, "last_generation": 0}
    other["baseline"] = {**other["baseline"], "path": str(place.bait)}
    documents = [*place.documents[:number], document, {**document, "value": other}, *place.documents[number + 1 :]]
    consent = replace(place.agreed(), baselines={"b": place.raw, "c": place.bait})
    with pytest.raises(FormatError, match="name one of them for all"):
        restore.restore(lines_of(documents), place.home / "again", consent=consent)
    restore.restore(
        lines_of(documents), place.home / "again", consent=replace(consent, baselines={"b": place.raw, "c": place.raw})
    )


def test_nothing_is_agreed_to_that_is_not_named(place: Place) -> None:
    for wrong in (Consent({"w": place.raw}), Consent({}, frozenset({(consents.HOOK, "/bin/true")}))):
        with pytest.raises(UsageError, match="does not name"):
            restore.restore(lines_of(place.documents), place.home / "again", consent=wrong, leaves_out=True)


def test_a_policy_that_cannot_be_read_here_is_left_out(place: Place) -> None:
    """A newer incfs on this host would read it, and do what it says."""
    documents = [{**d, "value": {**d["value"], "text": "[later]\n"}} if d.get("record") == "policy" else d
                 for d in place.documents]  # fmt: skip
    others = {pair for pair in place.agreed().others if pair[0] in (consents.PROGRAM, consents.TARGET)}
    consent = Consent({"b": place.raw}, frozenset(others))
    with pytest.raises(NamesOutside, match="cannot be read here"):
        restore.restore(lines_of(documents), place.home / "again", consent=consent)
    facts = restore.restore(lines_of(documents), place.home / "again", consent=consent, leaves_out=True)
    assert len(facts["left_out"]) == 1


@pytest.mark.parametrize("name", ["security.capability", "trusted.overlay.opaque", "user.incfs.size", "user.a\0b"])
def test_attributes_that_no_user_sets_are_refused(place: Place, name: str) -> None:
    """A file of the mount would have rights that its owner cannot give it."""
    documents = [{**d, "value": {**d["value"], "xattrs": {name: "00"}}} if "xattrs" in d.get("value", {}) else d
                 for d in place.documents]  # fmt: skip
    with pytest.raises(FormatError):
        restore.restore(lines_of(documents), place.home / "again", consent=place.agreed())


def test_the_command_lists_and_takes_each(place: Place, tmp_path: Path) -> None:
    (tmp_path / "dump").write_bytes(b"".join(lines_of(place.documents)))
    again = place.home / "again"
    named = Cli().json("pool", "restore", again, "--from", tmp_path / "dump", "-n")["names"]
    assert [image["storage"] for image in named["images"]] == [1, 1]
    listed = Cli().ok("pool", "restore", again, "--from", tmp_path / "dump", "-n")
    assert str(place.raw) in listed
    assert not again.exists()
    assert str(place.raw) in Cli().fails(2, "pool", "restore", again, "--from", tmp_path / "dump")
    options = {(claim["option"], claim["value"]) for claim in named["claims"]}
    arguments = [part for pair in sorted(options) for part in pair]
    assert Cli().ok("pool", "restore", again, "--from", tmp_path / "dump", *arguments) == ""
    left = Cli().ok("pool", "restore", place.home / "less", "--from", tmp_path / "dump", *arguments[2:], "--leave-out")
    assert left.startswith("left out: volume b ")
    Cli().fails(2, "pool", "restore", place.home / "more", "--from", tmp_path / "dump", "--baseline", "b")
