/* The mappings of one map page: how they are put together, and how the tables store them (docs/FORMAT.md).
 *
 * Knows nothing of Python, allocates nothing.
 */
#ifndef INCFS_MAPPINGS_H
#define INCFS_MAPPINGS_H

#include <stddef.h>
#include <stdint.h>

#include "plane.h"

enum { MAPPINGS_MAX_BYTES = 1 + PLANE_PAGE_BLOCKS / 8 + 12 * PLANE_PAGE_BLOCKS };

struct mapping {
    uint64_t address;
    uint32_t checksum;
    uint16_t index; /* of the block in its page */
};

/* Ascending by index, each index once. */
struct mappings {
    size_t count;
    struct mapping of[PLANE_PAGE_BLOCKS];
};

/* Lets mappings of a page, ascending, replace those of the same blocks, or come to them. */
void mappings_put(struct mappings *page, const struct mapping *above, size_t count);

/* Leaves out the blocks that have no mapping of their own. */
void mappings_drop_inherited(struct mappings *page);

/* Gives the length. */
size_t mappings_encode(const struct mappings *page, uint8_t target[MAPPINGS_MAX_BYTES]);

/* Gives what is wrong with the bytes; NULL: nothing. */
const char *mappings_decode(struct mappings *page, const uint8_t *data, size_t length);

#endif
