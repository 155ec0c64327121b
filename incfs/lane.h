/* The journal's fast lane: small commits that need no decision, made where fsync arrives.
 *
 * The control plane lends it the journal's end while nothing else waits to be committed, so that what a
 * lane's record says is always the next thing that happened.  A lane's commit is what incfs/checkpoint.py
 * does for a small one: seal, put the mappings and their data into one record, flush the journal.  The
 * sealed batches queue up for the control plane, which takes them before anything that came later.
 *
 * Invariants:
 *   1. Batches are sealed and queued, or handed to the control plane, under the lane's lock: their order is
 *      that of the seals.
 *   2. Record n+1 is begun after record n is durable; waiters are answered only then (I5).  A batch may be
 *      taken while its record is being flushed: whoever answers for it waits with lane_settle (I13).
 *   3. A record is written to every copy of the journal, and flushed side by side.  When some fail and another has it
 *      durable, the waiters are refused: the control plane first makes it known who was left behind, then answers.
 *   4. After a write or flush that failed for all copies the plane is frozen before anybody is answered, and the lane
 *      never opens again (I10).
 *   5. A record for which no copy has room is kept: its waiters are refused, and it is written by whoever settles next,
 *      before anything else.  Nothing of it was flushed, so writing it again is safe; until then the lane is closed.
 *
 * Locks: the lane's comes before the plane's gate, and is never held while the disk is waited for.
 */
#ifndef INCFS_LANE_H
#define INCFS_LANE_H

#include "hot.h"
#include "plane.h"

struct lane;

enum { LANE_MOST_COPIES = 4 };

/* The journal's end, as it is lent. */
struct lane_journal {
    int fds[LANE_MOST_COPIES]; /* of files that are alike */
    size_t copies;
    uint64_t end_bytes;   /* where the next record goes */
    uint64_t limit_bytes; /* no record is begun at or behind it */
    uint64_t nonce;       /* of the segment */
    uint64_t sequence;    /* of the last record */
    uint64_t folded;      /* the last commit that the tables contain */
    size_t most_blocks;   /* in one record */
    uint32_t block_bytes;
};

/* How a record reaches the disk; both return an errno. */
struct lane_disk {
    int (*write)(int fd, const void *bytes, size_t length, uint64_t offset);
    int (*flush)(int fd);
};

/* A committed batch, in the order of commits. */
struct lane_batch {
    struct lane_batch *next;
    struct plane_batch batch;
    uint64_t sequence;
};

struct lane *lane_new(struct plane *plane);
void lane_free(struct lane *lane);
/* For tests, before anything is lent: lets commits be stopped halfway, or fail. */
void lane_divert(struct lane *lane, const struct lane_disk *disk);

void lane_lend(struct lane *lane, const struct lane_journal *journal);
/* Goes on where it was closed; nobody else has appended since. */
void lane_reopen(struct lane *lane);
/* From now on no commit begins; one may still be under way. */
void lane_close(struct lane *lane);
/* Closes and waits for the commit under way; writes nothing else. */
void lane_stop(struct lane *lane);
/* Closes, waits for the commit under way, and writes the record that found no room, if there is one.  Returns an errno
 * if one failed: what it sealed is not durable. */
int lane_settle(struct lane *lane);
/* The errno for which the last record could not be written now, though it may be later, or 0. */
int lane_no_room(struct lane *lane);
/* The same, and gives the journal's end back. */
int lane_reclaim(struct lane *lane, uint64_t *end_bytes);
/* The errno for which a copy was left behind since the journal was lent, or 0.  While there is one, nothing is begun. */
int lane_left(struct lane *lane, size_t copy);
uint64_t lane_end_bytes(struct lane *lane);
/* The last commit whose flush has ended; those of batches that lane_take gave may be later. */
uint64_t lane_durable_sequence(struct lane *lane);
/* Another checkpoint has ended; said before any block that it freed is used again. */
void lane_set_folded(struct lane *lane, uint64_t folded);

/* Takes the batches committed so far, and with `rest` also closes and seals what no commit has.  They are
 * the caller's, each to be freed with lane_batch_free. */
enum plane_status lane_take(struct lane *lane, struct lane_batch **committed, struct plane_batch *rest);
void lane_batch_free(struct lane_batch *batch);

/* Makes everything written so far durable.  False, with nothing changed, when only the control plane may;
 * else the waiter belongs to the lane until it calls one of the two functions of `answers`. */
bool lane_sync(struct lane *lane, struct hot_waiter *waiter, bool can_wait, const struct hot_answers *answers);

#endif
