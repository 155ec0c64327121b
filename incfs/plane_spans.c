/* The pages that a change of the native data plane is about; discarding, which is nothing else.  See plane.h for the
 * locks. */
#include "plane_internal.h"

#include <stdlib.h>

/* Under the gate: finds every page of a range, ready for new mappings once locked. */
enum plane_status find_spans(struct plane *plane, uint64_t map_id, uint64_t first_block, size_t block_count,
                             struct spans *spans, struct plane_refusal *why)
{
    size_t most = block_count / PLANE_PAGE_BLOCKS + 2;
    spans->count = 0;
    spans->items = most <= INLINE_SPANS ? spans->small : malloc(most * sizeof *spans->items);
    if (!spans->items)
        return PLANE_NO_MEMORY;
    while (block_count) {
        unsigned start = first_block % PLANE_PAGE_BLOCKS;
        unsigned count = PLANE_PAGE_BLOCKS - start;
        if (count > block_count)
            count = block_count;
        struct page *page = plane_find_page(plane, map_id, first_block / PLANE_PAGE_BLOCKS);
        if (!page) {
            why->page_index = first_block / PLANE_PAGE_BLOCKS;
            return PLANE_NOT_RESIDENT;
        }
        atomic_store_explicit(&page->was_used, true, memory_order_relaxed);
        spans->items[spans->count++] = (struct span){page, start, count};
        first_block += count;
        block_count -= count;
    }
    return PLANE_OK;
}

void free_spans(struct spans *spans)
{
    if (spans->items != spans->small)
        free(spans->items);
}

void lock_spans(const struct spans *spans)
{
    for (size_t i = 0; i < spans->count; i++)
        pthread_mutex_lock(&spans->items[i].page->lock);
}

void unlock_spans(const struct spans *spans)
{
    for (size_t i = spans->count; i--;)
        pthread_mutex_unlock(&spans->items[i].page->lock);
}

bool prepare_spans(const struct spans *spans)
{
    for (size_t i = 0; i < spans->count; i++)
        if (!page_prepare(spans->items[i].page))
            return false;
    return true;
}

/* ---- Discarding --------------------------------------------------------------------------------- */

enum plane_status plane_discard(struct plane *plane, uint64_t map_id, uint64_t first_block, size_t block_count,
                                struct plane_refusal *why)
{
    struct spans spans;
    pthread_rwlock_rdlock(&plane->gate);
    enum plane_status status = find_spans(plane, map_id, first_block, block_count, &spans, why);
    if (status == PLANE_OK) {
        lock_spans(&spans);
        if (!prepare_spans(&spans))
            status = PLANE_NO_MEMORY;
        for (size_t s = 0; status == PLANE_OK && s < spans.count; s++) {
            const struct span *span = &spans.items[s];
            for (unsigned i = span->start; i < span->start + span->count; i++)
                page_set(plane, span->page, i, span->page->hole, 0);
        }
        unlock_spans(&spans);
    }
    pthread_rwlock_unlock(&plane->gate);
    free_spans(&spans);
    return status;
}
