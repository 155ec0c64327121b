"""The C code under a controlled scheduler: see schedules/schedules.c."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.figures import FIGURES

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "schedules"
SCHEDULES = int(os.environ.get("INCFS_SCHEDULES", "20000"))
FIRST_SEED = int(os.environ.get("INCFS_SCHEDULES_SEED", "1"))
COMPILER = os.environ.get("CC", "cc")

_HOOKED = """
    malloc calloc realloc free aligned_alloc memcpy clock_gettime
    pread64 pwrite64 preadv64v2 fstatfs64 fdatasync fsync posix_fadvise64 eventfd read write close
    pthread_mutex_init pthread_mutex_destroy pthread_mutex_lock pthread_mutex_trylock pthread_mutex_unlock
    pthread_rwlock_init pthread_rwlock_destroy pthread_rwlock_rdlock pthread_rwlock_wrlock pthread_rwlock_unlock
    pthread_cond_init pthread_cond_destroy pthread_cond_wait pthread_cond_timedwait pthread_cond_clockwait
    pthread_cond_signal pthread_cond_broadcast pthread_create pthread_join
"""
HOOKED = _HOOKED.split()
"""What the product calls and hooks.c or disk.c stands for."""
_PLAIN = """
    memset memmove memcmp strlen qsort __errno_location crc32c crc32c_init _GLOBAL_OFFSET_TABLE_
    pthread_rwlockattr_init pthread_rwlockattr_setkind_np pthread_rwlockattr_destroy
"""
PLAIN = _PLAIN.split()
"""What it may call as it is: touches nothing that is shared, and never waits."""

OWNERS = (
    "seals twice in a step",
    "answers an fsync at once, although the lane's record is being flushed",
    "loads pages without what the lane committed of them",
    "reuses freed blocks before the checkpoint",
    "leaves the lane open while changes wait",
    "appends to the journal that it has lent",
)
"""Wrong ones, by their numbers in control.h, from 1 on."""


def call(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_product(target: Path) -> list[Path]:
    """Compile plane*.c and lane.c, which are not changed, so that hooks.c and disk.c stand for the system."""
    made = []
    for source in [*sorted((ROOT / "incfs").glob("plane*.c")), ROOT / "incfs/lane.c"]:
        made.append(target / f"{source.stem}.o")
        flags = ["-std=gnu11", "-g", "-O1", "-D_FILE_OFFSET_BITS=64", "-fsanitize=thread", "-fno-builtin-memcpy"]
        call(COMPILER, *flags, "-c", source, "-o", made[-1])
        hooked = [*HOOKED, "plane_seal"] if source.name == "lane.c" else HOOKED
        call("objcopy", *(f"--redefine-sym={name}=hooks_{name}" for name in hooked), made[-1])
    return made


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compile_product(tmp_path_factory.mktemp("product"))


@pytest.fixture(scope="module")
def program(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("schedules") / "schedules"
    flags = ["-std=gnu11", "-g", "-O2", "-Wall", "-Wextra", "-Werror", "-D_FILE_OFFSET_BITS=64", f"-I{ROOT / 'incfs'}"]
    call(COMPILER, *flags, *sorted(HERE.glob("*.c")), *objects, ROOT / "incfs/crc32c.c", "-o", built)
    return built


def run(program: Path, count: int, seed: int = 1, owner: int = 0) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(count), str(seed), str(owner)]
    return subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")


def test_nothing_escapes_the_scheduler(objects: list[Path]) -> None:
    """A call of the system that no hook stands for would run past the schedule, on the real host."""
    symbols = [line.split()[-2:] for line in call("nm", "--format=bsd", *objects).splitlines() if len(line.split()) > 1]
    defined = {name for kind, name in symbols if kind not in "Uu"}
    asked = {name for kind, name in symbols if kind == "U"} - defined
    hooks = {f"hooks_{name}" for name in [*HOOKED, "plane_seal"]}
    assert {name for name in asked - hooks - set(PLAIN) if not name.startswith("__tsan_")} == set()


def test_every_schedule_is_right(program: Path) -> None:
    """Each read, each acknowledged fsync, each seal, each snapshot and what a power cut leaves is judged."""
    parts = os.cpu_count() or 1
    starts = [FIRST_SEED + SCHEDULES * part // parts for part in range(parts + 1)]
    with ThreadPoolExecutor(parts) as executor:
        ends = list(executor.map(lambda first, end: run(program, end - first, first), starts[:-1], starts[1:]))
    for end in ends:
        assert end.returncode == 0, end.stdout[-8000:] + end.stderr
    FIGURES["schedules of the C code"] += SCHEDULES


@pytest.mark.parametrize("owner", range(1, len(OWNERS) + 1), ids=OWNERS)
def test_a_wrong_owner_is_found_out(program: Path, owner: int) -> None:
    end = run(program, 200000, owner=owner)
    assert end.returncode == 1, end.stdout[-8000:] + end.stderr
    assert "FAILED: seed" in end.stdout, end.stdout[-8000:] + end.stderr


def test_a_seed_does_the_same_again_and_is_made_smaller(program: Path) -> None:
    found = run(program, 20000, owner=2).stdout
    seed = int(found.split()[1].rstrip(":"))
    assert run(program, 1, seed, owner=2).stdout == found
    sizes = found.splitlines()[-2].replace(" and", ",").split(",")  # "2, 0 and 2 operations, 0 steps, 1 changes, ..."
    assert sum(int(size.split()[0]) for size in sizes[:3]) <= 8
