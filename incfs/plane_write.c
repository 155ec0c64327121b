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
    bool is_zero, is_new;
};

struct write {
    struct plane *plane;
    struct spans spans;
    const char *data; /* whole blocks */
    size_t block_count, new_count;
    bool in_place;  /* some block is rewritten where it is */
    bool is_served; /* nobody asked the control plane */
    bool keep_zeros;
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

/* With the pages locked: decides for each block whether it needs a new place. */
static void place(struct write *write)
{
    struct placement *placement = write->placements;
    for (size_t s = 0; s < write->spans.count; s++) {
        const struct span *span = &write->spans.items[s];
        for (unsigned i = span->start; i < span->start + span->count; i++, placement++) {
            if (placement->is_zero)
                continue;
            placement->address = span->page->addresses[i];
            placement->is_new = placement->address <= PLANE_HOLE || !page_is_fresh(span->page, i);
            write->new_count += placement->is_new;
            write->in_place |= !placement->is_new;
        }
    }
}

/* What a write needs of the lease of one column. */
struct demand {
    struct table *lessee;
    size_t count;
    struct plane_run *runs; /* not handed out yet */
};

static uint64_t virtual_block_of(const struct write *write, size_t block)
{
    const struct span *span = &write->spans.items[0];
    return span->page->page_index * PLANE_PAGE_BLOCKS + span->start + block;
}

static size_t column_of(const struct write *write, const struct table *table, size_t block)
{
    return table->stripe_columns ? virtual_block_of(write, block) / table->stripe_unit % table->stripe_columns : 0;
}

static void count_demands(const struct write *write, struct table *table, struct demand *demands)
{
    for (size_t i = 0; i < write->block_count; i++)
        demands[column_of(write, table, i)].count += write->placements[i].is_new;
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
        if (!write->placements[i].is_new)
            continue;
        struct plane_run **run = &demands[column_of(write, table, i)].runs;
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

/* With the pages locked: the first `count` blocks are written, let them be seen. */
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

/* After a failed rewrite in place the blocks are a mix of old and new: take them as they are. */
static void reread_in_place(struct write *write, size_t from, size_t run)
{
    size_t size = write->plane->block_bytes, position = 0;
    char *block = malloc(size);
    for (size_t s = 0; block && s < write->spans.count; s++) {
        const struct span *span = &write->spans.items[s];
        for (unsigned i = span->start; i < span->start + span->count; i++, position++) {
            const struct placement *placement = &write->placements[position];
            struct plane_refusal unused;
            if (position >= from && position < from + run && !placement->is_zero && !placement->is_new &&
                read_extent(write->plane, placement->address, 1, true, block, &unused) == PLANE_OK)
                span->page->checksums[i] = crc32c(block, size);
        }
    }
    free(block);
}

static void give_up(struct write *write, size_t from)
{
    reread_in_place(write, from, contiguous(write, from));
    for (size_t i = from; i < write->block_count; i++)
        if (write->placements[i].is_new)
            plane_drop(write->plane, write->placements[i].address);
}

/* Pages locked at entry and at exit. */
static enum plane_status write_placed(struct write *write, struct plane_refusal *why)
{
    enum plane_status status = PLANE_OK;
    /* Only blocks that a reader can find need the lock while they are written. */
    if (!write->in_place)
        unlock_spans(&write->spans);
    size_t done = write_blocks(write, &status, why);
    if (!write->in_place)
        lock_spans(&write->spans);
    set_mappings(write, done);
    if (status != PLANE_OK)
        give_up(write, done);
    return status;
}

/* ---- Whole writes ------------------------------------------------------------------------------- */

/* A range of bytes, and the whole blocks that it makes once what lies around it is read. */
struct bytes {
    const char *data;
    size_t head, length, tail; /* tail: missing behind the range */
    char *whole;               /* NULL when nothing is missing */
};

/* With the pages locked: reads what the first and last block lack, around the range. */
static enum plane_status complete(struct write *write, const struct bytes *bytes, bool can_wait,
                                  struct plane_refusal *why)
{
    size_t size = write->plane->block_bytes, last = write->block_count - 1;
    const struct span *first_span = &write->spans.items[0];
    const struct span *last_span = &write->spans.items[write->spans.count - 1];
    enum plane_status status = PLANE_OK;
    if (bytes->head || (bytes->tail && !last))
        status = read_locked(write->plane, first_span->page, first_span->start, can_wait, true, bytes->whole, why);
    if (status == PLANE_OK && bytes->tail && last)
        status = read_locked(write->plane, last_span->page, last_span->start + last_span->count - 1, can_wait, true,
                             bytes->whole + last * size, why);
    if (status != PLANE_OK)
        return status;
    memcpy(bytes->whole + bytes->head, bytes->data, bytes->length);
    digest(write, 0);
    if (last)
        digest(write, last);
    return PLANE_OK;
}

/* Under the gate, pages locked. */
static enum plane_status write_locked(struct write *write, const struct bytes *bytes, bool can_wait,
                                      struct plane_refusal *why)
{
    enum plane_status status = PLANE_OK;
    if (bytes->whole) {
        status = complete(write, bytes, can_wait, why);
        if (status != PLANE_OK)
            return status;
    }
    place(write);
    if (!prepare_spans(&write->spans))
        return PLANE_NO_MEMORY;
    if (write->new_count && (status = take_blocks(write, why)) != PLANE_OK)
        return status;
    /* Merged bytes are right only as long as nobody changes the block: keep the lock. */
    write->in_place |= bytes->whole != NULL;
    return write_placed(write, why);
}

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

static enum plane_status write_whole(struct write *write, uint64_t map_id, uint64_t first_block,
                                     const struct bytes *bytes, bool can_wait, struct plane_refusal *why)
{
    uint64_t size = write->plane->block_bytes;
    for (size_t i = 0; i < write->block_count; i++)
        if (!bytes->whole || (i && i < write->block_count - 1))
            digest(write, i);
    pthread_rwlock_rdlock(&write->plane->gate);
    enum plane_status status = find_spans(write->plane, map_id, first_block, write->block_count, &write->spans, why);
    if (status == PLANE_OK && write->is_served && !may_serve(write, (first_block * size) + bytes->head + bytes->length))
        status = PLANE_NOT_SERVED;
    if (status == PLANE_OK) {
        follow_rules(write);
        lock_spans(&write->spans);
        status = write_locked(write, bytes, can_wait, why);
        unlock_spans(&write->spans);
    }
    pthread_rwlock_unlock(&write->plane->gate);
    free_spans(&write->spans);
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
            .data = bytes.whole ? bytes.whole : data,
            .block_count = block_count,
            .placements = placements,
            .is_served = is_served,
            .keep_zeros = keep_zeros,
        };
        status = write_whole(&write, map_id, offset_bytes / size, &bytes, can_wait, why);
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
