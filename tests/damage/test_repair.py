"""What is damaged can be saved: dump and restore of the metadata, repair into a new pool."""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio

from incfs import bookmarks, dump, removal, repair, restore
from incfs import snapshot as snapshots
from incfs.errors import (
    AlreadyExists,
    FormatError,
    ImageMismatch,
    IncfsError,
    JournalDamaged,
    PoolLocked,
    UnsupportedFormat,
)
from incfs.service import open_service
from tests.support import damage, pools
from tests.support.cli import Cli


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> damage.Built:
    return damage.build(tmp_path_factory.mktemp("built"), "journaled", 22)


@pytest.fixture
def pool(pool_home: Path, built: damage.Built) -> Path:
    damage.place(pool_home / "pool", built.files)
    return pool_home / "pool"


def state_of(pool: Path) -> damage.State:
    store = pools.open_tiny(pool)
    try:
        pools.check_clean(store)
        return damage.contents(store)
    finally:
        store.close()


def lines_of(pool: Path) -> list[bytes]:
    store = pools.open_tiny(pool)
    path = pool.parent / "dump"
    dump.write_dump(store, path)
    store.close()
    return path.read_bytes().splitlines(keepends=True)


# Dump and restore


def test_a_restored_pool_is_the_same(pool: Path, built: damage.Built) -> None:
    lines = lines_of(pool)
    (pool / "superblock").unlink()
    facts = restore.restore(lines, pool.parent / "again")
    assert state_of(pool.parent / "again") == built.state
    assert facts["volume_count"] == 2


def test_what_was_written_after_the_dump_is_never_returned_as_older_data(pool: Path) -> None:
    """Blocks that were reused since fail their checksum."""
    store = pools.open_tiny(pool, damage.options())
    work = damage.Workload(store, Random(3))
    work.checkpoint()
    path = pool.parent / "dump.gz"
    dump.write_dump(store, path)
    for _ in range(60):
        work.step()
        work.checkpoint()
    before = work.states[0]
    store.close()
    with restore.open_dump(path) as lines:
        restore.restore(lines, pool.parent / "again")
    store = pools.open_tiny(pool.parent / "again")
    assert damage._compare(store, [before]) == "detected"
    assert pools.run_check(store).is_damaged
    store.close()


def test_images_may_have_moved_and_nothing_is_overwritten(pool: Path, built: damage.Built) -> None:
    lines = lines_of(pool)
    moved = pool.parent / "moved.img"
    (image,) = (pool / "disk0").glob("*.img")
    image.rename(moved)
    with pytest.raises(ImageMismatch):
        restore.restore(lines, pool.parent / "first")
    restore.restore(lines, pool.parent / "again", images={1: moved})
    with pytest.raises(AlreadyExists):
        restore.restore(lines, pool.parent / "again", images={1: moved})
    with pytest.raises(AlreadyExists):
        restore.restore(lines, pool, images={1: moved})
    store = pools.open_tiny(pool.parent / "again")
    os.link(moved, image)
    assert damage.contents(store) == built.state
    with pytest.raises(PoolLocked):
        pools.open_tiny(pool)  # two pools on the same images would overwrite each other
    store.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_dump_is_refused(pool: Path, seed: int) -> None:
    """Or it makes the pool that it describes; never half of one, never another exception."""
    data = b"".join(lines_of(pool))
    random = Random(seed)
    for number in range(50):
        case = random.choice(damage.DAMAGES)(random, data)
        target = pool.parent / f"again{number}"
        if case == data:
            continue
        with pytest.raises(IncfsError):
            restore.restore(case.splitlines(keepends=True), target)
        assert not (target / "superblock").exists()


def hostile(documents: list[dict[str, Any]]) -> list[bytes]:
    """Make a dump of documents, its end as it should be."""
    from hashlib import blake2b

    lines = [json.dumps(document).encode() + b"\n" for document in documents]
    counts = {"records": sum("record" in d for d in documents), "pages": sum("page" in d for d in documents)}
    end = {**counts, "digest": blake2b(b"".join(lines), digest_size=16).hexdigest()}
    return [*lines, json.dumps({"end": end}).encode() + b"\n"]


def change(document: dict[str, Any], **values: Any) -> None:
    document["value"].update(values)


REPLICA = {"name": "r", "target": "/t", "volumes": ["u"], "names": ["db"]}


def replicas(**values: Any) -> dict[str, str]:
    """What a volume's record has of one replica, with some of it exchanged."""
    return {"r": json.dumps(REPLICA | values)}


BASELINE = {"id": 5, "path": "/x", "size_bytes": 1, "modified_ns": 1}

EVIL: list[tuple[str, Callable[[dict[str, Any]], None], type[IncfsError]]] = [
    ("volume", lambda d: change(d, name="../x"), FormatError),
    ("volume", lambda d: change(d, size_bytes=1 << 70), FormatError),
    ("volume", lambda d: change(d, size_bytes=-1), FormatError),
    ("volume", lambda d: change(d, mode=1 << 20), FormatError),
    ("volume", lambda d: change(d, id=0), FormatError),
    ("volume", lambda d: change(d, uuid="x"), FormatError),
    ("volume", lambda d: change(d, xattrs={"a": "zz"}), FormatError),
    ("volume", lambda d: change(d, more=1), FormatError),
    ("volume", lambda d: change(d, origin=9 << 32 | 1), FormatError),
    ("volume", lambda d: change(d, origin=1 << 16), FormatError),
    (
        "volume",
        lambda d: change(d, origin=5, baseline={"id": 6, "path": "/x", "size_bytes": 1, "modified_ns": 1}),
        FormatError,
    ),
    (
        "volume",
        lambda d: change(d, origin=5, baseline={"id": 5, "path": "x", "size_bytes": 1, "modified_ns": 1}),
        FormatError,
    ),
    ("volume", lambda d: change(d, baseline={"id": 5}), FormatError),
    ("volume", lambda d: change(d, origin=5, baseline=BASELINE | {"digest": "x"}), FormatError),
    ("volume", lambda d: change(d, origin=5, baseline=BASELINE | {"digest": 5}), FormatError),
    ("volume", lambda d: change(d, origin=5, baseline=BASELINE | {"is_changed": 1}), FormatError),
    ("volume", lambda d: change(d, rollback_to=1), FormatError),
    ("volume", lambda d: change(d, flat_generation=1 << 33), FormatError),
    ("volume", lambda d: change(d, trim_from_bytes=-1), FormatError),
    ("volume", lambda d: change(d, stripes=[[1, 0, 1]]), FormatError),
    ("volume", lambda d: change(d, stripes=[[1, 64]]), FormatError),
    ("volume", lambda d: change(d, stripes=[[1, 64, 1, 1]]), FormatError),
    ("volume", lambda d: change(d, stripes=[[1, 64, 1 << 20]]), FormatError),
    ("volume", lambda d: change(d, stripes=[[1, 1 << 70, 1]]), FormatError),
    ("volume", lambda d: change(d, stripes=[[1, 64, 1]] * 1000), FormatError),
    ("volume", lambda d: change(d, receive_lead=1), FormatError),
    ("volume", lambda d: change(d, receive_lead=77), FormatError),
    ("volume", lambda d: change(d, receive_state="AAAA"), FormatError),
    ("volume", lambda d: change(d, replicas={"r": "{}"}), FormatError),
    ("volume", lambda d: change(d, replicas={"r": 5}), FormatError),
    ("volume", lambda d: change(d, replicas={"other": json.dumps(REPLICA)}), FormatError),
    ("volume", lambda d: change(d, replicas=replicas(volumes="u")), FormatError),
    ("volume", lambda d: change(d, replicas=replicas(names=[])), FormatError),
    ("volume", lambda d: change(d, replicas=replicas(last_success_ns="x")), FormatError),
    ("snapshot", lambda d: change(d, volume_id=77), FormatError),
    ("snapshot", lambda d: change(d, holds={"a/b": None}), FormatError),
    ("snapshot", lambda d: change(d, holds={"tag": "x"}), FormatError),
    ("snapshot", lambda d: change(d, tag=5), FormatError),
    ("snapshot", lambda d: change(d, name="a/b"), FormatError),
    ("storage", lambda d: change(d, capacity_blocks=0), FormatError),
    ("storage", lambda d: change(d, path="/etc/passwd"), ImageMismatch),
    ("storage", lambda d: change(d, mirrors=["a", "b", "c", "d"]), FormatError),
    ("storage", lambda d: change(d, mirrors=[""]), FormatError),
    ("storage", lambda d: change(d, mirrors=["a\0"]), FormatError),
    ("storage", lambda d: change(d, stale_legs=[0]), FormatError),
    ("storage", lambda d: change(d, mirrors=["a"], stale_legs=[2]), FormatError),
    ("page", lambda d: d["runs"].append([0, 513, 1, ""]), FormatError),
    ("page", lambda d: d["runs"].append(d["runs"][0]), FormatError),
    ("page", lambda d: d["page"].__setitem__(0, 99), FormatError),
    ("page", lambda d: d["page"].__setitem__(2, 1 << 62), FormatError),
    ("page", lambda d: d.update(runs=[[0, 1, (9 << 48) + 5, "00000000"]]), FormatError),
    ("page", lambda d: d.update(runs=[[0, 1, (1 << 48) + (1 << 47), "00000000"]]), FormatError),
    ("dump", lambda d: d.update(format=2), UnsupportedFormat),
    ("dump", lambda d: d["pool"].update(block_bytes=63), FormatError),
    ("dump", lambda d: d["pool"].update(journal_bytes=1 << 50), FormatError),
    ("dump", lambda d: d["pool"].update(incompatible=["new"]), UnsupportedFormat),
    ("dump", lambda d: d.update(last_volume=-1), FormatError),
]


@pytest.mark.parametrize("number", range(len(EVIL)))
def test_hostile_dumps_are_refused(pool: Path, number: int) -> None:
    kind, spoil, expected = EVIL[number]
    documents = [json.loads(line) for line in lines_of(pool)[:-1]]
    chosen = next(d for d in documents if d.get("record") == kind or kind in d)
    spoil(chosen)
    with pytest.raises(expected):
        restore.restore(hostile(documents), pool.parent / "again", leaves_out=True)
    assert not (pool.parent / "again" / "superblock").exists()


def test_a_block_with_two_owners_is_refused(pool: Path) -> None:
    documents = [json.loads(line) for line in lines_of(pool)[:-1]]
    pages = [d for d in documents if "page" in d and any(run[2] > 1 for run in d["runs"])]
    pages[1]["runs"] = pages[0]["runs"]
    with pytest.raises(FormatError, match="two owners"):
        restore.restore(hostile(documents), pool.parent / "again")


def test_copies_lie_beside_the_images_and_the_one_before_is_kept(pool: Path, built: damage.Built) -> None:
    async def work() -> None:
        options = replace(damage.options(), dump_interval_s=0.0)
        async with open_service(pool, options) as service:
            await service.checkpoint()
            await service.create_volume("later", 640)
            await service.checkpoint()
            await trio.sleep(0.1)
            await service.checkpoint()

    trio.run(work)
    (image,) = (pool / "disk0").glob("*.img")
    copy = image.with_name(image.name + ".dump.gz")
    assert copy.stat().st_mode & 0o777 == 0o600
    assert copy.with_name(copy.name + ".1").exists()
    assert b'"later"' in gzip.decompress(copy.read_bytes())
    with restore.open_dump(copy) as lines:
        restore.restore(lines, pool.parent / "again")
    restored = state_of(pool.parent / "again")
    assert restored.pop("later") == bytes(640)
    assert restored == built.state


def test_command_dump_and_restore(offline: Cli, tmp_path: Path) -> None:
    assert offline.pool is not None
    offline.ok("volume", "create", "db", "1M")
    text = offline.ok("pool", "dump")
    offline.ok("pool", "dump", tmp_path / "d.gz")
    (tmp_path / "d").write_text(text)
    (offline.pool / "tables.mdb").unlink()
    for name in ("d", "d.gz"):
        found = offline.json("pool", "restore", tmp_path / f"from-{name}", "--from", tmp_path / name)["restored"]
        assert found["volume_count"] == 1
        assert "clean" in Cli(tmp_path / f"from-{name}").ok("pool", "check", "--data")
    offline.fails(1, "pool", "restore", tmp_path / "from-d", "--from", tmp_path / "d")
    offline.fails(2, "pool", "restore", tmp_path / "x", "--from", tmp_path / "d", "--image", "one")
    offline.fails(1, "pool", "restore", tmp_path / "x", "--from", tmp_path / "none")


@pytest.fixture
def offline(tmp_path: Path) -> Cli:
    Cli().ok("pool", "create", tmp_path / "pool", "--capacity", "1G")
    return Cli(tmp_path / "pool")


# Repair


def saved(pool: Path, **arguments: Any) -> tuple[repair.RepairReport, damage.State]:
    """Repair; the old pool must be what it was, the new one clean."""
    before = {p: p.read_bytes() for p in pool.rglob("*") if p.is_file()}
    target = pool.parent / "saved"
    report = repair.repair(pool, target, **arguments)
    assert {p: p.read_bytes() for p in pool.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in pool.parent.iterdir()) == ["pool", "saved"]
    return report, state_of(target)


def expected(built: damage.Built, report: repair.RepairReport) -> damage.State:
    """What the new pool must be: the model, with zeros where the report says."""
    state = {name: bytearray(data) for name, data in built.state.items()}
    for loss in report.losses:
        if loss.name in state:
            state[loss.name][loss.offset_bytes : loss.offset_bytes + loss.length_bytes] = bytes(loss.length_bytes)
    return {name: bytes(data) for name, data in state.items()}


def test_a_whole_pool_is_saved_whole(pool: Path, built: damage.Built) -> None:
    report, state = saved(pool)
    assert report.is_complete
    assert state == built.state


def test_a_damaged_superblock_is_replaced_with_an_images_header(pool: Path, built: damage.Built) -> None:
    (pool / "superblock").write_bytes(b"?" * 100)
    report, state = saved(pool)
    assert state == built.state
    assert len(report.notes) == 1


def test_damaged_data_becomes_listed_holes(pool: Path, built: damage.Built) -> None:
    (image,) = (pool / "disk0").glob("*.img")
    data = bytearray(image.read_bytes())
    for offset in range(65536 + 640, len(data), 1280):
        data[offset] ^= 1
    data[20] ^= 1  # the header, too
    image.write_bytes(data)
    report, state = saved(pool)
    assert report.losses
    assert state == expected(built, report)


def test_what_was_on_a_missing_image_is_listed(pool: Path, built: damage.Built) -> None:
    (image,) = (pool / "disk0").glob("*.img")
    image.rename(pool.parent / "away.img")
    before = (pool.parent / "away.img").read_bytes()
    (pool.parent / "away.img").unlink()
    report, state = saved(pool)
    assert report.losses
    assert "storage volume 1 is missing" in report.notes[0]
    assert state == expected(built, report)
    os.makedirs(pool.parent / "elsewhere")
    (pool.parent / "elsewhere" / "moved.img").write_bytes(before)
    report = repair.repair(pool, pool.parent / "second", images={1: pool.parent / "elsewhere" / "moved.img"})
    assert report.is_complete
    assert state_of(pool.parent / "second") == built.state


def test_a_damaged_journal_is_taken_up_to_the_damage(pool: Path, built: damage.Built) -> None:
    path = max(pool.glob("journal.*"), key=lambda path: path.read_bytes()[32:40][::-1])  # the current segment
    assert path.read_bytes().count(b"JREC") > 2
    data = bytearray(path.read_bytes())
    second = data.index(b"JREC", data.index(b"JREC") + 4)
    data[second + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(JournalDamaged):
        pools.open_tiny(pool)
    report, state = saved(pool)
    assert report.notes
    assert state in built.earlier


def test_repair_never_gives_wrong_data(pool_home: Path) -> None:
    """Damaged anywhere: each volume and snapshot that is saved is what it was, but for listed holes."""
    tried = complete = refused = 0
    for state in damage.STATES:
        built = damage.build(pool_home / state, state, 5)
        pool = pool_home / state / "pool"
        paths = [p for p in built.files if p.name.startswith(("tables", "journal", "incfs-"))]
        for number in range(30):
            case = damage.damaged(built, paths[number % len(paths)], Random(f"repair{number}"))
            assert case.data is not None
            damage.place(pool, built.files)
            (pool / case.path).write_bytes(case.data)
            tried += 1
            try:
                report = repair.repair(pool, pool_home / state / f"saved{number}")
            except IncfsError:
                refused += 1
                continue
            complete += report.is_complete
            found = state_of(pool_home / state / f"saved{number}")
            vague = any("not known which" in note for note in report.notes)
            allowed = [expected(replace(built, state=s), report) for s in (built.state, *built.earlier)]
            assert vague or any(found.items() <= one.items() for one in allowed), (state, number, case.what, case.path)
    print(f"repairs tried {tried}, complete {complete}, refused {refused}")


def test_command_repair(offline: Cli, tmp_path: Path) -> None:
    assert offline.pool is not None
    offline.ok("volume", "create", "db", "1M")
    assert offline.ok("pool", "repair", "--to", tmp_path / "new") == "saved: db\n"
    assert Cli(tmp_path / "new").json("volume", "show", "db")["volume"]["size_bytes"] == 1 << 20
    (offline.pool / "journal.0").write_bytes(b"")
    (offline.pool / "journal.1").write_bytes(b"")
    done = offline.run("pool", "repair", "--to", tmp_path / "newer", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["repair"]["saved"][0]["name"] == "db"
    offline.fails(1, "pool", "repair", "--to", tmp_path / "new")


def test_a_pool_in_use_is_not_repaired(pool: Path) -> None:
    store = pools.open_tiny(pool)
    with pytest.raises(PoolLocked):
        repair.repair(pool, pool.parent / "saved")
    store.close()


def test_commands_that_only_look_work_without_an_image(offline: Cli) -> None:
    assert offline.pool is not None
    offline.ok("volume", "create", "db", "1M")
    (image,) = (offline.pool / "images").glob("*.img")
    image.rename(image.with_suffix(".away"))
    for noun, verb in (("storage", "list"), ("pool", "show"), ("volume", "list")):
        done = offline.run(noun, verb, "--json")
        assert (done.returncode, "is missing" in done.stderr) == (0, True)
        assert {"storage": '"missing"', "pool": "is missing", "volume": '"db"'}[noun] in done.stdout
    assert "is missing" in offline.fails(4, "volume", "create", "other", "1M")
    image.with_suffix(".away").rename(image)
    offline.ok("volume", "create", "other", "1M")
    assert offline.json("storage", "list")["storages"][0]["state"] == "online"


def test_bookmarks_of_snapshots_that_are_whole_are_saved(pool_home: Path) -> None:
    """Replicas go on from them; they were lost, and each replica had to be sent anew as a whole."""
    pool = pools.make_pool(pool_home)
    with pools.open_tiny(pool) as store:
        made = pools.new_volume(store, "v", 640)
        for name in ("gone", "kept", "later"):
            pools.write(store, made.map_id, 0, name.encode())
            (taken,) = snapshots.create(store, [(made.id, name)])
            bookmarks.create(store, taken, f"of-{name}")
        removal.remove(store, [store.catalog.snapshot(made.id, "gone")])
        pools.reclaim(store)
        expected = {name: store.catalog.snapshot(made.id, name).uuid for name in ("kept", "later")}
    report = repair.repair(pool, pool_home / "saved")
    assert [note.partition(" is not")[0] for note in report.notes] == ["bookmark v#of-gone"]
    with pools.open_tiny(pool_home / "saved") as store:
        saved_id = store.catalog.volume_named("v").id
        assert {s.name: s.uuid for s in store.catalog.snapshots(saved_id)} == expected
        assert {name: b.uuid for b in store.catalog.bookmarks(saved_id) for name in b.names} == {
            f"of-{name}": uuid for name, uuid in expected.items()
        }
        pools.check_clean(store)


def test_a_snapshot_that_is_not_whole_is_another_one(pool_home: Path) -> None:
    """An increment from it would leave in a replica what is a hole here."""
    pool = pools.make_pool(pool_home)
    with pools.open_tiny(pool) as store:
        made = pools.new_volume(store, "v", 640)
        uuids = []
        for data in (b"a" * 64, b"b" * 64):
            pools.write(store, made.map_id, 64, data)
            (taken,) = snapshots.create(store, [(made.id, data[:1].decode())])
            bookmarks.create(store, taken, f"of-{taken.name}")
            uuids.append(taken.uuid)
    (image,) = pool.rglob("*.img")
    image.write_bytes(image.read_bytes().replace(b"a" * 64, b"a" * 63 + b"?"))
    report = repair.repair(pool, pool_home / "saved")
    assert report.losses
    with pools.open_tiny(pool_home / "saved") as store:
        saved_id = store.catalog.volume_named("v").id
        assert not {s.uuid for s in store.catalog.snapshots(saved_id)} & set(uuids)
        assert not store.catalog.bookmarks(saved_id)
    assert len([note for note in report.notes if note.startswith("bookmark v#of-")]) == 2
