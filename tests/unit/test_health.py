"""How a pool is judged: the worst counts, each reason says what to do."""

from typing import Any

import pytest

from incfs.health import judge, protection

POOL = {"read_only": False, "failure": None, "is_proved": True, "free_bytes": 4096}
LEGS = [{"leg": 0, "path": "/a", "state": "online"}, {"leg": 1, "path": "/b", "state": "stale"}]
STORAGE = {"id": 2, "path": "/a", "state": "online", "redundancy": "none", "legs": []}
COPY = {"copy": 1, "path": "/m", "state": "online", "reason": ""}
EVENT = {"kind": "leg-failed", "subject": "storage 2", "time": "2026-01-02T03:04:05.000001Z"}


@pytest.mark.parametrize(
    ("pool", "storage", "copy", "state", "code", "words"),
    [
        ({}, {}, {}, "sound", 0, []),
        ({"free_bytes": 0}, {}, {}, "full", 13, ["no block is free"]),
        ({}, {"state": "missing"}, {}, "degraded", 4, ["storage volume 2 (/a) is missing; mount its disk"]),
        (
            {},
            {"state": "degraded", "legs": LEGS},
            {},
            "degraded",
            4,
            ["storage volume 2 is a mirror 1/2 since 2026-01-02T03:04:05Z; `incfs storage resilver 2`"],
        ),
        ({}, {"state": "evacuating"}, {}, "sound", 0, []),
        ({}, {}, {"state": "stale", "reason": "it is away"}, "degraded", 4, ["the metadata in /m is not up to date"]),
        ({"is_proved": False}, {}, {}, "degraded", 4, ["of different times"]),
        (
            {"read_only": True, "failure": "cannot sync", "free_bytes": 0},
            {"state": "missing"},
            {},
            "read-only",
            1,
            ["cannot sync; mend", "is missing", "no block is free"],
        ),
    ],
)
def test_a_pool_is_judged(
    pool: dict[str, Any], storage: dict[str, Any], copy: dict[str, Any], state: str, code: int, words: list[str]
) -> None:
    found = judge(POOL | pool, [STORAGE | storage], [COPY | copy], [EVENT])
    assert (found.state, found.exit_code) == (state, code)
    assert len(found.reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, found.reasons, strict=True))
    assert found.line.startswith(state)


def test_what_protects_a_storage_volume() -> None:
    assert protection(STORAGE) == "none"
    assert protection(STORAGE | {"redundancy": "raid6"}) == "raid6"
    assert protection(STORAGE | {"redundancy": "raid1", "legs": LEGS}) == "mirror 1/2 on raid1"
