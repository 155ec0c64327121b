/* The host's files.  See disk.h. */
#define _GNU_SOURCE
#include "disk.h"

#include "fibres.h"

#include <errno.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/uio.h>
#include <sys/vfs.h>

enum { SECTOR = 64, MOST_BYTES = JOURNAL_BYTES, MOST_SECTORS = MOST_BYTES / SECTOR, EVENT_FD = FIRST_FD + DISK_FILES };

struct file {
    unsigned char cache[MOST_BYTES], durable[MOST_BYTES];
    /* Numbers of writes: a sector is dirty while the cache has a later one. */
    uint32_t version[MOST_SECTORS], durable_version[MOST_SECTORS];
    size_t used;
};

static struct file files[DISK_FILES];
static struct disk_faults faults;
static unsigned fault_count;
static bool has_failed;
static uint32_t last_version;
static uint64_t signals;

void disk_begin(void)
{
    for (unsigned i = 0; i < DISK_FILES; i++) {
        struct file *file = &files[i];
        size_t sectors = (file->used + SECTOR - 1) / SECTOR;
        memset(file->cache, 0, sectors * SECTOR);
        memset(file->durable, 0, sectors * SECTOR);
        memset(file->version, 0, sectors * sizeof *file->version);
        memset(file->durable_version, 0, sectors * sizeof *file->durable_version);
        file->used = 0;
    }
    faults = (struct disk_faults){0};
    last_version = 0;
    signals = 0;
    has_failed = false;
}

void disk_fail(const struct disk_faults *given)
{
    faults = *given;
    fault_count = 0;
}

int disk_fd(enum disk_file file)
{
    return FIRST_FD + file;
}

bool disk_has_failed(void)
{
    return has_failed;
}

const unsigned char *disk_cache(enum disk_file file)
{
    return files[file].cache;
}

size_t disk_used(enum disk_file file)
{
    return files[file].used;
}

uint64_t disk_signals(void)
{
    return signals;
}

const unsigned char *disk_after_cut(enum disk_file number, bool with_unflushed)
{
    static unsigned char left[DISK_FILES][MOST_BYTES];
    const struct file *file = &files[number];
    memcpy(left[number], file->durable, file->used);
    if (with_unflushed)
        for (size_t sector = 0; sector * SECTOR < file->used; sector++)
            if (file->version[sector] != file->durable_version[sector] && fibres_random(2))
                memcpy(left[number] + sector * SECTOR, file->cache + sector * SECTOR, SECTOR);
    return left[number];
}

static struct file *file_of(int fd, size_t length, int64_t offset)
{
    if (fd < FIRST_FD || fd >= EVENT_FD)
        fibres_fail("descriptor %d is used, which is none of a file", fd);
    size_t most = fd < FIRST_FD + JOURNAL ? IMAGE_BYTES : JOURNAL_BYTES;
    if (offset < 0 || offset + length > most)
        fibres_fail("bytes %ld to %ld of a file that has %zu", (long)offset, (long)(offset + length), most);
    return &files[fd - FIRST_FD];
}

static bool fails(enum fault kind)
{
    if (faults.kind != kind || ++fault_count < faults.at || fault_count >= faults.at + faults.count)
        return false;
    has_failed |= kind != FAULT_JOURNAL_FULL; /* which harms nothing */
    return true;
}

static size_t counted(size_t length)
{
    return faults.is_short && length > 1 && !fibres_random(16) ? 1 + fibres_random(length - 1) : length;
}

/* Two halves, between which others may run: no write is a single instant. */
static void copy(unsigned char *target, const unsigned char *source, size_t length, const char *what)
{
    size_t half = length / 2 & ~(size_t)7;
    memcpy(target, source, half);
    fibres_point(what);
    memcpy(target + half, source + half, length - half);
}

static int64_t failed(int error)
{
    errno = error;
    return -1;
}

int64_t hooks_pread64(int fd, void *buffer, size_t length, int64_t offset)
{
    struct file *file = file_of(fd, length, offset);
    fibres_point("read");
    if (fd < FIRST_FD + JOURNAL && fails(FAULT_READ_IMAGE))
        return failed(EIO);
    length = counted(length);
    copy(buffer, file->cache + offset, length, "reading");
    fibres_point("read done");
    return length;
}

int64_t hooks_preadv64v2(int fd, const struct iovec *vector, int count, int64_t offset, int flags)
{
    if (count != 1)
        fibres_fail("reads of %d pieces are not simulated", count);
    if (flags & RWF_NOWAIT && faults.waiting != TELLS)
        return failed(EOPNOTSUPP);
    if (flags & RWF_NOWAIT && fibres_random(100) < faults.miss_percent) {
        fibres_point("read would wait");
        return failed(EAGAIN);
    }
    return hooks_pread64(fd, vector->iov_base, vector->iov_len, offset);
}

int hooks_fstatfs64(int fd, struct statfs *found)
{
    file_of(fd, 0, 0);
    fibres_point("look at the filesystem");
    *found = (struct statfs){.f_type = faults.waiting == IS_MEMORY ? TMPFS_MAGIC : EXT4_SUPER_MAGIC};
    return 0;
}

static int write_fault(int fd)
{
    if (fd >= FIRST_FD + JOURNAL)
        return fails(FAULT_WRITE_JOURNAL) ? EIO : fails(FAULT_JOURNAL_FULL) ? ENOSPC : 0;
    return fails(FAULT_WRITE_IMAGE) ? EIO : fails(FAULT_IMAGE_FULL) ? ENOSPC : 0;
}

static void mark(struct file *file, size_t length, int64_t offset)
{
    for (size_t sector = offset / SECTOR; sector <= (offset + length - 1) / SECTOR; sector++)
        file->version[sector] = ++last_version;
    if (offset + length > file->used)
        file->used = offset + length;
}

int64_t hooks_pwrite64(int fd, const void *bytes, size_t length, int64_t offset)
{
    struct file *file = file_of(fd, length, offset);
    fibres_point("write");
    int error = write_fault(fd);
    if (error)
        return failed(error);
    length = counted(length);
    mark(file, length, offset);
    copy(file->cache + offset, bytes, length, "writing");
    mark(file, length, offset);
    fibres_point("write done");
    return length;
}

/* What is dirty now becomes durable some time before the end.  After a failure the host takes it for clean, and it is
 * lost. */
int hooks_fdatasync(int fd)
{
    static unsigned char flushed[MOST_FIBRES + 1][MOST_BYTES];
    static uint32_t versions[MOST_FIBRES + 1][MOST_SECTORS];
    struct file *file = file_of(fd, 0, 0);
    int me = fibres_current() + 1;
    fibres_point("flush");
    size_t used = file->used, sectors = (used + SECTOR - 1) / SECTOR;
    memcpy(flushed[me], file->cache, used);
    memcpy(versions[me], file->version, sectors * sizeof *versions[me]);
    bool is_lost = fails(FAULT_FLUSH);
    fibres_point("flushing");
    for (size_t sector = 0; sector < sectors; sector++) {
        if (versions[me][sector] <= file->durable_version[sector])
            continue;
        file->durable_version[sector] = versions[me][sector];
        if (!is_lost)
            memcpy(file->durable + sector * SECTOR, flushed[me] + sector * SECTOR, SECTOR);
    }
    fibres_point("flush done");
    return is_lost ? failed(EIO) : 0;
}

int hooks_fsync(int fd)
{
    return hooks_fdatasync(fd);
}

int hooks_posix_fadvise64(int fd, int64_t offset, int64_t length, int advice)
{
    (void)offset, (void)length, (void)advice, (void)fd;
    fibres_point("advise");
    return 0;
}

/* ---- The descriptor that signals ------------------------------------------------------------- */

int hooks_eventfd(unsigned count, int flags)
{
    (void)flags;
    signals = count;
    return EVENT_FD;
}

int64_t hooks_write(int fd, const void *bytes, size_t length)
{
    if (fd != EVENT_FD || length != sizeof(uint64_t))
        fibres_fail("%zu bytes are written to descriptor %d", length, fd);
    fibres_point("signal");
    uint64_t more;
    memcpy(&more, bytes, sizeof more);
    signals += more;
    fibres_notify();
    return length;
}

int64_t hooks_read(int fd, void *buffer, size_t length)
{
    if (fd != EVENT_FD || length != sizeof(uint64_t))
        fibres_fail("%zu bytes are read from descriptor %d", length, fd);
    fibres_point("hear a signal");
    if (!signals)
        return failed(EAGAIN);
    memcpy(buffer, &signals, sizeof signals);
    signals = 0;
    return length;
}

int hooks_close(int fd)
{
    (void)fd;
    return 0;
}
