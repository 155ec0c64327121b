"""Streams in and out of an open pool: tasks, pace, back pressure.

The core is asked in steps of the trio thread; packing, hashing and unpacking run in worker
threads, a batch at a time.  What the other end does not take is not made: a batch waits until
the one before has gone.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from incfs import ranges, receiver, sender, snapshot
from incfs.committer import Committer, offload
from incfs.driver import Driver
from incfs.errors import BaseMismatch, Busy, UsageError
from incfs.handles import Handles
from incfs.healer import Healer
from incfs.model import Base, MapId, Snapshot, Volume, VolumeId, map_id
from incfs.receiver import Receiver
from incfs.reclaimer import Reclaimer
from incfs.sender import SendPlan, Stretch
from incfs.store import Store
from incfs.stream.encoder import StreamEncoder
from incfs.stream.ranges import RangeJoiner
from incfs.stream.reader import StreamReader
from incfs.stream.records import Link, Range, Record, SnapBegin, SnapEnd, StreamBegin, Write, Zero
from incfs.stream.token import decode_token, encode_token
from incfs.transfers import receiving, require_not_receiving

BATCH_BYTES = 1 << 20
"""Ranges that are packed together in a worker thread; about so much is in memory, a few times."""
_BATCH_RANGES = 512

Output = Callable[[bytes], Awaitable[None]]
Input = Callable[[], Awaitable[bytes]]
"""Gives the next bytes; none at the end."""


Progress = Callable[[int, int], None]
"""Called with how far a snapshot has come, and its size, in bytes; anew for each."""


def unwatched(done: int, total: int) -> None:
    """Nobody wants to know."""


class _Travelled:
    """How far a stream has come, as its records say."""

    def __init__(self, tell: Progress) -> None:
        self._tell = tell
        self._total = 0

    def note(self, record: Record) -> None:
        """Take note of a record that was sent or received."""
        match record:
            case SnapBegin():
                self._total = record.size_bytes
                self._tell(record.start_bytes, self._total)
            case Write() | Zero():
                self._tell(record.offset_bytes, self._total)
            case SnapEnd():
                self.end_snapshot()

    def end_snapshot(self) -> None:
        """The snapshot is complete."""
        self._tell(self._total, self._total)


@dataclass(frozen=True, slots=True)
class Sent:
    """What a send did."""

    stream_bytes: int
    snapshots: list[Snapshot]


class Transfers:
    """Sends and receives on one open pool."""

    def __init__(
        self,
        store: Store,
        committer: Committer,
        driver: Driver,
        handles: Handles,
        reclaimer: Reclaimer,
        note_changed: Callable[[MapId], None],
    ) -> None:
        self._reclaimer = reclaimer
        self._store = store
        self._note_changed = note_changed
        self._committer = committer
        self._driver = driver
        self._handles = handles
        self._busy: set[VolumeId] = set()
        """Volumes that a stream is being received into now."""

    # Send

    def plan(
        self,
        wanted: Sequence[tuple[Volume, Snapshot]],
        *,
        base: str | Sequence[str | None] | None = None,
        every: bool = False,
    ) -> SendPlan:
        """Plan a stream; see ``sender.plan_send``."""
        return sender.plan_send(self._store, wanted, base=base, every=every)

    def plan_resume(self, token: str) -> SendPlan:
        """Plan the rest of a stream.

        Raises:
            TokenStale: The token is damaged, or what it needs is gone.
        """
        return sender.plan_resume(self._store, decode_token(token))

    async def send(
        self,
        plan: SendPlan,
        output: Output,
        *,
        level: int,
        rate_bytes: int | None = None,
        progress: Progress = unwatched,
    ) -> Sent:
        """Make the stream and hand it to ``output``, no faster than the rate (bytes a second).

        The snapshots cannot be removed meanwhile.
        """
        encoder = StreamEncoder(level=level)
        paced, travelled = _Pace(output, rate_bytes), _Travelled(progress)
        begin = plan.position.begin
        links = [link for step in begin.steps for link in step][begin.done_count :]
        with self._pinned([*plan.snapshots.values(), *plan.bases.values()], "send"):
            await paced.put(encoder.begin(begin))
            for number, link in enumerate(links):
                await self._send_snapshot(plan, link, encoder, paced, travelled, is_first=not number)
            await paced.put(encoder.end())
        return Sent(paced.sent_bytes, [plan.snapshots[link.uuid] for link in links])

    async def _send_snapshot(
        self,
        plan: SendPlan,
        link: Link,
        encoder: StreamEncoder,
        output: "_Pace",
        travelled: _Travelled,
        *,
        is_first: bool,
    ) -> None:
        snap = plan.header(link, self._store.block_bytes, is_first=is_first)
        older = plan.bases[link.base] if link.base else None
        await output.put(encoder.begin_snapshot(snap))
        travelled.note(snap)
        async for batch in self._batches(older, plan.snapshots[link.uuid], snap.start_bytes):
            packed = batch
            await output.put(await offload(lambda: b"".join(encoder.add(found) for found in packed)))  # noqa: B023
            travelled.note(batch[-1])
        await output.put(encoder.end_snapshot())
        travelled.end_snapshot()

    async def _batches(self, older: Base | None, newer: Snapshot, start_bytes: int) -> AsyncIterator[list[Range]]:
        """Read what changed, joined, in batches."""
        joiner = RangeJoiner()
        batch: list[Range] = []
        size = 0
        for page_index in snapshot.changed_pages(self._store, older, newer):
            for stretch in sender.changed_stretches(self._store, older, newer, page_index, start_bytes):
                for found in joiner.push(await self._read(newer.map_id, stretch)):
                    batch.append(found)
                    size += len(found.data) if isinstance(found, Write) else 0
                if size >= BATCH_BYTES or len(batch) >= _BATCH_RANGES:
                    yield batch
                    batch, size = [], 0
            await trio.lowlevel.checkpoint()
        batch += joiner.flush()
        if batch:
            yield batch

    async def _read(self, table: MapId, stretch: Stretch) -> Range:
        start, length = stretch.offset_bytes, stretch.length_bytes
        if not stretch.is_data:
            return Zero(start, length)
        data = await self._driver.drive(lambda wait: ranges.read(self._store, table, start, length, wait=wait))
        return Write(start, data)

    @contextmanager
    def _pinned(self, points: Iterable[Base], holder: str) -> Iterator[None]:
        pinned = [point.map_id for point in points]
        for table in pinned:
            self._handles.pin(table, holder)
        try:
            yield
        finally:
            for table in pinned:
                self._handles.close(table)

    # Receive

    async def receive(
        self, names: Sequence[str], source: Input, *, is_replica: bool = False, progress: Progress = unwatched
    ) -> Receiver:
        """Take a stream into volumes.

        Durability: each snapshot is durable once it is published; before that, what came before a CHECKPOINT.

        Raises:
            StreamCorrupt, StreamTruncated: The stream is no good; what it brought so far can be gone on from.
            BaseMismatch: A target does not hold exactly the base, or is in use.
        """
        work = Receiver(self._store, names, is_replica=is_replica, holders=self._handles.of_table)
        reader, travelled = StreamReader(), _Travelled(progress)
        locked: tuple[VolumeId, ...] = ()
        try:
            while data := await source():
                for record in await offload(lambda: list(reader.feed(data))):
                    if isinstance(record, StreamBegin):
                        self._require_unlocked(names, record)
                    await self._accept(work, record)
                    travelled.note(record)
                    if isinstance(record, StreamBegin):
                        locked = work.targets
                        self._busy.update(locked)
                        for target in locked:
                            self._note_changed(map_id(target))
            reader.close()
        finally:
            self._busy.difference_update(locked)
        return work

    def _require_unlocked(self, names: Sequence[str], begin: StreamBegin) -> None:
        for name in names or [member.name for member in begin.members]:
            for target in self._store.catalog.volumes.values():
                if target.name == name and target.id in self._busy:
                    raise BaseMismatch(f"another stream is being received into volume {name} now")

    async def heal(self, name: str, source: Input, *, progress: Progress = unwatched) -> Healer:
        """Write damaged blocks of a volume's snapshots again, from a stream that carries the same snapshots.

        Durability: what was healed is durable on return.

        Raises:
            StreamCorrupt: The stream is no good; what was healed before is right all the same.
            BaseMismatch: It carries no snapshot of the volume.
        """
        work, reader = Healer(self._store, self._store.catalog.volume_named(name)), StreamReader()
        travelled = _Travelled(progress)
        while data := await source():
            for record in await offload(lambda: list(reader.feed(data))):
                await self._accept(work, record)
                travelled.note(record)
        reader.close()
        await self._committer.checkpoint()
        return work

    async def _accept(self, work: Receiver | Healer, record: Record) -> None:
        steps = work.accept(record)
        result = None
        try:
            while True:
                request = steps.send(result)
                result = None
                if request is None:
                    await self._committer.commit()
                else:
                    result = await self._driver.drive(request)
        except StopIteration:
            return

    async def abort(self, name: str) -> list[VolumeId]:
        """End an unfinished receive: targets are as they were before it.

        Raises:
            UsageError: There is none.
            Busy: A stream is being received right now.
        """
        target = self._store.catalog.volume_named(name)
        if target.id in self._busy:
            raise Busy(f"volume {name} receives a stream now; end that one first")
        ended = await self._driver.drive(lambda _: receiver.abort(self._store, name))
        for volume_id in ended:
            self._note_changed(map_id(volume_id))
        self._reclaimer.reclaim_soon()
        await self._committer.commit()
        return ended

    async def set_replica(self, name: str, *, is_replica: bool) -> Volume:
        """Let a volume be an ordinary one, or changed by streams only.

        Raises:
            Busy: It receives a stream, or is open.
        """
        volume = self._store.catalog.volume_named(name)
        require_not_receiving(volume, "be promoted" if volume.is_replica else "be demoted")
        holders = self._handles.of_table(volume.map_id)
        if is_replica and holders:
            raise Busy(f"volume {name} is open by {', '.join(holders)}; close it first", holders=holders)
        with self._store.step():
            self._store.amend(volume, is_replica=is_replica)
        await self._committer.commit()
        return self._store.catalog.volume(volume.id)

    async def put_replicas(self, volume_id: VolumeId, replicas: Mapping[str, str]) -> None:
        """Keep where a volume is replicated to."""
        with self._store.step():
            self._store.amend(self._store.catalog.volume(volume_id), replicas=dict(replicas))
        await self._committer.commit()

    def any_volume(self, name: str) -> Volume:
        """Look up a volume, also one that is still hidden."""
        return self._store.catalog.volume_named(name)

    def unfinished(self, name: str) -> str | None:
        """Give the token of a volume's unfinished receive, if it has one; also of one that is still hidden."""
        state = receiving(self._store, self._store.catalog.volume_named(name))
        return None if state is None or state.position.link is None else encode_token(state.position)

    def token(self, name: str) -> str:
        """Give the token with which a sender goes on with an unfinished receive.

        Raises:
            UsageError: There is none.
        """
        token = self.unfinished(name)
        if token is None:
            raise UsageError(f"volume {name} has no unfinished receive", volume=name)
        return token


class _Pace:
    """Hands bytes on, no faster than a rate, and counts them."""

    def __init__(self, output: Output, rate_bytes: int | None) -> None:
        self._output = output
        self._rate_bytes = rate_bytes
        self._free_at = trio.current_time()
        self.sent_bytes = 0

    async def put(self, data: bytes) -> None:
        """Hand bytes on when their time has come."""
        if self._rate_bytes:
            now = trio.current_time()
            self._free_at = max(self._free_at, now) + len(data) / self._rate_bytes
            await trio.sleep_until(self._free_at)
        self.sent_bytes += len(data)
        await self._output(data)
