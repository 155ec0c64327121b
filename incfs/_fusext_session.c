/* The session: made with our operations and limits in it, and its requests past Python. */
#include "_fusext.h"

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static struct {
    unsigned int max_background; /* 0 leaves libfuse's and the kernel's choice, as for the next three */
    unsigned int congestion_threshold;
    unsigned int max_readahead;
    unsigned int max_request; /* of a read or write */
    unsigned int hot_threads; /* 0: every request goes to Python */
} limits;

static struct fuse_session *session; /* the one that was created through this module, until destroyed */
static void (*inner_init)(void *, struct fuse_conn_info *);
static void (*inner_getattr)(fuse_req_t, fuse_ino_t, struct fuse_file_info *);
static struct fuse_conn_info negotiated; /* as it stood at the end of init; proto_major is 0 before */

/* Only the first ten members of fuse_conn_info are used: they lie the same in every libfuse 3. */
static void op_init(void *userdata, struct fuse_conn_info *connection)
{
    if (inner_init)
        inner_init(userdata, connection);
    if (limits.max_background)
        connection->max_background = limits.max_background;
    if (limits.congestion_threshold)
        connection->congestion_threshold = limits.congestion_threshold;
    if (limits.max_readahead && limits.max_readahead < connection->max_readahead)
        connection->max_readahead = limits.max_readahead;
    if (limits.max_request)
        connection->max_read = connection->max_write = limits.max_request;
    /* A spliced request is in a pipe: hot threads and init_note want it in memory. */
    connection->want &= ~(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE);
    negotiated = *connection;
}

static void op_getattr(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *file)
{
    if (file && hot_is_refused(file->fh))
        libfuse.reply_err(req, ENOSPC);
    else
        inner_getattr(req, inode, file);
}

/* Returns a copy of `ops` with our operations in it, to be freed; NULL when out of memory. */
static struct fuse_lowlevel_ops *extended(const struct fuse_lowlevel_ops *ops, size_t *size)
{
    /* No larger than needed: pyfuse3 and this file may be built with different headers, and libfuse
     * complains about a table with more members than it knows.  lseek is the last one set here. */
    size_t needed = offsetof(struct fuse_lowlevel_ops, lseek) + sizeof ops->lseek;
    size_t given = *size;
    if (*size < needed)
        *size = needed;
    size_t room = *size < sizeof(struct fuse_lowlevel_ops) ? sizeof(struct fuse_lowlevel_ops) : *size;
    struct fuse_lowlevel_ops *table = calloc(1, room);
    if (!table)
        return NULL;
    memcpy(table, ops, given);
    inner_init = table->init;
    table->init = op_init;
    inner_getattr = table->getattr;
    table->getattr = op_getattr;
    /* A later pyfuse3 may bring its own; then its handlers are the ones that its users know. */
    if (!table->lseek)
        table->lseek = op_lseek;
    if (!table->fallocate)
        table->fallocate = op_fallocate;
    if (!table->copy_file_range)
        table->copy_file_range = op_copy_file_range;
    return table;
}

/* libfuse 3.17 made struct fuse_buf longer; hot threads must use the struct of the library that is loaded. */
static int same_buffers(void)
{
    return (libfuse.version() >= 317) == (FUSE_VERSION >= 317);
}

/* Creates the session with libfuse's own function; version is NULL for the unversioned one. */
static struct fuse_session *create_session(struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size,
                                           struct libfuse_version *version, void *userdata)
{
    if (!find_libfuse())
        return NULL;
    /* libfuse 3.17's fuse_session_new calls its fuse_session_new_versioned through the linker, so
     * the call comes back here with our table: extending that again would make op_init call itself. */
    int is_ours = !ops || ops->init == op_init;
    struct fuse_lowlevel_ops *table = is_ours ? NULL : extended(ops, &size);
    if (!is_ours && !table)
        return NULL;
    const struct fuse_lowlevel_ops *used = is_ours ? ops : table;
    struct fuse_session *created = version && libfuse.session_new_versioned
                                       ? libfuse.session_new_versioned(args, used, size, version, userdata)
                                       : libfuse.session_new(args, used, size, userdata);
    free(table); /* libfuse has copied it */
    if (!is_ours) {
        session = created;
        if (created && limits.hot_threads && same_buffers() && !hot_open(created, &libfuse.hot))
            fprintf(stderr, "incfs: no descriptor for the hot threads: %s\n", strerror(errno));
        begin_dispatch();
        memset(&negotiated, 0, sizeof negotiated);
    }
    return created;
}

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t ops_size,
                                      void *userdata)
{
    return create_session(args, ops, ops_size, NULL, userdata);
}

struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *ops,
                                                size_t ops_size, struct libfuse_version *version, void *userdata)
{
    return create_session(args, ops, ops_size, version, userdata);
}

static PyObject *server; /* the capsule whose plane the hot threads use */

/* Ends the hot threads; then nobody uses the plane any more. */
static void release_server(void)
{
    hot_stop();
    Py_CLEAR(server);
}

void fuse_session_destroy(struct fuse_session *ended)
{
    if (!find_libfuse())
        return;
    PyGILState_STATE gil = PyGILState_Ensure();
    if (ended == session) {
        close_pending();
        release_server();
        hot_close();
        session = NULL;
    }
    PyGILState_Release(gil);
    libfuse.session_destroy(ended);
}

int fuse_session_mount(struct fuse_session *mounted, const char *mountpoint)
{
    int result = find_libfuse() ? libfuse.session_mount(mounted, mountpoint) : -1;
    if (!result && mounted == session)
        init_mounted(session, libfuse.session_custom_io, libfuse.hot.session_fd(session));
    return result;
}

enum { REQUEST_ROOM = (1 << 20) + 8192 };

/* Whether libfuse can make a buffer for a request; it fills the log with each time that it cannot. */
static bool has_memory(void)
{
    void *volatile room = malloc(REQUEST_ROOM); /* or the compiler knows that it does without */
    free(room);
    return room != NULL;
}

/* pyfuse3 waits for this descriptor to be readable, and then receives one request. */
int fuse_session_fd(struct fuse_session *asked)
{
    if (hot_is_open() && asked == session)
        return hot_fd();
    return find_libfuse() ? libfuse.hot.session_fd(asked) : -1;
}

int fuse_session_receive_buf(struct fuse_session *asked, struct fuse_buf *buffer)
{
    if (hot_is_open() && asked == session)
        return hot_receive(buffer);
    if (!buffer->mem && !has_memory()) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        return -EINTR; /* on which pyfuse3 tries again; any other error ends it */
    }
    int result = find_libfuse() ? libfuse.hot.session_receive_buf(asked, buffer) : -ENOSYS;
    if (result > 0 && asked == session && !(buffer->flags & FUSE_BUF_IS_FD))
        init_note(buffer->mem, (size_t)result);
    return result == -ENOMEM ? -EINTR : result;
}

/* ---- For Python --------------------------------------------------------------------------------- */

PyObject *module_configure(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static char *names[] = {"max_background", "congestion_threshold", "max_readahead", "max_request", "hot_threads",
                            "maps_shared", NULL};
    unsigned int background, congestion, readahead, request, hot;
    int maps_shared;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$IIIIIp", names, &background, &congestion, &readahead, &request,
                                     &hot, &maps_shared))
        return NULL;
    init_allow_shared_mappings(maps_shared);
    limits.max_background = background;
    limits.congestion_threshold = congestion;
    limits.max_readahead = readahead;
    limits.max_request = request;
    limits.hot_threads = hot;
    Py_RETURN_NONE;
}

PyObject *module_start_hot(PyObject *module, PyObject *capsule)
{
    (void)module;
    struct hot_server *given = PyCapsule_GetPointer(capsule, HOT_SERVER_CAPSULE);
    if (!given)
        return NULL;
    int error = hot_start(given, limits.hot_threads);
    if (error) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_XSETREF(server, Py_NewRef(capsule));
    Py_RETURN_NONE;
}

PyObject *module_stop_hot(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    release_server();
    Py_RETURN_NONE;
}

PyObject *module_is_hot(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyBool_FromLong(hot_is_open());
}

PyObject *module_has_session(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyBool_FromLong(session != NULL);
}

PyObject *module_negotiated(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return Py_BuildValue("{sI sI sI sI sI sI sI sI}", "proto_major", negotiated.proto_major, "proto_minor",
                         negotiated.proto_minor, "max_write", negotiated.max_write, "max_readahead",
                         negotiated.max_readahead, "max_background", negotiated.max_background,
                         "congestion_threshold", negotiated.congestion_threshold, "capable",
                         (unsigned int)negotiated.capable, "want", (unsigned int)negotiated.want);
}
