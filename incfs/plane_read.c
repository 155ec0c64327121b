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

/* Reads one block of a locked page: nobody rewrites it meanwhile, so a mismatch is damage. */
enum plane_status read_locked(struct plane *plane, struct page *page, unsigned index, bool can_wait, bool verify,
                              char *buffer, struct plane_refusal *why)
{
    uint64_t address = page->addresses[index];
    if (address <= PLANE_HOLE) {
        memset(buffer, 0, plane->block_bytes);
        return PLANE_OK;
    }
    enum plane_status status = read_extent(plane, address, 1, can_wait, buffer, why);
    if (status != PLANE_OK || !verify)
        return status;
    uint64_t virtual_block = page->page_index * PLANE_PAGE_BLOCKS + index;
    return matches(plane, virtual_block, address, buffer, page->checksums[index], why) ? PLANE_OK : PLANE_MISMATCH;
}

/* What was read without the lock did not match: the block may have been rewritten since, or be another's by now. */
static enum plane_status read_again(struct plane *plane, uint64_t map_id, uint64_t page_index, unsigned index, bool can_wait,
                                    bool verify, char *buffer, struct plane_refusal *why)
{
    enum plane_status status = PLANE_NOT_RESIDENT;
    why->page_index = page_index;
    pthread_rwlock_rdlock(&plane->gate);
    struct page *page = plane_find_page(plane, map_id, page_index);
    if (page) {
        pthread_mutex_lock(&page->lock);
        status = read_locked(plane, page, index, can_wait, verify, buffer, why);
        pthread_mutex_unlock(&page->lock);
    }
    pthread_rwlock_unlock(&plane->gate);
    return status;
}

struct copied {
    uint64_t seal_count;
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
        copied->seal_count = atomic_load(&plane->seal_count);
        memcpy(copied->addresses, page->addresses + start, count * sizeof *copied->addresses);
        memcpy(copied->checksums, page->checksums + start, count * sizeof *copied->checksums);
        pthread_mutex_unlock(&page->lock);
    }
    pthread_rwlock_unlock(&plane->gate);
    return page != NULL;
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
 * got the block as long as nothing was sealed since its mapping was looked up. */
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
        if (!verify && atomic_load(&plane->seal_count) == copied.seal_count)
            continue;
        for (size_t k = i; k < i + run && status == PLANE_OK; k++) {
            char *block = buffer + k * plane->block_bytes;
            uint64_t virtual_block = page_index * PLANE_PAGE_BLOCKS + start + k;
            if (!matches(plane, virtual_block, copied.addresses[k], block, copied.checksums[k], why))
                status = read_again(plane, map_id, page_index, start + k, can_wait, verify, block, why);
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
