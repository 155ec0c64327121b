"""Sends and receives without tasks: the core of both, driven in this thread."""

from collections.abc import Sequence

from incfs import ranges, sender, snapshot
from incfs.healer import Healer
from incfs.model import Base, Snapshot, Volume
from incfs.receiver import Receiver
from incfs.sender import SendPlan
from incfs.store import Store
from incfs.stream.encoder import StreamEncoder
from incfs.stream.ranges import join_ranges
from incfs.stream.reader import Position, StreamReader
from incfs.stream.records import Range, Write, Zero
from tests.support.pools import read


def send(store: Store, plan: SendPlan, *, checkpoint_bytes: int = 1 << 30, level: int = 1) -> bytes:
    """Make a stream."""
    encoder = StreamEncoder(level=level, checkpoint_bytes=checkpoint_bytes)
    begin = plan.position.begin
    made = encoder.begin(begin)
    for number, link in enumerate([link for step in begin.steps for link in step][begin.done_count :]):
        snap = plan.header(link, store.block_bytes, is_first=not number)
        older = plan.bases[link.base] if link.base else None
        made += encoder.begin_snapshot(snap)
        for found in join_ranges(changed(store, older, plan.snapshots[link.uuid], snap.start_bytes)):
            made += encoder.add(found)
        made += encoder.end_snapshot()
    return made + encoder.end()


def changed(store: Store, older: Base | None, newer: Snapshot, start_bytes: int) -> list[Range]:
    found: list[Range] = []
    for page in snapshot.changed_pages(store, older, newer):
        for stretch in sender.changed_stretches(store, older, newer, page, start_bytes):
            start, length = stretch.offset_bytes, stretch.length_bytes
            found.append(
                Write(start, read(store, newer.map_id, start, length)) if stretch.is_data else Zero(start, length)
            )
    return found


def send_all(store: Store, volume: Volume, base: str | None = None, **options: int) -> bytes:
    """Make a stream of a volume's snapshots, from the first or from behind ``base``."""
    newest = store.catalog.snapshots(volume.id)[-1]
    return send(store, sender.plan_send(store, [(volume, newest)], base=base, every=True), **options)


def resume(store: Store, position: Position, **options: int) -> bytes:
    """Make the rest of a stream."""
    return send(store, sender.plan_resume(store, position), **options)


def receive(
    store: Store, stream: bytes, *names: str, step: int = 1 << 20, is_replica: bool = False, commits: bool = True
) -> Receiver:
    """Take a stream; what came before an error stays."""
    work = Receiver(store, names, is_replica=is_replica)
    reader = StreamReader()
    for start in range(0, len(stream), step):
        for record in reader.feed(stream[start : start + step]):
            accept(store, work, record, commits=commits)
    reader.close()
    return work


def accept(store: Store, work: Receiver | Healer, record: object, *, commits: bool = True) -> None:
    steps = work.accept(record)  # type: ignore[arg-type]
    result = None
    try:
        while True:
            request = steps.send(result)
            result = None
            if request is None and commits:
                store.commit()
            elif request is not None:
                result = ranges.drive(store, request)
    except StopIteration:
        return


def contents(store: Store, name: str) -> dict[str, bytes]:
    """What a volume holds: at each snapshot, by UUID and name."""
    volume = store.catalog.volume_named(name)
    return {f"{s.uuid} {s.name}": read(store, s.map_id) for s in store.catalog.snapshots(volume.id)}


def newest(store: Store, names: Sequence[str]) -> list[tuple[Volume, Snapshot]]:
    volumes = [store.catalog.volume_named(name) for name in names]
    return [(volume, store.catalog.snapshots(volume.id)[-1]) for volume in volumes]
