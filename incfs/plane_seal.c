/* Mappings of the native data plane: how they become fresh, and how a seal hands them over. */
#include "plane_internal.h"

#include <stdlib.h>
#include <string.h>

/* ---- Fresh mappings ----------------------------------------------------------------------------- */

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
    if (old == address)
        return; /* zeros over zeros: a block is written once */
    if (!page_is_fresh(page, index)) {
        page->replaced->addresses[index] = old;
        page->replaced->checksums[index] = page->checksums[index];
        page->fresh[index / 64] |= (uint64_t)1 << index % 64;
        atomic_fetch_add_explicit(&plane->fresh_count, 1, memory_order_relaxed);
        if (!page->is_dirty)
            mark_dirty(plane, page);
    } else if (old > PLANE_HOLE) {
        plane_give_back(plane, page->table, page->page_index * PLANE_PAGE_BLOCKS + index, old);
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

/* ---- Seal --------------------------------------------------------------------------------------- */

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
    plane->leases_were_taken = false;
    atomic_store(&plane->fresh_count, 0);
    return PLANE_OK;
}

enum plane_status plane_seal(struct plane *plane, size_t most, struct plane_batch *batch)
{
    memset(batch, 0, sizeof *batch);
    pthread_rwlock_wrlock(&plane->gate);
    enum plane_status status = plane_fresh_count(plane) > most ? PLANE_NOT_SERVED : gather(plane, batch);
    if (status == PLANE_OK)
        atomic_fetch_add(&plane->seal_count, 1);
    atomic_fetch_add(&plane->reuse_count, 1);
    pthread_rwlock_unlock(&plane->gate);
    if (status != PLANE_OK)
        plane_batch_free(batch);
    else
        qsort(batch->pages, batch->page_count, sizeof *batch->pages, by_table_and_index);
    return status;
}

uint64_t plane_seal_count(struct plane *plane)
{
    return atomic_load(&plane->seal_count);
}

void plane_batch_free(struct plane_batch *batch)
{
    free(batch->pages);
    free(batch->appended);
    free(batch->written);
    free(batch->dropped);
    memset(batch, 0, sizeof *batch);
}

size_t plane_run_length(const struct plane_appended *appended, size_t start, size_t end)
{
    uint64_t step = appended[start].address > PLANE_HOLE;
    size_t count = 1;
    while (start + count < end && appended[start + count].index == appended[start].index + count &&
           appended[start + count].address == appended[start].address + step * count)
        count++;
    return count;
}

/* ---- For tests ---------------------------------------------------------------------------------- */

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
