/* Threads that read /dev/fuse and answer what the data plane can serve at once, without the GIL: READ,
 * WRITE, FSYNC, and what the kernel asks around these.  Every other request they put into a queue, untouched, and Python takes it from
 * there: fuse_session_fd gives pyfuse3 the queue's eventfd instead of /dev/fuse, and
 * fuse_session_receive_buf the oldest request in it (_fusext_session.c has both).
 *
 * Invariants:
 *   1. A request is answered here or queued, never both and never neither, until hot_stop.
 *   2. While the queue holds something or the session has ended, the eventfd is readable.
 *   3. Memory in the queue and among the spares was made by libfuse, which alone knows its size:
 *      buffers are swapped, never made or cut here.
 *
 * Threads: the queue has a lock of its own, held for a few instructions.  The threads never take the
 * GIL, so waiting for them while holding it is safe.
 */
#ifndef INCFS_FUSE_HOT_H
#define INCFS_FUSE_HOT_H

#include "hot.h"

#include <fuse_lowlevel.h>
#include <stdbool.h>
#include <stdint.h>

enum { HOT_MAX_THREADS = 16 };

/* libfuse's own functions, which this module's stand in front of. */
struct hot_libfuse {
    int (*session_fd)(struct fuse_session *);
    int (*session_receive_buf)(struct fuse_session *, struct fuse_buf *);
};

/* How long requests took that were served, by what they asked for: bucket i has those of less than 4^i times 4096 ns
 * (histogram.py); the last one all that are longer. */
enum hot_operation { HOT_READ, HOT_WRITE, HOT_FSYNC, HOT_GETATTR, HOT_SETATTR, HOT_GETXATTR, HOT_OPERATIONS };
enum { HOT_BUCKETS = 13 };

struct hot_durations {
    uint64_t counts[HOT_OPERATIONS][HOT_BUCKETS], sum_ns[HOT_OPERATIONS];
};

struct hot_counts {
    uint64_t reads, read_bytes, writes, write_bytes, syncs, lookups; /* served */
    uint64_t handed_reads, handed_writes, others;    /* left to Python */
};

/* For a session that was just made: from now on requests for Python come through hot_fd and
 * hot_receive.  False when the descriptor cannot be made. */
bool hot_open(struct fuse_session *session, const struct hot_libfuse *libfuse);
bool hot_is_open(void);
int hot_fd(void);
int hot_receive(struct fuse_buf *buffer);

/* Starts threads; `server` is copied.  Returns 0 or an errno. */
int hot_start(const struct hot_server *server, unsigned thread_count);
/* Ends them: on return none touches the session or the plane.  May be called at any time; not with the
 * GIL held by a thread that a hot thread waits for (none does). */
void hot_stop(void);
/* Forgets the session, with what is still queued. */
void hot_close(void);

/* From now on every fsync is left to Python, or not any more: one that is received after the return. */
void hot_leave_syncs(bool are_left);
/* Whether the pool is full.  Then the kernel, which caches writes and would go on to take them, is told so before each:
 * it asks through the handle for attributes, and gives the error to the writer.  Handles that can be read, too, are
 * left alone: a read at the end asks in the same way. */
void hot_refuse_writers(bool are_refused);
bool hot_is_refused(uint64_t handle);

struct hot_counts hot_get_counts(void);
struct hot_durations hot_get_durations(void);

#endif
