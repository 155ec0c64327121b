"""Damages the files of a tiny pool, and judges what the product makes of it.

``build`` makes a pool in one of three states, with everything that it may ever be read as.
``damaged`` yields cases: a file and its bytes.  ``judge`` opens the damaged pool, reads all,
checks it, closes it, and does so again; its verdict is

    detected    an ``IncfsError``, when it was opened or for a range that was read
    harmless    everything is what it was
    older       everything is as at an earlier commit point (only after lost writes of the journal's end)

and anything else, a wrong byte or another exception, fails.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from incfs import ranges
from incfs.errors import IncfsError, NoSpace
from incfs.model import MapId
from incfs.options import Options
from incfs.store import Store, new_nonce
from tests.support import pools

State = dict[str, bytes]
"""Contents of each volume and snapshot, by ``VOL`` or ``VOL@SNAP``."""
STATES = ("closed", "journaled", "folding")
VOLUMES = ("a", "b")
SIZES = {"a": 34_000, "b": 6_000}
"""The first has two map pages."""
STEP = 1024
"""Bytes of one read: a range that fails must not keep others from being read."""


@dataclass(slots=True)
class Built:
    """A pool's files, what it contains, and what it contained at earlier commit points."""

    files: dict[Path, bytes]
    state: State
    earlier: list[State] = field(default_factory=list)
    old_files: dict[Path, bytes] = field(default_factory=dict)
    """The files at an earlier time."""


@dataclass(frozen=True, slots=True)
class Case:
    """One damage: what was done, to which file, and its bytes now (None: it is gone)."""

    what: str
    path: Path
    data: bytes | None


@dataclass(slots=True)
class Figures:
    """How many cases went which way."""

    tried: int = 0
    detected: int = 0
    harmless: int = 0
    older: int = 0


def contents(store: Store) -> State:
    """Read everything; nothing may fail."""
    found: State = {}
    for name, table in tables(store):
        found[name] = pools.read(store, table)
    return found


def tables(store: Store) -> Iterator[tuple[str, MapId]]:
    """Name every volume and snapshot."""
    for volume in store.catalog.volumes.values():
        if volume.name:
            yield volume.name, volume.map_id
            for snapshot in store.catalog.snapshots(volume.id):
                yield f"{volume.name}@{snapshot.name}", snapshot.map_id


class Workload:
    """Changes a pool by chance, and remembers each commit point."""

    def __init__(self, store: Store, random: Random) -> None:
        self.store = store
        self.random = random
        self.states: list[State] = []

    def step(self) -> None:
        """Do one thing to one volume."""
        store, random = self.store, self.random
        name = random.choice(VOLUMES)
        if not store.catalog.has_name(name):
            pools.new_volume(store, name, SIZES[name])
        volume = store.catalog.volume_named(name)
        kind = random.random()
        if kind < 0.75:
            size = random.choice((64, 200, 640, 3000))
            pools.write(store, volume.map_id, random.randrange(SIZES[name] - size), random.randbytes(size))
        elif kind < 0.85:
            start = random.randrange(0, SIZES[name], 64)
            pools.discard(store, volume.map_id, start, start + 1024)
        elif len(store.catalog.snapshots(volume.id)) < 2:
            pools.take_snapshots(store, [(volume.id, f"s{volume.last_generation}")])
        elif random.random() < 0.5:
            pools.remove_snapshot(store, volume.id, store.catalog.snapshots(volume.id)[0].name)
            pools.reclaim(store)

    def commit(self) -> None:
        """Commit: what is there now is a commit point."""
        self.states.append(contents(self.store))
        self.store.commit()

    def checkpoint(self) -> None:
        """Checkpoint: a commit point, too."""
        self.states.append(contents(self.store))
        self.store.checkpoint()


def options() -> Options:
    """Commits of both kinds: with their data in the journal and without."""
    return replace(pools.tiny_options(small_commit_bytes=2000), page_cache_pages=64)


def files_of(pool: Path) -> dict[Path, bytes]:
    """Read every file of a pool but those that mean nothing."""
    ignored = ("lock", "tables.mdb-lock")
    return {
        p.relative_to(pool): p.read_bytes() for p in sorted(pool.rglob("*")) if p.is_file() and p.name not in ignored
    }


def build(home: Path, kind: str, seed: int) -> Built:
    """Make a pool: closed, killed with records in its journal, or killed between journal and tables."""
    random = Random(f"{kind}{seed}")
    pool = pools.make_pool(home, storages=2, capacity_bytes=1 << 20)
    store = pools.open_tiny(pool, options())
    work = Workload(store, random)
    for _ in range(3):
        for _ in range(12):
            work.step()
        work.checkpoint()
    old = files_of(pool)
    for _ in range(2):
        for _ in range(12):
            work.step()
        work.checkpoint()
    if kind == "closed":
        work.states.append(contents(store))
        store.close()
    else:
        for _ in range(5):
            for _ in range(random.choice((1, 6))):
                work.step()
            work.commit()
        if kind == "folding":
            checkpoint = store.begin_checkpoint(new_nonce())
            checkpoint.run_commit()
            store.end_checkpoint_commit(checkpoint)
            for _ in range(3):
                work.step()
                work.commit()
        store.abandon()
    built = Built(files_of(pool), work.states[-1], work.states[:-1], old)
    shutil.rmtree(pool)
    return built


def place(pool: Path, files: dict[Path, bytes]) -> None:
    """Make the pool's directory hold exactly these files."""
    for path, data in files.items():
        target = pool / path
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
        target.write_bytes(data)


# Damages of one file; each gives its bytes, or None where it makes no sense.


def _spot(random: Random, data: bytes) -> int:
    """Choose a place, mostly one that holds something."""
    offset = random.randrange(len(data))
    for _ in range(40):
        if data[offset] or random.random() < 0.02:
            break
        offset = random.randrange(len(data))
    return offset


def flip(random: Random, data: bytes) -> bytes:
    """One bit."""
    offset = _spot(random, data)
    return data[:offset] + bytes([data[offset] ^ 1 << random.randrange(8)]) + data[offset + 1 :]


def scribble(random: Random, data: bytes) -> bytes:
    """A few random bytes."""
    offset = _spot(random, data)
    noise = random.randbytes(random.choice((2, 8, 64, 512)))
    return (data[:offset] + noise + data[offset + len(noise) :])[: len(data)]


def zero(random: Random, data: bytes) -> bytes:
    """A sector, a page or any range reads as zeros."""
    size = random.choice((1, 8, 64, 512, 4096))
    offset = _spot(random, data) // size * size
    return (data[:offset] + bytes(size) + data[offset + size :])[: len(data)]


def duplicate(random: Random, data: bytes) -> bytes:
    """One sector's or page's content is at another place, too."""
    size = random.choice((64, 512, 4096))
    source, target = (_spot(random, data) // size * size for _ in range(2))
    return (data[:target] + data[source : source + size] + data[target + size :])[: len(data)]


def swap(random: Random, data: bytes) -> bytes:
    """Two sectors or pages have changed places."""
    size = random.choice((64, 512, 4096))
    first, second = sorted(_spot(random, data) // size * size for _ in range(2))
    if first + size > second or second + size > len(data):
        return duplicate(random, data)
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + size :]


def truncate(random: Random, data: bytes) -> bytes:
    """The end is missing."""
    end = random.randrange(len(data))
    return data[: end // random.choice((1, 512, 4096))]


Damage = Callable[[Random, bytes], bytes]
DAMAGES: tuple[Damage, ...] = (flip, flip, flip, scribble, zero, duplicate, swap, truncate)


def stale(random: Random, data: bytes, old: bytes) -> bytes:
    """A write was lost: a sector or page is as it was at an earlier time."""
    size = random.choice((512, 4096, 4096))
    changed = [o for o in range(0, min(len(data), len(old)), size) if data[o : o + size] != old[o : o + size]]
    if not changed:
        return flip(random, data)
    at = random.choice(changed)
    return data[:at] + old[at : at + size] + data[at + size :]


def damaged(built: Built, path: Path, random: Random) -> Case:
    """Damage one file by chance."""
    data = built.files[path]
    if random.random() < 0.15 and path in built.old_files:
        return Case("stale", path, stale(random, data, built.old_files[path]))
    damage = random.choice(DAMAGES)
    return Case(damage.__name__, path, damage(random, data))


def _loses_journal_page(built: Built, case: Case) -> bool:
    """A lost write, or more than a sector of the journal gone at once, may take the last record and its proof."""
    if not case.path.name.startswith("journal") or case.data is None:
        return False
    before = built.files[case.path]
    if len(before) != len(case.data):
        return False
    different = [i for i, (a, b) in enumerate(zip(before, case.data, strict=True)) if a != b]
    return case.what == "stale" or different[-1] - different[0] >= 512


class WrongResult(AssertionError):
    """The product gave data that was never there, or failed in a way it must not."""


def judge(pool: Path, built: Built, case: Case, opened: Options, looks: int = 2) -> str:
    """Give the verdict on one case, opening the pool ``looks`` times one after the other.

    Raises:
        WrongResult: It is none that is allowed.
    """
    if case.data == built.files.get(case.path):
        return "harmless"
    place(pool, built.files)
    if case.data is None:
        (pool / case.path).unlink()
    else:
        (pool / case.path).write_bytes(case.data)
    allowed = [built.state, *(built.earlier if _loses_journal_page(built, case) else [])]
    verdicts = set()
    for _ in range(looks):
        try:
            verdict = _look(pool, allowed, opened)
            verdicts.add(verdict or "detected")
            if not verdict:
                break
        except WrongResult:
            raise
        except Exception as error:
            raise WrongResult(f"{type(error).__name__}: {error}") from error
    return next(verdict for verdict in ("detected", "older", "harmless") if verdict in verdicts)


def _look(pool: Path, allowed: list[State], opened: Options) -> str:
    """Open, read, check, write, close; the verdict, or nothing when it could not be opened."""
    try:
        store = pools.open_tiny(pool, opened)
    except IncfsError:
        return ""
    try:
        verdict = _compare(store, allowed)
        report = pools.run_check(store)
        if not report.is_clean:
            verdict = "detected"
        _write_more(store)
    except BaseException:
        store.abandon()
        raise
    try:
        store.close()
    except IncfsError:
        return "detected"
    return verdict


def _write_more(store: Store) -> None:
    """Go on with a volume of its own: that must neither fail badly nor harm what is there."""
    try:
        if store.catalog.has_name("more"):
            volume = store.catalog.volume_named("more")
        else:
            volume = pools.new_volume(store, "more", 8192)
        pools.write(store, volume.map_id, 0, b"m" * 4096)
        store.commit()
    except IncfsError as error:
        if not isinstance(error, NoSpace) and store.failure is None:
            raise WrongResult(f"a write elsewhere failed, but the pool is not read-only: {error!r}") from error


def _compare(store: Store, allowed: list[State]) -> str:
    """Read everything in small steps; what can be read must belong to one of the allowed states."""
    found: dict[str, list[bytes | None]] = {}
    for name, table in tables(store):
        if name != "more":
            found[name] = _read_pieces(store, table)
    for number, state in enumerate(allowed):
        if _matches(found, state):
            if any(piece is None for pieces in found.values() for piece in pieces):
                return "detected"
            return "older" if number else "harmless"
    raise WrongResult(f"contents that never were: {_difference(found, allowed[0])}")


def _read_pieces(store: Store, table: MapId) -> list[bytes | None]:
    size = store.catalog.size_bytes(table)
    offsets = range(0, size, STEP)
    try:
        whole = pools.read(store, table)
    except IncfsError:
        return [_try_read(store, table, offset) for offset in offsets]
    return [whole[offset : offset + STEP] for offset in offsets]


def _try_read(store: Store, table: MapId, offset: int) -> bytes | None:
    try:
        return ranges.drive(store, lambda wait: ranges.read(store, table, offset, STEP, wait=wait))
    except IncfsError:
        return None


def _matches(found: dict[str, list[bytes | None]], state: State) -> bool:
    if found.keys() != state.keys():
        return False
    return all(
        len(pieces) == -(-len(state[name]) // STEP)
        and all(piece is None or piece == state[name][i * STEP : (i + 1) * STEP] for i, piece in enumerate(pieces))
        for name, pieces in found.items()
    )


def _difference(found: dict[str, list[bytes | None]], state: State) -> str:
    if found.keys() != state.keys():
        return f"{sorted(found)} instead of {sorted(state)}"
    for name, pieces in found.items():
        for i, piece in enumerate(pieces):
            if piece is not None and piece != state[name][i * STEP : (i + 1) * STEP]:
                return f"{name} differs near byte {i * STEP}"
    return "sizes differ"
