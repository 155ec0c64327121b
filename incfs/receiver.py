"""Receives a stream into a pool: record by record, in steps of the owner thread.

Data goes into the target's live table, while nobody has it open.  What is published are
snapshots, each in one commit once its digest has been proved.

Invariants:
    1. A target is written only if its live table is exactly the stream's base: the newest snapshot has the base's
       UUID, and nothing was written since.
    2. What the state says is done is in the same commit as its data, or in an earlier one.
    3. The snapshots of a step are published in one change, together with the state behind them.
    4. A snapshot is its base and the ranges that its digest covers; nothing that an earlier attempt left is in it.
    5. A stream removes nothing: what it replaces belongs to the base snapshot from then on.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from incfs import ranges, snapshot, volume
from incfs.errors import BaseMismatch, StreamCorrupt, TokenStale, UsageError, VolumeNotFound
from incfs.memory import one_step
from incfs.model import PAGE_BLOCKS, MapId, Snapshot, Volume, VolumeId
from incfs.overlay import TableKey
from incfs.ranges import StepsPending
from incfs.rollback import roll_back, unroll
from incfs.store import Store
from incfs.stream.chain import count_present
from incfs.stream.reader import Position
from incfs.stream.records import Checkpoint, Link, Record, Resize, SnapBegin, SnapEnd, StreamBegin, Write, Zero
from incfs.transfers import Receiving, put_state, receiving

Request = Callable[[bool], Any]
_UNROLL_PAGES = 2
Work = Generator[Request | None, Any, None]
"""Requests to drive (see ``ranges.drive``), whose results are sent back; None asks for a commit."""


class Receiver:
    """One receive.

    Args:
        store: The pool.
        names: The target volumes, in the order of the stream's members; none: named as at the sender.
        is_replica: Keep them read-only until they are promoted.
        holders: Names who has a table open.
    """

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        *,
        is_replica: bool = False,
        holders: Callable[[MapId], Sequence[str]] = lambda table: (),
    ) -> None:
        self._store = store
        self._names = tuple(names)
        self._is_replica = is_replica
        self._holders = holders
        self._state: Receiving | None = None
        self._snap: SnapBegin | None = None
        self.targets: tuple[VolumeId, ...] = ()
        self.published: list[Snapshot] = []
        """Snapshots that this stream brought."""
        self.received_bytes = 0

    def accept(self, record: Record) -> Work:
        """Take the next record, which the stream's reader has proved.

        Raises:
            BaseMismatch: A target does not hold exactly the base, or is in use.
            TokenStale: The stream goes on at a place that the targets have not reached.
            NoSpace, LimitExceeded: As they say; the receive can be resumed.
        """
        match record:
            case StreamBegin():
                self._begin(record)
                yield None
            case SnapBegin():
                yield from self._begin_snapshot(record)
            case _ if self._snap is not None:
                yield from self._accept_inside(record, self._snap)

    def _accept_inside(self, record: Record, snap: SnapBegin) -> Work:
        target = self._target(snap.link)
        match record:
            case Resize(size):
                yield lambda _: volume.set_size(self._store, target.id, size)
                while not (yield lambda wait: ranges.trim(self._store, target.id, wait=wait)):
                    pass
            case Write(offset, data):
                yield lambda wait: ranges.write(self._store, target.map_id, offset, data, wait=wait)
                self.received_bytes += len(data)
            case Zero(offset, length):
                yield from self._clear(target.map_id, offset, offset + length)
            case Checkpoint():
                yield from self._reach(record)
            case SnapEnd():
                yield from self._end_snapshot(snap)

    def _clear(self, table: MapId, start: int, end: int) -> Work:
        while start < end:
            begin = start
            start = yield lambda wait: ranges.discard(self._store, table, begin, end, wait=wait)  # noqa: B023

    # The start of a stream

    def _begin(self, begin: StreamBegin) -> None:
        with self._store.step():
            self._find_targets(begin)

    def _find_targets(self, begin: StreamBegin) -> None:
        store = self._store
        names = self._names or tuple(member.name for member in begin.members)
        if len(names) != len(begin.members) or len(set(names)) != len(names):
            raise UsageError(f"the stream is of {len(begin.members)} volumes; name each target once, in their order")
        found = [_find(store, name) for name in names]
        skipped = count_present(begin, lambda link: _has(store, found[link.member], link))
        begin = replace(begin, steps=begin.steps[skipped:], done_count=0 if skipped else begin.done_count)
        if not begin.steps:
            self.targets = tuple(target.id for target in found if target is not None)
            return
        leads = {target.receive_lead for target in found if target is not None and target.receive_lead}
        states = [receiving(store, store.catalog.volume(lead)) for lead in leads]
        state = states[0] if states else None
        if state is None:
            self._start(begin, names, found)
        else:
            self._go_on(state, begin, found)

    def _start(self, begin: StreamBegin, names: Sequence[str], found: list[Volume | None]) -> None:
        if begin.done_count:
            raise TokenStale("the stream goes on with a group of which nothing was received here; send it whole")
        for member, target in enumerate(found):
            self._require_base(begin, member, target, names[member])
        targets = [target or _create(self._store, name) for target, name in zip(found, names, strict=True)]
        self._put(Receiving(Position(begin), tuple(target.id for target in targets)))

    def _go_on(self, state: Receiving, begin: StreamBegin, found: list[Volume | None]) -> None:
        position = state.position
        if tuple(target.id if target else 0 for target in found) != state.targets:
            raise self._unfinished(state)
        if position.begin.steps[:1] != begin.steps[:1]:
            self._require_untouched(state, begin)
            position = Position(begin)
        if begin.done_count > position.begin.done_count:
            raise TokenStale("the stream goes on behind what was received here; take the token of this receiver")
        begin = replace(begin, done_count=position.begin.done_count)
        self._put(replace(state, position=replace(position, begin=begin)))

    def _require_untouched(self, state: Receiving, begin: StreamBegin) -> None:
        """Another stream is as good when nothing of the unfinished one was written."""
        for member, target in enumerate(state.targets):
            known = self._store.catalog.volume(target)
            if known.is_hidden or state.waiting:
                raise self._unfinished(state)
            try:
                self._require_base(begin, member, known, known.name)
            except BaseMismatch as error:
                raise self._unfinished(state) from error

    def _unfinished(self, state: Receiving) -> BaseMismatch:
        name = self._store.catalog.volume(state.targets[0]).name
        return BaseMismatch(
            f"volume {name} has an unfinished receive of another stream; go on with that one "
            f"(`incfs receive --token {name}`), or end it (`incfs receive --abort {name}`)",
            volume=name,
        )

    def _require_base(self, begin: StreamBegin, member: int, target: Volume | None, name: str) -> None:
        base = next(link for step in begin.steps for link in step if link.member == member).base
        if target is None:
            if base is not None:
                raise BaseMismatch(f"there is no volume {name}; the stream starts from snapshot {base} of it")
            return
        holders = self._holders(target.map_id)
        if holders:
            raise BaseMismatch(f"volume {name} is open by {', '.join(holders)}; close it first", holders=list(holders))
        if self._is_replica and not target.is_replica:
            raise BaseMismatch(f"volume {name} is no replica; make it one with `incfs replica demote {name}`")
        require_base(self._store, target, base)

    def _put(self, state: Receiving) -> None:
        """Note the state, and in each target that it receives."""
        self._state = state
        self.targets = state.targets
        lead = state.targets[0]
        for target in state.targets:
            known = self._store.catalog.volume(target)
            is_replica = known.is_replica or self._is_replica
            self._store.touch(known, receive_lead=lead, is_replica=is_replica)
        put_state(self._store, state)

    # One snapshot

    def _target(self, link: Link) -> Volume:
        assert self._state is not None
        return self._store.catalog.volume(self._state.targets[link.member])

    def _begin_snapshot(self, snap: SnapBegin) -> Work:
        state = self._state
        if state is None or snap.link != state.position.link:
            return  # the target has it already
        target = self._target(snap.link)
        position = state.position
        if snap.start_bytes and (snap.start_bytes, snap.digest) != (position.offset_bytes, position.digest):
            raise TokenStale(
                f"the stream goes on at {snap.start_bytes} of snapshot {snap.name}, but {target.name} has it up to "
                f"{position.offset_bytes}, or another one; take the token of this receiver"
            )
        if any(known.name == snap.name for known in self._store.catalog.snapshots(target.id)):
            raise BaseMismatch(f"volume {target.name} has another snapshot named {snap.name}; rename that one first")
        base = _newest(self._store, target)
        if snap.base_size_bytes != (base.size_bytes if base else 0):
            raise StreamCorrupt(f"the base of {snap.name} has not {snap.base_size_bytes} bytes, as the stream says")
        self._store.account.require_snapshot(target.id)
        self._state = replace(state, position=replace(position, offset_bytes=snap.start_bytes, digest=snap.digest))
        put_state(self._store, self._state)
        yield from self._take_back(target, base, snap.start_bytes)
        self._snap = snap

    def _take_back(self, target: Volume, base: Snapshot | None, start_bytes: int) -> Work:
        """Let everything from an offset on be as in the base again.

        What an earlier stream brought behind its last CHECKPOINT was never proved.
        """
        store = self._store
        if base is None and not start_bytes:
            yield lambda _: volume.set_size(store, target.id, 0)
            while not (yield lambda wait: ranges.trim(store, target.id, wait=wait)):
                pass
        elif base is None:
            yield from self._clear(target.map_id, start_bytes, target.size_bytes)
        elif start_bytes:
            yield from self._copy_back(target, base, start_bytes)
        elif target.size_bytes != base.size_bytes or target.trim_from_bytes is not None or _is_changed(store, base):
            yield lambda _: roll_back(store, target.id, base.name, force=True)  # only bookmarks can be newer

    def _copy_back(self, target: Volume, base: Snapshot, start_bytes: int) -> Work:
        store, block = self._store, self._store.block_bytes
        store.absorb()
        first = start_bytes // block
        for table, page in _changed_pages(store, base):
            if (page + 1) * PAGE_BLOCKS <= first:
                continue
            for index in sorted(store.log.entries(table, page)):
                offset = max((page * PAGE_BLOCKS + index) * block, start_bytes)
                end = min((page * PAGE_BLOCKS + index + 1) * block, target.size_bytes)
                if offset < end:
                    old = yield partial(_read, store, base.map_id, offset, end - offset)
                    yield partial(_write, store, target.map_id, offset, old.ljust(end - offset, b"\0"))

    def _reach(self, checkpoint: Checkpoint) -> Work:
        assert self._state is not None
        position = self._state.position
        if checkpoint.offset_bytes > position.offset_bytes:
            self._state = replace(
                self._state,
                position=replace(position, offset_bytes=checkpoint.offset_bytes, digest=checkpoint.digest),
            )
            put_state(self._store, self._state)
            yield None

    def _end_snapshot(self, snap: SnapBegin) -> Work:
        assert self._state is not None
        state = replace(
            self._state, position=self._state.position.after_snapshot(), waiting=(*self._state.waiting, snap)
        )
        self._snap = None
        with self._store.step():
            if not state.position.begin.done_count:
                self.published += _publish(self._store, state)
                state = replace(state, waiting=())
            if state.position.link is None:
                _forget(self._store, state.targets)
                self._state = None
            else:
                self._state = state
                put_state(self._store, state)
        yield None


def _find(store: Store, name: str) -> Volume | None:
    try:
        return store.catalog.volume_named(name)
    except VolumeNotFound:
        return None


def _has(store: Store, target: Volume | None, link: Link) -> bool:
    return target is not None and any(known.uuid == link.uuid for known in store.catalog.snapshots(target.id))


def _newest(store: Store, target: Volume) -> Snapshot | None:
    return max(store.catalog.snapshots(target.id), key=lambda known: known.generation, default=None)


def _create(store: Store, name: str) -> Volume:
    return volume.create(store, name, 0, mode=0o600)


def require_base(store: Store, target: Volume, base: str | None) -> None:
    """Prove that a volume is exactly one of its snapshots, the newest, and that this is the base.

    Cost: one look-up; not proportional to anything.

    Raises:
        BaseMismatch: It is not.
    """
    newest = _newest(store, target)
    if base is None or newest is None or newest.uuid != base:
        has = "no snapshot" if newest is None else f"snapshot {newest.name} ({newest.uuid}) as its newest"
        wants = "a new volume" if base is None else f"snapshot {base}"
        raise BaseMismatch(
            f"the stream starts from {wants}, but volume {target.name} has {has}; send from a snapshot that both have",
            volume=target.name,
            expected=base,
            found=newest.uuid if newest else None,
        )
    if target.size_bytes != newest.size_bytes or target.trim_from_bytes is not None or _is_changed(store, newest):
        raise BaseMismatch(
            f"volume {target.name} was changed since its snapshot {newest.name}; roll it back to that one, "
            f"or receive into another volume",
            volume=target.name,
        )


def _is_changed(store: Store, newest: Snapshot) -> bool:
    return any(store.log.entries(table, page) for table, page in _changed_pages(store, newest))


def _changed_pages(store: Store, newest: Snapshot) -> Iterator[tuple[TableKey, int]]:
    """Yield where it stands what was replaced since: increments of removed snapshots behind it count too."""
    undone = store.catalog.undone(newest.volume_id)  # what a rollback took back is not a change
    for later in store.catalog.snapshots(newest.volume_id, removed=True):
        if later.generation >= newest.generation and later.generation not in undone:
            table = TableKey(newest.volume_id, later.generation)
            for page in store.log.page_indexes(table):
                yield table, page


def _read(store: Store, table: MapId, offset_bytes: int, length_bytes: int, wait: bool) -> bytes:
    return ranges.read(store, table, offset_bytes, length_bytes, wait=wait)


def _write(store: Store, table: MapId, offset_bytes: int, data: bytes, wait: bool) -> int:
    return ranges.write(store, table, offset_bytes, data, wait=wait)


def _publish(store: Store, state: Receiving) -> list[Snapshot]:
    taken = []
    for snap in state.waiting:
        target = store.catalog.volume(state.targets[snap.link.member])
        generation = snapshot.next_generation(target)
        made = Snapshot(
            *(target.id, generation, snap.link.uuid, snap.name, target.size_bytes, target.mapped_blocks),
            *(snap.created_ns, 0, snap.tag),
        )
        taken.append(made)
    return snapshot.adopt(store, taken)


def _forget(store: Store, targets: Sequence[VolumeId]) -> None:
    for target in targets:
        store.touch(store.catalog.volume(target), receive_lead=VolumeId(0), receive_state="")


@one_step
def abort(store: Store, name: str) -> list[VolumeId]:
    """End an unfinished receive: new volumes go, others are as their newest snapshot again.

    Returns:
        The volumes.

    Raises:
        UsageError: The volume receives nothing.
        StepsPending: An earlier rollback must be carried out first.
    """
    state = receiving(store, store.catalog.volume_named(name))
    if state is None:
        raise UsageError(f"volume {name} has no unfinished receive", volume=name)
    targets = [store.catalog.volume(target) for target in state.targets]
    for target in targets:
        if target.rollback_to:
            raise StepsPending(lambda _, which=target.id: unroll(store, which, _UNROLL_PAGES))  # type: ignore[misc]
    for target in targets:
        idle = store.amend(target, receive_lead=VolumeId(0), receive_state="")
        newest = _newest(store, target)
        if newest is None:
            store.amend(idle, name="")
            continue
        roll_back(store, target.id, newest.name, force=True)  # as above
    return list(state.targets)
