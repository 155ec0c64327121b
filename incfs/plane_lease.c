/* Leases of the native data plane: the free blocks that writes take from, table by table or column by column. */
#include "plane_internal.h"

#include <stdlib.h>
#include <string.h>

/* Room for one more run on either side. */
static bool make_lease_room(struct table *table)
{
    if (table->lease_first && table->lease_end < table->lease_room)
        return true;
    size_t used = table->lease_end - table->lease_first, room = 2 * used + 8;
    size_t first = (room > table->lease_room ? room - used : table->lease_room - used) / 2;
    if (room <= table->lease_room) {
        memmove(table->lease + first, table->lease + table->lease_first, used * sizeof *table->lease);
    } else {
        struct plane_run *larger = malloc(room * sizeof *larger);
        if (!larger)
            return false;
        if (used)
            memcpy(larger + first, table->lease + table->lease_first, used * sizeof *larger);
        free(table->lease);
        table->lease = larger;
        table->lease_room = room;
    }
    table->lease_first = first;
    table->lease_end = first + used;
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

/* With the lease lock held; false when out of memory. */
static bool put_first(struct table *table, uint64_t address)
{
    struct plane_run *first = table->lease_first < table->lease_end ? &table->lease[table->lease_first] : NULL;
    if (first && first->address + first->count == address) {
        first->count++;
    } else if (first && first->address == address + 1) {
        first->address--;
        first->count++;
    } else if (make_lease_room(table)) {
        table->lease[--table->lease_first] = (struct plane_run){address, 1};
    } else {
        return false;
    }
    table->lease_blocks++;
    return true;
}

void plane_give_back(struct plane *plane, struct table *table, uint64_t virtual_block, uint64_t address)
{
    struct table *lessee = plane->leases_were_taken ? NULL : plane_column(plane, table, column_of(table, virtual_block));
    bool is_back = false;
    /* First: whoever is handed the block afterwards may write it at once. */
    atomic_fetch_add(&plane->reuse_count, 1);
    if (lessee) {
        pthread_mutex_lock(&lessee->lease_lock);
        is_back = put_first(lessee, address);
        pthread_mutex_unlock(&lessee->lease_lock);
    }
    if (!is_back)
        plane_drop(plane, address);
}

void void_placements(struct plane *plane)
{
    plane->placing++;
    plane->leases_were_taken = true;
}

bool lease_runs_low(struct table *table)
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
        void_placements(plane);
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
    void_placements(plane);
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
