#define FUSE_USE_VERSION 312
#include "fuse_init.h"

#include <linux/fuse.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>
#include <unistd.h>

/* Since Linux 6.6; headers may be older than the kernel. */
#ifndef FUSE_DIRECT_IO_ALLOW_MMAP
#define FUSE_DIRECT_IO_ALLOW_MMAP (1ULL << 36)
#endif

static _Atomic uint64_t asked_unique; /* of the first request, until it is answered */
static _Atomic uint64_t added_flags;  /* what its answer says beyond what libfuse can say; 32 bits and more as flags2 */
static bool maps_shared;

void init_allow_shared_mappings(bool are_allowed)
{
    maps_shared = are_allowed;
}

/* Before each write the kernel asks whether the file has capabilities that writing takes away, unless the
 * filesystem says that it takes them away itself.  libfuse 3.14 cannot say so; we say it in its name.  There
 * is nothing to do for it: no file of ours can have setuid bits or capabilities.  Nor can it say that a file
 * that the kernel does not cache may be mapped shared. */
static ssize_t write_reply(int fd, struct iovec *vector, int part_count, void *unused)
{
    (void)unused;
    const struct fuse_out_header *header = vector[0].iov_base;
    uint64_t asked = atomic_load(&asked_unique);
    if (asked && header->unique == asked && !header->error && part_count > 1) {
        struct fuse_init_out *out = vector[1].iov_base;
        uint64_t flags = atomic_load(&added_flags);
        out->flags |= (uint32_t)flags;
        if (flags >> 32 && vector[1].iov_len >= offsetof(struct fuse_init_out, flags2) + sizeof out->flags2) {
            out->flags |= FUSE_INIT_EXT;
            out->flags2 |= flags >> 32;
        }
        atomic_store(&asked_unique, 0);
    }
    return writev(fd, vector, part_count);
}

static ssize_t read_request(int fd, void *buffer, size_t length, void *unused)
{
    (void)unused;
    return read(fd, buffer, length);
}

void init_mounted(struct fuse_session *session, init_custom_io custom_io, int fd)
{
    static const struct fuse_custom_io io = {.writev = write_reply, .read = read_request};
    if (custom_io)
        custom_io(session, &io, fd);
}

void init_note(const void *request, size_t length)
{
    const struct fuse_in_header *header = request;
    const struct fuse_init_in *in = (const void *)(header + 1);
    bool is_first = length >= sizeof *header && header->opcode == FUSE_INIT;
    if (!is_first || length < sizeof *header + offsetof(struct fuse_init_in, flags) + sizeof in->flags)
        return;
    /* The answer is changed if the kernel knows what it would be told. */
    uint64_t known = in->flags;
    if (known & FUSE_INIT_EXT && length >= sizeof *header + offsetof(struct fuse_init_in, flags2) + sizeof in->flags2)
        known |= (uint64_t)in->flags2 << 32;
    atomic_store(&added_flags, known & (FUSE_HANDLE_KILLPRIV_V2 | (maps_shared ? FUSE_DIRECT_IO_ALLOW_MMAP : 0)));
    if (atomic_load(&added_flags))
        atomic_store(&asked_unique, header->unique);
}
