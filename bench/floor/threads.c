/* The floor under any FUSE server written in C: threads that answer READ and WRITE with one pread or pwrite each.
 *
 *   usage: threads IMAGE MOUNTPOINT [THREADS]      MOUNTPOINT/volume is IMAGE
 *
 * It maps nothing, checks nothing and stores nothing of its own; whatever incfs takes longer than this is incfs.
 * In the foreground; ends when it is unmounted or gets SIGTERM. */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 30
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { VOLUME_INODE = 2, MAX_THREADS = 64, BUFFER_BYTES = 1 << 20 };
static const char volume_name[] = "volume";
static const double forever_s = 86400.0;
static int image_fd;
static _Thread_local char *read_buffer;

static int describe(fuse_ino_t inode, struct stat *facts) {
    memset(facts, 0, sizeof *facts);
    if (inode == FUSE_ROOT_ID) {
        facts->st_mode = S_IFDIR | 0755;
        facts->st_nlink = 2;
    } else if (inode == VOLUME_INODE) {
        if (fstat(image_fd, facts)) return errno;
        facts->st_mode = S_IFREG | 0600;
        facts->st_nlink = 1;
    } else {
        return ENOENT;
    }
    facts->st_ino = inode;
    return 0;
}

static void on_init(void *user, struct fuse_conn_info *connection) {
    (void)user;
    connection->want |= connection->capable & FUSE_CAP_WRITEBACK_CACHE;
    connection->want &= ~(unsigned)(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE);
    connection->max_background = 64;
    connection->congestion_threshold = 48;
}

static void on_lookup(fuse_req_t request, fuse_ino_t parent, const char *name) {
    struct fuse_entry_param entry = {.ino = VOLUME_INODE, .attr_timeout = forever_s, .entry_timeout = forever_s};
    if (parent != FUSE_ROOT_ID || strcmp(name, volume_name)) {
        fuse_reply_err(request, ENOENT);
        return;
    }
    int error = describe(VOLUME_INODE, &entry.attr);
    if (error) fuse_reply_err(request, error);
    else fuse_reply_entry(request, &entry);
}

static void on_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file) {
    (void)file;
    struct stat facts;
    int error = describe(inode, &facts);
    if (error) fuse_reply_err(request, error);
    else fuse_reply_attr(request, &facts, forever_s);
}

static void on_setattr(fuse_req_t request, fuse_ino_t inode, struct stat *wanted, int which, struct fuse_file_info *file) {
    if (which & FUSE_SET_ATTR_SIZE && inode == VOLUME_INODE && ftruncate(image_fd, wanted->st_size)) {
        fuse_reply_err(request, errno);
        return;
    }
    on_getattr(request, inode, file);
}

static void on_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file) {
    file->keep_cache = 1;
    if (inode == VOLUME_INODE) fuse_reply_open(request, file);
    else fuse_reply_err(request, EISDIR);
}

static void on_read(fuse_req_t request, fuse_ino_t inode, size_t length, off_t offset, struct fuse_file_info *file) {
    (void)inode, (void)file;
    if (!read_buffer) read_buffer = aligned_alloc(4096, BUFFER_BYTES);
    if (!read_buffer || length > BUFFER_BYTES) {
        fuse_reply_err(request, ENOMEM);
        return;
    }
    ssize_t count = pread(image_fd, read_buffer, length, offset);
    if (count < 0) fuse_reply_err(request, errno);
    else fuse_reply_buf(request, read_buffer, (size_t)count);
}

static void on_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t length, off_t offset,
                     struct fuse_file_info *file) {
    (void)inode, (void)file;
    ssize_t count = pwrite(image_fd, data, length, offset);
    if (count < 0) fuse_reply_err(request, errno);
    else fuse_reply_write(request, (size_t)count);
}

static void on_fsync(fuse_req_t request, fuse_ino_t inode, int data_only, struct fuse_file_info *file) {
    (void)inode, (void)data_only, (void)file;
    fuse_reply_err(request, fdatasync(image_fd) ? errno : 0);
}

static void on_flush(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file) {
    (void)inode, (void)file;
    fuse_reply_err(request, 0);
}

static void on_statfs(fuse_req_t request, fuse_ino_t inode) {
    (void)inode;
    struct statvfs facts;
    if (fstatvfs(image_fd, &facts)) fuse_reply_err(request, errno);
    else fuse_reply_statfs(request, &facts);
}

static const struct fuse_lowlevel_ops operations = {
    .init = on_init,   .lookup = on_lookup, .getattr = on_getattr, .setattr = on_setattr, .open = on_open,
    .read = on_read,   .write = on_write,   .fsync = on_fsync,     .flush = on_flush,     .release = on_flush,
    .statfs = on_statfs,
};

static void *serve(void *argument) {
    struct fuse_session *session = argument;
    struct fuse_buf buffer = {0};
    while (!fuse_session_exited(session)) {
        int got = fuse_session_receive_buf(session, &buffer);
        if (got == -EINTR) continue;
        if (got <= 0) break;
        fuse_session_process_buf(session, &buffer);
    }
    fuse_session_exit(session);
    free(buffer.mem);
    free(read_buffer);
    return NULL;
}

int main(int argc, char **argv) {
    int thread_count = argc > 3 ? atoi(argv[3]) : 4;
    if (argc < 3 || thread_count < 1 || thread_count > MAX_THREADS) {
        fprintf(stderr, "usage: %s IMAGE MOUNTPOINT [THREADS, at most %d]\n", argv[0], MAX_THREADS);
        return 2;
    }
    image_fd = open(argv[1], O_RDWR | O_CLOEXEC);
    if (image_fd < 0) {
        perror(argv[1]);
        return 1;
    }
    char *words[] = {argv[0], "-ofsname=floor,subtype=floor"};
    struct fuse_args arguments = FUSE_ARGS_INIT(2, words);
    struct fuse_session *session = fuse_session_new(&arguments, &operations, sizeof operations, NULL);
    if (!session || fuse_set_signal_handlers(session) || fuse_session_mount(session, argv[2])) return 1;
    pthread_t threads[MAX_THREADS];
    for (int i = 1; i < thread_count; i++)
        if (pthread_create(&threads[i], NULL, serve, session)) return 1;
    serve(session);
    /* The others wait in read(2): taking the mount away wakes them. */
    fuse_session_unmount(session);
    for (int i = 1; i < thread_count; i++) pthread_join(threads[i], NULL);
    fuse_remove_signal_handlers(session);
    fuse_session_destroy(session);
    return 0;
}
