/* What the native data plane does for others than the control plane: which tables are served, what they are told,
 * and how they call for help. */
#include "plane_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

/* ---- What may be served ------------------------------------------------------------------------- */

enum plane_status plane_serve(struct plane *plane, uint64_t map_id, uint64_t size_bytes, bool is_writable,
                              struct plane_rules rules, const struct plane_facts *facts)
{
    pthread_rwlock_wrlock(&plane->gate);
    struct table *table = need_table(plane, map_id);
    if (table) {
        table->is_served = true;
        table->is_writable = is_writable;
        table->size_bytes = size_bytes;
        table->rules = rules;
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

/* ---- Failure ------------------------------------------------------------------------------------ */

void plane_fail(struct plane *plane, int host_errno, uint64_t address)
{
    pthread_mutex_lock(&plane->list_lock);
    if (!plane->failed_errno) {
        plane->failed_errno = host_errno;
        plane->failed_address = address;
    }
    pthread_mutex_unlock(&plane->list_lock);
    atomic_store(&plane->is_frozen, true);
    plane_call(plane);
}

int plane_failure(struct plane *plane, uint64_t *address)
{
    pthread_mutex_lock(&plane->list_lock);
    int error = plane->failed_errno;
    *address = plane->failed_address;
    pthread_mutex_unlock(&plane->list_lock);
    return error;
}

/* ---- Requests ----------------------------------------------------------------------------------- */

/* Under no lock: where a read ends, and what rules it; false when the table is not served. */
static bool find_end(struct plane *plane, uint64_t map_id, uint64_t *size_bytes, struct plane_rules *rules)
{
    pthread_rwlock_rdlock(&plane->gate);
    const struct table *table = plane_find_table(plane, map_id);
    bool is_served = table && table->is_served;
    if (is_served) {
        *size_bytes = table->size_bytes;
        *rules = table->rules;
    }
    pthread_rwlock_unlock(&plane->gate);
    return is_served;
}

enum plane_status plane_serve_read(struct plane *plane, uint64_t map_id, uint64_t offset_bytes, size_t length_bytes,
                                   bool can_wait, char *buffer, size_t room, size_t *start, size_t *count)
{
    uint64_t size_bytes, block = plane->block_bytes;
    struct plane_rules rules;
    if (!find_end(plane, map_id, &size_bytes, &rules))
        return PLANE_NOT_SERVED;
    *start = *count = 0;
    if (offset_bytes >= size_bytes)
        return PLANE_OK;
    if (length_bytes > size_bytes - offset_bytes)
        length_bytes = size_bytes - offset_bytes;
    *start = offset_bytes % block;
    *count = length_bytes;
    size_t block_count = (*start + length_bytes + block - 1) / block;
    if (block_count * block > room)
        return PLANE_NOT_SERVED;
    struct plane_refusal why;
    return plane_read(plane, map_id, offset_bytes / block, block_count, can_wait, !rules.is_unverified, buffer,
                      &why);
}

static void note_served_write(struct plane *plane, uint64_t map_id)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    pthread_rwlock_rdlock(&plane->gate);
    struct table *table = plane_find_table(plane, map_id);
    bool is_low = table && table_runs_low(plane, table);
    if (table)
        atomic_store_explicit(&table->written_ns, (uint64_t)now.tv_sec * 1000000000u + now.tv_nsec,
                              memory_order_relaxed);
    if (is_low || plane_fresh_count(plane) >= plane->seal_at)
        plane_call(plane);
    pthread_rwlock_unlock(&plane->gate);
}

enum plane_status plane_write_served(struct plane *plane, uint64_t map_id, uint64_t offset_bytes, const void *data,
                                     size_t length_bytes, bool can_wait, struct plane_refusal *why)
{
    enum plane_status status =
        write_bytes(plane, map_id, offset_bytes, data, length_bytes, true, can_wait, false, why);
    if (status == PLANE_OK)
        note_served_write(plane, map_id);
    else if (status == PLANE_WRITE_ERROR && !is_full(why->host_errno))
        plane_fail(plane, why->host_errno, why->address); /* a full disk harms nothing and is no failure */
    return status;
}

enum plane_status plane_serve_write(struct plane *plane, uint64_t map_id, uint64_t offset_bytes, const void *data,
                                    size_t length_bytes)
{
    struct plane_refusal why;
    return plane_write_served(plane, map_id, offset_bytes, data, length_bytes, false, &why);
}
