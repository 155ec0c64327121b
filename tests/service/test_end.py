"""The end of a daemon whose mount cannot be taken away: what the kernel holds is written first."""

import logging
from pathlib import Path
from typing import Any

import pytest

from incfs.errors import IncfsError
from incfs.mount import _Stopping
from incfs.service import Service, open_service
from tests.support import pools


class Kernel:
    """Writes what it holds of a volume; the first time that has just got another name, or has gone."""

    def __init__(self, service: Service, change: str) -> None:
        self._service = service
        self._change = change
        self.asked: list[str] = []

    async def sync_volume(self, name: str) -> None:
        self.asked.append(name)
        if len(self.asked) == 1:
            volume_id = self._service.volume(name).id
            if self._change == "renamed":
                await self._service.rename_volume(volume_id, "other")
            elif self._change == "removed":
                await self._service.remove_volume(volume_id)
            raise IncfsError(f"{name}: no such file")


@pytest.mark.parametrize(
    ("change", "asked", "told"),
    [("renamed", ["db", "other"], False), ("removed", ["db"], False), ("there", ["db"], True)],
)
async def test_a_volume_renamed_or_removed_at_the_end_is_no_failure(
    pool_home: Path, caplog: pytest.LogCaptureFixture, change: str, asked: list[str], told: bool
) -> None:
    """It was said that not everything could be written, and under its new name nothing was."""
    async with open_service(pools.make_pool(pool_home), pools.tiny_options()) as service:
        volume = await service.create_volume("db")
        service.handles.open(volume.map_id, "somebody")
        kernel: Any = Kernel(service, change)
        await _Stopping(service, kernel, pool_home, Any)._write_open_volumes()  # type: ignore[arg-type]
        service.handles.close(volume.map_id)
    assert kernel.asked == asked
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR and "written" in r.message] == (
        ["db: not everything could be written: db: no such file"] if told else []
    )
