"""docs/SEMANTICS.md promises nothing that no test holds: each test it names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs/SEMANTICS.md").read_text(encoding="utf-8"))
    assert len(named) > 40
    for path, name in named:
        file = ROOT / (path if "/" in path else f"tests/mount/{path}")
        assert f"def {name}(" in file.read_text(encoding="utf-8"), f"{path}::{name}"
