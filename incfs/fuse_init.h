/* What is agreed with the kernel in a session's first exchange, beyond what libfuse can say. */
#ifndef INCFS_FUSE_INIT_H
#define INCFS_FUSE_INIT_H

#include <fuse_lowlevel.h>
#include <stdbool.h>
#include <stddef.h>

typedef int (*init_custom_io)(struct fuse_session *, const struct fuse_custom_io *, int);

/* The session is mounted, and nothing was received yet.  `custom_io` is libfuse's; NULL: it has none of this shape.
 * From then on nothing is spliced. */
void init_mounted(struct fuse_session *session, init_custom_io custom_io, int fd);

/* Whether files that the kernel does not cache may be mapped shared, in the next session, if the kernel knows how. */
void init_allow_shared_mappings(bool are_allowed);

/* Looks at a request that was received, if it is the first.  Any thread. */
void init_note(const void *request, size_t length);

#endif
