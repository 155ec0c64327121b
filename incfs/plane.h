/* The native data plane: resident map pages, and bytes read and written through them.
 *
 * The C twin of incfs/dataplane.py, which is the specification: what is said there of pages, leases,
 * fresh blocks and seals holds here too, and tests hold the two against each other.  Knows nothing of
 * Python and may be called from any thread.
 *
 * Locks, in the order in which they are taken:
 *   1. gate: a reader-writer lock.  Reads, writes and discards hold it shared, so that many run at
 *      once; whatever changes which pages, tables and leases there are holds it alone, and so does
 *      seal, which therefore finds no write half done.
 *   2. page locks, of one table only, by rising index: they guard a page's mappings.
 *   3. lease locks of a table's columns, by rising column; or the plane's list lock.  Nothing else is
 *      taken under these.
 *
 * The host is never waited for under any of them: a disk that is slow keeps waiting who asked it.
 *
 * A write takes blocks that no mapping names (gate, for a moment), writes them without a lock, and sets its
 * mappings, all at once (gate again).  What happened meanwhile decides whether it still may: else its blocks
 * are given up and it begins anew, or is refused.  No block is written that a mapping names.
 * A read copies mappings and reads without locks; when what it finds does not match, it looks again, and only
 * while the mapping stays what it was is the block damaged.
 */
#ifndef INCFS_PLANE_H
#define INCFS_PLANE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PLANE_INHERIT = 0, PLANE_HOLE = 1, PLANE_PAGE_BLOCKS = 512, PLANE_MAX_COLUMNS = 64, PLANE_MAX_LEGS = 4 };

struct plane;

enum plane_status {
    PLANE_OK,
    PLANE_NOT_RESIDENT, /* page_index must be loaded */
    PLANE_NO_LEASE,     /* block_count blocks must be granted to column */
    PLANE_WOULD_WAIT,   /* block_count blocks at address must be brought into the page cache */
    PLANE_MISMATCH,     /* virtual_block at address has checksum found, not expected */
    PLANE_READ_ERROR,   /* host_errno at address; 0: the image ends too early */
    PLANE_WRITE_ERROR,  /* host_errno at address */
    PLANE_LEG_ERROR,    /* a write to number leg of the mirror at address failed, with host_errno; others may be right */
    PLANE_NO_MEMORY,    /* nothing was changed */
    PLANE_NOT_SERVED,   /* only the control plane may answer this */
};

/* Why a request was not served; which members count, plane_status says. */
struct plane_refusal {
    uint64_t page_index;
    uint64_t virtual_block;
    uint64_t address;
    uint64_t block_count;
    uint64_t column;
    uint32_t found, expected;
    int host_errno;
    unsigned leg;
};

struct plane_mapping {
    uint64_t address;
    uint32_t checksum;
};

struct plane_run {
    uint64_t address, count;
};

/* One mapping appended since the last seal, and the one it replaced. */
struct plane_appended {
    uint64_t address, old_address;
    uint32_t checksum, old_checksum;
    uint16_t index; /* in the page */
};

struct plane_sealed_page {
    uint64_t map_id, page_index;
    size_t first, count; /* in the batch's `appended` */
};

/* When a served write last changed a table, in nanoseconds since 1970. */
struct plane_written {
    uint64_t map_id, written_ns;
};

struct plane_batch {
    struct plane_sealed_page *pages; /* by rising map_id and page_index */
    size_t page_count;
    struct plane_appended *appended;
    struct plane_written *written; /* of these pages' tables, as far as nobody has asked for it yet */
    size_t written_count;
    uint64_t *dropped; /* taken from a lease that was taken back meanwhile, and not used */
    size_t dropped_count;
};

struct plane *plane_new(uint32_t block_bytes);
void plane_free(struct plane *plane);

/* Lets addresses of a storage volume be used: block n lies at data_offset + n * block_bytes of each fd, the legs of a
 * mirror.  Reads use the first.  No write that only the descriptors before know will be seen after return.
 * The descriptors stay the caller's and must outlive the plane. */
enum plane_status plane_attach(struct plane *plane, uint16_t storage_id, const int *fds, unsigned fd_count,
                               uint64_t data_offset);
bool plane_is_attached(struct plane *plane, uint64_t address);

/* Pages: the storage volumes of all addresses must be attached. */
enum plane_status plane_load(struct plane *plane, uint64_t map_id, uint64_t page_index,
                             const struct plane_mapping mappings[PLANE_PAGE_BLOCKS], uint64_t hole);
void plane_evict(struct plane *plane, uint64_t map_id);
/* Evicts what was not used lately; *evicted (to be freed) is pairs of map_id and page_index. */
enum plane_status plane_shrink(struct plane *plane, size_t page_count, uint64_t **evicted, size_t *evicted_count);
size_t plane_page_count(struct plane *plane);
bool plane_is_resident(struct plane *plane, uint64_t map_id, uint64_t page_index);

/* Leases: of a table, or of a column of a striped one: map_id | column. */
enum plane_status plane_grant(struct plane *plane, uint64_t map_id, struct plane_run run);
/* Takes back unused blocks, of all tables when map_id is NULL; *runs is to be freed.  Blocks that writes under way
 * have taken are not among them: these writes will not be seen, and the blocks are among the next batch's `dropped`. */
enum plane_status plane_revoke(struct plane *plane, const uint64_t *map_id, struct plane_run **runs, size_t *run_count);

uint64_t plane_leased_blocks(struct plane *plane, uint64_t map_id);
/* Lets new blocks of a live table come from `columns` leases in turn, unit_blocks from each. */
enum plane_status plane_stripe(struct plane *plane, uint64_t map_id, uint64_t unit_blocks, uint64_t columns);

/* Lets mappings of a resident page that are `old`, or are fresh and replaced `old`, be `new`. */
struct plane_move {
    uint64_t index, old_address, new_address;
};
void plane_move(struct plane *plane, uint64_t map_id, uint64_t page_index, const struct plane_move *moves,
                size_t move_count);

/* What a volume's policy says of its data. */
struct plane_rules {
    bool keeps_zeros;   /* blocks of zeros are stored, they become no holes */
    bool is_unverified; /* reads do not compare checksums; all else does */
};

/* Blocks.  `can_wait`: read the disk here rather than refuse. */
enum plane_status plane_read(struct plane *plane, uint64_t map_id, uint64_t first_block, size_t block_count, bool can_wait,
                             bool verify, void *buffer, struct plane_refusal *why);
/* Any byte range; what is missing of the first and the last block is read and kept. */
enum plane_status plane_write(struct plane *plane, uint64_t map_id, uint64_t offset_bytes, const void *data,
                              size_t length_bytes, bool can_wait, bool keep_zeros, struct plane_refusal *why);
enum plane_status plane_discard(struct plane *plane, uint64_t map_id, uint64_t first_block, size_t block_count,
                                struct plane_refusal *why);

/* What stat() shows of a table. */
struct plane_facts {
    uint32_t mode, uid, gid, link_count;
    uint64_t mapped_blocks;
    uint64_t accessed_ns, modified_ns, changed_ns;
};

/* Requests that are served without the control plane.  It says of which tables, up to which size, and
 * whether they may be written; everything else is PLANE_NOT_SERVED and has changed nothing. */
enum plane_status plane_serve(struct plane *plane, uint64_t map_id, uint64_t size_bytes, bool is_writable,
                              struct plane_rules rules, const struct plane_facts *facts);
void plane_unserve(struct plane *plane, uint64_t map_id);
/* The pool failed: no write is served any more, and none that is under way will be seen. */
void plane_freeze(struct plane *plane);
/* The bytes are *count ones at buffer + *start; short at the end of the table. */
enum plane_status plane_serve_read(struct plane *plane, uint64_t map_id, uint64_t offset_bytes, size_t length_bytes,
                                   bool can_wait, char *buffer, size_t room, size_t *start, size_t *count);
enum plane_status plane_serve_write(struct plane *plane, uint64_t map_id, uint64_t offset_bytes, const void *data,
                                    size_t length_bytes);
/* The same, and why not; `can_wait` for what a block that is written in part lacks. */
enum plane_status plane_write_served(struct plane *plane, uint64_t map_id, uint64_t offset_bytes, const void *data,
                                     size_t length_bytes, bool can_wait, struct plane_refusal *why);

/* The facts as of now, and the size; false when the table is not served. */
bool plane_serve_stat(struct plane *plane, uint64_t map_id, struct plane_facts *facts, uint64_t *size_bytes);
/* Sets the time of modification, if it only goes forward. */
bool plane_serve_time(struct plane *plane, uint64_t map_id, uint64_t modified_ns);

/* Returns a descriptor that becomes readable when served writes need the control plane soon: a lease
 * runs low, or seal_at mappings are unsealed; -1 when there is none.  It belongs to the plane. */
int plane_watch(struct plane *plane, size_t seal_at);
/* Makes the descriptor readable. */
void plane_call(struct plane *plane);
/* Resets the descriptor; *tables (to be freed) are those whose leases run low. */
enum plane_status plane_attend(struct plane *plane, uint64_t **tables, size_t *table_count);
/* Takes what is known of the times of served writes: *writes (to be freed) is pairs of map_id and
 * nanoseconds since 1970. */
enum plane_status plane_written(struct plane *plane, uint64_t **writes, size_t *write_count);

int64_t plane_mapped_delta(struct plane *plane, uint64_t map_id);
size_t plane_fresh_count(struct plane *plane);
uint64_t plane_seal_count(struct plane *plane);
/* PLANE_NOT_SERVED, with nothing changed, when more than `most` mappings are fresh. */
enum plane_status plane_seal(struct plane *plane, size_t most, struct plane_batch *batch);
/* Takes the time of a table's last served write; 0 when nobody needs to be told. */
uint64_t plane_take_written(struct plane *plane, uint64_t map_id);
/* A write or flush that was not asked for by the control plane failed: nothing is served any more. */
void plane_fail(struct plane *plane, int host_errno, uint64_t address);
/* What plane_fail was told first; 0 if nothing failed. */
int plane_failure(struct plane *plane, uint64_t *address);
/* Writes all of it.  Returns an errno. */
int write_fully(int fd, const void *bytes, size_t length, uint64_t offset);
/* Reads one block, waiting for the disk, from the first leg that has it right.  Returns an errno. */
int plane_read_stored(struct plane *plane, uint64_t address, uint32_t checksum, char *block);
void plane_batch_free(struct plane_batch *batch);
/* Mappings of a page, from `start` on and before `end`, that are one run: of slots, and of addresses or of one kind
 * of zeros. */
size_t plane_run_length(const struct plane_appended *appended, size_t start, size_t end);

/* Shows everything to callbacks, for tests; they must not call the plane. */
struct plane_visitor {
    void *context;
    /* A resident page; `fresh` are its unsealed mappings and what they replaced, by index. */
    void (*page)(void *context, uint64_t map_id, uint64_t page_index, const uint64_t *addresses,
                 const uint32_t *checksums, const struct plane_appended *fresh, size_t fresh_count);
    void (*lease)(void *context, uint64_t map_id, struct plane_run run);
    void (*dropped)(void *context, uint64_t address);
};
void plane_inspect(struct plane *plane, const struct plane_visitor *visitor);

#endif
