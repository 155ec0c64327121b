/* Reading through the native data plane.  See plane.h for the locks. */
#include "crc32c.h"
#include "plane_internal.h"

#include <string.h>

/* Blocks from `start` on that are one extent, or one kind of zeros. */
static size_t run_length(const uint64_t *addresses, size_t start, size_t end)
{
    uint64_t step = addresses[start] > PLANE_HOLE, expected = addresses[start] + step;
    size_t stop = start + 1;
    for (; stop < end && addresses[stop] == expected; stop++)
        expected += step;
    return stop - start;
}

static bool matches(struct plane *plane, uint64_t virtual_block, uint64_t address, const char *block, uint32_t expected,
                    struct plane_refusal *why)
{
    uint32_t found = crc32c(block, plane->block_bytes);
    if (found == expected)
        return true;
    why->virtual_block = virtual_block;
    why->address = address;
    why->found = found;
    why->expected = expected;
    return false;
}

struct copied {
    uint64_t reuse_count;
    uint64_t addresses[PLANE_PAGE_BLOCKS];
    uint32_t checksums[PLANE_PAGE_BLOCKS];
};

static bool copy_mappings(struct plane *plane, uint64_t map_id, uint64_t page_index, unsigned start, unsigned count,
                          struct copied *copied)
{
    pthread_rwlock_rdlock(&plane->gate);
    struct page *page = plane_find_page(plane, map_id, page_index);
    if (page) {
        atomic_store_explicit(&page->was_used, true, memory_order_relaxed);
        pthread_mutex_lock(&page->lock);
        copied->reuse_count = atomic_load(&plane->reuse_count);
        memcpy(copied->addresses, page->addresses + start, count * sizeof *copied->addresses);
        memcpy(copied->checksums, page->checksums + start, count * sizeof *copied->checksums);
        pthread_mutex_unlock(&page->lock);
    }
    pthread_rwlock_unlock(&plane->gate);
    return page != NULL;
}

static bool is_same(const struct copied *one, const struct copied *other)
{
    return one->addresses[0] == other->addresses[0] && one->checksums[0] == other->checksums[0];
}

/* One that is rewritten all the time is found as it was so often only if it is damaged. */
enum { MOST_LOOKS = 16 };

/* While the mapping stays what it is, the block does: it is written before any mapping names it.  So what does not
 * match between two looks at the same mapping is damage, unless the block was given up and came back in between. */
static enum plane_status look(struct plane *plane, uint64_t virtual_block, const struct copied *now, bool can_wait,
                              bool verify, char *buffer, struct plane_refusal *why)
{
    if (now->addresses[0] <= PLANE_HOLE) {
        memset(buffer, 0, plane->block_bytes);
        return PLANE_OK;
    }
    enum plane_status status = read_extent(plane, now->addresses[0], 1, can_wait, buffer, why);
    if (status != PLANE_OK || (!verify && atomic_load(&plane->reuse_count) == now->reuse_count))
        return status;
    return matches(plane, virtual_block, now->addresses[0], buffer, now->checksums[0], why) ? PLANE_OK : PLANE_MISMATCH;
}

enum plane_status read_block(struct plane *plane, uint64_t map_id, uint64_t virtual_block, bool can_wait, bool verify,
                             char *buffer, struct plane_mapping *mapping, struct plane_refusal *why)
{
    uint64_t page_index = virtual_block / PLANE_PAGE_BLOCKS;
    struct copied now, then = {0};
    enum plane_status status = PLANE_OK;
    for (unsigned looks = 0;; looks++, then = now) {
        why->page_index = page_index;
        if (!copy_mappings(plane, map_id, page_index, virtual_block % PLANE_PAGE_BLOCKS, 1, &now))
            return PLANE_NOT_RESIDENT;
        bool is_settled = then.reuse_count == now.reuse_count || looks >= MOST_LOOKS;
        if (status == PLANE_MISMATCH && is_settled && is_same(&then, &now))
            return status;
        status = look(plane, virtual_block, &now, can_wait, verify, buffer, why);
        if (status != PLANE_MISMATCH) {
            *mapping = (struct plane_mapping){now.addresses[0], now.checksums[0]};
            return status;
        }
    }
}

/* Reads an extent of a page.  The first that must be waited for has all behind it fetched, too: they may be on other disks. */
static enum plane_status read_run(struct plane *plane, const struct copied *copied, size_t start, size_t run, size_t end,
                                  bool can_wait, bool *is_ahead, char *buffer, struct plane_refusal *why)
{
    enum plane_status status = read_extent(plane, copied->addresses[start], run, false, buffer, why);
    if (status != PLANE_WOULD_WAIT || !can_wait)
        return status;
    for (size_t i = start + run, length; i < end && !*is_ahead; i += length) {
        length = run_length(copied->addresses, i, end);
        if (copied->addresses[i] > PLANE_HOLE)
            read_ahead(plane, copied->addresses[i], length);
    }
    *is_ahead = true;
    return read_extent(plane, copied->addresses[start], run, true, buffer, why);
}

/* A checksum that matches also shows that the block was not another's while it was read.  Without it, nobody can have
 * got the block as long as none was given up since its mapping was looked up. */
static enum plane_status read_page(struct plane *plane, uint64_t map_id, uint64_t page_index, unsigned start, unsigned count,
                                   bool can_wait, bool verify, char *buffer, struct plane_refusal *why)
{
    struct copied copied;
    why->page_index = page_index;
    if (!copy_mappings(plane, map_id, page_index, start, count, &copied))
        return PLANE_NOT_RESIDENT;
    enum plane_status status = PLANE_OK;
    bool is_ahead = false;
    for (size_t i = 0, run; i < count && status == PLANE_OK; i += run) {
        run = run_length(copied.addresses, i, count);
        char *target = buffer + i * plane->block_bytes;
        if (copied.addresses[i] <= PLANE_HOLE) {
            memset(target, 0, run * plane->block_bytes);
            continue;
        }
        status = read_run(plane, &copied, i, run, count, can_wait, &is_ahead, target, why);
        if (!verify && atomic_load(&plane->reuse_count) == copied.reuse_count)
            continue;
        for (size_t k = i; k < i + run && status == PLANE_OK; k++) {
            char *block = buffer + k * plane->block_bytes;
            uint64_t virtual_block = page_index * PLANE_PAGE_BLOCKS + start + k;
            struct plane_mapping now;
            if (!matches(plane, virtual_block, copied.addresses[k], block, copied.checksums[k], why))
                status = read_block(plane, map_id, virtual_block, can_wait, verify, block, &now, why);
        }
    }
    return status;
}

enum plane_status plane_read(struct plane *plane, uint64_t map_id, uint64_t first_block, size_t block_count, bool can_wait,
                             bool verify, void *buffer, struct plane_refusal *why)
{
    char *target = buffer;
    enum plane_status status = PLANE_OK;
    while (block_count && status == PLANE_OK) {
        unsigned start = first_block % PLANE_PAGE_BLOCKS;
        unsigned count = PLANE_PAGE_BLOCKS - start;
        if (count > block_count)
            count = block_count;
        status = read_page(plane, map_id, first_block / PLANE_PAGE_BLOCKS, start, count, can_wait, verify, target, why);
        first_block += count;
        block_count -= count;
        target += (size_t)count * plane->block_bytes;
    }
    return status;
}
