"""The power fails at a random moment under writers that wait for fsync: nothing that was acknowledged is lost.

The machine is stopped in its tracks and its disk copied as QEMU's end would leave it then; it goes on, to be cut again.
INCFS_VM_CUTS sets the number.
"""

import os
import random
import time

import pytest

from tests.vm.judge import judge
from tests.vm.machine import BOOT_TIMEOUT_S

CUTS = int(os.environ.get("INCFS_VM_CUTS", "20"))
SEED = int(os.environ.get("INCFS_VM_SEED", "1"))


@pytest.mark.timeout(2 * BOOT_TIMEOUT_S + 60 * CUTS)
def test_cuts_at_random_moments_lose_nothing_that_was_acknowledged(machine, tmp_path):
    rng = random.Random(SEED)
    machine.boot()
    machine.ok("mkdir -p /mnt/cut && incfs pool create /srv/cut --capacity 128M && incfs mount /srv/cut /mnt/cut")
    machine.ok("systemd-run --unit=stamper python3 /opt/incfs/tests/vm/guest/stamper.py /mnt/cut")
    looked_at = 0
    for number in range(CUTS):
        machine.await_stamps(rng.randint(1, 60))
        time.sleep(rng.uniform(0, 0.5))
        disk = tmp_path / f"cut-{number}.qcow2"
        stamps = machine.copy_disk(disk)
        looked_at += judge(disk, stamps, "/srv/cut")
        disk.unlink()
    print(f"\n{CUTS} cuts, {looked_at} acknowledged blocks")
    machine.cut()
