"""The admin verbs: what names mean, what is refused, what goes through the mount."""

from pathlib import Path
from typing import Any

import pytest

from incfs.admin import VERBS, run_verb
from incfs.errors import AlreadyExists, Busy, InvalidName, SnapshotNotFound, UsageError, VolumeNotFound
from incfs.targets import split_target
from tests.support.fake_admin import BLOCK_BYTES, FakeAdminService


class Hook:
    """A mount that carries changes out on the service, and remembers them."""

    def __init__(self, service: FakeAdminService) -> None:
        self._service = service
        self.calls: list[tuple[Any, ...]] = []

    async def resize_volume(self, name: str, size_bytes: int) -> None:
        self.calls.append(("resize", name, size_bytes))
        await self._service.resize_volume(self._service.volume(name).id, size_bytes, shrink=True)

    async def rename_volume(self, old: str, new: str) -> None:
        self.calls.append(("rename", old, new))
        await self._service.rename_volume(self._service.volume(old).id, new)

    async def remove_volume(self, name: str) -> None:
        self.calls.append(("remove", name))
        await self._service.remove_volume(self._service.volume(name).id)

    async def rename_snapshot(self, volume: str, old: str, new: str) -> None:
        self.calls.append(("rename snapshot", volume, old, new))
        await self._service.rename_snapshot(self._service.volume(volume).id, old, new)


@pytest.fixture
async def service(tmp_path: Path) -> FakeAdminService:
    made = FakeAdminService(tmp_path)
    await made.create_volume("db", 1 << 20)
    await made.create_volume("log", 0)
    return made


async def run(service: FakeAdminService, verb: str, **arguments: Any) -> dict[str, Any]:
    return await run_verb(service, verb, arguments, lambda done, total, unit: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "parts"),
    [("db", ("db", None)), ("db@monday", ("db", "monday")), ("uuid:1-2@s", ("uuid:1-2", "s")), ("d b", ("d b", None))],
)
def test_targets(text: str, parts: tuple[str, str | None]) -> None:
    assert split_target(text) == parts


@pytest.mark.parametrize("text", ["", "@s", "db@", "a/b", "-a", ".a", "db@a@b", "db@.x", "a#b", "a\nb", "x" * 201])
def test_bad_targets(text: str) -> None:
    with pytest.raises((UsageError, InvalidName)):
        split_target(text)


async def test_volume_and_snapshot_by_uuid(service: FakeAdminService) -> None:
    made = await run(service, "snapshot.create", targets=["db@a"])
    volume_uuid, snapshot_uuid = service.volume("db").uuid, made["snapshots"][0]["uuid"]
    assert (await run(service, "volume.show", volume=f"uuid:{volume_uuid}"))["volume"]["name"] == "db"
    assert (await run(service, "snapshot.show", target=f"uuid:{snapshot_uuid}"))["snapshot"]["name"] == "db@a"
    assert (await run(service, "snapshot.show", target=f"uuid:{volume_uuid}@a"))["snapshot"]["snapshot"] == "a"
    with pytest.raises(VolumeNotFound):
        await run(service, "volume.show", volume="uuid:0")
    with pytest.raises(SnapshotNotFound):
        await run(service, "snapshot.show", target="uuid:0")


async def test_shrink_must_be_asked_for_and_grow_not(service: FakeAdminService) -> None:
    with pytest.raises(UsageError, match="--shrink"):
        await run(service, "volume.resize", volume="db", size_bytes=1)
    await run(service, "volume.resize", volume="db", size_bytes=1, shrink=True)
    document = await run(service, "volume.resize", volume="db", size_bytes=2 << 20)
    assert document["volume"]["size_bytes"] == 2 << 20


async def test_what_somebody_has_open_is_not_made_smaller(service: FakeAdminService) -> None:
    volume = service.volume("db")
    service.open_by = ["pid 7"]
    with pytest.raises(Busy, match="cannot be made smaller: it is open by pid 7"):
        await run(service, "volume.resize", volume="db", size_bytes=1, shrink=True)
    assert service.volume("db").size_bytes == volume.size_bytes
    await run(service, "volume.resize", volume="db", change_bytes=5)
    service.open_by = []
    await run(service, "volume.resize", volume="db", change_bytes=-6, shrink=True)
    assert service.volume("db").size_bytes == volume.size_bytes - 1


async def test_changes_go_through_the_mount(service: FakeAdminService) -> None:
    service.mounted = hook = Hook(service)
    await run(service, "snapshot.create", targets=["db@a", "db@b"])
    await run(service, "volume.resize", volume="db", size_bytes=5, shrink=True)
    await run(service, "volume.rename", volume="db", name="data")
    await run(service, "snapshot.rename", target="data@a", name="data@x")
    await run(service, "snapshot.remove", targets=["data@x"])
    await run(service, "volume.remove", volume="data", snapshots=True)
    assert hook.calls == [
        ("resize", "db", 5),
        ("rename", "db", "data"),
        ("rename snapshot", "data", "a", "x"),
        ("remove", "data"),
    ]


async def test_rename_through_the_mount_never_replaces(service: FakeAdminService) -> None:
    service.mounted = Hook(service)
    await run(service, "snapshot.create", targets=["db@a"])
    await run(service, "snapshot.create", targets=["db@b"])
    with pytest.raises(AlreadyExists):
        await run(service, "volume.rename", volume="db", name="log")
    with pytest.raises(AlreadyExists):
        await run(service, "snapshot.rename", target="db@a", name="b")
    with pytest.raises(InvalidName):
        await run(service, "volume.rename", volume="db", name="a/b")
    with pytest.raises(InvalidName):
        await run(service, "snapshot.rename", target="db@a", name=".x")


@pytest.mark.parametrize(("verb", "more"), [("volume.remove", {}), ("volume.rename", {"name": "x"})])
async def test_open_volume_is_busy_and_names_its_holders(
    service: FakeAdminService, verb: str, more: dict[str, Any]
) -> None:
    service.open_by = ["losetup (pid 7)", "cp (pid 8)"]
    with pytest.raises(Busy, match=r"losetup \(pid 7\), cp \(pid 8\)"):
        await run(service, verb, volume="db", **more)


async def test_volume_with_snapshots_is_busy_also_in_a_dry_run(service: FakeAdminService) -> None:
    await run(service, "snapshot.create", targets=[f"db@s{i}" for i in range(7)])
    for dry_run in (True, False):
        with pytest.raises(Busy, match=r"\(s0, s1, s2, s3, s4 and 2 more\)"):
            await run(service, "volume.remove", volume="db", dry_run=dry_run)


async def test_dry_run_says_what_would_be_freed_and_changes_nothing(service: FakeAdminService) -> None:
    await run(service, "snapshot.create", targets=["db@a"])
    await run(service, "snapshot.create", targets=["db@b"])
    removal = (await run(service, "volume.remove", volume="db", snapshots=True, dry_run=True))["removal"]
    assert removal["freed_bytes"] == (3 + 1 + 2) * BLOCK_BYTES
    assert [item["name"] for item in removal["items"]] == ["db@a", "db@b", "db"]
    newer = (await run(service, "snapshot.remove", targets=["db@%"], dry_run=True))["removal"]
    assert [item["freed_bytes"] for item in newer["items"]] == [2 * BLOCK_BYTES] * 2
    assert newer["freed_bytes"] == 7 * BLOCK_BYTES
    assert len(service.snapshots(service.volume("db").id)) == 2


async def test_map_comes_in_pages(service: FakeAdminService) -> None:
    first = await run(service, "volume.map", target="db", limit=20)
    second = await run(service, "volume.map", target="db", limit=20, start_bytes=first["next_bytes"])
    assert len(first["extents"]) == 20
    assert len(second["extents"]) == 5
    assert second["next_bytes"] is None


async def test_snapshot_create_needs_a_snapshot_name(service: FakeAdminService) -> None:
    with pytest.raises(UsageError):
        await run(service, "snapshot.create", targets=["db"])


async def test_diff_and_rename_stay_on_one_volume(service: FakeAdminService) -> None:
    await run(service, "snapshot.create", targets=["db@a", "log@a"])
    diff = await run(service, "snapshot.diff", target="db@a", from_snapshot="db@a")
    assert diff["changed_bytes"] == 2 * BLOCK_BYTES
    assert (diff["block_metadata"][1], diff["next_offset"]) == ({"byte_offset": 8192, "size_bytes": 4096}, None)
    assert (await run(service, "snapshot.diff", target="db@a", max_results=1))["next_offset"] == 8192
    with pytest.raises(UsageError):
        await run(service, "snapshot.diff", target="db@a", from_snapshot="log@a")
    with pytest.raises(UsageError):
        await run(service, "snapshot.rename", target="db@a", name="log@b")


def test_every_verb_is_in_the_table_once() -> None:
    assert len({verb.run for verb in VERBS.values()}) == len(VERBS)
    assert all(verb.run.__doc__ for verb in VERBS.values())
