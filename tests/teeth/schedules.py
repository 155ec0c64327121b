"""Breakages of the C code that only some orders of threads show: the controlled scheduler must meet one of those."""

from typing import Final

from tests.teeth.breakage import Breakage

_SCHEDULES = "tests/native/test_schedules.py::test_every_schedule_is_right"

SCHEDULES: Final = (
    Breakage(
        "lane-answers-before-the-flush",
        "I5",
        "incfs/lane.c",
        "    if (!flush->error)\n        flush->error = flush->disk->flush(flush->fd);",
        "    (void)flush->disk->flush;",
        _SCHEDULES,
    ),
    Breakage(
        "lane-answers-who-came-during-the-flush",
        "I13",
        "incfs/lane.c",
        "        bool is_done = commit(lane, waiters, &error);\n",
        "        bool is_done = commit(lane, waiters, &error);\n"
        "        struct hot_waiter **last = &waiters;\n"
        "        while (*last)\n"
        "            last = &(*last)->next;\n"
        "        *last = take_waiters(lane);\n",
        _SCHEDULES,
    ),
    Breakage(
        "lane-close-does-not-stop-the-next-commit",
        "I12",
        "incfs/lane.c",
        "    if (!lane->is_open || !begin(lane, waiters, &record))",
        "    if (!begin(lane, waiters, &record))",
        _SCHEDULES,
    ),
    Breakage(
        "lane-stays-open-behind-the-owners-seal",
        "I12",
        "incfs/lane.c",
        "        lane->is_open = false;\n        status = plane_seal",
        "        status = plane_seal",
        _SCHEDULES,
    ),
    Breakage(
        "lane-settles-without-waiting",
        "I13",
        "incfs/lane.c",
        "    while (lane->is_committing)\n        pthread_cond_wait(&lane->ended, &lane->lock);\n",
        "",
        _SCHEDULES,
    ),
    Breakage(
        "lane-believes-whoever-wakes-it",
        "I13",
        "incfs/lane.c",
        "    while (lane->is_committing)\n        pthread_cond_wait",
        "    if (lane->is_committing)\n        pthread_cond_wait",
        _SCHEDULES,
    ),
    Breakage(
        "lane-says-what-it-sealed-is-durable",
        "I13",
        "incfs/lane.c",
        "    uint64_t sequence = lane->durable_sequence;",
        "    uint64_t sequence = lane->journal.sequence;",
        _SCHEDULES,
    ),
    Breakage(
        "lane-record-goes-with-older-tables",
        "I3",
        "incfs/lane.c",
        "    lane->journal.folded = folded;",
        "    (void)folded;",
        _SCHEDULES,
    ),
    Breakage(
        "lane-two-lead-at-once",
        "I5",
        "incfs/lane.c",
        "    lane->is_committing |= leads;",
        "    lane->is_committing |= false;",
        _SCHEDULES,
    ),
    Breakage(
        "native-seal-with-writes-half-in-it",
        "I6",
        "incfs/plane_seal.c",
        "    pthread_rwlock_wrlock(&plane->gate);\n    enum plane_status status = plane_fresh_count(plane) > most",
        "    pthread_rwlock_rdlock(&plane->gate);\n    enum plane_status status = plane_fresh_count(plane) > most",
        _SCHEDULES,
    ),
    Breakage(
        "native-read-does-not-look-again",
        "I4",
        "incfs/plane_read.c",
        "                status = read_block(plane, map_id, virtual_block, can_wait, verify, block, &now, why);",
        "                status = PLANE_MISMATCH, (void)now;",
        _SCHEDULES,
    ),
    Breakage(
        "native-part-published-over-another-write",
        "I4",
        "incfs/plane_write.c",
        "        *again = !is_complete(write);",
        "        *again = false;",
        _SCHEDULES,
    ),
    Breakage(
        "native-write-published-to-a-lease-that-is-no-more",
        "I9",
        "incfs/plane_write.c",
        "    bool is_placed = write->placing == write->plane->placing;",
        "    bool is_placed = true;",
        _SCHEDULES,
    ),
)
