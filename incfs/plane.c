/* The structure of the native data plane: tables and their resident pages, found by hash.  See plane.h. */
#include "plane_internal.h"

#include "crc32c.h"

#include <stdlib.h>
#include <unistd.h>

enum { FIRST_BUCKETS = 64 };

/* ---- The plane ---------------------------------------------------------------------------------- */

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

/* ---- Hash tables, under the gate ---------------------------------------------------------------- */

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

struct table *need_table(struct plane *plane, uint64_t map_id)
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
void release_table(struct plane *plane, struct table *table)
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

/* ---- Pages -------------------------------------------------------------------------------------- */

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
