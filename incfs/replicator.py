"""Replication, carried out: asks the target what it has, sends what it lacks, sees that it arrived.

The other side is always the command ``incfs`` on the target's pool, through ssh or as a process
of this host: it reaches that pool's daemon, or opens the pool itself.  Cut off at any point,
the target keeps what came before its last checkpoint, and the next run goes on from there.
"""

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import trio

from incfs.committer import offload
from incfs.errors import (
    AlreadyExists,
    BaseMismatch,
    Busy,
    HoldNotFound,
    IncfsError,
    NotFound,
    ReplicaFailed,
    ReplicaNotFound,
    SnapshotNotFound,
    TokenStale,
    UsageError,
)
from incfs.model import Snapshot, Volume, validate_name
from incfs.replication import (
    OurSnapshot,
    ReplicaConfig,
    ReplicaPlan,
    TargetFacts,
    decode_answer,
    local_pool,
    plan_replica,
    target_command,
)
from incfs.sender import SendPlan
from incfs.stream.encoder import DEFAULT_LEVEL
from incfs.transport import Progress, unwatched

if TYPE_CHECKING:
    from incfs.service import Service

SSH_VARIABLE: Final = "INCFS_SSH"
"""The ssh command and options of its own, such as ``ssh -F FILE``."""
LEASE_S: Final = 7 * 86400
"""How long the newest common snapshot is kept on both sides for the next run."""
_MAX_ANSWER_BYTES: Final = 16 << 20
_MAX_ERROR_BYTES: Final = 4096


def list_replicas(service: "Service") -> list[tuple[Volume, ReplicaConfig]]:
    """List the replicas of a pool, each with the volume that keeps it."""
    return [
        (volume, ReplicaConfig.from_text(text))
        for volume in service.volumes()
        for _, text in sorted(volume.replicas.items())
    ]


def find_replica(service: "Service", name: str) -> tuple[Volume, ReplicaConfig]:
    """Look up a replica.

    Raises:
        ReplicaNotFound: There is none of that name.
    """
    for volume, config in list_replicas(service):
        if config.name == name:
            return volume, config
    raise ReplicaNotFound(f"there is no replica {name!r}; `incfs replica list` shows them", name=name)


async def add(
    service: "Service", volumes: Sequence[Volume], target: str, *, name: str, names: Sequence[str], program: str
) -> ReplicaConfig:
    """Keep a new replica; nothing is sent yet.

    Raises:
        UsageError: The target makes no sense, or names do not match the volumes.
        AlreadyExists: A replica has that name.
    """
    validate_name(name, what="replica")
    if len(set(names)) != len(volumes) or len({volume.id for volume in volumes}) != len(volumes) or not volumes:
        raise UsageError("name each volume once, and as many names at the target")
    if any(config.name == name for _, config in list_replicas(service)):
        raise AlreadyExists(f"there is a replica {name!r} already; choose a name with --name", name=name)
    if "://" not in target:
        if not target.startswith("/"):
            raise UsageError(f"{target!r} is neither ssh://host/pool nor an absolute path", target=target)
        if str(local_pool(target)) == str(service.directory):
            raise UsageError(f"{target} is this pool; a replica needs another one")
        if not await offload(lambda: os.path.exists(target)):
            raise UsageError(
                f"there is no pool {target}; make it first, or write ssh://host/pool for one of another host",
                target=target,
            )
    config = ReplicaConfig(name, target, [volume.uuid for volume in volumes], list(names), program)
    target_command(config, [], ["ssh"])
    await _keep(service, volumes[0], config)
    return config


async def remove(service: "Service", name: str) -> None:
    """Forget a replica, and let go of the snapshot that was kept for it; the target stays as it is."""
    keeper, config = find_replica(service, name)
    await _release(service, config, config.common)
    await _forget_bookmarks(service, config)
    kept = {known: text for known, text in service.volume_by_id(keeper.id).replicas.items() if known != name}
    await service.transfers.put_replicas(keeper.id, kept)


async def _keep(service: "Service", keeper: Volume, config: ReplicaConfig) -> None:
    known = service.volume_by_id(keeper.id).replicas
    await service.transfers.put_replicas(keeper.id, {**known, config.name: config.to_text()})


def target_facts(service: "Service", names: Sequence[str]) -> list[dict[str, Any] | None]:
    """Say, at the target, what it has of volumes: the other half of a run."""
    found: list[dict[str, Any] | None] = []
    for name in names:
        try:
            token = service.transfers.unfinished(name)
        except NotFound:
            found.append(None)
            continue
        volume = service.transfers.any_volume(name)
        snapshots = [taken.uuid for taken in service.snapshots(volume.id)]
        found.append({"is_replica": volume.is_replica, "token": token, "snapshots": snapshots})
    return found


async def run(
    service: "Service", name: str, *, rate_bytes: int | None = None, progress: Progress = unwatched
) -> dict[str, Any]:
    """Bring one replica up to date.

    Durability: what the target acknowledged is durable there.

    Raises:
        BaseMismatch: The two sides do not go together; nothing was changed.
        ReplicaFailed: The target could not be reached, or did not take the stream; run it again.
    """
    keeper, config = find_replica(service, name)
    try:
        sent_bytes, plan = await _Run(service, config, rate_bytes, progress).go()
    except IncfsError as error:
        await _keep(service, keeper, replace(config, last_error=str(error)))
        raise
    done = replace(config, last_success_ns=time.time_ns(), last_error="", common=list(plan.goals))
    await _keep(service, keeper, done)
    await _bookmark(service, config, plan.goals)
    await _release(service, config, [uuid for uuid in config.common if uuid not in plan.goals])
    return {"name": name, "stream_bytes": sent_bytes, "snapshots": list(plan.goals)}


class _Run:
    """One run of one replica."""

    def __init__(self, service: "Service", config: ReplicaConfig, rate_bytes: int | None, progress: Progress) -> None:
        self._service = service
        self._progress = progress
        self._config = config
        self._rate_bytes = rate_bytes
        self._ssh = shlex.split(os.environ.get(SSH_VARIABLE, "ssh"))
        self._volumes = [service.volume(f"uuid:{uuid}") for uuid in config.volumes]

    async def go(self) -> tuple[int, ReplicaPlan]:
        """Send until the target has the newest snapshots; give the bytes sent."""
        plan = await self._plan()
        sent_bytes = 0
        if plan.token is not None:
            sent_bytes += await self._go_on(plan.token, self._config.names[plan.receiving])
            plan = await self._plan()
        await _hold(self._service, self._config, [*plan.goals, *(base for base in plan.bases if base)])
        if not plan.is_done:
            sent_bytes += await self._send(
                self._service.transfers.plan(
                    self._wanted(plan), base=_named([plan.bases[number] for number in plan.lacking]), every=True
                )
            )
            if (await self._plan()).bases != plan.goals:
                raise ReplicaFailed(f"replica {self._config.name} took the stream, but has not the snapshots in it")
        await self._hold_there(plan)
        return sent_bytes, plan

    async def _plan(self) -> ReplicaPlan:
        answer = await self._ask("replica", "facts", *self._config.names, "--json")
        facts = [TargetFacts.from_document(document) for document in answer.get("volumes", [])]
        ours = [_points(self._service, volume) for volume in self._volumes]
        if len(facts) != len(ours):
            raise ReplicaFailed(f"replica {self._config.name} gave no answer for each volume")
        return plan_replica(self._config.names, ours, facts)

    def _wanted(self, plan: ReplicaPlan) -> list[tuple[Volume, Snapshot]]:
        """Give what is to be sent: a volume of which the target has the goal already is no part of the stream."""
        return [
            (self._volumes[number], self._service.snapshot(self._volumes[number].id, f"uuid:{plan.goals[number]}"))
            for number in plan.lacking
        ]

    async def _go_on(self, token: str, name: str) -> int:
        """Send the rest of what the target has begun; what cannot be gone on with is ended there."""
        try:
            rest = self._service.transfers.plan_resume(token)
        except TokenStale:
            await self._ask("receive", "--abort", name, "--json")
            return 0
        return await self._send(rest)

    async def _send(self, plan: SendPlan) -> int:
        by_uuid = dict(zip(self._config.volumes, self._config.names, strict=True))
        names = [by_uuid[member.uuid] for member in plan.position.begin.members]
        async with _target(self._command("receive", "--replica", *names)) as process:
            sent = None
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # its own words follow
                sent = await self._service.transfers.send(
                    plan, process.put, level=DEFAULT_LEVEL, rate_bytes=self._rate_bytes, progress=self._progress
                )
            await process.finish(self._config.name)
        if sent is None:
            raise ReplicaFailed(f"replica {self._config.name} stopped taking the stream")
        return sent.stream_bytes

    async def _hold_there(self, plan: ReplicaPlan) -> None:
        for name, uuid in zip(self._config.names, plan.goals, strict=True):
            await self._ask("snapshot", "hold", _tag(self._config), f"{name}@uuid:{uuid}", "--expires", f"{LEASE_S}s")

    async def _ask(self, *arguments: str) -> dict[str, Any]:
        async with _target(self._command(*arguments)) as process:
            answer = await process.finish(self._config.name)
        return decode_answer(self._config.name, answer)

    def _command(self, *arguments: str) -> list[str]:
        return target_command(self._config, arguments, self._ssh)


class _Target:
    """A process that works on the target."""

    def __init__(self, process: trio.Process, nursery: trio.Nursery) -> None:
        self._process = process
        self._said = bytearray()
        self._answer = bytearray()
        assert process.stdout is not None
        assert process.stderr is not None
        self._collected = [trio.Event(), trio.Event()]
        nursery.start_soon(_collect, process.stdout, self._answer, _MAX_ANSWER_BYTES, self._collected[0])
        nursery.start_soon(_collect, process.stderr, self._said, _MAX_ERROR_BYTES, self._collected[1])

    async def put(self, data: bytes) -> None:
        """Hand bytes to its stdin."""
        assert self._process.stdin is not None
        await self._process.stdin.send_all(data)

    async def finish(self, name: str) -> bytes:
        """Close its stdin and wait for its end; give what it wrote.

        Raises:
            BaseMismatch: It says that the two sides do not go together.
            ReplicaFailed: It failed in another way.
        """
        assert self._process.stdin is not None
        await self._process.stdin.aclose()
        for collected in self._collected:
            await collected.wait()
        code = await self._process.wait()
        if code:
            said = " ".join(self._said.decode(errors="replace").split()).removeprefix("incfs: ")
            raised = BaseMismatch if code == BaseMismatch.exit_code else ReplicaFailed
            raise raised(f"replica {name}: {said or f'the command at the target ended with {code}'}", code_there=code)
        return bytes(self._answer)


@contextlib.asynccontextmanager
async def _target(command: list[str]) -> AsyncIterator[_Target]:
    try:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise ReplicaFailed(f"cannot run {command[0]}: {error.strerror}") from error
    try:
        async with trio.open_nursery() as nursery:
            yield _Target(process, nursery)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def _collect(stream: trio.abc.ReceiveStream, into: bytearray, limit_bytes: int, done: trio.Event) -> None:
    """Take all that a process says, and keep as much as the limit allows."""
    async for chunk in stream:
        into += chunk[: max(0, limit_bytes - len(into))]
    done.set()


def _tag(config: ReplicaConfig) -> str:
    return f"replica-{config.name}"


def _named(uuids: Sequence[str | None]) -> list[str | None]:
    return [None if uuid is None else f"uuid:{uuid}" for uuid in uuids]


def _ours(service: "Service", config: ReplicaConfig, uuids: Sequence[str]) -> list[tuple[Volume, Snapshot]]:
    found = []
    for uuid in dict.fromkeys(uuids):
        for volume_uuid in config.volumes:
            with contextlib.suppress(SnapshotNotFound, NotFound):
                volume = service.volume(f"uuid:{volume_uuid}")
                found.append((volume, service.snapshot(volume.id, f"uuid:{uuid}")))
    return found


def _points(service: "Service", volume: Volume) -> list[OurSnapshot]:
    """List a volume's snapshots, and the bookmarks of those that are gone, oldest first."""
    taken = service.snapshots(volume.id)
    known = {snapshot.uuid for snapshot in taken}
    gone = [marked for marked in service.branches.bookmarks(volume.id) if marked.uuid not in known]
    points = {snapshot.generation: OurSnapshot(snapshot.uuid, snapshot.created_ns) for snapshot in taken}
    points |= {marked.generation: OurSnapshot(marked.uuid, marked.taken_ns, is_there=False) for marked in gone}
    return [point for _, point in sorted(points.items())]


async def _bookmark(service: "Service", config: ReplicaConfig, uuids: Sequence[str]) -> None:
    """Have the next run start from what both sides have now, also when it outlives its lease and is removed."""
    for _, taken in _ours(service, config, uuids):
        with contextlib.suppress(Busy):  # somebody sends from it: the next run moves it
            await service.branches.move_bookmark(taken, _tag(config))


async def _forget_bookmarks(service: "Service", config: ReplicaConfig) -> None:
    for uuid in config.volumes:
        with contextlib.suppress(NotFound):
            await service.branches.remove_bookmarks([(service.volume(f"uuid:{uuid}").id, _tag(config))])


async def _hold(service: "Service", config: ReplicaConfig, uuids: Sequence[str]) -> None:
    wanted = [(volume.id, taken.name) for volume, taken in _ours(service, config, uuids)]
    await service.branches.hold(wanted, _tag(config), expires_ns=time.time_ns() + LEASE_S * 10**9)


async def _release(service: "Service", config: ReplicaConfig, uuids: Sequence[str]) -> None:
    for volume, taken in _ours(service, config, uuids):
        with contextlib.suppress(HoldNotFound):
            await service.branches.release([(volume.id, taken.name)], _tag(config))
