"""What incfs relies on of a kernel, on this one: the tests that docs/KERNELS.md names beside each promise."""

import re

import pytest

from tests.vm.image import ROOT
from tests.vm.machine import BOOT_TIMEOUT_S

PYTEST = (
    "cd /opt/incfs && INCFS_REQUIRE_MOUNT=1 PATH=$PATH:/usr/sbin "
    "/opt/venv/bin/python -m pytest -q -p no:cacheprovider --basetemp=/var/tmp/pytest"
)


def promised_tests():
    """Return the tests' ids that the page names."""
    page = (ROOT / "docs/KERNELS.md").read_text(encoding="utf-8")
    return sorted({f"tests/mount/{name}" for name in re.findall(r"`(test_\w+\.py(?:::\w+)?)`", page)})


@pytest.fixture(scope="module")
def booted(machine):
    machine.boot()
    return machine


@pytest.mark.timeout(2 * BOOT_TIMEOUT_S)
def test_the_kernel_is_the_one_that_is_asked_for(booted, platform):
    assert booted.ok("uname -r").startswith(platform.kernel)


@pytest.mark.short
@pytest.mark.timeout(2 * BOOT_TIMEOUT_S)
def test_seeks_miss_nothing_that_is_on_its_way(booted):
    said = booted.ok(f"{PYTEST} tests/mount/test_race.py -k running", timeout_s=BOOT_TIMEOUT_S)
    assert re.search(r"\d passed", said), said


@pytest.mark.timeout(4 * BOOT_TIMEOUT_S)
def test_each_promise_holds(booted):
    said = booted.ok(f"{PYTEST} {' '.join(promised_tests())}", timeout_s=3 * BOOT_TIMEOUT_S)
    assert re.search(r"\d passed", said), said
    assert "skipped" not in said, said
