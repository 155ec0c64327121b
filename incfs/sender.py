"""What a stream is made of: which snapshots, and the ranges of each, in steps of the owner thread."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from incfs import snapshot
from incfs.errors import NotFound, TokenStale, UsageError
from incfs.model import HOLE, Base, Snapshot, Volume
from incfs.store import Store
from incfs.stream.ranges import CHUNK_BYTES, round_up
from incfs.stream.reader import Position
from incfs.stream.records import Link, Member, SnapBegin, Step, StreamBegin

_Chain = list[tuple[str | None, Snapshot]]
"""(UUID of the base, snapshot), oldest first."""


@dataclass(frozen=True, slots=True)
class SendPlan:
    """A stream that can be made now."""

    position: Position
    """Where it begins."""
    snapshots: Mapping[str, Snapshot]
    """By UUID: those that it carries."""
    bases: Mapping[str, Base]
    """By UUID: what they start from."""

    def header(self, link: Link, block_bytes: int, *, is_first: bool) -> SnapBegin:
        """Give the facts of one snapshot."""
        newer = self.snapshots[link.uuid]
        base_size = self.bases[link.base].size_bytes if link.base else 0
        snap = SnapBegin(link, newer.name, base_size, newer.size_bytes, block_bytes, newer.created_ns, newer.tag)
        if is_first and self.position.digest:
            return replace(snap, start_bytes=self.position.offset_bytes, digest=self.position.digest)
        return snap


@dataclass(frozen=True, slots=True)
class Stretch:
    """A range of a snapshot that goes into the stream."""

    offset_bytes: int
    length_bytes: int
    is_data: bool


def plan_send(
    store: Store,
    wanted: Sequence[tuple[Volume, Snapshot]],
    *,
    base: str | Sequence[str | None] | None = None,
    every: bool = False,
) -> SendPlan:
    """Plan a stream of snapshots of different volumes.

    Args:
        store: The pool.
        wanted: The snapshots; those that come last in the stream, published together.
        base: Name, ``#BOOKMARK`` or ``uuid:...``, of the snapshot of each volume that the receiver has, or one of
            each; None: it has none.
        every: Send the snapshots between, too; those that were taken together stay together.

    Raises:
        UsageError: A volume is named twice, or a base is not older.
        SnapshotNotFound, BookmarkNotFound: A volume has no such base.
    """
    if len({volume.id for volume, _ in wanted}) != len(wanted) or not wanted:
        raise UsageError("name each volume once, and at least one")
    bases = [base] * len(wanted) if base is None or isinstance(base, str) else base
    chains = [_chain(store, newest, older, every=every) for (_, newest), older in zip(wanted, bases, strict=True)]
    members = tuple(Member(volume.uuid, volume.name) for volume, _ in wanted)
    begin = StreamBegin(members, tuple(_steps(chains)))
    return _plan(store, Position(begin), [volume for volume, _ in wanted])


def plan_resume(store: Store, position: Position) -> SendPlan:
    """Plan the rest of a stream.

    Raises:
        TokenStale: A volume or a snapshot of it is gone.
    """
    by_uuid = {volume.uuid: volume for volume in store.catalog.volumes.values() if volume.name}
    found = [by_uuid.get(member.uuid) for member in position.begin.members]
    volumes = [volume for volume in found if volume is not None]
    if len(volumes) != len(found) or position.link is None:
        raise TokenStale("the token is of a volume that is not in this pool, or nothing is left to send")
    try:
        return _plan(store, position, volumes)
    except NotFound as error:
        raise TokenStale(f"the token cannot be used any more: {error}") from error


def _plan(store: Store, position: Position, volumes: Sequence[Volume]) -> SendPlan:
    snapshots: dict[str, Snapshot] = {}
    bases: dict[str, Base] = {}
    for link in (link for step in position.begin.steps for link in step):
        volume_id = volumes[link.member].id
        snapshots[link.uuid] = store.catalog.snapshot(volume_id, f"uuid:{link.uuid}")
        if link.base is not None:
            bases[link.base] = store.catalog.base(volume_id, f"uuid:{link.base}")
    return SendPlan(position, snapshots, bases)


def _chain(store: Store, newest: Snapshot, base: str | None, *, every: bool) -> _Chain:
    older = None if base is None else store.catalog.base(newest.volume_id, base)
    if older is not None and older.generation >= newest.generation:
        raise UsageError(f"{older.name} is not older than {newest.name}")
    after = older.generation if older is not None else 0
    between = [s for s in store.catalog.snapshots(newest.volume_id) if after < s.generation < newest.generation]
    sent = [*(between if every else ()), newest]
    bases = [older.uuid if older is not None else None, *(taken.uuid for taken in sent)]
    return list(zip(bases, sent, strict=False))


def _steps(chains: Sequence[_Chain]) -> Iterator[Step]:
    """Merge the chains: what was taken at one time is one step, and the last ones are, whenever they were taken."""
    heads = [0] * len(chains)
    while any(head < len(chain) - 1 for head, chain in zip(heads, chains, strict=True)):
        waiting = [i for i, chain in enumerate(chains) if heads[i] < len(chain) - 1]
        when = min(chains[i][heads[i]][1].created_ns for i in waiting)
        members = [i for i in waiting if chains[i][heads[i]][1].created_ns == when]
        yield tuple(Link(i, chains[i][heads[i]][0], chains[i][heads[i]][1].uuid) for i in members)
        for i in members:
            heads[i] += 1
    yield tuple(Link(i, chain[-1][0], chain[-1][1].uuid) for i, chain in enumerate(chains))


def changed_stretches(
    store: Store, older: Base | None, newer: Snapshot, page_index: int, start_bytes: int
) -> list[Stretch]:
    """List what of one map page goes into a stream, from an offset on, cut where a range may end.

    Zeros behind the base's end are left out: what a volume gains reads as zeros.
    """
    base_end = round_up(older.size_bytes, store.block_bytes) if older is not None else 0
    found: list[Stretch] = []
    for extent in snapshot.changed_extents(store, older, newer, page_index):
        start, end = max(extent.offset_bytes, start_bytes), extent.offset_bytes + extent.length_bytes
        if extent.address <= HOLE:
            end = min(end, base_end)
            if start < end:
                found.append(Stretch(start, end - start, is_data=False))
            continue
        while start < end:
            stop = min(end, round_up(start + 1, CHUNK_BYTES))
            found.append(Stretch(start, stop - start, is_data=True))
            start = stop
    return found
