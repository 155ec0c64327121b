/* The control plane as incfs/memory.py, store.py, committer.py and driver.py play it: one owner, whose steps no other
 * task of its own interrupts, and workers that flush for it.  Hot threads run beside all of it. */
#ifndef CONTROL_H
#define CONTROL_H

#include "lane.h"
#include "oracle.h"
#include "plane.h"
#include "tables.h"

/* What the owner does by itself, one step each. */
enum step_kind {
    STEP_SEAL,
    STEP_TAKE,     /* what the lane committed */
    STEP_TOUCH,    /* a record that goes with the next commit */
    STEP_COMMIT,
    STEP_CHECKPOINT,
    STEP_SNAPSHOT, /* of both volumes */
    STEP_REMOVE,   /* the newest snapshot */
    STEP_EVICT,
    STEP_SHRINK,
    STEP_REVOKE,
    STEP_SERVE,    /* another size and back */
    STEP_QUIET,    /* no writes, as a rollback begins */
    STEP_DISCARD,
    STEP_ATTACH,   /* another leg */
    STEP_TIMES,
    STEP_KINDS,
};

struct step {
    enum step_kind kind;
    unsigned volume, block, count;
};

enum { MOST_STEPS = 20 };

/* Owners that do one thing wrong, each of which must be found out. */
enum owner {
    OWNER_RIGHT,
    OWNER_SEALS_TWICE,          /* evicts with a second seal, after what the step has looked at */
    OWNER_ANSWERS_AT_ONCE,      /* an fsync that finds nothing pending, although the lane's record is being flushed */
    OWNER_LOADS_OLD_PAGES,      /* without what the lane committed of them */
    OWNER_REUSES_EARLY,         /* freed blocks, before the checkpoint */
    OWNER_LEAVES_LANE_OPEN,     /* while changes wait for a commit of its own */
    OWNER_APPENDS_BESIDE_LANE,  /* to the journal that it has lent */
    OWNERS,
};

/* What a hot thread leaves to the owner. */
struct request {
    enum { REQUEST_WRITE, REQUEST_READ, REQUEST_SYNC } kind;
    struct request *next;
    unsigned volume, first_word, word_count;
    uint64_t *words;
    bool is_done;
    int error;
};

struct control_options {
    enum owner owner;
    const struct step *steps;
    unsigned step_count, client_count;
    bool is_unverified; /* the second volume */
    bool has_other_leg; /* is attached by STEP_ATTACH */
    unsigned most_blocks;
    uint64_t limit_bytes;
};

void control_begin(const struct control_options *options, struct plane *plane, struct lane *lane);
/* Fibres: the owner, who makes commits durable for it, and who folds. */
void control_run(void *unused);
void control_commit(void *unused);
void control_fold(void *unused);

/* For clients. */
void control_ask(struct request *request);
void control_leave(void);
/* Whatever happens now, what was promised must be there. */
void control_cut(bool with_unflushed);

/* After the run: everything is taken over, and judged. */
void control_judge(void);

#endif
