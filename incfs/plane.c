/* The structure of the native data plane: pages, tables, leases, seal.  See plane.h. */
#define _GNU_SOURCE
#include "plane_internal.h"

#include "crc32c.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { FIRST_BUCKETS = 64 };

/* ---- The plane ------------------------------------------------------------------------------------ */

struct plane *plane_new(uint32_t block_bytes)
{
    crc32c_init();
    struct plane *plane = calloc(1, sizeof *plane);
    if (!plane)
        return NULL;
    plane->block_bytes = block_bytes;
    plane->page_bucket_count = plane->table_bucket_count = FIRST_BUCKETS;
    plane->page_buckets = calloc(FIRST_BUCKETS, sizeof *plane->page_buckets);
    plane->table_buckets = calloc(FIRST_BUCKETS, sizeof *plane->table_buckets);
    /* The default prefers readers: under load a seal would wait for ever. */
    pthread_rwlockattr_t attributes;
    pthread_rwlockattr_init(&attributes);
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&plane->gate, &attributes);
    pthread_rwlockattr_destroy(&attributes);
    pthread_mutex_init(&plane->list_lock, NULL);
    plane->attention_fd = -1;
    if (!plane->page_buckets || !plane->table_buckets) {
        plane_free(plane);
        return NULL;
    }
    return plane;
}

static void page_free(struct page *page)
{
    pthread_mutex_destroy(&page->lock);
    free(page->replaced);
    free(page);
}

static void table_free(struct table *table)
{
    pthread_mutex_destroy(&table->lease_lock);
    free(table->lease);
    free(table);
}

void plane_free(struct plane *plane)
{
    for (struct page *page = plane->oldest, *next; page; page = next) {
        next = page->next;
        page_free(page);
    }
    for (size_t i = 0; plane->table_buckets && i < plane->table_bucket_count; i++)
        for (struct table *table = plane->table_buckets[i], *next; table; table = next) {
            next = table->next_in_bucket;
            table_free(table);
        }
    for (size_t id = 0; id <= MAX_STORAGE_ID; id++)
        for (struct file *file = plane->files[id], *superseded; file; file = superseded) {
            superseded = file->superseded;
            free(file);
        }
    if (plane->attention_fd >= 0)
        close(plane->attention_fd);
    pthread_rwlock_destroy(&plane->gate);
    pthread_mutex_destroy(&plane->list_lock);
    free(plane->page_buckets);
    free(plane->table_buckets);
    free(plane->dropped);
    free(plane);
}

enum plane_status plane_attach(struct plane *plane, uint16_t storage_id, const int *fds, unsigned fd_count,
                               uint64_t data_offset)
{
    struct file *file = malloc(sizeof *file);
    if (!file)
        return PLANE_NO_MEMORY;
    memcpy(file->fds, fds, fd_count * sizeof *fds);
    file->fd_count = fd_count;
    file->data_offset = data_offset;
    atomic_init(&file->can_nowait, true);
    pthread_rwlock_wrlock(&plane->gate);
    file->superseded = atomic_load(&plane->files[storage_id]);
    atomic_store(&plane->files[storage_id], file);
    pthread_rwlock_unlock(&plane->gate);
    return PLANE_OK;
}

bool plane_is_attached(struct plane *plane, uint64_t address)
{
    return atomic_load(&plane->files[address >> ADDRESS_BLOCK_BITS]) != NULL;
}

/* ---- Hash tables, under the gate -------------------------------------------------------------------- */

static size_t scramble(uint64_t map_id, uint64_t page_index)
{
    uint64_t mixed = (map_id * 0x9E3779B97F4A7C15u ^ page_index) * 0xD6E8FEB86659FD93u;
    return mixed ^ mixed >> 32;
}

struct page *plane_find_page(struct plane *plane, uint64_t map_id, uint64_t page_index)
{
    struct page *page = plane->page_buckets[scramble(map_id, page_index) & (plane->page_bucket_count - 1)];
    while (page && (page->page_index != page_index || page->table->map_id != map_id))
        page = page->next_in_bucket;
    return page;
}

struct table *plane_find_table(struct plane *plane, uint64_t map_id)
{
    struct table *table = plane->table_buckets[scramble(map_id, 0) & (plane->table_bucket_count - 1)];
    while (table && table->map_id != map_id)
        table = table->next_in_bucket;
    return table;
}

/* When it is out of memory the chains only get longer. */
static void grow_page_buckets(struct plane *plane)
{
    size_t count = plane->page_bucket_count * 2;
    struct page **buckets = calloc(count, sizeof *buckets);
    if (!buckets)
        return;
    for (struct page *page = plane->oldest; page; page = page->next) {
        struct page **bucket = &buckets[scramble(page->table->map_id, page->page_index) & (count - 1)];
        page->next_in_bucket = *bucket;
        *bucket = page;
    }
    free(plane->page_buckets);
    plane->page_buckets = buckets;
    plane->page_bucket_count = count;
}

static void grow_table_buckets(struct plane *plane)
{
    size_t count = plane->table_bucket_count * 2;
    struct table **buckets = calloc(count, sizeof *buckets);
    if (!buckets)
        return;
    for (size_t i = 0; i < plane->table_bucket_count; i++)
        for (struct table *table = plane->table_buckets[i], *next; table; table = next) {
            next = table->next_in_bucket;
            struct table **bucket = &buckets[scramble(table->map_id, 0) & (count - 1)];
            table->next_in_bucket = *bucket;
            *bucket = table;
        }
    free(plane->table_buckets);
    plane->table_buckets = buckets;
    plane->table_bucket_count = count;
}

static struct table *need_table(struct plane *plane, uint64_t map_id)
{
    struct table *table = plane_find_table(plane, map_id);
    if (table)
        return table;
    table = calloc(1, sizeof *table);
    if (!table)
        return NULL;
    table->map_id = map_id;
    pthread_mutex_init(&table->lease_lock, NULL);
    if (plane->table_count >= plane->table_bucket_count)
        grow_table_buckets(plane);
    struct table **bucket = &plane->table_buckets[scramble(map_id, 0) & (plane->table_bucket_count - 1)];
    table->next_in_bucket = *bucket;
    *bucket = table;
    plane->table_count++;
    return table;
}

/* Frees the table when nothing is known of it any more; a pool may see millions of snapshots pass. */
static void release_table(struct plane *plane, struct table *table)
{
    if (table->page_count || table->lease_blocks || table->is_served || table->stripe_columns)
        return;
    struct table **link = &plane->table_buckets[scramble(table->map_id, 0) & (plane->table_bucket_count - 1)];
    while (*link != table)
        link = &(*link)->next_in_bucket;
    *link = table->next_in_bucket;
    plane->table_count--;
    table_free(table);
}

/* ---- Pages ---------------------------------------------------------------------------------------------- */

static void append_page(struct plane *plane, struct page *page)
{
    page->next = NULL;
    page->previous = plane->newest;
    if (plane->newest)
        plane->newest->next = page;
    else
        plane->oldest = page;
    plane->newest = page;
}

static void unlink_page(struct plane *plane, struct page *page)
{
    if (page->previous)
        page->previous->next = page->next;
    else
        plane->oldest = page->next;
    if (page->next)
        page->next->previous = page->previous;
    else
        plane->newest = page->previous;
}

enum plane_status plane_load(struct plane *plane, uint64_t map_id, uint64_t page_index,
                             const struct plane_mapping mappings[PLANE_PAGE_BLOCKS], uint64_t hole)
{
    struct page *page = calloc(1, sizeof *page);
    if (!page)
        return PLANE_NO_MEMORY;
    page->page_index = page_index;
    page->hole = hole;
    atomic_init(&page->was_used, true);
    pthread_mutex_init(&page->lock, NULL);
    for (unsigned i = 0; i < PLANE_PAGE_BLOCKS; i++) {
        page->addresses[i] = mappings[i].address;
        page->checksums[i] = mappings[i].checksum;
    }
    pthread_rwlock_wrlock(&plane->gate);
    page->table = need_table(plane, map_id);
    if (page->table) {
        page->table->page_count++;
        if (++plane->page_count > plane->page_bucket_count)
            grow_page_buckets(plane);
        struct page **bucket =
            &plane->page_buckets[scramble(map_id, page_index) & (plane->page_bucket_count - 1)];
        page->next_in_bucket = *bucket;
        *bucket = page;
        append_page(plane, page);
    }
    pthread_rwlock_unlock(&plane->gate);
    if (!page->table) {
        page_free(page);
        return PLANE_NO_MEMORY;
    }
    return PLANE_OK;
}

/* Leaves the page's table in place. */
static void forget_page(struct plane *plane, struct page *page)
{
    struct page **link =
        &plane->page_buckets[scramble(page->table->map_id, page->page_index) & (plane->page_bucket_count - 1)];
    while (*link != page)
        link = &(*link)->next_in_bucket;
    *link = page->next_in_bucket;
    unlink_page(plane, page);
    page->table->page_count--;
    plane->page_count--;
    page_free(page);
}

void plane_evict(struct plane *plane, uint64_t map_id)
{
    pthread_rwlock_wrlock(&plane->gate);
    struct table *table = plane_find_table(plane, map_id);
    for (struct page *page = plane->oldest, *next; table && page && table->page_count; page = next) {
        next = page->next;
        /* A page with unsealed mappings stays: dropping it would lose them. */
        if (page->table == table && !page->is_dirty)
            forget_page(plane, page);
    }
    if (table)
        release_table(plane, table);
    pthread_rwlock_unlock(&plane->gate);
}

enum plane_status plane_shrink(struct plane *plane, size_t page_count, uint64_t **evicted, size_t *evicted_count)
{
    enum plane_status status = PLANE_OK;
    *evicted_count = 0;
    *evicted = NULL;
    pthread_rwlock_wrlock(&plane->gate);
    size_t looks = plane->page_count > page_count ? plane->page_count : 0;
    size_t surplus = looks ? plane->page_count - page_count : 0;
    if (surplus && !(*evicted = malloc(surplus * 2 * sizeof **evicted)))
        status = PLANE_NO_MEMORY, looks = 0;
    for (; looks && plane->page_count > page_count; looks--) {
        struct page *page = plane->oldest;
        if (page->is_dirty || atomic_load_explicit(&page->was_used, memory_order_relaxed)) {
            atomic_store_explicit(&page->was_used, false, memory_order_relaxed);
            unlink_page(plane, page);
            append_page(plane, page);
            continue;
        }
        struct table *table = page->table;
        (*evicted)[2 * *evicted_count] = table->map_id;
        (*evicted)[2 * *evicted_count + 1] = page->page_index;
        ++*evicted_count;
        forget_page(plane, page);
        release_table(plane, table);
    }
    pthread_rwlock_unlock(&plane->gate);
    return status;
}

size_t plane_page_count(struct plane *plane)
{
    pthread_rwlock_rdlock(&plane->gate);
    size_t count = plane->page_count;
    pthread_rwlock_unlock(&plane->gate);
    return count;
}

bool plane_is_resident(struct plane *plane, uint64_t map_id, uint64_t page_index)
{
    pthread_rwlock_rdlock(&plane->gate);
    bool found = plane_find_page(plane, map_id, page_index) != NULL;
    pthread_rwlock_unlock(&plane->gate);
    return found;
}

/* ---- Leases ------------------------------------------------------------------------------------------------ */

static bool make_lease_room(struct table *table)
{
    if (table->lease_end < table->lease_room)
        return true;
    size_t used = table->lease_end - table->lease_first;
    if (table->lease_first > used) {
        memmove(table->lease, table->lease + table->lease_first, used * sizeof *table->lease);
    } else {
        size_t room = table->lease_room ? 2 * table->lease_room : 8;
        struct plane_run *larger = malloc(room * sizeof *larger);
        if (!larger)
            return false;
        if (used)
            memcpy(larger, table->lease + table->lease_first, used * sizeof *larger);
        free(table->lease);
        table->lease = larger;
        table->lease_room = room;
    }
    table->lease_first = 0;
    table->lease_end = used;
    return true;
}

enum plane_status plane_grant(struct plane *plane, uint64_t map_id, struct plane_run run)
{
    pthread_rwlock_wrlock(&plane->gate);
    struct table *table = need_table(plane, map_id);
    bool done = table && make_lease_room(table);
    if (done) {
        table->lease[table->lease_end++] = run;
        table->lease_blocks += run.count;
        table->granted_blocks = table->lease_blocks;
    } else if (table) {
        release_table(plane, table);
    }
    pthread_rwlock_unlock(&plane->gate);
    return done ? PLANE_OK : PLANE_NO_MEMORY;
}

struct table *plane_column(struct plane *plane, struct table *table, uint64_t column)
{
    return column ? plane_find_table(plane, table->map_id | column) : table;
}

void table_take(struct table *table, uint64_t block_count, struct plane_run *runs)
{
    table->lease_blocks -= block_count;
    while (block_count) {
        struct plane_run *lease = &table->lease[table->lease_first];
        uint64_t step = lease->count < block_count ? lease->count : block_count;
        *runs++ = (struct plane_run){lease->address, step};
        lease->address += step;
        lease->count -= step;
        block_count -= step;
        if (!lease->count)
            table->lease_first++;
    }
}

static bool lease_runs_low(struct table *table)
{
    pthread_mutex_lock(&table->lease_lock);
    bool is_low = table->lease_blocks < table->granted_blocks / 2;
    pthread_mutex_unlock(&table->lease_lock);
    return is_low;
}

bool table_runs_low(struct plane *plane, struct table *table)
{
    bool is_low = lease_runs_low(table);
    for (uint64_t column = 1; !is_low && column < table->stripe_columns; column++) {
        struct table *lessee = plane_column(plane, table, column);
        is_low = lessee && lease_runs_low(lessee);
    }
    return is_low;
}

enum plane_status plane_stripe(struct plane *plane, uint64_t map_id, uint64_t unit_blocks, uint64_t columns)
{
    pthread_rwlock_wrlock(&plane->gate);
    struct table *table = need_table(plane, map_id);
    if (table) {
        table->stripe_unit = unit_blocks;
        table->stripe_columns = columns > 1 ? columns : 0;
        release_table(plane, table);
    }
    pthread_rwlock_unlock(&plane->gate);
    return table ? PLANE_OK : PLANE_NO_MEMORY;
}

uint64_t plane_leased_blocks(struct plane *plane, uint64_t map_id)
{
    uint64_t blocks = 0;
    pthread_rwlock_rdlock(&plane->gate);
    struct table *table = plane_find_table(plane, map_id);
    if (table) {
        pthread_mutex_lock(&table->lease_lock);
        blocks = table->lease_blocks;
        pthread_mutex_unlock(&table->lease_lock);
    }
    pthread_rwlock_unlock(&plane->gate);
    return blocks;
}

static void move_lease(struct table *table, struct plane_run *runs, size_t *run_count)
{
    size_t count = table->lease_end - table->lease_first;
    if (count)
        memcpy(runs + *run_count, table->lease + table->lease_first, count * sizeof *runs);
    *run_count += count;
    table->lease_first = table->lease_end = 0;
    table->lease_blocks = 0;
}

static enum plane_status revoke_all(struct plane *plane, struct plane_run **runs, size_t *run_count)
{
    size_t total = 0;
    for (size_t i = 0; i < plane->table_bucket_count; i++)
        for (struct table *table = plane->table_buckets[i]; table; table = table->next_in_bucket)
            total += table->lease_end - table->lease_first;
    if (!(*runs = malloc((total + 1) * sizeof **runs)))
        return PLANE_NO_MEMORY;
    for (size_t i = 0; i < plane->table_bucket_count; i++)
        for (struct table *table = plane->table_buckets[i], *next; table; table = next) {
            next = table->next_in_bucket;
            move_lease(table, *runs, run_count);
            release_table(plane, table);
        }
    return PLANE_OK;
}

enum plane_status plane_revoke(struct plane *plane, const uint64_t *map_id, struct plane_run **runs, size_t *run_count)
{
    enum plane_status status = PLANE_OK;
    *runs = NULL;
    *run_count = 0;
    pthread_rwlock_wrlock(&plane->gate);
    if (map_id) {
        struct table *table = plane_find_table(plane, *map_id);
        if (table && !(*runs = malloc((table->lease_end - table->lease_first + 1) * sizeof **runs)))
            status = PLANE_NO_MEMORY;
        else if (table) {
            move_lease(table, *runs, run_count);
            release_table(plane, table);
        }
    } else {
        status = revoke_all(plane, runs, run_count);
    }
    pthread_rwlock_unlock(&plane->gate);
    return status;
}

/* ---- What may be served ---------------------------------------------------------------------------------------- */

enum plane_status plane_serve(struct plane *plane, uint64_t map_id, uint64_t size_bytes, bool is_writable,
                              const struct plane_facts *facts)
{
    pthread_rwlock_wrlock(&plane->gate);
    struct table *table = need_table(plane, map_id);
    if (table) {
        table->is_served = true;
        table->is_writable = is_writable;
        table->size_bytes = size_bytes;
        table->facts = *facts;
    }
    pthread_rwlock_unlock(&plane->gate);
    return table ? PLANE_OK : PLANE_NO_MEMORY;
}

void plane_unserve(struct plane *plane, uint64_t map_id)
{
    pthread_rwlock_wrlock(&plane->gate);
    struct table *table = plane_find_table(plane, map_id);
    if (table) {
        table->is_served = table->is_writable = false;
        release_table(plane, table);
    }
    pthread_rwlock_unlock(&plane->gate);
}

void plane_freeze(struct plane *plane)
{
    pthread_rwlock_wrlock(&plane->gate);
    atomic_store(&plane->is_frozen, true);
    pthread_rwlock_unlock(&plane->gate);
}

int plane_watch(struct plane *plane, size_t seal_at)
{
    pthread_rwlock_wrlock(&plane->gate);
    plane->seal_at = seal_at;
    if (plane->attention_fd < 0)
        plane->attention_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    pthread_rwlock_unlock(&plane->gate);
    return plane->attention_fd;
}

void plane_call(struct plane *plane)
{
    uint64_t one = 1;
    if (plane->attention_fd >= 0 && !atomic_exchange(&plane->is_calling, true) &&
        write(plane->attention_fd, &one, sizeof one) < 0)
        atomic_store(&plane->is_calling, false);
}

/* Makes room for two numbers of each table. */
static uint64_t *room_for_tables(struct plane *plane)
{
    return malloc((2 * plane->table_count + 1) * sizeof(uint64_t));
}

/* A column that has no lease yet is not listed: it has no table either. */
static void list_low_leases(struct plane *plane, struct table *table, uint64_t *leases, size_t *lease_count)
{
    uint64_t columns = table->stripe_columns ? table->stripe_columns : 1;
    for (uint64_t column = 0; column < columns; column++) {
        struct table *lessee = plane_column(plane, table, column);
        if (lessee && lease_runs_low(lessee))
            leases[(*lease_count)++] = lessee->map_id;
    }
}

enum plane_status plane_attend(struct plane *plane, uint64_t **tables, size_t *table_count)
{
    uint64_t count;
    *table_count = 0;
    pthread_rwlock_rdlock(&plane->gate);
    *tables = room_for_tables(plane);
    /* First the descriptor, then the flag, then the look: whoever calls after the look is heard. */
    if (read(plane->attention_fd, &count, sizeof count) < 0)
        count = 0;
    atomic_store(&plane->is_calling, false);
    for (size_t i = 0; *tables && i < plane->table_bucket_count; i++)
        for (struct table *table = plane->table_buckets[i]; table; table = table->next_in_bucket)
            if (table->is_writable)
                list_low_leases(plane, table, *tables, table_count);
    pthread_rwlock_unlock(&plane->gate);
    return *tables ? PLANE_OK : PLANE_NO_MEMORY;
}

enum plane_status plane_written(struct plane *plane, uint64_t **writes, size_t *write_count)
{
    *write_count = 0;
    pthread_rwlock_rdlock(&plane->gate);
    *writes = room_for_tables(plane);
    for (size_t i = 0; *writes && i < plane->table_bucket_count; i++)
        for (struct table *table = plane->table_buckets[i]; table; table = table->next_in_bucket) {
            uint64_t written_ns = atomic_exchange_explicit(&table->written_ns, 0, memory_order_relaxed);
            if (written_ns) {
                (*writes)[2 * *write_count] = table->map_id;
                (*writes)[2 * (*write_count)++ + 1] = written_ns;
            }
        }
    pthread_rwlock_unlock(&plane->gate);
    return *writes ? PLANE_OK : PLANE_NO_MEMORY;
}

uint64_t plane_take_written(struct plane *plane, uint64_t map_id)
{
    pthread_rwlock_rdlock(&plane->gate);
    struct table *table = plane_find_table(plane, map_id);
    uint64_t written_ns = table ? atomic_exchange_explicit(&table->written_ns, 0, memory_order_relaxed) : 0;
    pthread_rwlock_unlock(&plane->gate);
    return written_ns;
}

bool plane_serve_stat(struct plane *plane, uint64_t map_id, struct plane_facts *facts, uint64_t *size_bytes)
{
    pthread_rwlock_rdlock(&plane->gate);
    struct table *table = plane_find_table(plane, map_id);
    bool is_served = table && table->is_served;
    if (is_served) {
        *facts = table->facts;
        *size_bytes = table->size_bytes;
        facts->mapped_blocks += atomic_load_explicit(&table->mapped_delta, memory_order_relaxed);
        uint64_t written_ns = atomic_load_explicit(&table->written_ns, memory_order_relaxed);
        if (written_ns > facts->modified_ns)
            facts->modified_ns = facts->changed_ns = written_ns;
    }
    pthread_rwlock_unlock(&plane->gate);
    return is_served;
}

bool plane_serve_time(struct plane *plane, uint64_t map_id, uint64_t modified_ns)
{
    pthread_rwlock_rdlock(&plane->gate);
    struct table *table = plane_find_table(plane, map_id);
    bool is_done = table && table->is_served && table->is_writable &&
                   !atomic_load_explicit(&plane->is_frozen, memory_order_relaxed);
    uint64_t known = 0;
    if (is_done) {
        known = atomic_load_explicit(&table->written_ns, memory_order_relaxed);
        is_done = modified_ns >= (known > table->facts.modified_ns ? known : table->facts.modified_ns);
    }
    /* A write in between has set a later time: that one stays. */
    if (is_done)
        atomic_compare_exchange_strong(&table->written_ns, &known, modified_ns);
    pthread_rwlock_unlock(&plane->gate);
    return is_done;
}

/* ---- Fresh mappings ------------------------------------------------------------------------------------------- */

void plane_drop(struct plane *plane, uint64_t address)
{
    pthread_mutex_lock(&plane->list_lock);
    if (plane->dropped_count == plane->dropped_room) {
        size_t room = plane->dropped_room ? 2 * plane->dropped_room : 64;
        uint64_t *larger = realloc(plane->dropped, room * sizeof *larger);
        if (larger) {
            plane->dropped = larger;
            plane->dropped_room = room;
        }
    }
    /* Out of memory the block stays unused until the pool is opened again; nothing is harmed. */
    if (plane->dropped_count < plane->dropped_room)
        plane->dropped[plane->dropped_count++] = address;
    pthread_mutex_unlock(&plane->list_lock);
}

bool page_prepare(struct page *page)
{
    if (!page->replaced)
        page->replaced = malloc(sizeof *page->replaced);
    return page->replaced != NULL;
}

static void mark_dirty(struct plane *plane, struct page *page)
{
    pthread_mutex_lock(&plane->list_lock);
    page->is_dirty = true;
    page->next_dirty = plane->dirty;
    plane->dirty = page;
    plane->dirty_count++;
    pthread_mutex_unlock(&plane->list_lock);
}

void page_set(struct plane *plane, struct page *page, unsigned index, uint64_t address, uint32_t checksum)
{
    uint64_t old = page->addresses[index];
    if (old == address) {
        page->checksums[index] = checksum;
        return;
    }
    if (!page_is_fresh(page, index)) {
        page->replaced->addresses[index] = old;
        page->replaced->checksums[index] = page->checksums[index];
        page->fresh[index / 64] |= (uint64_t)1 << index % 64;
        atomic_fetch_add_explicit(&plane->fresh_count, 1, memory_order_relaxed);
        if (!page->is_dirty)
            mark_dirty(plane, page);
    } else if (old > PLANE_HOLE) {
        plane_drop(plane, old);
    }
    page->addresses[index] = address;
    page->checksums[index] = checksum;
    int delta = (address > PLANE_HOLE) - (old > PLANE_HOLE);
    if (delta)
        atomic_fetch_add_explicit(&page->table->mapped_delta, delta, memory_order_relaxed);
}

int64_t plane_mapped_delta(struct plane *plane, uint64_t map_id)
{
    pthread_rwlock_rdlock(&plane->gate);
    struct table *table = plane_find_table(plane, map_id);
    int64_t delta = table ? atomic_load(&table->mapped_delta) : 0;
    pthread_rwlock_unlock(&plane->gate);
    return delta;
}

size_t plane_fresh_count(struct plane *plane)
{
    return atomic_load_explicit(&plane->fresh_count, memory_order_relaxed);
}

void plane_move(struct plane *plane, uint64_t map_id, uint64_t page_index, const struct plane_move *moves,
                size_t move_count)
{
    pthread_rwlock_wrlock(&plane->gate);
    struct page *page = plane_find_page(plane, map_id, page_index);
    for (size_t i = 0; page && i < move_count; i++) {
        unsigned index = moves[i].index % PLANE_PAGE_BLOCKS;
        if (page->addresses[index] == moves[i].old_address)
            page->addresses[index] = moves[i].new_address;
        else if (page_is_fresh(page, index) && page->replaced->addresses[index] == moves[i].old_address)
            page->replaced->addresses[index] = moves[i].new_address;
    }
    pthread_rwlock_unlock(&plane->gate);
}

/* ---- Seal -------------------------------------------------------------------------------------------------------- */

static struct plane_appended appended_at(const struct page *page, unsigned index)
{
    return (struct plane_appended){
        .address = page->addresses[index],
        .old_address = page->replaced->addresses[index],
        .checksum = page->checksums[index],
        .old_checksum = page->replaced->checksums[index],
        .index = index,
    };
}

/* Writes the page's fresh mappings behind `appended`, by index; one that is back to what it was is none. */
static size_t collect_fresh(const struct page *page, struct plane_appended *appended)
{
    size_t count = 0;
    for (unsigned word = 0; word < FRESH_WORDS; word++)
        for (uint64_t bits = page->fresh[word]; bits; bits &= bits - 1) {
            unsigned index = word * 64 + __builtin_ctzll(bits);
            if (page->addresses[index] != page->replaced->addresses[index])
                appended[count++] = appended_at(page, index);
        }
    return count;
}

static void settle_page(struct page *page, struct plane_batch *batch)
{
    struct table *table = page->table;
    uint64_t written_ns = atomic_exchange_explicit(&table->written_ns, 0, memory_order_relaxed);
    if (written_ns)
        batch->written[batch->written_count++] = (struct plane_written){table->map_id, written_ns};
    table->facts.mapped_blocks += atomic_exchange_explicit(&table->mapped_delta, 0, memory_order_relaxed);
    memset(page->fresh, 0, sizeof page->fresh);
    free(page->replaced);
    page->replaced = NULL;
    page->is_dirty = false;
}

static int by_table_and_index(const void *left, const void *right)
{
    const struct plane_sealed_page *a = left, *b = right;
    if (a->map_id != b->map_id)
        return a->map_id < b->map_id ? -1 : 1;
    return a->page_index < b->page_index ? -1 : a->page_index > b->page_index;
}

/* Under the gate, alone. */
static enum plane_status gather(struct plane *plane, struct plane_batch *batch)
{
    size_t fresh_count = plane_fresh_count(plane), used = 0;
    batch->pages = malloc((plane->dirty_count + 1) * sizeof *batch->pages);
    batch->appended = malloc((fresh_count + 1) * sizeof *batch->appended);
    batch->written = malloc((plane->dirty_count + 1) * sizeof *batch->written);
    if (!batch->pages || !batch->appended || !batch->written)
        return PLANE_NO_MEMORY;
    for (struct page *page = plane->dirty; page; page = page->next_dirty) {
        size_t count = collect_fresh(page, batch->appended + used);
        if (count)
            batch->pages[batch->page_count++] =
                (struct plane_sealed_page){page->table->map_id, page->page_index, used, count};
        used += count;
        settle_page(page, batch);
    }
    plane->dirty = NULL;
    plane->dirty_count = 0;
    batch->dropped = plane->dropped;
    batch->dropped_count = plane->dropped_count;
    plane->dropped = NULL;
    plane->dropped_count = plane->dropped_room = 0;
    atomic_store(&plane->fresh_count, 0);
    return PLANE_OK;
}

enum plane_status plane_seal(struct plane *plane, size_t most, struct plane_batch *batch)
{
    memset(batch, 0, sizeof *batch);
    pthread_rwlock_wrlock(&plane->gate);
    enum plane_status status = plane_fresh_count(plane) > most ? PLANE_NOT_SERVED : gather(plane, batch);
    pthread_rwlock_unlock(&plane->gate);
    if (status != PLANE_OK)
        plane_batch_free(batch);
    else
        qsort(batch->pages, batch->page_count, sizeof *batch->pages, by_table_and_index);
    return status;
}

void plane_batch_free(struct plane_batch *batch)
{
    free(batch->pages);
    free(batch->appended);
    free(batch->written);
    free(batch->dropped);
    memset(batch, 0, sizeof *batch);
}

static void inspect_page(struct page *page, const struct plane_visitor *visitor)
{
    struct plane_appended fresh[PLANE_PAGE_BLOCKS];
    size_t count = 0;
    for (unsigned index = 0; index < PLANE_PAGE_BLOCKS; index++)
        if (page_is_fresh(page, index))
            fresh[count++] = appended_at(page, index);
    visitor->page(visitor->context, page->table->map_id, page->page_index, page->addresses, page->checksums, fresh,
                  count);
}

void plane_inspect(struct plane *plane, const struct plane_visitor *visitor)
{
    pthread_rwlock_wrlock(&plane->gate);
    for (struct page *page = plane->oldest; page; page = page->next)
        inspect_page(page, visitor);
    for (size_t i = 0; i < plane->table_bucket_count; i++)
        for (struct table *table = plane->table_buckets[i]; table; table = table->next_in_bucket)
            for (size_t k = table->lease_first; k < table->lease_end; k++)
                visitor->lease(visitor->context, table->map_id, table->lease[k]);
    for (size_t i = 0; i < plane->dropped_count; i++)
        visitor->dropped(visitor->context, plane->dropped[i]);
    pthread_rwlock_unlock(&plane->gate);
}
