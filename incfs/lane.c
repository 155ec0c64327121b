/* The journal's fast lane.  See lane.h; the bytes are those of incfs/journal.py and incfs/changes.py. */
#define _GNU_SOURCE
#include "lane.h"

#include "crc32c.h"

#include <endian.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SECTOR_BYTES = 512, HEAD_BYTES = 32, CALL_AT_MAPPINGS = 1024 };

struct bytes {
    unsigned char *start;
    size_t length, room;
    bool is_short; /* of memory */
};

/* A record in the making. */
struct record {
    struct bytes bytes;  /* room for the head, then the body */
    struct bytes stored; /* of struct stored: the blocks that the body still lacks */
    uint64_t sequence;
    uint64_t folded;
    bool is_whole; /* with its data and head */
};

struct lane {
    struct plane *plane;
    struct lane_disk disk;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t ended; /* a commit */
    struct lane_journal journal;
    uint64_t durable_sequence;
    bool is_open, is_committing;
    int failed_errno;
    int left_errno[LANE_MOST_COPIES]; /* of copies that failed while another has everything */
    struct record unwritten;          /* the last one, if no copy had room for it: nothing of it was flushed */
    int no_room_errno;                /* why */
    struct hot_waiter *first_waiter, *last_waiter;
    struct lane_batch *first_batch, *last_batch;
    size_t queued_mappings;
};

static int flush(int fd)
{
    return fdatasync(fd) ? errno : 0;
}

struct lane *lane_new(struct plane *plane)
{
    struct lane *lane = calloc(1, sizeof *lane);
    if (!lane)
        return NULL;
    lane->plane = plane;
    lane->disk = (struct lane_disk){write_fully, flush};
    pthread_mutex_init(&lane->lock, NULL);
    pthread_cond_init(&lane->ended, NULL);
    return lane;
}

void lane_batch_free(struct lane_batch *batch)
{
    plane_batch_free(&batch->batch);
    free(batch);
}

static void record_free(struct record *record)
{
    free(record->bytes.start);
    free(record->stored.start);
    *record = (struct record){0};
}

void lane_free(struct lane *lane)
{
    record_free(&lane->unwritten);
    for (struct lane_batch *batch = lane->first_batch, *next; batch; batch = next) {
        next = batch->next;
        lane_batch_free(batch);
    }
    pthread_cond_destroy(&lane->ended);
    pthread_mutex_destroy(&lane->lock);
    free(lane);
}

void lane_divert(struct lane *lane, const struct lane_disk *disk)
{
    lane->disk = *disk;
}

static void write_again(struct lane *lane);

/* ---- For the control plane ------------------------------------------------------------------------------ */

static bool has_left(const struct lane *lane)
{
    for (size_t i = 0; i < LANE_MOST_COPIES; i++)
        if (lane->left_errno[i])
            return true;
    return false;
}

static bool may_open(const struct lane *lane)
{
    return !lane->failed_errno && !has_left(lane) && !lane->unwritten.sequence;
}

void lane_lend(struct lane *lane, const struct lane_journal *journal)
{
    pthread_mutex_lock(&lane->lock);
    lane->journal = *journal;
    lane->durable_sequence = journal->sequence;
    memset(lane->left_errno, 0, sizeof lane->left_errno);
    lane->is_open = may_open(lane);
    pthread_mutex_unlock(&lane->lock);
}

void lane_reopen(struct lane *lane)
{
    pthread_mutex_lock(&lane->lock);
    lane->is_open = may_open(lane);
    pthread_mutex_unlock(&lane->lock);
}

void lane_close(struct lane *lane)
{
    pthread_mutex_lock(&lane->lock);
    lane->is_open = false;
    pthread_mutex_unlock(&lane->lock);
}

static void wait_for_rest(struct lane *lane)
{
    lane->is_open = false;
    while (lane->is_committing)
        pthread_cond_wait(&lane->ended, &lane->lock);
}

void lane_stop(struct lane *lane)
{
    pthread_mutex_lock(&lane->lock);
    wait_for_rest(lane);
    pthread_mutex_unlock(&lane->lock);
}

int lane_settle(struct lane *lane)
{
    pthread_mutex_lock(&lane->lock);
    wait_for_rest(lane);
    if (lane->unwritten.sequence)
        write_again(lane);
    int error = lane->failed_errno;
    pthread_mutex_unlock(&lane->lock);
    return error;
}

int lane_no_room(struct lane *lane)
{
    pthread_mutex_lock(&lane->lock);
    int error = lane->no_room_errno;
    pthread_mutex_unlock(&lane->lock);
    return error;
}

int lane_reclaim(struct lane *lane, uint64_t *end_bytes)
{
    int error = lane_settle(lane);
    *end_bytes = lane_end_bytes(lane);
    return error;
}

int lane_left(struct lane *lane, size_t copy)
{
    pthread_mutex_lock(&lane->lock);
    int error = lane->left_errno[copy];
    pthread_mutex_unlock(&lane->lock);
    return error;
}

uint64_t lane_end_bytes(struct lane *lane)
{
    pthread_mutex_lock(&lane->lock);
    uint64_t end_bytes = lane->journal.end_bytes;
    pthread_mutex_unlock(&lane->lock);
    return end_bytes;
}

uint64_t lane_durable_sequence(struct lane *lane)
{
    pthread_mutex_lock(&lane->lock);
    uint64_t sequence = lane->durable_sequence;
    pthread_mutex_unlock(&lane->lock);
    return sequence;
}

void lane_set_folded(struct lane *lane, uint64_t folded)
{
    pthread_mutex_lock(&lane->lock);
    lane->journal.folded = folded;
    pthread_mutex_unlock(&lane->lock);
}

enum plane_status lane_take(struct lane *lane, struct lane_batch **committed, struct plane_batch *rest)
{
    enum plane_status status = PLANE_OK;
    pthread_mutex_lock(&lane->lock);
    if (rest) {
        lane->is_open = false;
        status = plane_seal(lane->plane, SIZE_MAX, rest);
    }
    *committed = NULL;
    if (status == PLANE_OK) {
        *committed = lane->first_batch;
        lane->first_batch = lane->last_batch = NULL;
        lane->queued_mappings = 0;
    }
    pthread_mutex_unlock(&lane->lock);
    return status;
}

/* ---- The bytes of a record -------------------------------------------------------------------------------- */

static void *extend(struct bytes *bytes, size_t length)
{
    if (bytes->length + length > bytes->room) {
        size_t room = 2 * (bytes->length + length);
        unsigned char *larger = realloc(bytes->start, room);
        if (!larger) {
            bytes->is_short = true;
            return NULL;
        }
        bytes->start = larger;
        bytes->room = room;
    }
    bytes->length += length;
    return bytes->start + bytes->length - length;
}

static void put(struct bytes *bytes, const void *data, size_t length)
{
    void *place = extend(bytes, length);
    if (place && length)
        memcpy(place, data, length);
}

/* A msgpack head of one byte and a big-endian number behind it. */
static void put_head(struct bytes *bytes, unsigned char kind, uint32_t number)
{
    uint32_t big = htobe32(number);
    put(bytes, &kind, 1);
    put(bytes, &big, sizeof big);
}

static void put_array(struct bytes *bytes, uint32_t count)
{
    put_head(bytes, 0xdd, count);
}

static void put_binary(struct bytes *bytes, const void *data, uint32_t length)
{
    put_head(bytes, 0xc6, length);
    put(bytes, data, length);
}

static void put_number(struct bytes *bytes, uint64_t number)
{
    unsigned char small = number;
    if (number < 128) {
        put(bytes, &small, 1);
        return;
    }
    unsigned char kind = 0xcf;
    uint64_t big = htobe64(number);
    put(bytes, &kind, 1);
    put(bytes, &big, sizeof big);
}

static void put_text(struct bytes *bytes, const char *text)
{
    unsigned char head = 0xa0 | strlen(text);
    put(bytes, &head, 1);
    put(bytes, text, strlen(text));
}

/* Four values of a "map" change for each run of a page, without their array's head; returns how many runs. */
static uint32_t put_runs(struct bytes *bytes, const struct plane_batch *batch, const struct plane_sealed_page *page)
{
    uint32_t runs = 0;
    uint32_t checksums[PLANE_PAGE_BLOCKS];
    size_t end = page->first + page->count;
    for (size_t i = page->first, count; i < end; i += count, runs++) {
        const struct plane_appended *first = &batch->appended[i];
        count = plane_run_length(batch->appended, i, end);
        for (size_t k = 0; k < count; k++)
            checksums[k] = htole32(first[k].checksum);
        put_number(bytes, page->page_index * PLANE_PAGE_BLOCKS + first->index);
        put_number(bytes, count);
        put_number(bytes, first->address);
        put_binary(bytes, checksums, first->address > PLANE_HOLE ? 4 * count : 0);
    }
    return runs;
}

static uint64_t volume_of(uint64_t map_id)
{
    return map_id >> 32;
}

/* One "map" change for each volume; returns how many. */
static uint32_t put_maps(struct bytes *bytes, const struct plane_batch *batch)
{
    uint32_t changes = 0;
    for (size_t i = 0; i < batch->page_count; changes++) {
        uint64_t map_id = batch->pages[i].map_id;
        put_array(bytes, 3);
        put_text(bytes, "map");
        put_number(bytes, volume_of(map_id));
        size_t head = bytes->length;
        put_array(bytes, 0);
        uint32_t runs = 0;
        for (; i < batch->page_count && batch->pages[i].map_id == map_id; i++)
            runs += put_runs(bytes, batch, &batch->pages[i]);
        uint32_t big = htobe32(4 * runs);
        if (!bytes->is_short)
            memcpy(bytes->start + head + 1, &big, sizeof big);
    }
    return changes;
}

static uint32_t put_times(struct bytes *bytes, const struct plane_batch *batch)
{
    for (size_t i = 0; i < batch->written_count; i++) {
        put_array(bytes, 3);
        put_text(bytes, "written");
        put_number(bytes, volume_of(batch->written[i].map_id));
        put_number(bytes, batch->written[i].written_ns);
    }
    return batch->written_count;
}

/* A block that a record carries. */
struct stored {
    uint64_t address;
    uint32_t checksum;
};

static void put_stored(struct bytes *stored, const struct plane_batch *batch)
{
    for (size_t p = 0; p < batch->page_count; p++)
        for (size_t i = batch->pages[p].first; i < batch->pages[p].first + batch->pages[p].count; i++)
            if (batch->appended[i].address > PLANE_HOLE)
                put(stored, &(struct stored){batch->appended[i].address, batch->appended[i].checksum},
                    sizeof(struct stored));
}

/* Everything but the data: touches no disk. */
static void put_changes(struct record *record, const struct plane_batch *batch)
{
    struct bytes *bytes = &record->bytes;
    extend(bytes, HEAD_BYTES);
    put_array(bytes, 3);
    size_t head = bytes->length;
    put_array(bytes, 0);
    uint32_t count = put_maps(bytes, batch);
    uint32_t big = htobe32(count + put_times(bytes, batch));
    if (!bytes->is_short)
        memcpy(bytes->start + head + 1, &big, sizeof big);
    put_stored(&record->stored, batch);
}

/* Reads the blocks back and ends the body.  Returns an errno. */
static int put_data(struct record *record, struct plane *plane, uint32_t block_bytes)
{
    struct bytes *bytes = &record->bytes;
    const struct stored *stored = (const void *)record->stored.start;
    size_t count = record->stored.length / sizeof *stored;
    put_head(bytes, 0xc6, count * block_bytes);
    for (size_t i = 0; i < count && !bytes->is_short; i++) {
        char *block = extend(bytes, block_bytes);
        int error = block ? plane_read_stored(plane, stored[i].address, stored[i].checksum, block) : ENOMEM;
        if (error)
            return error;
    }
    put_number(bytes, record->folded);
    return bytes->is_short || record->stored.is_short ? ENOMEM : 0;
}

/* Magic, length, sequence, nonce, checksum of the body; checksum of these. */
static void make_head(unsigned char *head, const char *magic, uint32_t length, uint64_t sequence, uint64_t nonce,
                      uint32_t body_checksum)
{
    length = htole32(length);
    sequence = htole64(sequence);
    nonce = htole64(nonce);
    body_checksum = htole32(body_checksum);
    memcpy(head, magic, 4);
    memcpy(head + 4, &length, 4);
    memcpy(head + 8, &sequence, 8);
    memcpy(head + 16, &nonce, 8);
    memcpy(head + 24, &body_checksum, 4);
    uint32_t checksum = htole32(crc32c(head, HEAD_BYTES - 4));
    memcpy(head + HEAD_BYTES - 4, &checksum, 4);
}

/* A flush of one copy, in a thread of its own where there is one. */
struct flush {
    const struct lane_disk *disk;
    int fd;
    int error;
    bool has_thread;
    pthread_t thread;
};

static void *run_flush(void *arg)
{
    struct flush *flush = arg;
    if (!flush->error)
        flush->error = flush->disk->flush(flush->fd);
    return NULL;
}

static bool is_no_room(int error)
{
    return error == ENOSPC || error == EDQUOT;
}

static bool has_sound(const struct lane_journal *journal, const int *errors)
{
    for (size_t i = 0; i < journal->copies; i++)
        if (!errors[i])
            return true;
    return false;
}

/* Writes the bytes to every copy, then flushes all of them, side by side: as long as the slowest takes.  Each copy's
 * errno goes into errors.  Returns 0 when one has them durable, else the first errno: a negative one when none had
 * room for them, and nothing was flushed. */
static int write_copies(const struct lane_disk *disk, const struct lane_journal *journal, const struct bytes *bytes,
                        uint64_t offset, int *errors)
{
    struct flush flushes[LANE_MOST_COPIES];
    size_t full = 0;
    for (size_t i = 0; i < journal->copies; i++) {
        int error = disk->write(journal->fds[i], bytes->start, bytes->length, offset);
        flushes[i] = (struct flush){.disk = disk, .fd = journal->fds[i], .error = error};
        full += is_no_room(error);
    }
    if (full == journal->copies)
        return -flushes[0].error;
    for (size_t i = 1; i < journal->copies; i++)
        flushes[i].has_thread = !flushes[i].error && !pthread_create(&flushes[i].thread, NULL, run_flush, &flushes[i]);
    for (size_t i = 0; i < journal->copies; i++)
        if (!flushes[i].has_thread)
            run_flush(&flushes[i]);
    for (size_t i = 0; i < journal->copies; i++) {
        if (flushes[i].has_thread)
            pthread_join(flushes[i].thread, NULL);
        errors[i] = flushes[i].error;
    }
    return has_sound(journal, errors) ? 0 : errors[0];
}

/* Reads the data back and makes the head, once.  Returns an errno. */
static int make_whole(struct record *record, struct plane *plane, const struct lane_journal *journal)
{
    struct bytes *bytes = &record->bytes;
    int error = record->is_whole ? 0 : put_data(record, plane, journal->block_bytes);
    if (error || record->is_whole)
        return error;
    size_t body = bytes->length - HEAD_BYTES, padding = -bytes->length % SECTOR_BYTES;
    void *rest = extend(bytes, padding);
    if (!rest)
        return ENOMEM;
    memset(rest, 0, padding);
    make_head(bytes->start, "JREC", body, record->sequence, journal->nonce, crc32c(bytes->start + HEAD_BYTES, body));
    record->is_whole = true;
    return 0;
}

/* Writes the record and flushes it; *end_bytes moves behind it.  Returns, as write_copies does, an errno when no copy
 * has it; else errors has those of the copies that lack it. */
static int write_record(const struct lane_disk *disk, const struct lane_journal *journal, const struct record *record,
                        uint64_t *end_bytes, int *errors)
{
    int error = write_copies(disk, journal, &record->bytes, *end_bytes, errors);
    if (error)
        return error;
    *end_bytes += record->bytes.length;
    /* Nobody waits for it: see encode_ack in journal.py.  Without room for it the record is durable all the same. */
    unsigned char ack[SECTOR_BYTES] = {0};
    make_head(ack, "JACK", 0, record->sequence, journal->nonce, 0);
    for (size_t i = 0; i < journal->copies; i++) {
        error = errors[i] ? 0 : disk->write(journal->fds[i], ack, sizeof ack, *end_bytes);
        if (error && !is_no_room(error))
            errors[i] = error;
    }
    return has_sound(journal, errors) ? 0 : errors[0];
}

/* ---- Commits ------------------------------------------------------------------------------------------------ */

static void answer(struct hot_waiter *waiters, int error, bool is_refused, const struct hot_answers *answers)
{
    for (struct hot_waiter *waiter = waiters, *next; waiter; waiter = next) {
        next = waiter->next;
        if (is_refused)
            answers->refused(waiter);
        else
            answers->done(waiter, error);
    }
}

static struct hot_waiter *take_waiters(struct lane *lane)
{
    struct hot_waiter *waiters = lane->first_waiter;
    lane->first_waiter = lane->last_waiter = NULL;
    return waiters;
}

/* The times of files that were only touched: no page of theirs is in the batch. */
static bool add_times(struct plane *plane, const struct hot_waiter *waiters, struct plane_batch *batch)
{
    size_t count = 0;
    for (const struct hot_waiter *waiter = waiters; waiter; waiter = waiter->next)
        count++;
    struct plane_written *larger = realloc(batch->written, (batch->written_count + count + 1) * sizeof *larger);
    if (!larger)
        return false;
    batch->written = larger;
    for (const struct hot_waiter *waiter = waiters; waiter; waiter = waiter->next) {
        uint64_t written_ns = plane_take_written(plane, waiter->inode);
        if (written_ns)
            larger[batch->written_count++] = (struct plane_written){waiter->inode, written_ns};
    }
    return true;
}

static void note_gains(struct plane *plane, struct hot_waiter *waiters)
{
    for (struct hot_waiter *waiter = waiters; waiter; waiter = waiter->next)
        waiter->gained_blocks = plane_mapped_delta(plane, waiter->inode) != 0;
}

static void enqueue(struct lane *lane, struct lane_batch *batch)
{
    batch->next = NULL;
    if (lane->last_batch)
        lane->last_batch->next = batch;
    else
        lane->first_batch = batch;
    lane->last_batch = batch;
    for (size_t i = 0; i < batch->batch.page_count; i++)
        lane->queued_mappings += batch->batch.pages[i].count;
}

/* Under the lock: seals what the waiters wait for, queues it and begins its record, if there is anything to
 * commit.  False when the control plane must act. */
static bool begin(struct lane *lane, struct hot_waiter *waiters, struct record *record)
{
    struct lane_batch *batch = lane->journal.end_bytes < lane->journal.limit_bytes ? malloc(sizeof *batch) : NULL;
    if (!batch)
        return false;
    note_gains(lane->plane, waiters);
    if (plane_seal(lane->plane, lane->journal.most_blocks, &batch->batch) != PLANE_OK) {
        free(batch);
        return false;
    }
    /* Out of memory here the times are told later, like those of writes that nobody waits for. */
    add_times(lane->plane, waiters, &batch->batch);
    if (batch->batch.page_count || batch->batch.written_count) {
        record->sequence = ++lane->journal.sequence;
        record->folded = lane->journal.folded;
        put_changes(record, &batch->batch);
    }
    batch->sequence = lane->journal.sequence;
    enqueue(lane, batch);
    return true;
}

static int finish(struct lane *lane, const struct lane_journal *journal, struct record *record, uint64_t *end_bytes,
                  int *errors)
{
    int error = make_whole(record, lane->plane, journal);
    return error ? error : write_record(&lane->disk, journal, record, end_bytes, errors);
}

/* Under the lock, which it lets go of while the disk is waited for: writes a record, or keeps it when no copy has room
 * for it.  Returns an errno if it failed. */
static int store_record(struct lane *lane, struct record *record)
{
    const struct lane_journal journal = lane->journal;
    uint64_t end_bytes = journal.end_bytes;
    int errors[LANE_MOST_COPIES] = {0};
    pthread_mutex_unlock(&lane->lock);
    int error = finish(lane, &journal, record, &end_bytes, errors);
    if (error > 0)
        plane_fail(lane->plane, error, 0);
    pthread_mutex_lock(&lane->lock);
    lane->journal.end_bytes = end_bytes;
    lane->no_room_errno = error < 0 ? -error : 0;
    if (error < 0) {
        lane->unwritten = *record;
        lane->is_open = false;
        return 0;
    }
    if (!error)
        memcpy(lane->left_errno, errors, sizeof errors);
    record_free(record);
    if (error) {
        lane->failed_errno = error;
        lane->is_open = false;
    } else if (has_left(lane)) {
        lane->is_open = false;
    } else {
        lane->durable_sequence = lane->journal.sequence;
    }
    return error;
}

/* Under the lock, while nobody commits. */
static void write_again(struct lane *lane)
{
    struct record record = lane->unwritten;
    lane->unwritten = (struct record){0};
    lane->is_committing = true;
    store_record(lane, &record);
    lane->is_committing = false;
    pthread_cond_broadcast(&lane->ended);
}

/* Under the lock.  False when the control plane must act, or must tell who was left behind before anybody hears that
 * the record is durable. */
static bool commit(struct lane *lane, struct hot_waiter *waiters, int *error)
{
    struct record record = {0};
    *error = 0;
    if (!lane->is_open || !begin(lane, waiters, &record))
        return false;
    if (record.sequence)
        *error = store_record(lane, &record);
    else
        lane->durable_sequence = lane->journal.sequence;
    if (lane->queued_mappings >= CALL_AT_MAPPINGS || lane->journal.end_bytes >= lane->journal.limit_bytes)
        plane_call(lane->plane);
    return !has_left(lane) && !lane->unwritten.sequence;
}

bool lane_sync(struct lane *lane, struct hot_waiter *waiter, bool can_wait, const struct hot_answers *answers)
{
    pthread_mutex_lock(&lane->lock);
    bool is_taken = lane->is_open && (can_wait || lane->is_committing);
    bool leads = is_taken && !lane->is_committing;
    if (is_taken) {
        waiter->next = NULL;
        if (lane->last_waiter)
            lane->last_waiter->next = waiter;
        else
            lane->first_waiter = waiter;
        lane->last_waiter = waiter;
    }
    lane->is_committing |= leads;
    while (leads && lane->first_waiter) {
        int error;
        struct hot_waiter *waiters = take_waiters(lane);
        bool is_done = commit(lane, waiters, &error);
        pthread_mutex_unlock(&lane->lock);
        answer(waiters, error, !is_done, answers);
        pthread_mutex_lock(&lane->lock);
    }
    if (leads) {
        lane->is_committing = false;
        pthread_cond_broadcast(&lane->ended);
    }
    pthread_mutex_unlock(&lane->lock);
    return is_taken;
}
