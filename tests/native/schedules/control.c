/* The control plane.  See control.h; names are those of the Python that each part stands for. */
#include "control.h"

#include "crc32c.h"
#include "disk.h"
#include "fibres.h"
#include "hooks.h"

#include <errno.h>
#include <string.h>

enum block_state { FREE, LEASED, LIVE, FREED };
enum { SEAL_AT = 12, COMMIT_AT_CHANGES = 48, CHECKPOINT_AT_BYTES = 24 << 10, SMALL_BLOCKS = 8, MOST_SEALS = 512 };

/* Work that a worker does for the owner. */
struct job {
    bool is_wanted, is_done, is_over;
    int error;
};

struct commit {
    struct job job; /* first */
    uint64_t sequence, folded, segment;
    struct table_change changes[MOST_CHANGES_PENDING];
    unsigned count;
    bool is_turning; /* the journal goes on in its next segment afterwards */
};

struct checkpoint {
    struct job job; /* first */
    struct tables frozen;
    uint64_t freed[IMAGE_BLOCKS];
    unsigned freed_count;
};

static struct control_options options;
static struct plane *plane;
static struct lane *lane;

static struct {
    struct tables tables, stored;
    enum block_state states[IMAGE_BLOCKS];
    bool is_void[IMAGE_BLOCKS]; /* of a lease that was taken back, and sealed nowhere since: no mapping may name it */
    uint64_t freed[IMAGE_BLOCKS];
    unsigned freed_count;
    struct table_change pending[MOST_CHANGES_PENDING];
    unsigned pending_count;
    uint64_t sequence, durable_sequence, folded, last_number;
    struct commit commit;
    struct checkpoint checkpoint;
    bool is_committing, is_turning, is_checkpointing, has_failed, wants_commit, wants_checkpoint;
    bool is_lent, is_closed, has_both_legs;
    int sync_errno[DISK_FILES]; /* of the first that failed */
    uint64_t freed_by[IMAGE_BLOCKS]; /* the checkpoint that made a block free last */
    uint64_t end_bytes, used_bytes, nonce, segment;
    struct {
        bool is_writable;
        uint64_t blocks;
    } served[VOLUMES];
    struct request *first, *last;          /* of clients */
    struct request *next_round, *in_round; /* who waits for the next commit, and for the one under way */
    unsigned step, clients_left;
    bool in_step;
} state;

/* ---- Seals: hooks_plane_seal stands for plane_seal in lane.c --------------------------------- */

static const void *seals[MOST_SEALS];
static unsigned seal_count, taken_seals;

enum plane_status hooks_plane_seal(struct plane *sealed, size_t most, struct plane_batch *batch)
{
    enum plane_status status = plane_seal(sealed, most, batch);
    if (status != PLANE_OK)
        return status;
    bool is_hot = fibres_current() > 0;
    if (is_hot && state.in_step)
        fibres_fail("sealed within a step of the owner");
    if (is_hot && state.is_closed)
        fibres_fail("sealed although the lane is closed");
    if (seal_count < MOST_SEALS)
        seals[seal_count++] = batch->pages;
    return status;
}

static void note_taken(const struct plane_batch *batch)
{
    if (taken_seals >= seal_count || seals[taken_seals] != batch->pages)
        fibres_fail("a batch is taken that was not sealed next");
    taken_seals++;
}

/* ---- Blocks ---------------------------------------------------------------------------------- */

static unsigned block_at(uint64_t address)
{
    if (address < STORAGE || address >= STORAGE + IMAGE_BLOCKS)
        fibres_fail("%lx is no address", (unsigned long)address);
    return address - STORAGE;
}

static void turn(uint64_t address, enum block_state from, enum block_state to)
{
    static const char *names[] = {"free", "leased", "live", "freed"};
    unsigned block = block_at(address);
    if (state.states[block] != from)
        fibres_fail("block %u becomes %s, but it is %s and not %s", block, names[to], names[state.states[block]],
                    names[from]);
    if (to == LIVE && state.is_void[block])
        fibres_fail("block %u is used, although its lease was taken back", block);
    state.states[block] = to;
    state.is_void[block] = false;
}

static void note_freed(uint64_t address)
{
    bool is_early = options.owner == OWNER_REUSES_EARLY;
    turn(address, LIVE, is_early ? FREE : FREED);
    if (!is_early)
        state.freed[state.freed_count++] = address;
}

/* Gives a table some of the lowest free blocks: what was freed last is soon used again. */
static bool grant(uint64_t map_id, unsigned wanted)
{
    unsigned first = 0, count = 0;
    while (first < IMAGE_BLOCKS && state.states[first] != FREE)
        first++;
    for (; count < wanted && first + count < IMAGE_BLOCKS && state.states[first + count] == FREE; count++)
        turn(STORAGE + first + count, FREE, LEASED);
    if (count)
        plane_grant(plane, map_id, (struct plane_run){STORAGE + first, count});
    return count;
}

static void revoke_all(void)
{
    struct plane_run *runs;
    size_t count;
    plane_revoke(plane, NULL, &runs, &count);
    for (size_t i = 0; i < count; i++)
        for (uint64_t k = 0; k < runs[i].count; k++)
            turn(runs[i].address + k, LEASED, FREE);
    hooks_free(runs);
}

/* What was taken from these leases and is not sealed now is never seen. */
static void note_void(void)
{
    for (unsigned block = 0; block < IMAGE_BLOCKS; block++)
        state.is_void[block] = state.states[block] == LEASED;
}

/* ---- memory.py ------------------------------------------------------------------------------- */

static void close_lane(void)
{
    if (options.owner == OWNER_LEAVES_LANE_OPEN)
        return;
    lane_close(lane);
    state.is_closed = true;
}

static void fail_pool(void)
{
    state.has_failed = true;
    close_lane(); /* _dataplane_served.c, method_freeze */
    plane_freeze(plane);
}

/* Both legs of a mirror have what was written since the second was attached. */
static void require_both_legs(uint64_t address)
{
    size_t at = block_at(address) * BLOCK_BYTES;
    if (state.has_both_legs && !disk_has_failed() &&
        memcmp(disk_cache(IMAGE) + at, disk_cache(OTHER_LEG) + at, BLOCK_BYTES))
        fibres_fail("block %u was sealed, but the other leg does not have it", block_at(address));
}

static void take_mapping(const struct plane_sealed_page *page, const struct plane_appended *appended, bool is_pending)
{
    struct table_change change = {
        .kind = CHANGE_MAP,
        .volume = (page->map_id >> 32) - 1,
        .block = page->page_index * PLANE_PAGE_BLOCKS + appended->index - FIRST_BLOCK,
        .mapping = {appended->address, appended->checksum},
    };
    if (change.volume >= VOLUMES || change.block >= BLOCKS)
        fibres_fail("a mapping of volume %u block %u is sealed", change.volume, change.block);
    struct plane_mapping before = state.tables.live[change.volume][change.block];
    if (before.address != appended->old_address || before.checksum != appended->old_checksum)
        fibres_fail("volume %u block %u: %lx was replaced, but the tables have %lx", change.volume, change.block,
                    (unsigned long)appended->old_address, (unsigned long)before.address);
    if (appended->address > PLANE_HOLE) {
        turn(appended->address, LEASED, LIVE);
        require_both_legs(appended->address);
    }
    tables_apply(&state.tables, &change, note_freed);
    if (is_pending)
        state.pending[state.pending_count++] = change;
}

static uint64_t mapped_blocks(unsigned volume)
{
    uint64_t count = 0;
    for (unsigned block = 0; block < BLOCKS; block++)
        count += state.tables.live[volume][block].address > PLANE_HOLE;
    return count;
}

/* As far as its record allows; its facts change with each batch that is taken. */
static void serve_anew(unsigned volume)
{
    struct plane_facts facts = {.mapped_blocks = mapped_blocks(volume)};
    struct plane_rules rules = {.is_unverified = volume == 1 && options.is_unverified};
    plane_serve(plane, map_id_of(volume), state.served[volume].blocks * BLOCK_BYTES,
                state.served[volume].is_writable && !state.has_failed, rules, &facts);
}

static void take(const struct plane_batch *batch, bool is_pending)
{
    note_taken(batch);
    unsigned changed = 0;
    for (size_t i = 0; i < batch->dropped_count; i++)
        turn(batch->dropped[i], LEASED, FREE);
    for (size_t p = 0; p < batch->page_count; p++) {
        for (size_t i = 0; i < batch->pages[p].count; i++)
            take_mapping(&batch->pages[p], &batch->appended[batch->pages[p].first + i], is_pending);
        changed |= 1 << ((batch->pages[p].map_id >> 32) - 1);
    }
    for (unsigned volume = 0; volume < VOLUMES; volume++)
        if (changed >> volume & 1)
            serve_anew(volume);
}

static void take_committed(struct lane_batch *committed)
{
    for (struct lane_batch *batch = committed, *next; batch; batch = next) {
        next = batch->next;
        if (batch->sequence != state.sequence + (batch->batch.page_count || batch->batch.written_count))
            fibres_fail("batch of record %lu behind record %lu", (unsigned long)batch->sequence,
                        (unsigned long)state.sequence);
        state.sequence = batch->sequence;
        take(&batch->batch, false);
        lane_batch_free(batch);
    }
    uint64_t durable = lane_durable_sequence(lane);
    if (durable > state.durable_sequence)
        state.durable_sequence = durable;
}

static void catch_up(void)
{
    struct lane_batch *committed;
    lane_take(lane, &committed, NULL);
    take_committed(committed);
}

/* Lets a change wait for the next commit. */
static void pend(struct table_change change)
{
    close_lane();
    catch_up();
    tables_apply(&state.tables, &change, note_freed);
    state.pending[state.pending_count++] = change;
}

/* What is taken here only a commit of the control plane makes durable. */
static void take_times(void)
{
    uint64_t *writes;
    size_t count;
    close_lane();
    plane_written(plane, &writes, &count);
    if (count)
        pend((struct table_change){.kind = CHANGE_TOUCH});
    hooks_free(writes);
}

static void absorb(void)
{
    struct plane_batch rest;
    struct lane_batch *committed;
    lane_take(lane, &committed, &rest);
    state.is_closed = true;
    take_committed(committed);
    take(&rest, true);
    plane_batch_free(&rest);
    take_times();
}

/* From here to the end of the step nothing may be sealed: its records are about what is known now. */
static void begin_change(void)
{
    absorb();
    state.in_step = true;
}

static void end_step(void)
{
    state.in_step = false;
    fibres_notify();
}

static bool is_resident(unsigned volume, uint64_t page)
{
    return plane_is_resident(plane, map_id_of(volume), page);
}

static void load(unsigned volume, uint64_t page)
{
    static struct plane_mapping mappings[PLANE_PAGE_BLOCKS];
    if (is_resident(volume, page))
        return;
    if (options.owner != OWNER_LOADS_OLD_PAGES)
        catch_up(); /* it may have been sealed by the lane, and evicted since */
    memset(mappings, 0, sizeof mappings);
    for (unsigned block = 0; block < BLOCKS; block++)
        if ((FIRST_BLOCK + block) / PLANE_PAGE_BLOCKS == page)
            mappings[(FIRST_BLOCK + block) % PLANE_PAGE_BLOCKS] = state.tables.live[volume][block];
    plane_load(plane, map_id_of(volume), page, mappings, PLANE_INHERIT);
}

static void serve(unsigned volume, bool is_writable, uint64_t blocks)
{
    state.served[volume].is_writable = is_writable;
    state.served[volume].blocks = blocks;
    serve_anew(volume);
}

static void serve_all(void)
{
    for (unsigned volume = 0; volume < VOLUMES; volume++)
        serve(volume, true, FIRST_BLOCK + BLOCKS);
}

/* ---- journal.py, checkpoint.py: any thread --------------------------------------------------- */

static int journal_fd(void)
{
    return disk_fd(state.segment % 2 ? OTHER_JOURNAL : JOURNAL);
}

static int reclaim(void)
{
    if (!state.is_lent || options.owner == OWNER_APPENDS_BESIDE_LANE)
        return 0;
    int error;
    do
        error = lane_reclaim(lane, &state.end_bytes);
    while (!error && lane_no_room(lane));
    state.is_closed = true;
    state.is_lent = false;
    return error;
}

static int settle(void)
{
    int error;
    if (!state.is_lent)
        return 0;
    do
        error = lane_settle(lane);
    while (!error && lane_no_room(lane));
    return error;
}

/* The committer tries again what found no room. */
static int write_journal(int fd, const unsigned char *bytes, size_t length, uint64_t offset)
{
    int error;
    do
        error = write_fully(fd, bytes, length, offset);
    while (error == ENOSPC);
    return error;
}

static int append(const unsigned char *record, size_t length, uint64_t sequence)
{
    unsigned char ack[SECTOR_BYTES] = {0};
    int error = reclaim();
    if (error || (error = write_journal(journal_fd(), record, length, state.end_bytes)))
        return error;
    if (hooks_fdatasync(journal_fd()))
        return errno;
    state.end_bytes += length;
    state.used_bytes = state.end_bytes;
    encode_head(ack, "JACK", 0, sequence, state.nonce, 0);
    error = write_fully(journal_fd(), ack, sizeof ack, state.end_bytes);
    return error == ENOSPC ? 0 : error;
}

static int start_segment(uint64_t start_sequence)
{
    unsigned char sector[SECTOR_BYTES];
    int error = reclaim();
    if (error)
        return error;
    uint64_t segment = state.segment + 1, nonce = state.nonce + 1;
    int fd = disk_fd(segment % 2 ? OTHER_JOURNAL : JOURNAL);
    encode_segment(sector, segment, start_sequence, nonce);
    if ((error = write_journal(fd, sector, sizeof sector, 0)))
        return error;
    if (hooks_fdatasync(fd))
        return errno;
    state.segment = segment;
    state.nonce = nonce;
    state.end_bytes = state.used_bytes = SECTOR_BYTES;
    return 0;
}

/* Checkpoint.run_commit's and Commit.run's data: that of few blocks goes into the record. */
static int read_back(const struct commit *commit, unsigned char *data, unsigned *blocks)
{
    for (unsigned i = 0; i < commit->count; i++) {
        const struct plane_mapping *mapping = &commit->changes[i].mapping;
        if (commit->changes[i].kind != CHANGE_MAP || mapping->address <= PLANE_HOLE)
            continue;
        int error = plane_read_stored(plane, mapping->address, mapping->checksum, (char *)data + *blocks * BLOCK_BYTES);
        if (error && !disk_has_failed())
            fibres_fail("block %u differs from what was sealed", block_at(mapping->address));
        if (error)
            return error;
        ++*blocks;
    }
    return 0;
}

static unsigned stored_blocks(const struct commit *commit)
{
    unsigned blocks = 0;
    for (unsigned i = 0; i < commit->count; i++)
        blocks += commit->changes[i].kind == CHANGE_MAP && commit->changes[i].mapping.address > PLANE_HOLE;
    return blocks;
}

/* backing.File.sync: the kernel tells of what it could not write once, so whoever asks later is told the same. */
static int sync_image(enum disk_file file)
{
    if (!state.sync_errno[file] && hooks_fdatasync(disk_fd(file)))
        state.sync_errno[file] = errno;
    return state.sync_errno[file];
}

static int flush_images(void)
{
    int error = sync_image(IMAGE);
    return error || !options.has_other_leg ? error : sync_image(OTHER_LEG);
}

static int run_commit(const struct commit *commit)
{
    static unsigned char data[MOST_CHANGES_PENDING * BLOCK_BYTES], record[MOST_RECORD_BYTES];
    unsigned blocks = 0;
    int error = 0;
    if (!commit->count)
        error = settle();
    else if (stored_blocks(commit) <= SMALL_BLOCKS)
        error = read_back(commit, data, &blocks);
    else
        error = flush_images();
    if (!error && commit->count)
        error = append(record, encode_record(record, commit->sequence, state.nonce, commit->folded, commit->changes,
                                             commit->count, data, blocks), commit->sequence);
    return error || !commit->is_turning ? error : start_segment(commit->sequence + 1);
}

/* ---- store.py, committer.py ------------------------------------------------------------------ */

/* Whether everything is durable: sealed means queued, and a record of the lane may still be on its way. */
static bool has_nothing_to_commit(void)
{
    return !state.pending_count &&
           (state.durable_sequence == state.sequence || options.owner == OWNER_ANSWERS_AT_ONCE);
}

static void begin_commit(void)
{
    struct commit *commit = &state.commit;
    state.sequence += state.pending_count != 0;
    commit->sequence = state.sequence;
    commit->folded = state.folded;
    memcpy(commit->changes, state.pending, state.pending_count * sizeof *commit->changes);
    commit->count = state.pending_count;
    commit->is_turning = false;
    state.pending_count = 0;
    state.is_committing = true;
    commit->job = (struct job){.is_wanted = true};
}

static void lend_journal(void)
{
    bool is_at_rest = !(state.pending_count || state.is_committing || state.is_turning);
    if (!(is_at_rest || options.owner == OWNER_LEAVES_LANE_OPEN) || state.has_failed)
        return;
    state.is_closed = false;
    if (state.is_lent) {
        lane_reopen(lane);
        return;
    }
    lane_lend(lane, &(struct lane_journal){
                        .fds = {journal_fd()},
                        .copies = 1,
                        .end_bytes = state.end_bytes,
                        .limit_bytes = options.limit_bytes,
                        .nonce = state.nonce,
                        .sequence = state.sequence,
                        .folded = state.folded,
                        .most_blocks = options.most_blocks,
                        .block_bytes = BLOCK_BYTES,
                    });
    state.is_lent = true;
}

static void answer(struct request *request, int error)
{
    request->error = error;
    request->is_done = true;
    fibres_notify();
}

static void answer_all(struct request *requests, int error)
{
    for (struct request *next; requests; requests = next) {
        next = requests->next;
        answer(requests, error);
    }
}

static void begin_checkpoint(void)
{
    begin_commit();
    struct checkpoint *checkpoint = &state.checkpoint;
    state.wants_checkpoint = false;
    state.is_turning = state.is_checkpointing = true;
    state.commit.is_turning = true;
    checkpoint->frozen = state.tables;
    checkpoint->frozen.sequence = state.sequence;
    checkpoint->frozen.segment = state.segment + 1;
    memcpy(checkpoint->freed, state.freed, state.freed_count * sizeof *state.freed);
    checkpoint->freed_count = state.freed_count;
    state.freed_count = 0;
    checkpoint->job = (struct job){0};
}

static void end_round(int error)
{
    if (!error)
        lend_journal();
    answer_all(state.in_round, error);
    state.in_round = NULL;
}

static bool is_checkpoint_due(void)
{
    return (state.wants_checkpoint || state.used_bytes >= CHECKPOINT_AT_BYTES) && !state.is_checkpointing;
}

static void commit_or_checkpoint(void)
{
    state.in_round = state.next_round;
    state.next_round = NULL;
    state.wants_commit = false;
    absorb();
    if (is_checkpoint_due())
        begin_checkpoint();
    else if (!has_nothing_to_commit())
        begin_commit();
    else
        end_round(0);
}

static void end_commit(void)
{
    struct commit *commit = &state.commit;
    int error = commit->job.error;
    commit->job.is_done = state.is_committing = false;
    if (error)
        fail_pool();
    else
        state.durable_sequence = commit->sequence;
    state.checkpoint.job.is_wanted |= !error && commit->is_turning;
    state.is_checkpointing &= !(error && commit->is_turning);
    state.is_turning = false;
    end_round(error);
}

static void end_checkpoint(void)
{
    struct checkpoint *checkpoint = &state.checkpoint;
    checkpoint->job.is_done = state.is_checkpointing = false;
    if (checkpoint->job.error) {
        fail_pool();
        return;
    }
    state.folded = checkpoint->frozen.sequence;
    lane_set_folded(lane, state.folded);
    for (unsigned i = 0; i < checkpoint->freed_count; i++) {
        turn(checkpoint->freed[i], FREED, FREE);
        state.freed_by[block_at(checkpoint->freed[i])] = state.folded;
    }
}

static bool is_asked(void *context)
{
    const struct job *job = context;
    return job->is_wanted || job->is_over;
}

void control_commit(void *unused)
{
    (void)unused;
    struct job *job = &state.commit.job;
    for (;;) {
        fibres_wait(is_asked, job, "work");
        if (!job->is_wanted)
            return;
        job->is_wanted = false;
        job->error = run_commit(&state.commit);
        job->is_done = true;
        fibres_notify();
    }
}

void control_fold(void *unused)
{
    (void)unused;
    struct job *job = &state.checkpoint.job;
    for (;;) {
        fibres_wait(is_asked, job, "work");
        if (!job->is_wanted)
            return;
        job->is_wanted = false;
        job->error = flush_images();
        fibres_point("store the tables");
        if (!job->error)
            state.stored = state.checkpoint.frozen;
        fibres_point("the tables are stored");
        job->is_done = true;
        fibres_notify();
    }
}

/* ---- Steps ----------------------------------------------------------------------------------- */

static void attend(void)
{
    uint64_t *tables, address;
    size_t count;
    plane_attend(plane, &tables, &count);
    if (plane_failure(plane, &address)) {
        fail_pool();
    } else {
        catch_up();
        for (size_t i = 0; i < count; i++)
            grant(tables[i], 4);
        if (plane_fresh_count(plane) >= SEAL_AT)
            absorb();
        if (state.is_lent)
            state.used_bytes = lane_end_bytes(lane);
    }
    hooks_free(tables);
}

static void take_snapshots(void)
{
    uint64_t begin = oracle_now();
    begin_change();
    uint64_t end = oracle_now(), number = ++state.last_number;
    for (unsigned volume = 0; volume < VOLUMES; volume++)
        if (newest_snapshot(&state.tables, volume) < SNAPSHOTS - 1)
            pend((struct table_change){
                .kind = CHANGE_SNAPSHOT, .volume = volume, .begin = begin, .end = end, .number = number});
    end_step();
}

/* volume._fold_some: the last page's step drops the snapshot. */
static bool remove_some(unsigned volume)
{
    begin_change();
    int newest = newest_snapshot(&state.tables, volume);
    bool is_empty = newest >= 0 && !memchr(state.tables.snapshots[volume][newest].has, true, BLOCKS);
    if (newest >= 0 && !is_empty)
        pend((struct table_change){.kind = CHANGE_FOLD, .volume = volume});
    if (is_empty && options.owner == OWNER_SEALS_TWICE) {
        state.in_step = false;
        absorb();
    }
    if (is_empty)
        pend((struct table_change){.kind = CHANGE_DROP, .volume = volume});
    end_step();
    return is_empty;
}

static void evict(unsigned volume)
{
    absorb();
    plane_evict(plane, map_id_of(volume));
}

/* A page goes when it was not used between two looks. */
static void shrink(unsigned page_count)
{
    uint64_t *evicted;
    size_t count;
    for (unsigned looks = 0; looks < 2; looks++) {
        plane_shrink(plane, page_count, &evicted, &count);
        hooks_free(evicted);
    }
}

/* rollback: hot writes are stopped, everything is sealed and evicted, and nothing may have been written meanwhile. */
static void quiet(void)
{
    for (unsigned volume = 0; volume < VOLUMES; volume++)
        serve(volume, false, FIRST_BLOCK + BLOCKS);
    begin_change();
    for (unsigned volume = 0; volume < VOLUMES; volume++)
        plane_evict(plane, map_id_of(volume));
    if (plane_fresh_count(plane) || plane_page_count(plane))
        fibres_fail("%zu mappings and %zu pages are there after all was sealed and evicted", plane_fresh_count(plane),
                    plane_page_count(plane));
    end_step();
    serve_all();
}

/* Another size and back: nothing behind it is written meanwhile (ranges.trim relies on it). */
static void cut_short(unsigned volume, unsigned block)
{
    serve(volume, true, FIRST_BLOCK + block);
    absorb();
    struct plane_mapping before[BLOCKS];
    memcpy(before, state.tables.live[volume], sizeof before);
    fibres_point("the volume is shorter");
    absorb();
    if (memcmp(before + block, state.tables.live[volume] + block, (BLOCKS - block) * sizeof *before))
        fibres_fail("volume %u was written behind its end", volume);
    serve(volume, true, FIRST_BLOCK + BLOCKS);
}

static void discard(unsigned volume, unsigned block, unsigned count)
{
    uint64_t words[WORDS];
    struct plane_refusal why;
    if (state.has_failed)
        return;
    struct write *write = oracle_write(volume, block * BLOCK_WORDS, count * BLOCK_WORDS, true, words);
    if (plane_discard(plane, map_id_of(volume), FIRST_BLOCK + block, count, &why) == PLANE_OK)
        oracle_written(write);
}

/* legs.attach_leg: blocks that were written to the others only are sealed at the end of this step at the latest. */
static void attach(void)
{
    if (!options.has_other_leg)
        return;
    plane_attach(plane, 1, (const int[]){disk_fd(IMAGE), disk_fd(OTHER_LEG)}, 2, 0);
    absorb();
    state.has_both_legs = true;
}

static void perform(const struct step *step)
{
    fibres_trace("step %d, volume %u, block %u, count %u", step->kind, step->volume, step->block, step->count);
    switch (step->kind) {
    case STEP_SEAL: return absorb();
    case STEP_TAKE: return catch_up();
    case STEP_TOUCH: return pend((struct table_change){.kind = CHANGE_TOUCH});
    case STEP_COMMIT: state.wants_commit = true; return;
    case STEP_CHECKPOINT: state.wants_checkpoint = true; return;
    case STEP_SNAPSHOT: return take_snapshots();
    case STEP_REMOVE:
        for (unsigned tries = 0; tries < 3 && !remove_some(step->volume); tries++)
            fibres_yield("between two steps");
        return;
    case STEP_EVICT: return evict(step->volume);
    case STEP_SHRINK: return shrink(step->block % 2);
    case STEP_REVOKE: revoke_all(); absorb(); return note_void();
    case STEP_SERVE: return cut_short(step->volume, step->block);
    case STEP_QUIET: return quiet();
    case STEP_DISCARD: return discard(step->volume, step->block, step->count);
    case STEP_ATTACH: return attach();
    case STEP_TIMES: return take_times();
    default: fibres_fail("no step %d", step->kind);
    }
}

/* ---- driver.py: what hot threads left -------------------------------------------------------- */

/* Whether a refused request may be tried again. */
static bool mend(struct request *request, enum plane_status status, const struct plane_refusal *why)
{
    switch (status) {
    case PLANE_NOT_RESIDENT:
        load(request->volume, why->page_index);
        return true;
    case PLANE_NO_LEASE: {
        uint64_t has = plane_leased_blocks(plane, map_id_of(request->volume));
        return has >= why->block_count || grant(map_id_of(request->volume), why->block_count - has);
    }
    default:
        return false;
    }
}

static void require_excuse(enum plane_status status, const struct plane_refusal *why)
{
    if (status == PLANE_NO_LEASE || disk_has_failed())
        return;
    fibres_fail("the plane refuses with status %d: block %lu at %lx has %08x, not %08x", status,
                (unsigned long)why->virtual_block, (unsigned long)why->address, why->found, why->expected);
}

/* Committer.commit: it is for the next round, since the one under way may have sealed before. */
static void await_round(struct request *request)
{
    request->next = state.next_round;
    state.next_round = request;
    state.wants_commit = true;
}

static enum plane_status try(const struct request *request, struct plane_refusal *why)
{
    uint64_t map_id = map_id_of(request->volume), at = FIRST_BLOCK * BLOCK_BYTES + request->first_word * 8;
    if (request->kind == REQUEST_WRITE)
        return plane_write(plane, map_id, at, request->words, request->word_count * 8, true, false, why);
    return plane_read(plane, map_id, at / BLOCK_BYTES, request->word_count / BLOCK_WORDS, true,
                      !(request->volume == 1 && options.is_unverified), request->words, why);
}

/* Tries once; false when it must wait for another turn. */
static bool serve_request(struct request *request)
{
    struct plane_refusal why = {0};
    if (request->kind != REQUEST_READ && state.has_failed) {
        answer(request, EROFS);
        return true;
    }
    if (request->kind == REQUEST_SYNC) {
        await_round(request);
        return true;
    }
    enum plane_status status = try(request, &why);
    if (status != PLANE_OK && mend(request, status, &why))
        return false;
    if (status != PLANE_OK)
        require_excuse(status, &why);
    if (status == PLANE_WRITE_ERROR && why.host_errno != ENOSPC)
        fail_pool();
    if (status == PLANE_OK && request->kind == REQUEST_WRITE && plane_fresh_count(plane) >= SEAL_AT)
        absorb();
    answer(request, status == PLANE_OK ? 0 : EIO);
    return true;
}

static void enqueue(struct request *request)
{
    request->next = NULL;
    if (state.last)
        state.last->next = request;
    else
        state.first = request;
    state.last = request;
    fibres_notify();
}

static bool is_done(void *context)
{
    return ((struct request *)context)->is_done;
}

void control_ask(struct request *request)
{
    request->is_done = false;
    enqueue(request);
    fibres_wait(is_done, request, "the owner");
}

void control_leave(void)
{
    state.clients_left--;
    fibres_notify();
}

static void serve_first(void)
{
    struct request *request = state.first;
    state.first = request->next;
    if (!state.first)
        state.last = NULL;
    if (!serve_request(request))
        enqueue(request);
}

/* ---- The owner's loop ------------------------------------------------------------------------ */

static bool may_begin(void)
{
    bool is_due = state.wants_commit || state.pending_count >= COMMIT_AT_CHANGES;
    return !state.is_committing && !state.has_failed && (is_due || is_checkpoint_due());
}

static bool is_over(void)
{
    return !state.clients_left && state.step == options.step_count && !state.first && !state.is_committing &&
           !state.is_checkpointing;
}

static bool has_something_to_do(void *unused)
{
    (void)unused;
    return state.commit.job.is_done || state.checkpoint.job.is_done || disk_signals() || state.first || may_begin() ||
           state.step < options.step_count || is_over() || (state.has_failed && state.next_round);
}

static void do_something(void)
{
    unsigned chosen = fibres_random(6);
    for (unsigned i = 0; i < 6; i++)
        switch ((chosen + i) % 6) {
        case 0:
            if (state.commit.job.is_done)
                return end_commit();
            break;
        case 1:
            if (state.checkpoint.job.is_done)
                return end_checkpoint();
            break;
        case 2:
            if (disk_signals())
                return attend();
            break;
        case 3:
            if (state.first)
                return serve_first();
            break;
        case 4:
            if (state.has_failed && state.next_round) {
                answer_all(state.next_round, EROFS);
                state.next_round = NULL;
                return;
            }
            if (may_begin())
                return commit_or_checkpoint();
            break;
        default:
            if (state.step < options.step_count && !state.has_failed)
                return perform(&options.steps[state.step++]);
            state.step = state.has_failed ? options.step_count : state.step;
        }
}

void control_run(void *unused)
{
    (void)unused;
    while (!is_over()) {
        fibres_wait(has_something_to_do, NULL, "something to do");
        if (!is_over())
            do_something();
        fibres_yield("the owner looks around");
    }
    state.commit.job.is_over = state.checkpoint.job.is_over = true;
    fibres_notify();
}

void control_begin(const struct control_options *given, struct plane *given_plane, struct lane *given_lane)
{
    unsigned char sector[SECTOR_BYTES];
    options = *given;
    plane = given_plane;
    lane = given_lane;
    seal_count = taken_seals = 0;
    memset(&state, 0, sizeof state);
    state.clients_left = given->client_count;
    state.segment = state.stored.segment = 1;
    state.nonce = 77;
    state.end_bytes = SECTOR_BYTES;
    encode_segment(sector, state.segment, 1, state.nonce);
    write_fully(journal_fd(), sector, sizeof sector, 0);
    hooks_fdatasync(journal_fd());
    plane_attach(plane, 1, (const int[]){disk_fd(IMAGE)}, 1, 0);
    plane_watch(plane, SEAL_AT);
    serve_all();
    lend_journal();
}

/* ---- Judgement ------------------------------------------------------------------------------- */

void control_cut(bool with_unflushed)
{
    judge_cut(&state.stored, state.freed_by, with_unflushed);
}

static void see_lease(void *unused, uint64_t map_id, struct plane_run run)
{
    (void)unused, (void)map_id;
    for (uint64_t i = 0; i < run.count; i++)
        turn(run.address + i, LEASED, FREE);
}

static void see_dropped(void *unused, uint64_t address)
{
    (void)unused;
    fibres_fail("block %u was dropped, and nobody told", block_at(address));
}

static void see_page(void *unused, uint64_t map_id, uint64_t page_index, const uint64_t *addresses,
                     const uint32_t *checksums, const struct plane_appended *fresh, size_t fresh_count)
{
    (void)unused, (void)fresh;
    unsigned volume = (map_id >> 32) - 1;
    if (fresh_count)
        fibres_fail("mappings are fresh after the last seal");
    for (unsigned block = 0; block < BLOCKS; block++) {
        unsigned index = (FIRST_BLOCK + block) % PLANE_PAGE_BLOCKS;
        const struct plane_mapping *mapping = &state.tables.live[volume][block];
        if ((FIRST_BLOCK + block) / PLANE_PAGE_BLOCKS == page_index &&
            (addresses[index] != mapping->address || checksums[index] != mapping->checksum))
            fibres_fail("volume %u block %u: the page has %lx, the tables %lx", volume, block,
                        (unsigned long)addresses[index], (unsigned long)mapping->address);
    }
}

/* Each block has exactly one owner: nobody, a lease, a table or an increment, or the next checkpoint. */
static void judge_blocks(void)
{
    unsigned named[IMAGE_BLOCKS] = {0};
    for (unsigned volume = 0; volume < VOLUMES; volume++)
        for (unsigned block = 0; block < BLOCKS; block++) {
            if (state.tables.live[volume][block].address > PLANE_HOLE)
                named[block_at(state.tables.live[volume][block].address)]++;
            for (unsigned i = 0; i < SNAPSHOTS && state.tables.snapshots[volume][i].is_taken; i++)
                if (state.tables.snapshots[volume][i].has[block] &&
                    state.tables.snapshots[volume][i].increment[block].address > PLANE_HOLE)
                    named[block_at(state.tables.snapshots[volume][i].increment[block].address)]++;
        }
    for (unsigned block = 0; block < IMAGE_BLOCKS; block++)
        if (named[block] != (state.states[block] == LIVE) || state.states[block] == LEASED)
            fibres_fail("block %u is named %u times and is %s", block, named[block],
                        (const char *[]){"free", "leased by nobody", "live", "freed"}[state.states[block]]);
}

static void judge_facts(void)
{
    for (unsigned volume = 0; volume < VOLUMES; volume++) {
        struct plane_facts facts;
        uint64_t size_bytes;
        if (plane_serve_stat(plane, map_id_of(volume), &facts, &size_bytes) &&
            facts.mapped_blocks != mapped_blocks(volume))
            fibres_fail("volume %u has %lu blocks, stat says %lu", volume, (unsigned long)mapped_blocks(volume),
                        (unsigned long)facts.mapped_blocks);
    }
}

void control_judge(void)
{
    static struct picture picture;
    absorb();
    picture_live(&state.tables, disk_cache(IMAGE), &picture, "at the end");
    for (unsigned volume = 0; volume < VOLUMES; volume++)
        oracle_seen(volume, 0, WORDS, picture.words[volume], oracle_now(), oracle_now(), false);
    judge_snapshots(&state.tables, disk_cache(IMAGE), "a snapshot", true);
    oracle_judge();
    plane_inspect(plane, &(struct plane_visitor){NULL, see_page, see_lease, see_dropped});
    judge_facts();
    judge_blocks();
}
