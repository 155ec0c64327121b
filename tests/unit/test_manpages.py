"""The man pages: each command, each verb and each option is in one, and roff finds nothing wrong with them."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from incfs.cli import NOUNS, app

TOOL = Path(__file__).parents[2] / "tools/manpages.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("manpages", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    made: dict[str, str] = load().pages()
    return made


def verbs(command: Any) -> list[Any]:
    return [verb for verb in getattr(command, "commands", {}).values() if not verb.hidden] or [command]


def test_each_command_verb_and_option_has_its_place(pages: dict[str, str]) -> None:
    root: Any = typer.main.get_command(app)
    assert {f"incfs-{name}.1" for name in NOUNS} | {"incfs.1"} == set(pages)
    for name, command in root.commands.items():
        page = pages[f"incfs-{name}.1"]
        assert f"incfs\\-{name} (1)" in pages["incfs.1"]
        for verb in verbs(command):
            assert verb is command or f".SS {verb.name.replace('-', chr(92) + '-')}" in page
            options = [option for parameter in verb.params for option in parameter.opts if option.startswith("--")]
            assert [option for option in options if option.replace("-", "\\-") not in page] == []


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_roff_finds_nothing_wrong(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww"], input=page, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), name
        assert "EXIT STATUS" in re.sub(r".\x08", "", done.stdout)  # bold is struck twice
