/* What the control plane knows of each volume, as incfs/log.py, catalog.py and overlay.py do it in Python: which block
 * holds what, now and in snapshots; how a journal record changes that; and what a crash leaves of it.
 */
#ifndef TABLES_H
#define TABLES_H

#include "oracle.h"
#include "plane.h"

enum {
    FIRST_BLOCK = PLANE_PAGE_BLOCKS - BLOCKS / 2, /* of each volume's blocks that are used */
    SNAPSHOTS = 3,
    IMAGE_BLOCKS = 64,
    MOST_CHANGES_PENDING = 128,
};
static const uint64_t STORAGE = (uint64_t)1 << 48;

static inline uint64_t map_id_of(unsigned volume)
{
    return (uint64_t)(volume + 1) << 32;
}

/* An increment: what the live table, or the next newer snapshot, had where it was overwritten. */
struct snapshot {
    bool is_taken, has[BLOCKS];
    bool is_removed; /* what it had goes away, piece by piece */
    struct plane_mapping increment[BLOCKS];
    uint64_t begin, end; /* between which it was taken */
    uint64_t number;     /* no two have the same */
};

struct tables {
    struct plane_mapping live[VOLUMES][BLOCKS];
    struct snapshot snapshots[VOLUMES][SNAPSHOTS]; /* those taken come first, oldest first */
    uint64_t sequence;                             /* of the last record that is in here */
    uint64_t segment;                              /* of the journal, which goes on from there */
};

/* What a journal record of the control plane says; lane.c's own say "map" in their way. */
enum change_kind { CHANGE_MAP, CHANGE_SNAPSHOT, CHANGE_FOLD, CHANGE_DROP, CHANGE_TOUCH };

struct table_change {
    enum change_kind kind;
    unsigned volume, block;
    struct plane_mapping mapping;
    uint64_t begin, end, number; /* of a snapshot */
};

/* Blocks that nothing names any more; NULL: nobody wants to know. */
typedef void (*on_freed)(uint64_t address);

int newest_snapshot(const struct tables *tables, unsigned volume);
void tables_apply(struct tables *tables, const struct table_change *change, on_freed freed);
/* Where a snapshot's block lies. */
struct plane_mapping snapshot_mapping(const struct tables *tables, unsigned volume, unsigned snapshot, unsigned block);

/* Reads what a table names from an image's bytes, comparing checksums. */
void picture_live(const struct tables *tables, const unsigned char *image, struct picture *picture, const char *whose);
void picture_snapshot(const struct tables *tables, unsigned volume, unsigned snapshot, const unsigned char *image,
                      struct picture *picture, const char *whose);

/* All snapshots, those of one moment together; `is_seen`: the oracle takes note of what is in them. */
void judge_snapshots(const struct tables *tables, const unsigned char *image, const char *whose, bool is_seen);

/* ---- The journal ----------------------------------------------------------------------------- */

enum { SECTOR_BYTES = 512, RECORD_HEAD_BYTES = 32, MOST_RECORD_BYTES = 24 << 10 };

/* Makes a record of the control plane, with the data of its mappings or without; returns its length. */
size_t encode_record(unsigned char *record, uint64_t sequence, uint64_t nonce, uint64_t folded,
                     const struct table_change *changes, unsigned count, const unsigned char *data,
                     unsigned data_blocks);
void encode_head(unsigned char *head, const char *magic, uint32_t length, uint64_t sequence, uint64_t nonce,
                 uint32_t checksum);
void encode_segment(unsigned char *sector, uint64_t number, uint64_t start_sequence, uint64_t nonce);

/* Cuts the power and recovers: the tables that were stored last, and the journal's records behind them.  Judges that
 * what comes out is a point in time, with everything that was promised; and that each record says that it needs tables
 * which know that its blocks were free: `freed_by` has the record of the checkpoint that made each free last. */
void judge_cut(const struct tables *stored, const uint64_t freed_by[IMAGE_BLOCKS], bool with_unflushed);

#endif
