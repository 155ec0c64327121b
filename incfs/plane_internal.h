/* What the files of the native data plane share: its structure, and what each file does for the others. */
#ifndef INCFS_PLANE_INTERNAL_H
#define INCFS_PLANE_INTERNAL_H

#include "plane.h"

#include <pthread.h>
#include <stdatomic.h>

enum { MAX_STORAGE_ID = 65535, ADDRESS_BLOCK_BITS = 48, FRESH_WORDS = PLANE_PAGE_BLOCKS / 64 };

/* What a filesystem says of whether a read would wait: tells with RWF_NOWAIT; does not, but is in memory; does not. */
enum { TELLS, NEVER_WAITS, MAY_WAIT };

struct file {
    struct file *superseded; /* what was attached before: somebody may still read through it */
    int fds[PLANE_MAX_LEGS]; /* the first is read, all are written */
    unsigned fd_count;
    uint64_t data_offset;
    atomic_int knowledge; /* of these */
};

struct table {
    struct table *next_in_bucket;
    uint64_t map_id;
    size_t page_count; /* resident; gate */
    pthread_mutex_t lease_lock;
    struct plane_run *lease; /* lease_lock; used from lease_first on */
    size_t lease_first, lease_end, lease_room;
    uint64_t lease_blocks; /* of all runs together */
    uint64_t granted_blocks; /* as many were leased after the last grant */
    /* New blocks come from the leases of tables map_id | b / stripe_unit % stripe_columns; gate.
     * stripe_columns is 0 where there is but one. */
    uint64_t stripe_unit, stripe_columns;
    /* For served requests; gate */
    bool is_served, is_writable;
    uint64_t size_bytes;
    struct plane_rules rules;
    struct plane_facts facts;
    _Atomic uint64_t written_ns; /* time of the last served write that was not asked for yet */
    _Atomic int64_t mapped_delta;
};

/* The mappings that fresh ones of a page replaced. */
struct replaced {
    uint64_t addresses[PLANE_PAGE_BLOCKS];
    uint32_t checksums[PLANE_PAGE_BLOCKS];
};

struct page {
    struct page *next_in_bucket;
    struct page *previous, *next; /* by age; gate */
    struct page *next_dirty;      /* list_lock */
    struct table *table;
    uint64_t page_index, hole;
    atomic_bool was_used; /* since shrink last came by */
    pthread_mutex_t lock; /* guards all below */
    bool is_dirty;        /* in the dirty list: something is fresh */
    uint64_t fresh[FRESH_WORDS];
    struct replaced *replaced; /* NULL or room for the fresh mappings' predecessors */
    uint64_t addresses[PLANE_PAGE_BLOCKS];
    uint32_t checksums[PLANE_PAGE_BLOCKS];
};

struct plane {
    uint32_t block_bytes;
    pthread_rwlock_t gate;
    /* gate */
    struct page **page_buckets;
    struct table **table_buckets;
    size_t page_bucket_count, table_bucket_count; /* powers of two */
    size_t page_count, table_count;
    struct page *oldest, *newest;
    uint64_t placing;       /* rises when blocks that writes under way have taken must not be used any more */
    bool leases_were_taken; /* since the last seal: fresh blocks may be of leases that are no more */
    /* list_lock */
    pthread_mutex_t list_lock;
    struct page *dirty;
    size_t dirty_count;
    uint64_t *dropped;
    size_t dropped_count, dropped_room;
    /* The first served write that the host refused; list_lock */
    int failed_errno;
    uint64_t failed_address;
    /* no lock */
    _Atomic uint64_t seal_count;
    _Atomic uint64_t reuse_count; /* a block that is given up is not used again before it rises */
    atomic_bool is_frozen;
    atomic_bool is_calling; /* attention_fd was written to and not attended yet */
    int attention_fd;
    size_t seal_at;
    _Atomic size_t fresh_count;
    _Atomic(struct file *) files[MAX_STORAGE_ID + 1];
};

/* ---- plane.c: under the gate ------------------------------------------------------------------------- */

struct page *plane_find_page(struct plane *plane, uint64_t map_id, uint64_t page_index);
struct table *plane_find_table(struct plane *plane, uint64_t map_id);

/* The gate held alone: finds a table, or makes it; NULL when out of memory. */
struct table *need_table(struct plane *plane, uint64_t map_id);
/* The gate held alone: frees the table when nothing is known of it any more. */
void release_table(struct plane *plane, struct table *table);

/* ---- plane_files.c ------------------------------------------------------------------------------------ */

/* Read and write blocks that lie one behind the other; a mirror's legs are all written. */
enum plane_status read_extent(struct plane *plane, uint64_t address, size_t block_count, bool can_wait, char *buffer,
                              struct plane_refusal *why);
/* Lets the host fetch blocks while others are waited for; of images on several disks, all at once. */
void read_ahead(struct plane *plane, uint64_t address, size_t block_count);
enum plane_status write_extent(struct plane *plane, uint64_t address, size_t block_count, const char *data,
                               struct plane_refusal *why);
/* Whether the host has no room: a full filesystem, a quota, the largest file that it allows.  That harms nothing. */
bool is_full(int host_errno);

/* ---- plane_write.c ------------------------------------------------------------------------------------- */

/* `is_served`: nobody asked the control plane, and the table's rules say whether zeros are kept. */
enum plane_status write_bytes(struct plane *plane, uint64_t map_id, uint64_t offset_bytes, const void *data,
                              size_t length_bytes, bool is_served, bool can_wait, bool keep_zeros,
                              struct plane_refusal *why);

/* ---- plane_read.c ------------------------------------------------------------------------------------- */

/* Reads one block as it is now, and gives its mapping; a mismatch is damage.  Under no lock. */
enum plane_status read_block(struct plane *plane, uint64_t map_id, uint64_t virtual_block, bool can_wait, bool verify,
                             char *buffer, struct plane_mapping *mapping, struct plane_refusal *why);

/* ---- plane_spans.c: the pages of a change ------------------------------------------------------------- */

/* What most changes need; larger ones ask for memory. */
enum { INLINE_SPANS = 4 };

struct span {
    struct page *page;
    unsigned start, count;
};

struct spans {
    struct span *items;
    size_t count;
    struct span small[INLINE_SPANS];
};

/* Under the gate: finds every page of a range, ready for new mappings once locked and prepared; to be freed in any
 * case. */
enum plane_status find_spans(struct plane *plane, uint64_t map_id, uint64_t first_block, size_t block_count,
                             struct spans *spans, struct plane_refusal *why);
void free_spans(struct spans *spans);
void lock_spans(const struct spans *spans);
void unlock_spans(const struct spans *spans);
/* False when out of memory. */
bool prepare_spans(const struct spans *spans);

/* ---- plane_lease.c ------------------------------------------------------------------------------------- */

/* The table whose lease a column's new blocks come from; NULL when there is none yet. */
struct table *plane_column(struct plane *plane, struct table *table, uint64_t column);

/* With the lease lock held: takes exactly block_count blocks, in runs; there must be as many.  runs: room for
 * block_count. */
void table_take(struct table *table, uint64_t block_count, struct plane_run *runs);

/* The column whose lease a virtual block's new places come from. */
static inline uint64_t column_of(const struct table *table, uint64_t virtual_block)
{
    return table->stripe_columns ? virtual_block / table->stripe_unit % table->stripe_columns : 0;
}

/* Gives a block that no sealed mapping names back to the lease that it came from, to be the next that is taken. */
void plane_give_back(struct plane *plane, struct table *table, uint64_t virtual_block, uint64_t address);

/* The gate held alone: what writes under way have taken, and what is fresh, does not go back to its lease. */
void void_placements(struct plane *plane);

/* Whether a lease should be added to before it is used up: this table's own, or any of its columns'. */
bool lease_runs_low(struct table *table);
bool table_runs_low(struct plane *plane, struct table *table);

/* ---- plane_seal.c: fresh mappings ---------------------------------------------------------------------- */

/* Notes blocks that no mapping will ever name. */
void plane_drop(struct plane *plane, uint64_t address);

/* Under the page's lock: makes room for predecessors; false when out of memory. */
bool page_prepare(struct page *page);

/* Under the page's lock, after page_prepare: the mapping of one block is this from now on. */
void page_set(struct plane *plane, struct page *page, unsigned index, uint64_t address, uint32_t checksum);

static inline bool page_is_fresh(const struct page *page, unsigned index)
{
    return page->fresh[index / 64] >> index % 64 & 1;
}

#endif
