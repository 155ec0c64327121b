/* Requests that hot threads answer by themselves.  See fuse_hot.h for the rules. */
#define _GNU_SOURCE
#include "fuse_hot_internal.h"
#include "fuse_init.h"

#include <errno.h>
#include <linux/fuse.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>

static struct hot_server server;
static int device_fd = -1;
static unsigned thread_count;
static atomic_uint waiting_count; /* threads that may be waiting for a disk */
static struct durations of_syncs;
static atomic_bool are_syncs_left; /* to Python: a standstill holds back the answers to some */

void hot_leave_syncs(bool are_left)
{
    atomic_store(&are_syncs_left, are_left);
}

/* Of the numbers that fuse_files.py gives to handles: open for writing, and not for reading. */
enum { ONLY_WRITES = 1 };
static atomic_bool are_writers_refused;

void hot_refuse_writers(bool are_refused)
{
    atomic_store(&are_writers_refused, are_refused);
}

bool hot_is_refused(uint64_t handle)
{
    return handle & ONLY_WRITES && atomic_load_explicit(&are_writers_refused, memory_order_relaxed);
}

void serve_from(const struct hot_server *given, int fd, unsigned threads)
{
    server = *given;
    device_fd = fd;
    thread_count = threads;
}

/* ---- Replies ------------------------------------------------------------------------------------ */

/* A reply fails when the caller was interrupted or the mount is gone; then nobody waits for it. */
static void reply(uint64_t unique, int error, const void *data, size_t length)
{
    struct fuse_out_header header = {.len = sizeof header + length, .error = -error, .unique = unique};
    struct iovec vector[2] = {{&header, sizeof header}, {(void *)(uintptr_t)data, length}};
    while (writev(device_fd, vector, length ? 2 : 1) < 0 && errno == EINTR)
        ;
}

/* As the control plane says it, too: fuse_attributes.py. */
enum { ATTRIBUTES_TIMEOUT_S = 1, SECTOR = 512, LEAST_BLOCK = 4096 };
#define NS_PER_S 1000000000ull

static void reply_attributes(const struct fuse_in_header *header, const struct hot_stat *found)
{
    struct fuse_attr_out out = {
        .attr_valid = ATTRIBUTES_TIMEOUT_S,
        .attr =
            {
                .ino = header->nodeid,
                .size = found->size_bytes,
                .blocks = found->stored_bytes / SECTOR,
                .atime = found->accessed_ns / NS_PER_S,
                .atimensec = found->accessed_ns % NS_PER_S,
                .mtime = found->modified_ns / NS_PER_S,
                .mtimensec = found->modified_ns % NS_PER_S,
                .ctime = found->changed_ns / NS_PER_S,
                .ctimensec = found->changed_ns % NS_PER_S,
                .mode = S_IFREG | found->mode,
                .nlink = found->link_count,
                .uid = found->uid,
                .gid = found->gid,
                .blksize = found->block_bytes > LEAST_BLOCK ? found->block_bytes : LEAST_BLOCK,
            },
    };
    reply(header->unique, 0, &out, sizeof out);
}

/* Makes the kernel ask for an inode's attributes the next time. */
static void forget_attributes(uint64_t inode)
{
    struct fuse_notify_inval_inode_out out = {.ino = inode, .off = -1};
    struct fuse_out_header header = {.len = sizeof header + sizeof out, .error = FUSE_NOTIFY_INVAL_INODE};
    struct iovec vector[2] = {{&header, sizeof header}, {&out, sizeof out}};
    while (writev(device_fd, vector, 2) < 0 && errno == EINTR)
        ;
}

/* ---- Requests ----------------------------------------------------------------------------------- */

static void count(_Atomic uint64_t *counter, uint64_t more)
{
    atomic_fetch_add_explicit(counter, more, memory_order_relaxed);
}

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * NS_PER_S + now.tv_nsec;
}

static void note_duration(struct durations *durations, enum hot_operation operation, uint64_t started_ns)
{
    uint64_t took_ns = now_ns() - started_ns;
    int bits = 64 - __builtin_clzll(took_ns | 1);
    int bucket = bits <= 12 ? 0 : (bits - 11) / 2;
    count(&durations->counts[operation][bucket < HOT_BUCKETS ? bucket : HOT_BUCKETS - 1], 1);
    count(&durations->sum_ns[operation], took_ns);
}

struct durations *sync_durations(void)
{
    return &of_syncs;
}

/* One thread must always be free to take requests, else nothing is answered while a disk is slow. */
static bool begin_waiting(const struct worker *worker)
{
    if (worker->stands_by)
        return false;
    if (atomic_fetch_add(&waiting_count, 1) + 1 < thread_count)
        return true;
    atomic_fetch_sub(&waiting_count, 1);
    return false;
}

static bool serve_read(struct worker *worker, const struct fuse_in_header *header, size_t length)
{
    const struct fuse_read_in *in = (const void *)(header + 1);
    if (length < sizeof *header + sizeof *in || in->size > READ_BYTES)
        return false;
    size_t start, found;
    bool can_wait = begin_waiting(worker);
    bool is_served = server.read(server.owner, header->nodeid, in->offset, in->size, can_wait, worker->room, ROOM,
                                 &start, &found);
    if (can_wait)
        atomic_fetch_sub(&waiting_count, 1);
    count(is_served ? &worker->reads : &worker->handed_reads, 1);
    if (!is_served)
        return false;
    count(&worker->read_bytes, found);
    reply(header->unique, 0, worker->room + start, found);
    return true;
}

static bool serve_write(struct worker *worker, const struct fuse_in_header *header, size_t length)
{
    const struct fuse_write_in *in = (const void *)(header + 1);
    /* FUSE_WRITE_KILL_SUIDGID asks for nothing more: see write_reply. */
    bool is_served = !worker->stands_by && length >= sizeof *header + sizeof *in &&
                     length - sizeof *header - sizeof *in >= in->size &&
                     !(in->write_flags & ~(FUSE_WRITE_CACHE | FUSE_WRITE_LOCKOWNER | FUSE_WRITE_KILL_SUIDGID)) &&
                     server.write(server.owner, header->nodeid, in->offset, in + 1, in->size);
    count(is_served ? &worker->writes : &worker->handed_writes, 1);
    if (!is_served)
        return false;
    count(&worker->write_bytes, in->size);
    struct fuse_write_out out = {.size = in->size};
    reply(header->unique, 0, &out, sizeof out);
    return true;
}

static bool serve_getattr(struct worker *worker, const struct fuse_in_header *header, size_t length)
{
    const struct fuse_getattr_in *in = (const void *)(header + 1);
    struct hot_stat found;
    if (length >= sizeof *header + sizeof *in && in->getattr_flags & FUSE_GETATTR_FH && hot_is_refused(in->fh)) {
        reply(header->unique, ENOSPC, NULL, 0);
        return true;
    }
    if (!server.stat(server.owner, header->nodeid, &found))
        return false;
    count(&worker->lookups, 1);
    reply_attributes(header, &found);
    return true;
}

/* Under write-back the kernel keeps the times of a file, and sends them before it asks for an fsync. */
static bool serve_setattr(struct worker *worker, const struct fuse_in_header *header, size_t length)
{
    const struct fuse_setattr_in *in = (const void *)(header + 1);
    const uint32_t ignored = FATTR_FH | FATTR_LOCKOWNER | FATTR_CTIME;
    struct hot_stat found;
    if (length < sizeof *header + sizeof *in || (in->valid & ~ignored) != FATTR_MTIME ||
        !server.set_modified(server.owner, header->nodeid, in->mtime * NS_PER_S + in->mtimensec) ||
        !server.stat(server.owner, header->nodeid, &found))
        return false;
    count(&worker->lookups, 1);
    reply_attributes(header, &found);
    return true;
}

static void sync_done(struct hot_waiter *waiter, int error)
{
    struct item *item = (struct item *)waiter;
    const struct fuse_in_header *header = item->buffer.mem;
    /* Under write-back the kernel does not know that its writes changed the count of blocks. */
    if (waiter->gained_blocks)
        forget_attributes(header->nodeid);
    reply(header->unique, error, NULL, 0);
    note_duration(&of_syncs, HOT_FSYNC, item->started_ns);
    free_item(item);
}

static void sync_refused(struct hot_waiter *waiter)
{
    hand_over((struct item *)waiter);
}

/* Takes the request's buffer and the item. */
static void serve_sync(struct worker *worker, struct item *item, size_t length)
{
    static const struct hot_answers answers = {sync_done, sync_refused};
    const struct fuse_in_header *header = worker->buffer.mem;
    uint64_t inode = header->nodeid;
    bool can_wait = begin_waiting(worker);
    put_away(item, &worker->buffer, length);
    item->waiter.inode = inode;
    item->started_ns = worker->started_ns;
    bool is_taken = server.sync(server.owner, &item->waiter, can_wait, &answers);
    if (can_wait)
        atomic_fetch_sub(&waiting_count, 1);
    count(is_taken ? &worker->syncs : &worker->others, 1);
    if (!is_taken)
        hand_over(item);
}

/* With a libfuse that write_reply cannot speak for, the kernel asks this before each write. */
static bool serve_getxattr(struct worker *worker, const struct fuse_in_header *header, size_t length)
{
    static const char name[] = "security.capability";
    const char *asked = (const char *)(header + 1) + sizeof(struct fuse_getxattr_in);
    bool is_served = length >= sizeof *header + sizeof(struct fuse_getxattr_in) + sizeof name &&
                     memcmp(asked, name, sizeof name) == 0;
    if (!is_served)
        return false;
    count(&worker->lookups, 1);
    reply(header->unique, ENODATA, NULL, 0);
    return true;
}

/* What a request asks for, if it can be answered at once; HOT_OPERATIONS when it is none of these. */
static enum hot_operation operation_of(uint32_t opcode)
{
    switch (opcode) {
    case FUSE_READ:
        return HOT_READ;
    case FUSE_WRITE:
        return HOT_WRITE;
    case FUSE_GETATTR:
        return HOT_GETATTR;
    case FUSE_SETATTR:
        return HOT_SETATTR;
    case FUSE_GETXATTR:
        return HOT_GETXATTR;
    default:
        return HOT_OPERATIONS;
    }
}

static bool serve_at_once(struct worker *worker, enum hot_operation operation, size_t length)
{
    const struct fuse_in_header *header = worker->buffer.mem;
    switch (operation) {
    case HOT_READ:
        return serve_read(worker, header, length);
    case HOT_WRITE:
        return serve_write(worker, header, length);
    case HOT_GETATTR:
        return serve_getattr(worker, header, length);
    case HOT_SETATTR:
        return serve_setattr(worker, header, length);
    default:
        return serve_getxattr(worker, header, length);
    }
}

bool serve(struct worker *worker, struct item **item, size_t length)
{
    const struct fuse_in_header *header = worker->buffer.mem;
    /* A spliced request is in a pipe, not in memory; the mount asks for none. */
    if (worker->buffer.flags & FUSE_BUF_IS_FD || length < sizeof *header)
        return false;
    worker->started_ns = now_ns();
    atomic_store_explicit(&worker->busy_since_ns, worker->started_ns, memory_order_relaxed);
    if (header->opcode == FUSE_FSYNC && !atomic_load(&are_syncs_left)) {
        serve_sync(worker, *item, length);
        *item = NULL;
        return true;
    }
    init_note(header, length);
    enum hot_operation operation = operation_of(header->opcode);
    bool is_served = operation != HOT_OPERATIONS && serve_at_once(worker, operation, length);
    if (is_served)
        note_duration(&worker->durations, operation, worker->started_ns);
    else if (operation != HOT_READ && operation != HOT_WRITE) /* those count for themselves */
        count(&worker->others, 1);
    return is_served;
}
