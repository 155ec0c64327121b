/* The native data plane under many threads, without Python; built with ThreadSanitizer or
 * AddressSanitizer by tests/native/test_stress.py.
 *
 *     stress SECONDS SEED
 *
 * Writers own stripes of blocks and write rising numbers into them; readers look whether each block
 * is whole, in its place and no older than what was acknowledged before the read began.  One control
 * thread does what the store does: grants, seals, frees and reuses blocks, evicts and loads pages,
 * rewrites parts of blocks.  It keeps a model of what was sealed and compares it with every seal.
 * Syncers make what was written durable through the journal's fast lane, all at once; the control
 * thread takes what they committed, and now and then takes the journal back.
 */
#define _GNU_SOURCE
#include "lane.h"
#include "plane.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    BLOCK = 512,
    WORDS = BLOCK / 8,
    PAGES = 4,
    BLOCKS = PAGES * PLANE_PAGE_BLOCKS,
    STRIPE = 8,
    STRIPES = BLOCKS / STRIPE,
    WRITERS = 3, /* and the control thread, which owns every fourth stripe */
    READERS = 2,
    SYNCERS = 2,
    THREADS = WRITERS + READERS + SYNCERS,
    IMAGE_BLOCKS = 3 * BLOCKS,
};
static const uint64_t TABLE = 1ull << 32, STORAGE = 1ull << 48;

static struct plane *plane;
static struct lane *lane;
static int journals[2]; /* which are alike */
static atomic_bool is_over;
static _Atomic uint64_t acknowledged[BLOCKS];
/* Twice the number of discards begun, plus 1 while zeros may be read. */
static _Atomic uint64_t zero_state[BLOCKS];
static atomic_ulong writes, reads, refusals, seals, syncs;

static void fail(const char *what, uint64_t block, uint64_t found, uint64_t expected)
{
    fprintf(stderr, "%s: block %lu: found %lu, expected %lu\n", what, block, found, expected);
    abort();
}

static void fill(uint64_t *words, uint64_t block, uint64_t number)
{
    for (unsigned i = 0; i < WORDS; i++)
        words[i] = i % 2 ? number : block + 1;
}

static void check_block(const uint64_t *words, uint64_t block, uint64_t floor, bool zero_is_right)
{
    if (!words[0] && zero_is_right) {
        for (unsigned i = 0; i < WORDS; i++)
            if (words[i])
                fail("torn zeros", block, words[i], 0);
        return;
    }
    for (unsigned i = 0; i < WORDS; i += 2) {
        if (words[i] != block + 1)
            fail("wrong place", block, words[i], block + 1);
        if (words[i + 1] != words[1])
            fail("torn block", block, words[i + 1], words[1]);
    }
    if (words[1] < floor)
        fail("stale", block, words[1], floor);
}

/* ---- Writers and readers ----------------------------------------------------------------------------- */

/* Most of the work is in everybody's first stripe, so that readers and rewrites in place meet there. */
static bool is_crowded(unsigned *seed)
{
    return rand_r(seed) % 8 != 0;
}

static void write_some(unsigned owner, unsigned *seed, uint64_t *number)
{
    uint64_t words[STRIPE * WORDS];
    uint64_t stripe = rand_r(seed) % (is_crowded(seed) ? 1 : STRIPES / (WRITERS + 1)) * (WRITERS + 1) + owner;
    uint64_t first = stripe * STRIPE + rand_r(seed) % STRIPE;
    uint64_t count = 1 + rand_r(seed) % ((stripe + 1) * STRIPE - first);
    bool is_discard = rand_r(seed) % 8 == 0;
    ++*number;
    for (uint64_t i = 0; i < count; i++) {
        if (is_discard)
            atomic_store(&zero_state[first + i], (zero_state[first + i] | 1) + 2);
        fill(words + i * WORDS, first + i, *number);
    }
    if (is_discard)
        memset(words, 0, sizeof words);
    enum plane_status status = plane_serve_write(plane, TABLE, first * BLOCK, words, count * BLOCK);
    if (status == PLANE_OK) {
        atomic_fetch_add(&writes, 1);
        for (uint64_t i = 0; i < count && !is_discard; i++) {
            atomic_store(&acknowledged[first + i], *number);
            atomic_fetch_and(&zero_state[first + i], ~1ull);
        }
    } else if (status == PLANE_NO_LEASE || status == PLANE_NOT_RESIDENT || status == PLANE_NOT_SERVED) {
        atomic_fetch_add(&refusals, 1);
        usleep(50);
    } else {
        fail("write", first, status, PLANE_OK);
    }
}

static void *run_writer(void *argument)
{
    unsigned owner = (uintptr_t)argument, seed = owner + 100;
    uint64_t number = 0;
    while (!atomic_load(&is_over))
        write_some(owner, &seed, &number);
    return NULL;
}

static void *run_reader(void *argument)
{
    unsigned seed = (uintptr_t)argument;
    static _Thread_local uint64_t words[64 * WORDS];
    while (!atomic_load(&is_over)) {
        uint64_t first = rand_r(&seed) % (is_crowded(&seed) ? (WRITERS + 1) * STRIPE : BLOCKS), most = BLOCKS - first < 40 ? BLOCKS - first : 40;
        uint64_t count = 1 + rand_r(&seed) % most, floors[64], zeros[64];
        for (uint64_t i = 0; i < count; i++) {
            zeros[i] = atomic_load(&zero_state[first + i]);
            floors[i] = atomic_load(&acknowledged[first + i]);
        }
        size_t start, found;
        enum plane_status status = plane_serve_read(plane, TABLE, first * BLOCK, count * BLOCK, rand_r(&seed) % 2,
                                                    (char *)words, sizeof words, &start, &found);
        if (status == PLANE_NOT_RESIDENT || status == PLANE_NOT_SERVED || status == PLANE_WOULD_WAIT) {
            atomic_fetch_add(&refusals, 1);
            continue;
        }
        if (status != PLANE_OK || start || found != count * BLOCK)
            fail("read", first, status, PLANE_OK);
        atomic_fetch_add(&reads, 1);
        for (uint64_t i = 0; i < count; i++)
            check_block(words + i * WORDS, first + i, floors[i],
                        zeros[i] & 1 || atomic_load(&zero_state[first + i]) != zeros[i]);
    }
    return NULL;
}

struct syncer {
    struct hot_waiter waiter; /* first */
    atomic_int state;         /* 1: done, 2: refused */
    int error;
};

static void sync_done(struct hot_waiter *waiter, int error)
{
    struct syncer *syncer = (struct syncer *)waiter;
    syncer->error = error;
    atomic_store(&syncer->state, 1);
}

static void sync_refused(struct hot_waiter *waiter)
{
    atomic_store(&((struct syncer *)waiter)->state, 2);
}

static void *run_syncer(void *argument)
{
    static const struct hot_answers answers = {sync_done, sync_refused};
    unsigned seed = (uintptr_t)argument;
    while (!atomic_load(&is_over)) {
        struct syncer syncer = {.waiter.inode = TABLE};
        if (lane_sync(lane, &syncer.waiter, rand_r(&seed) % 4, &answers)) {
            while (!atomic_load(&syncer.state))
                usleep(10);
            if (syncer.error)
                fail("sync", 0, syncer.error, 0);
            if (atomic_load(&syncer.state) == 1)
                atomic_fetch_add(&syncs, 1);
        }
        usleep(rand_r(&seed) % 200);
    }
    return NULL;
}

/* ---- The control plane --------------------------------------------------------------------------------- */

static struct plane_mapping sealed[BLOCKS];
static uint8_t in_use[IMAGE_BLOCKS]; /* leased, fresh or mapped */
static uint64_t freed[IMAGE_BLOCKS * 4];
static size_t freed_count;
static uint64_t cursor;

static void grant_some(unsigned *seed)
{
    uint64_t wanted = 16 + rand_r(seed) % 200, first = 0, count = 0;
    for (uint64_t tried = 0; tried < IMAGE_BLOCKS && count < wanted; tried++, cursor++) {
        uint64_t block = cursor % IMAGE_BLOCKS;
        if (in_use[block] || (count && block != first + count)) {
            if (count)
                break;
            continue;
        }
        if (!count)
            first = block;
        count++;
        in_use[block] = 1;
    }
    if (count)
        plane_grant(plane, TABLE, (struct plane_run){STORAGE | first, count});
}

static void note_freed(uint64_t address)
{
    if (address <= PLANE_HOLE)
        return;
    if (!in_use[address & 0xFFFFFFFF])
        fail("freed twice", address & 0xFFFFFFFF, 0, 1);
    freed[freed_count++] = address & 0xFFFFFFFF;
}

static void take(const struct plane_batch *batch)
{
    for (size_t p = 0; p < batch->page_count; p++)
        for (size_t i = 0; i < batch->pages[p].count; i++) {
            const struct plane_appended *appended = &batch->appended[batch->pages[p].first + i];
            uint64_t block = batch->pages[p].page_index * PLANE_PAGE_BLOCKS + appended->index;
            if (appended->old_address != sealed[block].address)
                fail("replaced another mapping", block, appended->old_address, sealed[block].address);
            if (appended->address > PLANE_HOLE && !in_use[appended->address & 0xFFFFFFFF])
                fail("mapped to a free block", block, appended->address, 0);
            note_freed(appended->old_address);
            sealed[block] = (struct plane_mapping){appended->address, appended->checksum};
        }
    for (size_t i = 0; i < batch->dropped_count; i++)
        note_freed(batch->dropped[i]);
}

static void take_committed(struct plane_batch *rest)
{
    static uint64_t sequence;
    struct lane_batch *committed;
    if (lane_take(lane, &committed, rest) != PLANE_OK)
        fail("seal", 0, 1, 0);
    for (struct lane_batch *batch = committed, *next; batch; batch = next) {
        next = batch->next;
        if (batch->sequence != sequence + (batch->batch.page_count || batch->batch.written_count))
            fail("a commit is missing", 0, batch->sequence, sequence);
        sequence = batch->sequence;
        take(&batch->batch);
        lane_batch_free(batch);
    }
    if (rest)
        take(rest);
}

static void seal(void)
{
    struct plane_batch rest;
    take_committed(&rest);
    plane_batch_free(&rest);
    /* Nobody reads a commit's blocks back any more: what was freed may be written again now, while readers
     * still hold its address. */
    uint64_t end_bytes;
    if (lane_reclaim(lane, &end_bytes))
        fail("commit", 0, 1, 0);
    while (freed_count)
        in_use[freed[--freed_count]] = 0;
    lane_reopen(lane);
    atomic_fetch_add(&seals, 1);
}

static void load_missing(void)
{
    for (uint64_t page = 0; page < PAGES; page++)
        if (!plane_is_resident(plane, TABLE, page)) {
            take_committed(NULL); /* it may have been sealed by a commit, and evicted then */
            plane_load(plane, TABLE, page, sealed + page * PLANE_PAGE_BLOCKS, PLANE_INHERIT);
        }
}

static void shrink(unsigned *seed)
{
    uint64_t *evicted;
    size_t count;
    plane_shrink(plane, rand_r(seed) % PAGES, &evicted, &count);
    free(evicted);
}

/* Writes half a block into one of its own: the other half must be kept. */
static void write_part(unsigned *seed, uint64_t *number)
{
    uint64_t stripe = rand_r(seed) % (STRIPES / (WRITERS + 1)) * (WRITERS + 1) + WRITERS;
    uint64_t block = stripe * STRIPE, words[WORDS];
    struct plane_refusal why;
    fill(words, block, ++*number);
    size_t half = BLOCK / 2;
    if (plane_write(plane, TABLE, block * BLOCK, words, BLOCK, true, false, &why) != PLANE_OK)
        return;
    /* Content that a reader accepts at every moment: both halves equal the whole block. */
    enum plane_status status = plane_write(plane, TABLE, block * BLOCK + half, (char *)words + half, half, true, false, &why);
    if (status != PLANE_OK && status != PLANE_NO_LEASE)
        fail("partial write", block, status, 0);
    atomic_store(&acknowledged[block], *number);
    atomic_fetch_and(&zero_state[block], ~1ull);
}

static void control(unsigned seed, time_t end)
{
    uint64_t number = 0;
    while (time(NULL) < end) {
        load_missing();
        if (plane_leased_blocks(plane, TABLE) < 200)
            grant_some(&seed);
        write_part(&seed, &number);
        switch (rand_r(&seed) % 16) {
        case 0: case 1: case 2: case 3:
            seal();
            break;
        case 4:
            shrink(&seed);
            break;
        case 5: {
            struct plane_run *runs;
            size_t count;
            plane_revoke(plane, NULL, &runs, &count);
            for (size_t i = 0; i < count; i++)
                memset(in_use + (runs[i].address & 0xFFFFFFFF), 0, runs[i].count);
            free(runs);
            break;
        }
        case 6:
            plane_unserve(plane, TABLE);
            plane_serve(plane, TABLE, (uint64_t)BLOCKS * BLOCK, true, (struct plane_rules){0}, &(struct plane_facts){0});
            break;
        case 8: case 9:
            take_committed(NULL);
            break;
        case 7: {
            uint64_t *list;
            size_t count;
            plane_attend(plane, &list, &count);
            free(list);
            lane_close(lane);
            plane_written(plane, &list, &count);
            free(list);
            lane_reopen(lane);
            break;
        }
        }
    }
}

static void check_all(void)
{
    static uint64_t words[BLOCKS * WORDS];
    struct plane_refusal why;
    seal();
    load_missing();
    if (plane_read(plane, TABLE, 0, BLOCKS, true, true, words, &why) != PLANE_OK)
        fail("last read", why.virtual_block, why.found, why.expected);
    for (uint64_t block = 0; block < BLOCKS; block++)
        check_block(words + block * WORDS, block, acknowledged[block], zero_state[block] & 1);
    plane_evict(plane, TABLE);
}

int main(int count, char **arguments)
{
    unsigned seed = count > 2 ? atoi(arguments[2]) : 1;
    int image = memfd_create("image", MFD_CLOEXEC);
    if (image < 0 || ftruncate(image, (off_t)IMAGE_BLOCKS * BLOCK) < 0)
        return 2;
    plane = plane_new(BLOCK);
    plane_attach(plane, 1, &image, 1, 0);
    plane_watch(plane, 64);
    lane = lane_new(plane);
    for (int i = 0; i < 2; i++)
        journals[i] = memfd_create("journal", MFD_CLOEXEC);
    lane_lend(lane, &(struct lane_journal){.fds = {journals[0], journals[1]},
                                           .copies = 2,
                                           .end_bytes = 512,
                                           .limit_bytes = UINT64_MAX,
                                           .most_blocks = 64,
                                           .block_bytes = BLOCK});
    plane_serve(plane, TABLE, (uint64_t)BLOCKS * BLOCK, true, (struct plane_rules){0}, &(struct plane_facts){0});
    for (size_t block = 0; block < BLOCKS; block++)
        atomic_store(&zero_state[block], 1);
    pthread_t threads[THREADS];
    for (uintptr_t i = 0; i < WRITERS; i++)
        pthread_create(&threads[i], NULL, run_writer, (void *)i);
    for (uintptr_t i = 0; i < READERS; i++)
        pthread_create(&threads[WRITERS + i], NULL, run_reader, (void *)(i + seed));
    for (uintptr_t i = 0; i < SYNCERS; i++)
        pthread_create(&threads[WRITERS + READERS + i], NULL, run_syncer, (void *)(i + seed));
    control(seed, time(NULL) + (count > 1 ? atoi(arguments[1]) : 5));
    atomic_store(&is_over, true);
    for (unsigned i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    check_all();
    lane_free(lane);
    plane_free(plane);
    for (int i = 0; i < 2; i++)
        close(journals[i]);
    printf("ok: %lu writes, %lu reads, %lu refusals, %lu seals, %lu syncs\n", writes, reads, refusals, seals, syncs);
    return 0;
}
