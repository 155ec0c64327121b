/* What the threads on /dev/fuse (hot.c, in _fusext) ask of the data plane (in _dataplane).
 *
 * The two modules are separate libraries; a capsule of this name carries the functions across. */
#ifndef INCFS_HOT_H
#define INCFS_HOT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HOT_SERVER_CAPSULE "incfs._dataplane.server"

/* Somebody who waits until what was written is durable. */
struct hot_waiter {
    struct hot_waiter *next;
    uint64_t inode;
    bool gained_blocks; /* the file occupies more or less than the kernel was last told */
};

/* How a waiter hears; called by the thread of another waiter, too. */
struct hot_answers {
    void (*done)(struct hot_waiter *waiter, int error);
    void (*refused)(struct hot_waiter *waiter); /* the control plane must do it; nothing was done */
};

struct hot_stat {
    uint32_t mode, uid, gid, link_count, block_bytes;
    uint64_t size_bytes, stored_bytes;
    uint64_t accessed_ns, modified_ns, changed_ns;
};

/* All return false, with nothing changed, when only the control plane may answer.  Inode numbers of
 * volumes and snapshots are their table numbers, and no others are served. */
struct hot_server {
    void *owner;
    /* The answer is *count bytes at buffer + *start. */
    bool (*read)(void *owner, uint64_t inode, uint64_t offset_bytes, size_t length_bytes, bool can_wait, char *buffer,
                 size_t room, size_t *start, size_t *count);
    bool (*write)(void *owner, uint64_t inode, uint64_t offset_bytes, const void *data, size_t length_bytes);
    bool (*stat)(void *owner, uint64_t inode, struct hot_stat *stat);
    bool (*set_modified)(void *owner, uint64_t inode, uint64_t modified_ns);
    bool (*sync)(void *owner, struct hot_waiter *waiter, bool can_wait, const struct hot_answers *answers);
};

#endif
