/* What the threads on /dev/fuse (hot.c, in _fusext) ask of the data plane (in _dataplane).
 *
 * The two modules are separate libraries; a capsule of this name carries the functions across. */
#ifndef INCFS_HOT_H
#define INCFS_HOT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HOT_SERVER_CAPSULE "incfs._dataplane.server"

/* Both functions return false, with nothing changed, when only the control plane may answer.  Inode
 * numbers of volumes and snapshots are their table numbers, and no others are served. */
struct hot_server {
    void *plane;
    /* The answer is *count bytes at buffer + *start. */
    bool (*read)(void *plane, uint64_t inode, uint64_t offset_bytes, size_t length_bytes, bool can_wait, char *buffer,
                 size_t room, size_t *start, size_t *count);
    bool (*write)(void *plane, uint64_t inode, uint64_t offset_bytes, const void *data, size_t length_bytes);
};

#endif
