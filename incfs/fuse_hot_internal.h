/* What the files of the hot threads share.  See fuse_hot.h. */
#ifndef INCFS_FUSE_HOT_INTERNAL_H
#define INCFS_FUSE_HOT_INTERNAL_H

#define FUSE_USE_VERSION 312
#include "fuse_hot.h"

#include <stdatomic.h>
#include <stdbool.h>

struct fuse_in_header;

/* Room for the largest read, and for what lies around it in its first and last block. */
enum { READ_BYTES = 1 << 20, LARGEST_BLOCK = 65536, ROOM = READ_BYTES + 2 * LARGEST_BLOCK };

struct durations {
    _Atomic uint64_t counts[HOT_OPERATIONS][HOT_BUCKETS], sum_ns[HOT_OPERATIONS];
};

struct item {
    struct hot_waiter waiter; /* first: an fsync that waits for the disk is known by it */
    uint64_t started_ns;      /* when that one was received */
    struct item *next;
    struct fuse_buf buffer;
    int result;
};

struct worker {
    pthread_t thread;
    char *room; /* for the bytes of a read */
    struct fuse_buf buffer;
    bool stands_by;      /* takes requests only while all others wait for their hosts, and waits for none */
    uint64_t started_ns; /* when the request at hand was received */
    _Atomic uint64_t busy_since_ns; /* the same; 0 while there is none */
    struct durations durations;
    _Atomic uint64_t reads, read_bytes, writes, write_bytes, syncs, lookups, handed_reads, handed_writes, others;
};

/* ---- fuse_hot_queue.c ------------------------------------------------------------------------------------ */

/* Makes the eventfd; false when there is none. */
bool queue_open(void);
/* Forgets what is queued. */
void queue_close(void);
/* Puts a request into an item of its own, and takes a spare buffer in exchange if there is one. */
void put_away(struct item *item, struct fuse_buf *buffer, int result);
/* Leaves a request to Python. */
void hand_over(struct item *item);
/* Keeps the item's buffer as a spare and frees the rest. */
void free_item(struct item *item);
/* The session is over, or reading failed for good: every receive gives `result` once the queue is empty. */
void end_queue(int result);

/* ---- fuse_hot_serve.c ------------------------------------------------------------------------------------ */

/* From now on requests are answered from there, through a descriptor of /dev/fuse, by so many threads. */
void serve_from(const struct hot_server *given, int fd, unsigned threads);
/* Answers a request, or puts it away in the item, which is NULL then; false when neither. */
bool serve(struct worker *worker, struct item **item, size_t length);
uint64_t now_ns(void);
/* Of flushes: whoever answers one is not the thread that received it. */
struct durations *sync_durations(void);

#endif
