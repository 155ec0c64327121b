/* Writing through the native data plane.  See plane.h for the locks. */
#include "crc32c.h"
#include "plane_internal.h"

#include <stdlib.h>
#include <string.h>

/* What most requests need; larger ones ask for memory. */
enum { INLINE_BLOCKS = 64 };

/* With more unsealed mappings than this, writes go through the control plane until it has caught up. */
enum { MOST_UNSEALED = 16384 };

/* ---- Where blocks go ---------------------------------------------------------------------------- */

/* Where one block of a write goes. */
struct placement {
    uint64_t address;
    uint32_t checksum;
    bool is_zero;
};

/* A range of bytes, and the whole blocks that it makes once what lies around it is read. */
struct bytes {
    const char *data;
    size_t head, length, tail; /* tail: missing behind the range */
    char *whole;               /* NULL when nothing is missing */
};

struct write {
    struct plane *plane;
    uint64_t map_id, first_block;
    struct bytes bytes;
    struct spans spans; /* under the gate only: a page may be evicted between */
    const char *data;   /* whole blocks */
    size_t block_count, new_count;
    bool is_served; /* nobody asked the control plane */
    bool keep_zeros;
    struct plane_mapping first_base, last_base; /* what was read of blocks that are written in part */
    uint64_t placing;                           /* the plane's when the blocks were taken */
    struct placement *placements;
};

static bool is_zero(const char *data, size_t length)
{
    /* Compares the block with itself, one byte on: equal when all bytes equal the first. */
    return !data[0] && !memcmp(data, data + 1, length - 1);
}

static void digest(struct write *write, size_t block)
{
    size_t size = write->plane->block_bytes;
    const char *data = write->data + block * size;
    write->placements[block].is_zero = !write->keep_zeros && is_zero(data, size);
    write->placements[block].checksum = write->placements[block].is_zero ? 0 : crc32c(data, size);
}

/* What a write needs of the lease of one column. */
struct demand {
    struct table *lessee;
    size_t count;
    struct plane_run *runs; /* not handed out yet */
};

static void count_demands(const struct write *write, struct table *table, struct demand *demands)
{
    for (size_t i = 0; i < write->block_count; i++)
        demands[column_of(table, write->first_block + i)].count += !write->placements[i].is_zero;
    for (size_t column = 0; !column || column < table->stripe_columns; column++)
        if (demands[column].count)
            demands[column].lessee = plane_column(write->plane, table, column);
}

/* Takes what each column needs, or nothing; gives the first column that has not enough, or `columns`. */
static size_t take_all(struct demand *demands, size_t columns, struct plane_run *runs)
{
    size_t locked = 0, missing = columns;
    for (; locked < columns && missing == columns; locked++) {
        struct demand *demand = &demands[locked];
        if (demand->count && !demand->lessee)
            missing = locked;
        else if (demand->count && !pthread_mutex_lock(&demand->lessee->lease_lock) &&
                 demand->lessee->lease_blocks < demand->count)
            missing = locked;
    }
    for (size_t column = 0; column < locked; column++) {
        struct demand *demand = &demands[column];
        if (!demand->count || !demand->lessee)
            continue;
        if (missing == columns) {
            demand->runs = runs;
            table_take(demand->lessee, demand->count, runs);
            runs += demand->count;
        }
        pthread_mutex_unlock(&demand->lessee->lease_lock);
    }
    return missing;
}

/* Gives each new block its address, if the leases have enough. */
static enum plane_status take_blocks(struct write *write, struct plane_refusal *why)
{
    struct table *table = write->spans.items[0].page->table;
    struct plane_run small[INLINE_BLOCKS];
    struct plane_run *runs = write->new_count <= INLINE_BLOCKS ? small : malloc(write->new_count * sizeof *runs);
    if (!runs)
        return PLANE_NO_MEMORY;
    size_t columns = table->stripe_columns ? table->stripe_columns : 1;
    struct demand demands[PLANE_MAX_COLUMNS];
    memset(demands, 0, columns * sizeof *demands);
    count_demands(write, table, demands);
    why->column = take_all(demands, columns, runs);
    bool taken = why->column == columns;
    if (!taken)
        why->block_count = demands[why->column].count;
    for (size_t i = 0; taken && i < write->block_count; i++) {
        if (write->placements[i].is_zero)
            continue;
        struct plane_run **run = &demands[column_of(table, write->first_block + i)].runs;
        if (!(*run)->count)
            ++*run;
        write->placements[i].address = (*run)->address++;
        (*run)->count--;
    }
    if (runs != small)
        free(runs);
    return taken ? PLANE_OK : PLANE_NO_LEASE;
}

/* ---- Data, then mappings ------------------------------------------------------------------------ */

/* Blocks from `first` on that one call writes, or that are all zeros. */
static size_t contiguous(const struct write *write, size_t first)
{
    const struct placement *placements = write->placements;
    size_t end = first + 1;
    for (; end < write->block_count && placements[end].is_zero == placements[first].is_zero; end++)
        if (!placements[first].is_zero && placements[end].address != placements[first].address + (end - first))
            break;
    return end - first;
}

/* Writes as far as it goes; returns how many blocks are written. */
static size_t write_blocks(struct write *write, enum plane_status *status, struct plane_refusal *why)
{
    size_t done = 0;
    while (done < write->block_count) {
        size_t run = contiguous(write, done);
        const struct placement *first = &write->placements[done];
        if (!first->is_zero) {
            const char *data = write->data + done * write->plane->block_bytes;
            *status = write_extent(write->plane, first->address, run, data, why);
            if (*status != PLANE_OK)
                break;
        }
        done += run;
    }
    return done;
}

/* With the pages locked and prepared: the first `count` blocks are written, let them be seen. */
static void set_mappings(struct write *write, size_t count)
{
    const struct placement *placement = write->placements;
    for (size_t s = 0; s < write->spans.count; s++) {
        const struct span *span = &write->spans.items[s];
        for (unsigned i = span->start; i < span->start + span->count && count; i++, placement++, count--)
            page_set(write->plane, span->page, i, placement->is_zero ? span->page->hole : placement->address,
                     placement->is_zero ? 0 : placement->checksum);
    }
}

/* Under the gate: gives the blocks from `from` on up, which nobody will see. */
static void give_up(struct write *write, size_t from, bool may_reuse)
{
    struct table *table = may_reuse ? plane_find_table(write->plane, write->map_id) : NULL;
    for (size_t i = from; i < write->block_count; i++) {
        if (write->placements[i].is_zero)
            continue;
        if (table)
            plane_give_back(write->plane, table, write->first_block + i, write->placements[i].address);
        else
            plane_drop(write->plane, write->placements[i].address);
    }
}

/* ---- Parts of blocks ----------------------------------------------------------------------------- */

/* Under no lock: reads what the first and last block lack, around the range. */
static enum plane_status complete(struct write *write, bool can_wait, struct plane_refusal *why)
{
    const struct bytes *bytes = &write->bytes;
    size_t size = write->plane->block_bytes, last = write->block_count - 1;
    enum plane_status status = PLANE_OK;
    if (bytes->head || (bytes->tail && !last))
        status = read_block(write->plane, write->map_id, write->first_block, can_wait, true, bytes->whole,
                            &write->first_base, why);
    if (status == PLANE_OK && bytes->tail && last)
        status = read_block(write->plane, write->map_id, write->first_block + last, can_wait, true,
                            bytes->whole + last * size, &write->last_base, why);
    if (status != PLANE_OK)
        return status;
    memcpy(bytes->whole + bytes->head, bytes->data, bytes->length);
    digest(write, 0);
    if (last)
        digest(write, last);
    return PLANE_OK;
}

static bool maps(const struct span *span, unsigned index, const struct plane_mapping *mapping)
{
    return span->page->addresses[index] == mapping->address && span->page->checksums[index] == mapping->checksum;
}

/* With the pages locked: whether the blocks that are written in part are still what was read of them. */
static bool is_complete(const struct write *write)
{
    const struct bytes *bytes = &write->bytes;
    const struct span *first = &write->spans.items[0], *last = &write->spans.items[write->spans.count - 1];
    bool has_first = bytes->head || (bytes->tail && write->block_count == 1);
    bool has_last = bytes->tail && write->block_count > 1;
    return (!has_first || maps(first, first->start, &write->first_base)) &&
           (!has_last || maps(last, last->start + last->count - 1, &write->last_base));
}

/* ---- Whole writes ------------------------------------------------------------------------------- */

/* Under the gate: whether a served write that ends there is within what the control plane allows. */
static bool may_serve(const struct write *write, uint64_t end_bytes)
{
    const struct table *table = write->spans.items[0].page->table;
    return table->is_served && table->is_writable && end_bytes <= table->size_bytes &&
           !atomic_load_explicit(&write->plane->is_frozen, memory_order_relaxed) &&
           plane_fresh_count(write->plane) < MOST_UNSEALED;
}

/* Under the gate: a served write keeps zeros if its table does.  Those that were found are data after all. */
static void follow_rules(struct write *write)
{
    if (!write->is_served || !write->spans.items[0].page->table->rules.keeps_zeros)
        return;
    write->keep_zeros = true;
    for (size_t i = 0; i < write->block_count; i++)
        if (write->placements[i].is_zero)
            digest(write, i);
}

/* Under the gate: finds the pages, and whether the write may be done as things are. */
static enum plane_status enter(struct write *write, struct plane_refusal *why)
{
    uint64_t end_bytes = write->first_block * write->plane->block_bytes + write->bytes.head + write->bytes.length;
    enum plane_status status =
        find_spans(write->plane, write->map_id, write->first_block, write->block_count, &write->spans, why);
    return status == PLANE_OK && write->is_served && !may_serve(write, end_bytes) ? PLANE_NOT_SERVED : status;
}

/* Looks whether the write may be done, before anything is read for it. */
static enum plane_status begin(struct write *write, struct plane_refusal *why)
{
    pthread_rwlock_rdlock(&write->plane->gate);
    enum plane_status status = enter(write, why);
    free_spans(&write->spans);
    pthread_rwlock_unlock(&write->plane->gate);
    return status;
}

/* Takes blocks that no mapping names. */
static enum plane_status place(struct write *write, struct plane_refusal *why)
{
    pthread_rwlock_rdlock(&write->plane->gate);
    enum plane_status status = enter(write, why);
    if (status == PLANE_OK) {
        follow_rules(write);
        write->placing = write->plane->placing;
        write->new_count = 0;
        for (size_t i = 0; i < write->block_count; i++)
            write->new_count += !write->placements[i].is_zero;
    }
    if (status == PLANE_OK && write->new_count)
        status = take_blocks(write, why);
    free_spans(&write->spans);
    pthread_rwlock_unlock(&write->plane->gate);
    return status;
}

/* Lets the first `done` blocks, which are written, be seen, all at once, if what was looked at before still holds.
 * Else nothing is, and PLANE_OK with *again says that it may be tried anew. */
static enum plane_status publish(struct write *write, size_t done, bool *again, struct plane_refusal *why)
{
    pthread_rwlock_rdlock(&write->plane->gate);
    bool is_placed = write->placing == write->plane->placing;
    enum plane_status status = enter(write, why);
    *again = status == PLANE_OK && !is_placed;
    if (status == PLANE_OK && is_placed) {
        lock_spans(&write->spans);
        *again = !is_complete(write);
        if (!*again && !prepare_spans(&write->spans))
            status = PLANE_NO_MEMORY;
        if (status == PLANE_OK && !*again)
            set_mappings(write, done);
        unlock_spans(&write->spans);
    }
    bool is_seen = status == PLANE_OK && !*again;
    /* Blocks that the host refused are not taken again at once. */
    give_up(write, is_seen ? done : 0, is_placed && done == write->block_count);
    free_spans(&write->spans);
    pthread_rwlock_unlock(&write->plane->gate);
    return status;
}

static enum plane_status write_once(struct write *write, bool can_wait, bool *again, struct plane_refusal *why)
{
    enum plane_status status = write->bytes.whole ? complete(write, can_wait, why) : PLANE_OK;
    if (status == PLANE_OK)
        status = place(write, why);
    if (status != PLANE_OK)
        return status;
    enum plane_status written = PLANE_OK;
    size_t done = write_blocks(write, &written, why);
    struct plane_refusal refusal = *why;
    status = publish(write, done, again, &refusal);
    if (written != PLANE_OK) {
        *again = false;
        return written;
    }
    *why = refusal;
    return status;
}

static enum plane_status write_whole(struct write *write, bool can_wait, struct plane_refusal *why)
{
    for (size_t i = 0; i < write->block_count; i++)
        if (!write->bytes.whole || (i && i < write->block_count - 1))
            digest(write, i);
    enum plane_status status = write->bytes.whole ? begin(write, why) : PLANE_OK;
    /* Whenever it is tried again somebody else has got further: another write of the block, or the control plane. */
    for (bool again = true; again && status == PLANE_OK;) {
        again = false;
        status = write_once(write, can_wait, &again, why);
    }
    return status;
}

enum plane_status write_bytes(struct plane *plane, uint64_t map_id, uint64_t offset_bytes, const void *data,
                              size_t length_bytes, bool is_served, bool can_wait, bool keep_zeros,
                              struct plane_refusal *why)
{
    size_t size = plane->block_bytes;
    struct bytes bytes = {.data = data, .head = offset_bytes % size, .length = length_bytes};
    size_t block_count = (bytes.head + length_bytes + size - 1) / size;
    bytes.tail = block_count * size - bytes.head - length_bytes;
    if (!block_count)
        return PLANE_OK;
    struct placement small[INLINE_BLOCKS];
    struct placement *placements = block_count <= INLINE_BLOCKS ? small : malloc(block_count * sizeof *placements);
    if ((bytes.head || bytes.tail) && (bytes.whole = malloc(block_count * size)))
        memcpy(bytes.whole + bytes.head, data, length_bytes);
    enum plane_status status = PLANE_NO_MEMORY;
    if (placements && (bytes.whole || !(bytes.head || bytes.tail))) {
        memset(placements, 0, block_count * sizeof *placements);
        struct write write = {
            .plane = plane,
            .map_id = map_id,
            .first_block = offset_bytes / size,
            .bytes = bytes,
            .data = bytes.whole ? bytes.whole : data,
            .block_count = block_count,
            .placements = placements,
            .is_served = is_served,
            .keep_zeros = keep_zeros,
        };
        status = write_whole(&write, can_wait, why);
    }
    free(bytes.whole);
    if (placements != small)
        free(placements);
    return status;
}

enum plane_status plane_write(struct plane *plane, uint64_t map_id, uint64_t offset_bytes, const void *data,
                              size_t length_bytes, bool can_wait, bool keep_zeros, struct plane_refusal *why)
{
    why->host_errno = plane_failure(plane, &why->address);
    /* Nobody has been told yet of the served write that failed, and none is tried again after it (I10). */
    if (why->host_errno)
        return PLANE_WRITE_ERROR;
    return write_bytes(plane, map_id, offset_bytes, data, length_bytes, false, can_wait, keep_zeros, why);
}
