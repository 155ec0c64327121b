/* The C code under a controlled scheduler: plane*.c and lane.c as they are, in fibres that change at points of a
 * schedule (fibres.h), over files in memory whose power may be cut (disk.h), driven by clients as hot threads do it and
 * by an owner as the control plane does it (control.h).  What each client saw, what each acknowledged fsync promised
 * and what is there at the end is judged (oracle.h).
 *
 *     schedules COUNT [FIRST_SEED [OWNER]]
 *
 * A seed gives a case: operations, steps, priorities, changes, faults.  One that fails is made smaller and printed with
 * its run; `schedules 1 SEED` does it again.  OWNER: the number of an owner that is known to be wrong (control.h).
 */
#define _GNU_SOURCE
#include "control.h"
#include "disk.h"
#include "fibres.h"
#include "hooks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CLIENTS = 3, MOST_OPERATIONS = 8, FIRST_CLIENT = 3 };

/* ---- Cases ----------------------------------------------------------------------------------- */

enum operation_kind { WRITE, WRITE_PART, WRITE_ZEROS, READ, SYNC, OPERATION_KINDS };

struct operation {
    enum operation_kind kind;
    unsigned volume, first_word, word_count;
    bool can_wait;
};

struct scenario {
    struct schedule schedule;
    struct operation operations[CLIENTS][MOST_OPERATIONS];
    unsigned operation_count[CLIENTS];
    struct step steps[MOST_STEPS];
    struct disk_faults faults;
    struct control_options options;
    bool cuts_unflushed;
};

static uint64_t seed_state;

static unsigned draw(unsigned below)
{
    uint64_t mixed = seed_state += 0x9E3779B97F4A7C15u;
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9u;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
    return ((mixed ^ mixed >> 31) >> 32) % below;
}

/* A case is of few kinds: what needs some of them in a row is met more often so (swarm testing). */
struct swarm {
    unsigned kinds[8], count;
    bool is_crowded; /* few blocks are wanted by all */
    bool prefers_other; /* volume, since it is the one whose reads are not verified */
};

static struct swarm draw_swarm(unsigned most, unsigned kinds)
{
    struct swarm swarm = {.count = 1 + draw(most)};
    for (unsigned i = 0; i < swarm.count; i++)
        swarm.kinds[i] = draw(kinds);
    return swarm;
}

static struct operation draw_operation(const struct swarm *swarm)
{
    struct operation operation = {.kind = swarm->kinds[draw(swarm->count)], .volume = draw(4) == 0};
    bool is_crowded = swarm->is_crowded;
    operation.volume ^= swarm->prefers_other;
    operation.can_wait = draw(4);
    unsigned block = is_crowded ? BLOCKS / 2 - 1 + draw(2) : draw(BLOCKS);
    unsigned most = BLOCKS - block < 4 ? BLOCKS - block : 4, blocks = is_crowded ? 1 + draw(2) : 1 + draw(most);
    operation.first_word = block * BLOCK_WORDS;
    operation.word_count = blocks * BLOCK_WORDS;
    if (operation.kind == WRITE_PART) {
        operation.first_word += draw(BLOCK_WORDS);
        operation.word_count = 1 + draw(blocks * BLOCK_WORDS - operation.first_word % BLOCK_WORDS);
    }
    return operation;
}

static struct step draw_step(const struct swarm *swarm)
{
    unsigned block = draw(BLOCKS);
    return (struct step){swarm->kinds[draw(swarm->count)], draw(4) == 0, block, 1 + draw(BLOCKS - block)};
}

static int by_point(const void *left, const void *right)
{
    const struct change *a = left, *b = right;
    return a->point < b->point ? -1 : a->point > b->point;
}

/* Either few changes, each of which sends the running fibre behind all others, or many that call others. */
static void draw_schedule(struct schedule *schedule, unsigned fibres)
{
    for (unsigned i = 0; i < fibres; i++)
        schedule->priorities[i] = 100 + draw(100);
    unsigned points = 64 << draw(6);
    bool is_walk = draw(4) == 0, is_fine = draw(3) == 0;
    schedule->change_count = is_walk ? 8 + draw(MOST_CHANGES - 8) : draw(8);
    for (unsigned i = 0; i < schedule->change_count; i++) {
        struct change *change = &schedule->changes[i];
        change->is_fine = is_fine && draw(2);
        change->point = 1 + draw(change->is_fine ? points * 16 : points);
        change->fibre = is_walk ? (int)draw(fibres) : LAST;
    }
    qsort(schedule->changes, schedule->change_count, sizeof *schedule->changes, by_point);
}

static void draw_faults(struct disk_faults *faults)
{
    *faults = (struct disk_faults){.miss_percent = draw(2) * draw(100), .is_short = draw(8) == 0};
    faults->waiting = draw(8) ? TELLS : 1 + draw(DOES_NOT_TELL);
    if (draw(4))
        return;
    faults->kind = draw(2) ? FAULT_FLUSH : 1 + draw(FAULT_READ_IMAGE);
    faults->at = 1 + draw(faults->kind == FAULT_FLUSH ? 4 : 16);
    faults->count = draw(2) ? 1 : 1 + draw(100);
}

static struct scenario draw_scenario(uint64_t seed, enum owner owner)
{
    struct scenario scenario = {.schedule.seed = seed};
    seed_state = seed * 0xD6E8FEB86659FD93u;
    draw(2);
    struct swarm operations = draw_swarm(4, OPERATION_KINDS), steps = draw_swarm(6, STEP_KINDS);
    operations.kinds[operations.count++] = WRITE;
    operations.is_crowded = draw(2);
    operations.prefers_other = draw(4) == 0;
    for (unsigned client = 0; client < CLIENTS; client++) {
        scenario.operation_count[client] = 1 + draw(MOST_OPERATIONS);
        for (unsigned i = 0; i < scenario.operation_count[client]; i++)
            scenario.operations[client][i] = draw_operation(&operations);
    }
    unsigned step_count = draw(MOST_STEPS + 1);
    for (unsigned i = 0; i < step_count; i++)
        scenario.steps[i] = draw_step(&steps);
    bool has_other_leg = step_count && draw(4) == 0;
    if (has_other_leg)
        scenario.steps[draw(step_count)].kind = STEP_ATTACH;
    draw_schedule(&scenario.schedule, FIRST_CLIENT + CLIENTS);
    draw_faults(&scenario.faults);
    scenario.options = (struct control_options){
        .owner = owner,
        .step_count = step_count,
        .client_count = CLIENTS,
        .is_unverified = operations.prefers_other,
        .has_other_leg = has_other_leg,
        .most_blocks = 2 + draw(12),
        .limit_bytes = draw(4) ? 40 << 10 : SECTOR_BYTES * (2 + draw(16)),
    };
    scenario.cuts_unflushed = draw(2);
    return scenario;
}

/* ---- Clients --------------------------------------------------------------------------------- */

static struct plane *plane;
static struct lane *lane;
static const struct scenario *running;
static uint64_t points, fine_points, switches; /* of all runs */

struct syncer {
    struct hot_waiter waiter; /* first */
    bool is_done, is_refused;
    int error;
};

static void sync_done(struct hot_waiter *waiter, int error)
{
    struct syncer *syncer = (struct syncer *)waiter;
    syncer->error = error;
    syncer->is_done = true;
    fibres_notify();
}

static void sync_refused(struct hot_waiter *waiter)
{
    struct syncer *syncer = (struct syncer *)waiter;
    syncer->is_done = syncer->is_refused = true;
    fibres_notify();
}

static bool is_answered(void *context)
{
    return ((struct syncer *)context)->is_done;
}

static uint64_t offset_of(const struct operation *operation)
{
    return FIRST_BLOCK * BLOCK_BYTES + operation->first_word * 8;
}

static struct request request_of(const struct operation *operation, uint64_t *words)
{
    return (struct request){.volume = operation->volume, .first_word = operation->first_word,
                            .word_count = operation->word_count, .words = words};
}

static void write_words(const struct operation *operation)
{
    uint64_t words[WORDS];
    struct write *write = oracle_write(operation->volume, operation->first_word, operation->word_count,
                                       operation->kind == WRITE_ZEROS, words);
    enum plane_status status = plane_serve_write(plane, map_id_of(operation->volume), offset_of(operation), words,
                                                 operation->word_count * 8);
    write->is_partial = status == PLANE_WRITE_ERROR;
    if (status != PLANE_OK) {
        struct request request = request_of(operation, words);
        request.kind = REQUEST_WRITE;
        control_ask(&request);
        write->is_partial |= request.error != 0;
        if (request.error)
            return;
    }
    oracle_written(write);
}

static void read_words(const struct operation *operation)
{
    uint64_t words[WORDS], begin = oracle_now();
    size_t start = 0, count = operation->word_count * 8;
    enum plane_status status = plane_serve_read(plane, map_id_of(operation->volume), offset_of(operation), count,
                                                operation->can_wait, (char *)words, sizeof words, &start, &count);
    if (status == PLANE_MISMATCH && !disk_has_failed())
        fibres_fail("a block that is whole is said to be damaged");
    if (status != PLANE_OK) {
        struct request request = request_of(operation, words);
        request.kind = REQUEST_READ;
        control_ask(&request);
        count = operation->word_count * 8;
        if (request.error)
            return;
    }
    bool is_unverified = operation->volume == 1 && running->options.is_unverified;
    oracle_seen(operation->volume, operation->first_word, count / 8, words, begin, oracle_now(), !is_unverified);
}

/* As _dataplane_served.c, server_sync, and then fuse_hot_serve.c. */
static int sync_volume(const struct operation *operation)
{
    static const struct hot_answers answers = {sync_done, sync_refused};
    struct syncer syncer = {.waiter.inode = map_id_of(operation->volume)};
    struct plane_facts facts;
    uint64_t size_bytes;
    bool is_taken = plane_serve_stat(plane, syncer.waiter.inode, &facts, &size_bytes) &&
                    lane_sync(lane, &syncer.waiter, operation->can_wait, &answers);
    if (is_taken)
        fibres_wait(is_answered, &syncer, "the lane");
    if (is_taken && !syncer.is_refused)
        return syncer.error;
    struct request request = request_of(operation, NULL);
    request.kind = REQUEST_SYNC;
    control_ask(&request);
    return request.error;
}

static void sync_words(const struct operation *operation)
{
    uint64_t begin = oracle_now();
    int error = sync_volume(operation);
    fibres_trace("fsync: %s", error ? "failed" : "durable");
    if (error)
        return;
    oracle_promise(begin);
    control_cut(running->cuts_unflushed);
}

static void run_client(void *argument)
{
    unsigned client = (uintptr_t)argument;
    for (unsigned i = 0; i < running->operation_count[client]; i++) {
        const struct operation *operation = &running->operations[client][i];
        fibres_trace("operation %u: %s of volume %u, %u words at %u", operation->kind,
                     (const char *[]){"write", "write of a part", "write of zeros", "read", "fsync"}[operation->kind],
                     operation->volume, operation->word_count, operation->first_word);
        if (operation->kind == READ)
            read_words(operation);
        else if (operation->kind == SYNC)
            sync_words(operation);
        else
            write_words(operation);
        if (fibres_random(2))
            fibres_yield("a client thinks");
    }
    control_leave();
}

/* ---- Runs ------------------------------------------------------------------------------------ */

static void judge(void *unused)
{
    (void)unused;
    control_cut(false);
    control_cut(true);
    control_judge();
    if (running->schedule.seed % 16)
        return; /* it takes longer than all the rest: a plane has room for 65,536 images */
    lane_free(lane);
    plane_free(plane);
    if (hooks_live_count())
        fibres_fail("%ld pieces of memory are left", hooks_live_count());
}

static const struct schedule alone;

/* Returns what was wrong, or NULL. */
static const char *run(const struct scenario *scenario, bool is_traced)
{
    static const char *names[CLIENTS] = {"client 0", "client 1", "client 2"};
    struct control_options options = scenario->options;
    options.steps = scenario->steps;
    running = scenario;
    hooks_begin();
    disk_begin();
    oracle_begin();
    plane = plane_new(BLOCK_BYTES);
    lane = lane_new(plane);
    control_begin(&options, plane, lane);
    disk_fail(&scenario->faults);
    fibres_add("owner", control_run, NULL);
    fibres_add("commit", control_commit, NULL);
    fibres_add("fold", control_fold, NULL);
    for (uintptr_t i = 0; i < CLIENTS; i++)
        fibres_add(names[i], run_client, (void *)i);
    const char *failure = fibres_run(&scenario->schedule, is_traced);
    if (failure)
        return failure;
    points += fibres_points();
    fine_points += fibres_fine_points();
    switches += fibres_switches();
    fibres_add("judge", judge, NULL);
    return fibres_run(&alone, false);
}

/* ---- Making a case smaller ------------------------------------------------------------------- */

enum { TRIES = 200 };

static bool fails_as_it_is(struct scenario *scenario)
{
    return run(scenario, false) != NULL;
}

/* As it is, or under another schedule: with an operation less, points have other numbers. */
static bool still_fails(struct scenario *scenario)
{
    if (fails_as_it_is(scenario))
        return true;
    struct scenario other = *scenario;
    for (unsigned i = 0; i < TRIES; i++) {
        other.schedule.seed = seed_state = i;
        draw_schedule(&other.schedule, FIRST_CLIENT + CLIENTS);
        if (!run(&other, false))
            continue;
        *scenario = other;
        return true;
    }
    return false;
}

static void drop(void *items, unsigned *count, unsigned which, size_t size)
{
    char *at = (char *)items + which * size;
    memmove(at, at + size, (--*count - which) * size);
}

/* Tries to do without each item of a list; whether it could without one. */
#define SHRINK_LIST(scenario, list, list_count, fails, is_smaller)                                                     \
    for (unsigned i = (scenario).list_count; i--;) {                                                                   \
        struct scenario smaller = scenario;                                                                            \
        drop(smaller.list, &smaller.list_count, i, sizeof *smaller.list);                                              \
        if (fails(&smaller))                                                                                           \
            (scenario) = smaller, is_smaller = true;                                                                   \
    }

static struct scenario shrink_case(struct scenario scenario)
{
    for (bool is_smaller = true; is_smaller;) {
        is_smaller = false;
        for (unsigned client = 0; client < CLIENTS; client++)
            SHRINK_LIST(scenario, operations[client], operation_count[client], still_fails, is_smaller)
        SHRINK_LIST(scenario, steps, options.step_count, still_fails, is_smaller)
        SHRINK_LIST(scenario, schedule.changes, schedule.change_count, fails_as_it_is, is_smaller)
        struct scenario smaller = scenario;
        smaller.faults = (struct disk_faults){0};
        if (memcmp(&smaller.faults, &scenario.faults, sizeof smaller.faults) && still_fails(&smaller))
            scenario = smaller, is_smaller = true;
    }
    return scenario;
}

static void tell(uint64_t seed, const struct scenario *found)
{
    struct scenario scenario = shrink_case(*found);
    printf("seed %lu, made smaller:\n", (unsigned long)seed);
    const char *failure = run(&scenario, true);
    printf("%u, %u and %u operations, %u steps, %u changes, fault %d\n", scenario.operation_count[0],
           scenario.operation_count[1], scenario.operation_count[2], scenario.options.step_count,
           scenario.schedule.change_count, scenario.faults.kind);
    printf("FAILED: seed %lu: %s\n", (unsigned long)seed, failure);
}

int main(int count, char **arguments)
{
    uint64_t schedules = count > 1 ? strtoull(arguments[1], NULL, 0) : 1000;
    uint64_t first = count > 2 ? strtoull(arguments[2], NULL, 0) : 1;
    enum owner owner = count > 3 ? atoi(arguments[3]) : OWNER_RIGHT;
    for (uint64_t seed = first; seed < first + schedules; seed++) {
        struct scenario scenario = draw_scenario(seed, owner);
        const char *failure = run(&scenario, false);
        if (failure) {
            printf("seed %lu: %s\n", (unsigned long)seed, failure);
            tell(seed, &scenario);
            return 1;
        }
    }
    printf("ok: %lu schedules, %lu points, %lu accesses to memory, %lu switches\n", (unsigned long)schedules,
           (unsigned long)points, (unsigned long)fine_points, (unsigned long)switches);
    return 0;
}
