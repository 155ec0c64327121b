/* Threads that read /dev/fuse and answer what the data plane can serve; see fuse_hot.c. */
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
    int (*session_custom_io)(struct fuse_session *, const struct fuse_custom_io *, int); /* NULL: not of this shape */
};

struct hot_counts {
    uint64_t reads, read_bytes, writes, write_bytes, syncs, lookups; /* served */
    uint64_t handed_reads, handed_writes, others;    /* left to Python */
};

/* For a session that was just made: from now on requests for Python come through hot_fd and
 * hot_receive.  False when the descriptor cannot be made. */
bool hot_open(struct fuse_session *session, const struct hot_libfuse *libfuse);
bool hot_is_open(void);
/* The session is mounted: sees to what is agreed with the kernel. */
void hot_mounted(void);
int hot_fd(void);
int hot_receive(struct fuse_buf *buffer);

/* Starts threads; `server` is copied.  Returns 0 or an errno. */
int hot_start(const struct hot_server *server, unsigned thread_count);
/* Ends them: on return none touches the session or the plane.  May be called at any time; not with the
 * GIL held by a thread that a hot thread waits for (none does). */
void hot_stop(void);
/* Forgets the session, with what is still queued. */
void hot_close(void);

struct hot_counts hot_get_counts(void);

#endif
