/* The image files below the native data plane: whole extents of blocks, read and written. */
#define _GNU_SOURCE
#include "crc32c.h"
#include "plane_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

enum plane_status plane_attach(struct plane *plane, uint16_t storage_id, const int *fds, unsigned fd_count,
                               uint64_t data_offset)
{
    struct file *file = malloc(sizeof *file);
    if (!file)
        return PLANE_NO_MEMORY;
    memcpy(file->fds, fds, fd_count * sizeof *fds);
    file->fd_count = fd_count;
    file->data_offset = data_offset;
    atomic_init(&file->knowledge, TELLS);
    pthread_rwlock_wrlock(&plane->gate);
    file->superseded = atomic_load(&plane->files[storage_id]);
    atomic_store(&plane->files[storage_id], file);
    /* A write under way may lack a leg that there is now. */
    plane->placing += file->superseded != NULL;
    pthread_rwlock_unlock(&plane->gate);
    return PLANE_OK;
}

bool plane_is_attached(struct plane *plane, uint64_t address)
{
    return atomic_load(&plane->files[address >> ADDRESS_BLOCK_BITS]) != NULL;
}

static struct file *file_of(struct plane *plane, uint64_t address)
{
    return atomic_load_explicit(&plane->files[address >> ADDRESS_BLOCK_BITS], memory_order_acquire);
}

static off_t file_offset(const struct plane *plane, const struct file *file, uint64_t address)
{
    uint64_t block_index = address & (((uint64_t)1 << ADDRESS_BLOCK_BITS) - 1);
    return file->data_offset + block_index * plane->block_bytes;
}

static enum plane_status read_waiting(int fd, off_t offset, char *buffer, size_t length, int *error)
{
    while (length) {
        ssize_t count = pread(fd, buffer, length, offset);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0) {
            *error = count < 0 ? errno : 0;
            return PLANE_READ_ERROR;
        }
        buffer += count;
        offset += count;
        length -= count;
    }
    return PLANE_OK;
}

/* Reads blocks that lie one behind the other. */
enum plane_status read_extent(struct plane *plane, uint64_t address, size_t block_count, bool can_wait, char *buffer,
                              struct plane_refusal *why)
{
    struct file *file = file_of(plane, address);
    off_t offset = file_offset(plane, file, address);
    size_t length = block_count * plane->block_bytes;
    why->address = address;
    why->block_count = block_count;
    int knowledge = atomic_load_explicit(&file->knowledge, memory_order_relaxed);
    if (can_wait || knowledge == NEVER_WAITS)
        return read_waiting(file->fds[0], offset, buffer, length, &why->host_errno);
    if (knowledge == MAY_WAIT)
        return PLANE_WOULD_WAIT;
    struct iovec vector = {buffer, length};
    ssize_t count = preadv2(file->fds[0], &vector, 1, offset, RWF_NOWAIT);
    if (count == (ssize_t)length)
        return PLANE_OK;
    if (count >= 0 || errno == EAGAIN || errno == EINTR)
        return PLANE_WOULD_WAIT;
    if (errno != EOPNOTSUPP && errno != ENOSYS) {
        why->host_errno = errno;
        return PLANE_READ_ERROR;
    }
    /* The filesystem does not tell; one in memory never waits. */
    struct statfs found;
    bool is_memory = !fstatfs(file->fds[0], &found) && (found.f_type == TMPFS_MAGIC || found.f_type == RAMFS_MAGIC);
    atomic_store_explicit(&file->knowledge, is_memory ? NEVER_WAITS : MAY_WAIT, memory_order_relaxed);
    return is_memory ? read_waiting(file->fds[0], offset, buffer, length, &why->host_errno) : PLANE_WOULD_WAIT;
}

void read_ahead(struct plane *plane, uint64_t address, size_t block_count)
{
    struct file *file = file_of(plane, address);
    posix_fadvise(file->fds[0], file_offset(plane, file, address), block_count * plane->block_bytes, POSIX_FADV_WILLNEED);
}

int write_fully(int fd, const void *bytes, size_t length, uint64_t offset)
{
    const char *data = bytes;
    while (length) {
        ssize_t count = pwrite(fd, data, length, offset);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return count < 0 ? errno : EIO;
        data += count;
        offset += count;
        length -= count;
    }
    return 0;
}

bool is_full(int host_errno)
{
    return host_errno == ENOSPC || host_errno == EDQUOT || host_errno == EFBIG;
}

enum plane_status write_extent(struct plane *plane, uint64_t address, size_t block_count, const char *data,
                               struct plane_refusal *why)
{
    struct file *file = file_of(plane, address);
    off_t offset = file_offset(plane, file, address);
    for (unsigned leg = 0; leg < file->fd_count; leg++) {
        int error = write_fully(file->fds[leg], data, block_count * plane->block_bytes, offset);
        if (!error)
            continue;
        why->address = address;
        why->host_errno = error;
        why->leg = leg;
        return file->fd_count > 1 && !is_full(error) ? PLANE_LEG_ERROR : PLANE_WRITE_ERROR;
    }
    return PLANE_OK;
}

int plane_read_stored(struct plane *plane, uint64_t address, uint32_t checksum, char *block)
{
    const struct file *file = file_of(plane, address);
    off_t offset = file_offset(plane, file, address);
    int error = EIO;
    for (unsigned leg = 0; leg < file->fd_count; leg++) {
        int found = 0;
        enum plane_status status = read_waiting(file->fds[leg], offset, block, plane->block_bytes, &found);
        if (status == PLANE_OK && crc32c(block, plane->block_bytes) == checksum)
            return 0;
        error = found ? found : error;
    }
    return error;
}
