/* The threads that read /dev/fuse, without a kernel and without Python; built with ThreadSanitizer or AddressSanitizer by
 * tests/native/test_stress.py.
 *
 *     hot_stress SECONDS SEED
 *
 * A pair of sockets stands for the device: one packet is a request, or an answer.  Clients do what the kernel does: each writes
 * and reads back ranges of its own, flushes, asks for attributes, and sends what is cut off or unknown.  A server with files in memory
 * answers some requests and leaves others, as the data plane does; one thread is Python, which takes those off the queue.  Now and then the
 * hot threads are stopped and started under load.  Each request must be answered once, with the right bytes.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 312
#include "fuse_hot.h"
#include "fuse_init.h"

#include <errno.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { CLIENTS = 6, THREADS = 3, FILES = 2, FILE_BYTES = 1 << 18, MOST = 1 << 14, PACKET = MOST + 4096 };

static int kernel_side, device_side;
static atomic_bool is_over;
static atomic_ulong sent, handed, notified, restarts;

static void fail(const char *what, uint64_t found, uint64_t expected)
{
    fprintf(stderr, "%s: found %lu, expected %lu\n", what, found, expected);
    abort();
}

/* ---- The server ------------------------------------------------------------------------------------------ */

static struct {
    pthread_mutex_t lock;
    unsigned char bytes[FILE_BYTES];
    uint64_t modified_ns;
} files[FILES] = {{.lock = PTHREAD_MUTEX_INITIALIZER}, {.lock = PTHREAD_MUTEX_INITIALIZER}};

/* Whether Python must do it, for no reason. */
static bool is_left(void)
{
    static __thread unsigned seed;
    return rand_r(&seed) % 8 == 0;
}

static void read_file(uint64_t inode, uint64_t offset, size_t length, void *target)
{
    pthread_mutex_lock(&files[inode].lock);
    memcpy(target, files[inode].bytes + offset, length);
    pthread_mutex_unlock(&files[inode].lock);
}

static void write_file(uint64_t inode, uint64_t offset, size_t length, const void *data)
{
    pthread_mutex_lock(&files[inode].lock);
    memcpy(files[inode].bytes + offset, data, length);
    pthread_mutex_unlock(&files[inode].lock);
}

static bool serve_read(void *owner, uint64_t inode, uint64_t offset, size_t length, bool can_wait, char *buffer, size_t room,
                       size_t *start, size_t *count)
{
    (void)owner;
    if (inode >= FILES || !can_wait || is_left())
        return false;
    *start = offset % 512;
    *count = length;
    if (*start + length > room)
        fail("room", room, *start + length);
    read_file(inode, offset, length, buffer + *start);
    return true;
}

static bool serve_write(void *owner, uint64_t inode, uint64_t offset, const void *data, size_t length)
{
    (void)owner;
    if (inode >= FILES || is_left())
        return false;
    write_file(inode, offset, length, data);
    return true;
}

static bool serve_stat(void *owner, uint64_t inode, struct hot_stat *found)
{
    (void)owner;
    if (inode >= FILES || is_left())
        return false;
    *found = (struct hot_stat){.size_bytes = FILE_BYTES, .block_bytes = 512, .link_count = 1};
    return true;
}

static bool set_modified(void *owner, uint64_t inode, uint64_t modified_ns)
{
    (void)owner;
    if (inode >= FILES || is_left())
        return false;
    pthread_mutex_lock(&files[inode].lock);
    files[inode].modified_ns = modified_ns;
    pthread_mutex_unlock(&files[inode].lock);
    return true;
}

/* As the lane does it: who comes while another waits for the disk is answered by that one. */
static pthread_mutex_t waiting_lock = PTHREAD_MUTEX_INITIALIZER;
static struct hot_waiter *waiting;
static bool is_syncing;

static bool serve_sync(void *owner, struct hot_waiter *waiter, bool can_wait, const struct hot_answers *answers)
{
    (void)owner;
    pthread_mutex_lock(&waiting_lock);
    bool leads = !is_syncing, is_taken = (can_wait || is_syncing) && !is_left();
    if (is_taken) {
        waiter->next = waiting;
        waiting = waiter;
    }
    leads &= is_taken;
    is_syncing |= leads;
    while (leads && waiting) {
        struct hot_waiter *round = waiting;
        waiting = NULL;
        pthread_mutex_unlock(&waiting_lock);
        nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
        bool is_refused = is_left();
        for (struct hot_waiter *next; round; round = next) {
            next = round->next;
            round->gained_blocks = is_left();
            if (is_refused)
                answers->refused(round);
            else
                answers->done(round, 0);
        }
        pthread_mutex_lock(&waiting_lock);
    }
    if (leads)
        is_syncing = false;
    pthread_mutex_unlock(&waiting_lock);
    return is_taken;
}

static const struct hot_server server = {
    .read = serve_read,
    .write = serve_write,
    .stat = serve_stat,
    .set_modified = set_modified,
    .sync = serve_sync,
};

/* ---- libfuse ----------------------------------------------------------------------------------------------------- */

static struct fuse_custom_io agreed;

static int session_fd(struct fuse_session *session)
{
    (void)session;
    return device_side;
}

static int receive_buf(struct fuse_session *session, struct fuse_buf *buffer)
{
    (void)session;
    if (!buffer->mem && !(buffer->mem = malloc(PACKET)))
        return -ENOMEM;
    ssize_t count = read(device_side, buffer->mem, PACKET);
    buffer->size = count > 0 ? count : 0;
    return count < 0 ? -errno : count;
}

static int custom_io(struct fuse_session *session, const struct fuse_custom_io *io, int fd)
{
    (void)session;
    (void)fd;
    agreed = *io;
    return 0;
}

/* ---- Python ------------------------------------------------------------------------------------------------------ */

static void answer(uint64_t unique, int error, void *data, size_t length)
{
    struct fuse_out_header header = {.len = sizeof header + length, .error = -error, .unique = unique};
    struct iovec vector[2] = {{&header, sizeof header}, {data, length}};
    if (agreed.writev(device_side, vector, length ? 2 : 1, NULL) < 0 && errno != EPIPE)
        fail("answer", errno, 0);
}

static void serve_in_python(const struct fuse_buf *buffer, size_t length)
{
    static char bytes[MOST];
    const struct fuse_in_header *header = buffer->mem;
    const void *body = header + 1;
    atomic_fetch_add(&handed, 1);
    if (header->opcode == FUSE_READ && length >= sizeof *header + sizeof(struct fuse_read_in)) {
        const struct fuse_read_in *in = body;
        read_file(header->nodeid, in->offset, in->size, bytes);
        answer(header->unique, 0, bytes, in->size);
    } else if (header->opcode == FUSE_WRITE && length >= sizeof *header + sizeof(struct fuse_write_in)) {
        const struct fuse_write_in *in = body;
        struct fuse_write_out out = {.size = in->size};
        write_file(header->nodeid, in->offset, in->size, in + 1);
        answer(header->unique, 0, &out, sizeof out);
    } else if (header->opcode == FUSE_INIT) {
        struct fuse_init_out out = {.major = 7};
        answer(header->unique, 0, &out, sizeof out);
    } else
        answer(header->unique, header->opcode == FUSE_FSYNC ? 0 : ENOSYS, NULL, 0);
}

static void *run_python(void *unused)
{
    struct fuse_buf buffer = {0};
    for (;;) {
        int result = hot_receive(&buffer);
        if (result == -EINTR)
            poll(&(struct pollfd){.fd = hot_fd(), .events = POLLIN}, 1, -1);
        else if (result <= 0)
            break;
        else
            serve_in_python(&buffer, result);
    }
    free(buffer.mem);
    return unused;
}

/* ---- The kernel -------------------------------------------------------------------------------------------------- */

static struct client {
    pthread_mutex_t lock;
    pthread_cond_t answered;
    uint64_t unique; /* of the request under way */
    bool is_answered;
    struct {
        struct fuse_out_header header;
        unsigned char body[MOST];
    } reply;
} clients[CLIENTS];

static void *take_answers(void *unused)
{
    static unsigned char packet[PACKET];
    for (ssize_t count; (count = read(kernel_side, packet, sizeof packet)) > 0;) {
        const struct fuse_out_header *header = (const void *)packet;
        if (header->len != count)
            fail("length of an answer", count, header->len);
        if (!header->unique) {
            atomic_fetch_add(&notified, 1);
            continue;
        }
        struct client *client = &clients[header->unique % CLIENTS];
        pthread_mutex_lock(&client->lock);
        if (header->unique != client->unique || client->is_answered)
            fail("answered twice, or never asked", header->unique, client->unique);
        memcpy(&client->reply, packet, count);
        client->is_answered = true;
        pthread_cond_signal(&client->answered);
        pthread_mutex_unlock(&client->lock);
    }
    return unused;
}

/* Sends a request of a header and two parts, and waits for its answer; gives the length of the answer's body. */
static size_t ask(struct client *client, uint32_t opcode, uint64_t inode, const void *first, size_t first_length,
                  const void *second, size_t second_length)
{
    pthread_mutex_lock(&client->lock);
    client->unique += CLIENTS;
    client->is_answered = false;
    struct fuse_in_header header = {.opcode = opcode, .unique = client->unique, .nodeid = inode};
    header.len = sizeof header + first_length + second_length;
    struct iovec vector[3] = {
        {&header, sizeof header}, {(void *)(uintptr_t)first, first_length}, {(void *)(uintptr_t)second, second_length}};
    pthread_mutex_unlock(&client->lock);
    if (writev(kernel_side, vector, 3) != (ssize_t)header.len)
        fail("a request", errno, 0);
    atomic_fetch_add(&sent, 1);
    pthread_mutex_lock(&client->lock);
    while (!client->is_answered)
        pthread_cond_wait(&client->answered, &client->lock);
    pthread_mutex_unlock(&client->lock);
    return client->reply.header.len - sizeof client->reply.header;
}

static void write_and_read(struct client *client, uint64_t inode, uint64_t offset, size_t length, unsigned char fill)
{
    static __thread unsigned char data[MOST];
    memset(data, fill, length);
    struct fuse_write_in write_in = {.offset = offset, .size = length};
    if (ask(client, FUSE_WRITE, inode, &write_in, sizeof write_in, data, length) != sizeof(struct fuse_write_out))
        fail("answer to a write", client->reply.header.error, 0);
    struct fuse_read_in read_in = {.offset = offset, .size = length};
    size_t found = ask(client, FUSE_READ, inode, &read_in, sizeof read_in, NULL, 0);
    if (found != length || memcmp(client->reply.body, data, length))
        fail("what was written is not what is read", found, length);
}

static void ask_something(struct client *client, uint64_t inode, unsigned choice)
{
    static const char nonsense[256];
    struct fuse_init_in init = {.major = 7, .flags = FUSE_HANDLE_KILLPRIV_V2};
    struct fuse_setattr_in times = {.valid = FATTR_MTIME, .mtime = 1};
    struct fuse_getxattr_in getxattr = {.size = 20};
    switch (choice % 6) {
    case 0:
        ask(client, FUSE_GETATTR, inode, nonsense, sizeof(struct fuse_getattr_in), NULL, 0);
        break;
    case 1:
        ask(client, FUSE_SETATTR, inode, &times, sizeof times, NULL, 0);
        break;
    case 2:
        ask(client, FUSE_GETXATTR, inode, &getxattr, sizeof getxattr, "security.capability", 20);
        if (client->reply.header.error != -ENODATA)
            fail("answer to a question for an attribute", client->reply.header.error, -ENODATA);
        break;
    case 3: /* cut off */
        ask(client, (const uint32_t[]){FUSE_READ, FUSE_WRITE, FUSE_SETATTR, FUSE_GETXATTR, FUSE_INIT}[choice / 6 % 5], inode,
            nonsense, choice / 30 % 16, NULL, 0);
        break;
    case 4:
        ask(client, FUSE_LOOKUP, inode, nonsense, choice / 6 % sizeof nonsense, NULL, 0);
        break;
    case 5:
        ask(client, FUSE_INIT, inode, &init, sizeof init, NULL, 0);
        break;
    }
}

static void *run_client(void *argument)
{
    struct client *client = argument;
    unsigned number = client - clients, seed = number + 1;
    uint64_t own = FILE_BYTES / CLIENTS, start = number * own;
    while (!atomic_load(&is_over)) {
        unsigned inode = rand_r(&seed) % FILES;
        size_t length = 1 + rand_r(&seed) % MOST;
        write_and_read(client, inode, start + rand_r(&seed) % (own - length), length, rand_r(&seed));
        if (ask(client, FUSE_FSYNC, inode, &(struct fuse_fsync_in){0}, sizeof(struct fuse_fsync_in), NULL, 0))
            fail("answer to a flush", client->reply.header.len, sizeof client->reply.header);
        ask_something(client, inode, rand_r(&seed));
    }
    return NULL;
}

static unsigned long timed(const struct hot_durations *durations, enum hot_operation operation)
{
    unsigned long sum = 0;
    for (unsigned bucket = 0; bucket < HOT_BUCKETS; bucket++)
        sum += durations->counts[operation][bucket];
    return sum;
}

int main(int count, char **arguments)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return 2;
    kernel_side = pair[0];
    device_side = pair[1];
    const struct hot_libfuse libfuse = {session_fd, receive_buf};
    if (!hot_open((struct fuse_session *)&agreed, &libfuse))
        return 2;
    init_mounted((struct fuse_session *)&agreed, custom_io, device_side);
    if (hot_start(&server, THREADS))
        return 2;
    pthread_t python, answers, threads[CLIENTS];
    pthread_create(&python, NULL, run_python, NULL);
    pthread_create(&answers, NULL, take_answers, NULL);
    for (unsigned i = 0; i < CLIENTS; i++) {
        clients[i] = (struct client){.lock = PTHREAD_MUTEX_INITIALIZER, .answered = PTHREAD_COND_INITIALIZER};
        clients[i].unique = i + CLIENTS;
        pthread_create(&threads[i], NULL, run_client, &clients[i]);
    }
    unsigned seed = count > 2 ? atoi(arguments[2]) : 1;
    for (time_t end = time(NULL) + (count > 1 ? atoi(arguments[1]) : 4); time(NULL) < end; restarts++) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000 * (1 + rand_r(&seed) % 100)}, NULL);
        hot_stop();
        if (hot_start(&server, THREADS))
            return 2;
    }
    atomic_store(&is_over, true);
    for (unsigned i = 0; i < CLIENTS; i++)
        pthread_join(threads[i], NULL);
    shutdown(kernel_side, SHUT_WR); /* the end of the mount: the last request is followed by nothing */
    pthread_join(python, NULL);
    struct hot_counts served = hot_get_counts();
    struct hot_durations durations = hot_get_durations();
    hot_close();
    shutdown(device_side, SHUT_RDWR);
    pthread_join(answers, NULL);
    close(kernel_side);
    close(device_side);
    if (!served.reads || !served.writes || !served.syncs || !served.lookups || !handed || !notified)
        fail("nothing of a kind happened", 0, 1);
    if (timed(&durations, HOT_READ) != served.reads || timed(&durations, HOT_WRITE) != served.writes ||
        !timed(&durations, HOT_FSYNC))
        fail("not every request was timed", 0, 1);
    printf("ok: %lu requests, %lu left to Python, %lu restarts\n", sent, handed, restarts);
    return 0;
}
