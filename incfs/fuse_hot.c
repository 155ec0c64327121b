/* Threads that read /dev/fuse and answer what the data plane can serve at once, without the GIL: READ,
 * WRITE, FSYNC, and what the kernel asks around these.  Every other request they put into a queue, untouched, and Python takes it from
 * there: fuse_session_fd gives pyfuse3 the queue's eventfd instead of /dev/fuse, and
 * fuse_session_receive_buf the oldest request in it (_fusext.c has both).
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
#define _GNU_SOURCE
#define FUSE_USE_VERSION 312

#include "fuse_hot.h"

#include <errno.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* Room for the largest read, and for what lies around it in its first and last block. */
enum { READ_BYTES = 1 << 20, LARGEST_BLOCK = 65536, ROOM = READ_BYTES + 2 * LARGEST_BLOCK, MOST_SPARES = 32 };

struct item {
    struct hot_waiter waiter; /* first: an fsync that waits for the disk is known by it */
    struct item *next;
    struct fuse_buf buffer;
    int result;
};

struct worker {
    pthread_t thread;
    char *room; /* for the bytes of a read */
    struct fuse_buf buffer;
    _Atomic uint64_t reads, read_bytes, writes, write_bytes, syncs, lookups, handed_reads, handed_writes, others;
};

static struct fuse_session *session;
static struct hot_libfuse libfuse;
static struct hot_server server;
static int event_fd = -1, device_fd = -1;

static struct worker workers[HOT_MAX_THREADS];
static unsigned worker_count;
static atomic_bool is_stopping;
static _Atomic uint64_t init_unique; /* of the first request, until it is answered */
static atomic_uint waiting_count; /* threads that may be waiting for a disk */

static pthread_mutex_t queue_lock = PTHREAD_MUTEX_INITIALIZER; /* guards all below */
static struct item *first_item, *last_item;
static bool has_ended;
static int end_result;
static struct fuse_buf spares[MOST_SPARES];
static unsigned spare_count;

/* ---- The queue ------------------------------------------------------------------------------------ */

static void signal_queue(void)
{
    uint64_t one = 1;
    while (write(event_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* Puts a request into an item of its own, and takes a spare buffer in exchange if there is one. */
static void put_away(struct item *item, struct fuse_buf *buffer, int result)
{
    *item = (struct item){.buffer = *buffer, .result = result};
    memset(buffer, 0, sizeof *buffer);
    pthread_mutex_lock(&queue_lock);
    if (spare_count)
        *buffer = spares[--spare_count];
    pthread_mutex_unlock(&queue_lock);
}

/* Leaves a request to Python. */
static void hand_over(struct item *item)
{
    pthread_mutex_lock(&queue_lock);
    if (last_item)
        last_item->next = item;
    else
        first_item = item;
    last_item = item;
    signal_queue();
    pthread_mutex_unlock(&queue_lock);
}

/* The session is over, or reading failed for good: every receive gives `result` once the queue is empty. */
static void end(int result)
{
    pthread_mutex_lock(&queue_lock);
    if (!has_ended)
        end_result = result;
    has_ended = true;
    signal_queue();
    pthread_mutex_unlock(&queue_lock);
}

static void keep_spare(struct fuse_buf *buffer)
{
    if (!buffer->mem)
        return;
    if (spare_count < MOST_SPARES)
        spares[spare_count++] = *buffer;
    else
        free(buffer->mem);
}

int hot_receive(struct fuse_buf *buffer)
{
    pthread_mutex_lock(&queue_lock);
    struct item *item = first_item;
    int result = has_ended ? end_result : -EINTR; /* on which pyfuse3 waits again */
    if (item) {
        first_item = item->next;
        if (!first_item)
            last_item = NULL;
        keep_spare(buffer);
        *buffer = item->buffer;
        result = item->result;
    }
    if (!first_item && !has_ended) {
        uint64_t count;
        while (read(event_fd, &count, sizeof count) < 0 && errno == EINTR)
            ;
    }
    pthread_mutex_unlock(&queue_lock);
    free(item);
    return result;
}

/* ---- What is agreed with the kernel ---------------------------------------------------------------------- */

/* Before each write the kernel asks whether the file has capabilities that writing takes away, unless the
 * filesystem says that it takes them away itself.  libfuse 3.14 cannot say so; we say it in its name.  There
 * is nothing to do for it: no file of ours can have setuid bits or capabilities. */
static ssize_t write_reply(int fd, struct iovec *vector, int part_count, void *unused)
{
    (void)unused;
    const struct fuse_out_header *header = vector[0].iov_base;
    uint64_t asked = atomic_load(&init_unique);
    if (asked && header->unique == asked && !header->error && part_count > 1) {
        struct fuse_init_out *out = vector[1].iov_base;
        out->flags |= FUSE_HANDLE_KILLPRIV_V2;
        atomic_store(&init_unique, 0);
    }
    return writev(fd, vector, part_count);
}

static ssize_t read_request(int fd, void *buffer, size_t length, void *unused)
{
    (void)unused;
    return read(fd, buffer, length);
}

/* Notes the request whose answer is to be changed, if the kernel knows what it would be told. */
static void note_init(const struct fuse_in_header *header, size_t length)
{
    const struct fuse_init_in *in = (const void *)(header + 1);
    bool can_kill = length >= sizeof *header + offsetof(struct fuse_init_in, flags) + sizeof in->flags &&
                    in->flags & FUSE_HANDLE_KILLPRIV_V2;
    if (can_kill)
        atomic_store(&init_unique, header->unique);
}

void hot_mounted(void)
{
    static const struct fuse_custom_io io = {.writev = write_reply, .read = read_request};
    if (libfuse.session_custom_io)
        libfuse.session_custom_io(session, &io, libfuse.session_fd(session));
}

/* ---- Serving ----------------------------------------------------------------------------------------- */

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

static void count(_Atomic uint64_t *counter, uint64_t more)
{
    atomic_fetch_add_explicit(counter, more, memory_order_relaxed);
}

/* One thread must always be free to take requests, else nothing is answered while a disk is slow. */
static bool begin_waiting(void)
{
    if (atomic_fetch_add(&waiting_count, 1) + 1 < worker_count)
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
    bool can_wait = begin_waiting();
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
    bool is_served = length >= sizeof *header + sizeof *in && length - sizeof *header - sizeof *in >= in->size &&
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

static bool serve_getattr(struct worker *worker, const struct fuse_in_header *header)
{
    struct hot_stat found;
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

static void free_item(struct item *item)
{
    pthread_mutex_lock(&queue_lock);
    keep_spare(&item->buffer);
    pthread_mutex_unlock(&queue_lock);
    free(item);
}

static void sync_done(struct hot_waiter *waiter, int error)
{
    struct item *item = (struct item *)waiter;
    const struct fuse_in_header *header = item->buffer.mem;
    /* Under write-back the kernel does not know that its writes changed the count of blocks. */
    if (waiter->gained_blocks)
        forget_attributes(header->nodeid);
    reply(header->unique, error, NULL, 0);
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
    bool can_wait = begin_waiting();
    put_away(item, &worker->buffer, length);
    item->waiter.inode = inode;
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

/* Answers a request, or puts it away in the item; false when neither. */
static bool serve(struct worker *worker, struct item **item, size_t length)
{
    const struct fuse_in_header *header = worker->buffer.mem;
    /* A spliced request is in a pipe, not in memory; the mount asks for none. */
    if (worker->buffer.flags & FUSE_BUF_IS_FD || length < sizeof *header)
        return false;
    bool is_served = false;
    switch (header->opcode) {
    case FUSE_READ:
        return serve_read(worker, header, length);
    case FUSE_WRITE:
        return serve_write(worker, header, length);
    case FUSE_FSYNC:
        serve_sync(worker, *item, length);
        *item = NULL;
        return true;
    case FUSE_INIT:
        note_init(header, length);
        break;
    case FUSE_GETXATTR:
        is_served = serve_getxattr(worker, header, length);
        break;
    case FUSE_GETATTR:
        is_served = serve_getattr(worker, header);
        break;
    case FUSE_SETATTR:
        is_served = serve_setattr(worker, header, length);
        break;
    }
    if (!is_served)
        count(&worker->others, 1);
    return is_served;
}

/* ---- The threads --------------------------------------------------------------------------------------- */

static void *run(void *argument)
{
    struct worker *worker = argument;
    /* What handing over needs is there before a request is taken: out of memory none is lost. */
    struct item *item = malloc(sizeof *item);
    while (!atomic_load(&is_stopping)) {
        if (!item && !(item = malloc(sizeof *item))) {
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
            continue;
        }
        int result = libfuse.session_receive_buf(session, &worker->buffer);
        if (result == -EINTR || result == -EAGAIN || result == -ENOMEM)
            continue;
        if (result <= 0) {
            end(result);
            break;
        }
        if (!serve(worker, &item, result)) {
            put_away(item, &worker->buffer, result);
            hand_over(item);
            item = NULL;
        }
    }
    free(item);
    return NULL;
}

static void wake(int number)
{
    (void)number; /* its arrival alone ends the read */
}

/* The signal that takes a thread out of its read of /dev/fuse. */
static int wake_signal(void)
{
    return SIGRTMIN + 7;
}

static void free_worker(struct worker *worker)
{
    free(worker->room);
    free(worker->buffer.mem);
    worker->room = NULL;
    memset(&worker->buffer, 0, sizeof worker->buffer);
}

static int start_worker(struct worker *worker)
{
    worker->room = aligned_alloc(4096, ROOM);
    if (!worker->room)
        return ENOMEM;
    int error = pthread_create(&worker->thread, NULL, run, worker);
    if (error)
        free_worker(worker);
    else
        pthread_setname_np(worker->thread, "incfs-hot");
    return error;
}

int hot_start(const struct hot_server *given, unsigned thread_count)
{
    if (!hot_is_open() || worker_count || !thread_count)
        return EINVAL;
    server = *given;
    device_fd = libfuse.session_fd(session);
    atomic_store(&is_stopping, false);
    struct sigaction action = {.sa_handler = wake};
    sigaction(wake_signal(), &action, NULL);
    /* Python's signals are for Python's main thread. */
    sigset_t blocked, before;
    sigfillset(&blocked);
    sigdelset(&blocked, wake_signal());
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int error = 0;
    unsigned wanted = thread_count < HOT_MAX_THREADS ? thread_count : HOT_MAX_THREADS;
    unsigned started = 0;
    worker_count = wanted; /* before the threads look at it */
    while (started < wanted && !(error = start_worker(&workers[started])))
        started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        worker_count = started;
        hot_stop();
    }
    return error;
}

void hot_stop(void)
{
    atomic_store(&is_stopping, true);
    for (unsigned i = 0; i < worker_count; i++) {
        /* The signal is lost on a thread that has looked at is_stopping and not begun its read yet. */
        while (pthread_tryjoin_np(workers[i].thread, NULL) == EBUSY) {
            pthread_kill(workers[i].thread, wake_signal());
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        }
        free_worker(&workers[i]);
    }
    worker_count = 0;
}

/* ---- The session ----------------------------------------------------------------------------------------- */

bool hot_open(struct fuse_session *opened, const struct hot_libfuse *functions)
{
    hot_close();
    libfuse = *functions;
    event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (event_fd < 0)
        return false;
    session = opened;
    for (unsigned i = 0; i < HOT_MAX_THREADS; i++)
        memset(&workers[i], 0, sizeof workers[i]);
    return true;
}

bool hot_is_open(void)
{
    return session != NULL;
}

int hot_fd(void)
{
    return event_fd;
}

void hot_close(void)
{
    hot_stop();
    while (first_item) {
        struct item *item = first_item;
        first_item = item->next;
        free(item->buffer.mem);
        free(item);
    }
    last_item = NULL;
    while (spare_count)
        free(spares[--spare_count].mem);
    has_ended = false;
    if (event_fd >= 0)
        close(event_fd);
    event_fd = device_fd = -1;
    session = NULL;
}

struct hot_counts hot_get_counts(void)
{
    struct hot_counts sum = {0};
    for (unsigned i = 0; i < HOT_MAX_THREADS; i++) {
        sum.reads += atomic_load(&workers[i].reads);
        sum.read_bytes += atomic_load(&workers[i].read_bytes);
        sum.writes += atomic_load(&workers[i].writes);
        sum.write_bytes += atomic_load(&workers[i].write_bytes);
        sum.handed_reads += atomic_load(&workers[i].handed_reads);
        sum.handed_writes += atomic_load(&workers[i].handed_writes);
        sum.syncs += atomic_load(&workers[i].syncs);
        sum.lookups += atomic_load(&workers[i].lookups);
        sum.others += atomic_load(&workers[i].others);
    }
    return sum;
}
