"""Machines with kernels and init as users have them; see the Makefile for the two forms.

INCFS_VM_PLATFORMS names those to try (bookworm-6.1,bookworm-6.12,trixie-6.12), all by default.
"""

import os
import shutil

import pytest

from tests.vm.image import PLATFORMS, prepare
from tests.vm.machine import Machine

WANTED = os.environ.get("INCFS_VM_PLATFORMS", ",".join(map(str, PLATFORMS))).split(",")
PROGRAMS = ("qemu-system-x86_64", "qemu-img", "mmdebstrap", "apt-get")


def require_vm():
    """In CI a machine that cannot run is a failure."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        refuse = pytest.fail if os.environ.get("INCFS_REQUIRE_VM") == "1" else pytest.skip
        refuse(f"needs root and {', '.join(missing) or 'nothing else'}")


@pytest.fixture(scope="module", params=[p for p in PLATFORMS if str(p) in WANTED], ids=str)
def platform(request):
    require_vm()
    return request.param


@pytest.fixture(scope="module")
def machine(platform, tmp_path_factory):
    """A machine that is off; the tests of a module boot it in turn."""
    machine = Machine(prepare(platform), tmp_path_factory.mktemp(f"{platform}"))
    yield machine
    machine.cut()
