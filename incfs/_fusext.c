/* incfs._fusext: what pyfuse3 lacks of libfuse's low-level interface.
 *
 * Owns: the operations lseek, fallocate and copy_file_range, the limits of the connection
 * (max_background, congestion_threshold, max_readahead, capability bits), and the way of requests past
 * Python (fuse_hot.c).  pyfuse3 stays the session
 * loop and keeps every other operation.
 *
 * How it gets between: pyfuse3's extension calls fuse_session_new, and the dynamic linker takes the
 * first definition in the global scope.  This module defines that name and puts itself into the
 * global scope when it is imported, so it has to be imported before pyfuse3 (incfs/__init__.py sees
 * to it).  It is not linked with libfuse3: at the first call it looks up the very library that
 * pyfuse3 has loaded, whatever its version, and calls that one's functions.
 *
 * Threads: everything here runs with the GIL held, which is what guards all static state.  The hot
 * threads of fuse_hot.c, which read /dev/fuse themselves, never wait for the GIL and touch nothing here.
 *
 * Invariants:
 *   1. A fuse_req_t is answered exactly once: it is owned by one Request, and whoever clears `req`
 *      (a reply, the deallocation, the end of the session) has answered it.
 *   2. No fuse_req_t outlives its session: fuse_session_destroy answers all pending ones first.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#define FUSE_USE_VERSION 312

#include <Python.h>
#include <structmember.h>

#include "fuse_hot.h"

#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>
#include <link.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* libfuse 3.17 turned the name into a macro that calls the versioned function below; both stay
 * exported by every libfuse that has them, and pyfuse3 calls the one of the headers it was built with. */
#undef fuse_session_new
struct libfuse_version;

#define EXPORTED __attribute__((visibility("default")))

EXPORTED struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *ops,
                                               size_t ops_size, void *userdata);
EXPORTED struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *ops,
                                                         size_t ops_size, struct libfuse_version *version,
                                                         void *userdata);
EXPORTED void fuse_session_destroy(struct fuse_session *session);
EXPORTED int fuse_session_mount(struct fuse_session *session, const char *mountpoint);
EXPORTED int fuse_session_fd(struct fuse_session *session);
EXPORTED int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buffer);

/* ---- libfuse as pyfuse3 loaded it ---------------------------------------------------------- */

typedef struct fuse_session *session_new_fn(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
typedef struct fuse_session *session_new_versioned_fn(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                                      struct libfuse_version *, void *);

static struct {
    session_new_fn *session_new;
    session_new_versioned_fn *session_new_versioned; /* NULL before libfuse 3.17 */
    void (*session_destroy)(struct fuse_session *);
    int (*session_mount)(struct fuse_session *, const char *);
    int (*reply_err)(fuse_req_t, int);
    int (*reply_lseek)(fuse_req_t, off_t);
    int (*reply_write)(fuse_req_t, size_t);
    const struct fuse_ctx *(*req_ctx)(fuse_req_t);
    int (*version)(void);
    struct hot_libfuse hot;
} libfuse;

/* Called for each loaded object; keeps the path of the one that is libfuse3. */
static int is_libfuse(struct dl_phdr_info *info, size_t size, void *found)
{
    (void)size;
    const char *slash = strrchr(info->dlpi_name, '/');
    const char *base = slash ? slash + 1 : info->dlpi_name;
    if (strncmp(base, "libfuse3", strlen("libfuse3")) != 0)
        return 0;
    *(char **)found = strdup(info->dlpi_name);
    return 1;
}

/* Returns the path of the libfuse3 in this process, to be freed; NULL when there is none.
 *
 * By what is loaded and not by a fixed name: Debian 12 has libfuse3.so.3, Debian 13 libfuse3.so.4, and a
 * wheel may carry a copy under a name of its own. */
static char *libfuse_path(void)
{
    char *path = NULL;
    dl_iterate_phdr(is_libfuse, &path);
    return path;
}

/* A function pointer cannot be assigned from void * in ISO C; POSIX's own way round it. */
static int look_up(void *handle, const char *name, void *slot)
{
    *(void **)slot = dlsym(handle, name);
    return *(void **)slot != NULL;
}

/* Fills `libfuse`; returns 0 and says why on stderr when it cannot. */
static int find_libfuse(void)
{
    if (libfuse.session_new)
        return 1;
    char *path = libfuse_path();
    void *handle = path ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : NULL;
    free(path);
    if (!handle) {
        fprintf(stderr, "incfs: libfuse3 is not loaded in this process\n");
        return 0;
    }
    session_new_fn *session_new;
    int complete = look_up(handle, "fuse_session_new", &session_new) &
                   look_up(handle, "fuse_session_destroy", &libfuse.session_destroy) &
                   look_up(handle, "fuse_session_mount", &libfuse.session_mount) &
                   look_up(handle, "fuse_reply_err", &libfuse.reply_err) &
                   look_up(handle, "fuse_reply_lseek", &libfuse.reply_lseek) &
                   look_up(handle, "fuse_reply_write", &libfuse.reply_write) &
                   look_up(handle, "fuse_req_ctx", &libfuse.req_ctx) &
                   look_up(handle, "fuse_version", &libfuse.version) &
                   look_up(handle, "fuse_session_fd", &libfuse.hot.session_fd) &
                   look_up(handle, "fuse_session_receive_buf", &libfuse.hot.session_receive_buf);
    look_up(handle, "fuse_session_new_versioned", &libfuse.session_new_versioned);
    /* libfuse 3.17 has another function of this name, with more arguments. */
    if (complete && libfuse.version() < 317)
        look_up(handle, "fuse_session_custom_io", &libfuse.hot.session_custom_io);
    if (!complete) {
        fprintf(stderr, "incfs: this libfuse3 lacks a function that incfs needs\n");
        return 0;
    }
    libfuse.session_new = session_new; /* last: its presence says that the table is whole */
    return 1;
}

/* ---- Request: one kernel request that waits for its reply ---------------------------------- */

typedef struct Request {
    PyObject_HEAD
    fuse_req_t req; /* NULL once answered */
    int replied;    /* answered by Python, as opposed to by the end of the session */
    unsigned int uid;
    unsigned int gid;
    int pid;
    struct Request *previous, *next; /* in `pending` while req is set */
} Request;

static PyTypeObject *request_type;
static Request *pending;

/* Takes the fuse_req_t out of the request: from here on the caller has to answer it. */
static fuse_req_t take(Request *self)
{
    fuse_req_t req = self->req;
    self->req = NULL;
    if (self->previous)
        self->previous->next = self->next;
    else
        pending = self->next;
    if (self->next)
        self->next->previous = self->previous;
    self->previous = self->next = NULL;
    return req;
}

static Request *request_new(fuse_req_t req)
{
    Request *self = PyObject_New(Request, request_type);
    if (!self)
        return NULL;
    const struct fuse_ctx *context = libfuse.req_ctx(req);
    self->req = req;
    self->replied = 0;
    self->uid = context->uid;
    self->gid = context->gid;
    self->pid = context->pid;
    self->previous = NULL;
    self->next = pending;
    if (pending)
        pending->previous = self;
    pending = self;
    return self;
}

static void request_dealloc(Request *self)
{
    /* Nobody can answer it any more, and without an answer the caller would hang for good. */
    if (self->req)
        libfuse.reply_err(take(self), EIO);
    PyTypeObject *type = Py_TYPE(self);
    PyObject_Free(self);
    Py_DECREF(type);
}

/* Answers every pending request with EIO; the objects live on and ignore replies. */
static void close_pending(void)
{
    while (pending)
        libfuse.reply_err(take(pending), EIO);
}

/* Returns 1 with *req set when a reply is to be sent; 0 when the session is over, so that a task that
 * finishes late needs no special case; -1 with an exception when the request was answered before. */
static int begin_reply(Request *self, fuse_req_t *req)
{
    if (self->replied) {
        PyErr_SetString(PyExc_RuntimeError, "this FUSE request has been answered already");
        return -1;
    }
    self->replied = 1;
    if (!self->req)
        return 0;
    *req = take(self);
    return 1;
}

/* The results of libfuse's reply functions are not looked at: they fail when the caller was
 * interrupted or the mount is gone, and then nobody waits for the answer. */

static PyObject *request_reply_err(Request *self, PyObject *arg)
{
    int error = PyLong_AsLong(arg);
    if (error == -1 && PyErr_Occurred())
        return NULL;
    if (error < 0 || error >= 1000) /* libfuse refuses others, and the caller would hang */
        return PyErr_Format(PyExc_ValueError, "errno %d is not between 0 and 999", error);
    fuse_req_t req;
    int send = begin_reply(self, &req);
    if (send < 0)
        return NULL;
    if (send)
        libfuse.reply_err(req, error);
    Py_RETURN_NONE;
}

static PyObject *request_reply_lseek(Request *self, PyObject *arg)
{
    long long offset = PyLong_AsLongLong(arg);
    if (offset == -1 && PyErr_Occurred())
        return NULL;
    fuse_req_t req;
    int send = begin_reply(self, &req);
    if (send < 0)
        return NULL;
    if (send)
        libfuse.reply_lseek(req, offset);
    Py_RETURN_NONE;
}

static PyObject *request_reply_write(Request *self, PyObject *arg)
{
    size_t count = PyLong_AsSize_t(arg);
    if (count == (size_t)-1 && PyErr_Occurred())
        return NULL;
    fuse_req_t req;
    int send = begin_reply(self, &req);
    if (send < 0)
        return NULL;
    if (send)
        libfuse.reply_write(req, count);
    Py_RETURN_NONE;
}

static PyObject *request_get_pending(Request *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(self->req != NULL);
}

static PyMethodDef request_methods[] = {
    {"reply_err", (PyCFunction)request_reply_err, METH_O, "Answer with an errno; 0 is success without a result."},
    {"reply_lseek", (PyCFunction)request_reply_lseek, METH_O, "Answer lseek with an offset in bytes."},
    {"reply_write", (PyCFunction)request_reply_write, METH_O, "Answer copy_file_range with a count of bytes."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef request_members[] = {
    {"uid", T_UINT, offsetof(Request, uid), READONLY, "User id of the calling process."},
    {"gid", T_UINT, offsetof(Request, gid), READONLY, "Group id of the calling process."},
    {"pid", T_INT, offsetof(Request, pid), READONLY, "Process id of the calling thread; 0 for the kernel."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef request_properties[] = {
    {"pending", (getter)request_get_pending, NULL, "Whether the kernel still waits for the answer.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot request_slots[] = {
    {Py_tp_doc, "A request of the kernel; answered once, with EIO when it is dropped."},
    {Py_tp_dealloc, request_dealloc},
    {Py_tp_methods, request_methods},
    {Py_tp_members, request_members},
    {Py_tp_getset, request_properties},
    {0, NULL},
};

static PyType_Spec request_spec = {
    .name = "incfs._fusext.Request",
    .basicsize = sizeof(Request),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = request_slots,
};

/* ---- From libfuse to Python ----------------------------------------------------------------- */

static PyObject *dispatch; /* called as dispatch(operation, request, *arguments); NULL while stopped */
static int was_started;    /* dispatch has been set since the session was created */

/* Hands a request to Python.  The rest of `format` describes the operation's arguments. */
static void hand_over(fuse_req_t req, const char *operation, const char *format, ...)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    if (!dispatch) {
        /* ENOSYS tells the kernel to help itself from now on, which is right only when nobody is
         * ever going to answer. */
        libfuse.reply_err(req, was_started ? EIO : ENOSYS);
        PyGILState_Release(gil);
        return;
    }
    PyObject *callable = Py_NewRef(dispatch); /* it may call stop() */
    PyObject *result = NULL, *arguments = NULL, *head = NULL, *all = NULL;
    Request *request = request_new(req);
    if (!request) {
        libfuse.reply_err(req, ENOMEM);
    } else {
        va_list values;
        va_start(values, format);
        arguments = Py_VaBuildValue(format, values);
        va_end(values);
        head = Py_BuildValue("(sO)", operation, (PyObject *)request);
        if (arguments && head)
            all = PySequence_Concat(head, arguments);
        if (all)
            result = PyObject_Call(callable, all, NULL);
    }
    if (!result) {
        PyErr_WriteUnraisable(callable);
        if (request && request->req)
            libfuse.reply_err(take(request), EIO);
    }
    Py_XDECREF(result);
    Py_XDECREF(all);
    Py_XDECREF(head);
    Py_XDECREF(arguments);
    Py_XDECREF((PyObject *)request);
    Py_DECREF(callable);
    PyGILState_Release(gil);
}

static void op_lseek(fuse_req_t req, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *file)
{
    (void)inode;
    hand_over(req, "lseek", "(KLi)", (unsigned long long)file->fh, (long long)offset, whence);
}

static void op_fallocate(fuse_req_t req, fuse_ino_t inode, int mode, off_t offset, off_t length,
                         struct fuse_file_info *file)
{
    (void)inode;
    hand_over(req, "fallocate", "(KiLL)", (unsigned long long)file->fh, mode, (long long)offset, (long long)length);
}

static void op_copy_file_range(fuse_req_t req, fuse_ino_t inode_in, off_t offset_in, struct fuse_file_info *file_in,
                               fuse_ino_t inode_out, off_t offset_out, struct fuse_file_info *file_out, size_t length,
                               int flags)
{
    (void)inode_in;
    (void)inode_out;
    hand_over(req, "copy_file_range", "(KLKLKi)", (unsigned long long)file_in->fh, (long long)offset_in,
              (unsigned long long)file_out->fh, (long long)offset_out, (unsigned long long)length, flags);
}

/* ---- The session ------------------------------------------------------------------------------ */

static struct {
    unsigned int max_background; /* 0 leaves libfuse's and the kernel's choice, as for the next two */
    unsigned int congestion_threshold;
    unsigned int max_readahead;
    unsigned int want_set;
    unsigned int want_clear;
    unsigned int hot_threads; /* 0: every request goes to Python */
} limits;

static struct fuse_session *session; /* the one that was created through this module, until destroyed */
static void (*inner_init)(void *, struct fuse_conn_info *);
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
    /* libfuse gives up on the mount when asked for a capability that the kernel lacks. */
    connection->want |= limits.want_set & connection->capable;
    connection->want &= ~limits.want_clear;
    negotiated = *connection;
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
        was_started = dispatch != NULL;
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
    if (!result && hot_is_open() && mounted == session)
        hot_mounted();
    return result;
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
    return find_libfuse() ? libfuse.hot.session_receive_buf(asked, buffer) : -ENOSYS;
}

/* ---- The module -------------------------------------------------------------------------------- */

/* libfuse was in the process before this module: pyfuse3 is bound to it already (Python loads
 * extensions with RTLD_NOW), and what is defined here does not reach it any more. */
static int came_late;

static PyObject *module_configure(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static char *names[] = {"max_background", "congestion_threshold", "max_readahead", "want_set",
                            "want_clear",     "hot_threads",          NULL};
    unsigned int background, congestion, readahead, set, clear, hot;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$IIIIII", names, &background, &congestion, &readahead, &set, &clear,
                                     &hot))
        return NULL;
    limits.max_background = background;
    limits.congestion_threshold = congestion;
    limits.max_readahead = readahead;
    limits.want_set = set;
    limits.want_clear = clear;
    limits.hot_threads = hot;
    Py_RETURN_NONE;
}

static PyObject *module_start(PyObject *module, PyObject *callable)
{
    (void)module;
    if (!PyCallable_Check(callable)) {
        PyErr_SetString(PyExc_TypeError, "dispatch must be callable");
        return NULL;
    }
    Py_XSETREF(dispatch, Py_NewRef(callable));
    was_started = 1;
    Py_RETURN_NONE;
}

static PyObject *module_stop(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    close_pending();
    Py_CLEAR(dispatch);
    Py_RETURN_NONE;
}

static PyObject *module_start_hot(PyObject *module, PyObject *capsule)
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

static PyObject *module_stop_hot(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    release_server();
    Py_RETURN_NONE;
}

static PyObject *module_is_hot(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyBool_FromLong(hot_is_open());
}

static PyObject *module_hot_counts(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    struct hot_counts counts = hot_get_counts();
    return Py_BuildValue("{sK sK sK sK sK sK sK sK sK}", "reads", (unsigned long long)counts.reads, "read_bytes",
                         (unsigned long long)counts.read_bytes, "writes", (unsigned long long)counts.writes,
                         "write_bytes", (unsigned long long)counts.write_bytes, "syncs",
                         (unsigned long long)counts.syncs, "lookups", (unsigned long long)counts.lookups, "handed_reads",
                         (unsigned long long)counts.handed_reads, "handed_writes",
                         (unsigned long long)counts.handed_writes, "others", (unsigned long long)counts.others);
}

static PyObject *module_is_interposed(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    void *first = dlsym(RTLD_DEFAULT, "fuse_session_new");
    return PyBool_FromLong(!came_late && first == (void *)(uintptr_t)&fuse_session_new);
}

static PyObject *module_has_session(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyBool_FromLong(session != NULL);
}

static PyObject *module_negotiated(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return Py_BuildValue("{sI sI sI sI sI sI sI sI}", "proto_major", negotiated.proto_major, "proto_minor",
                         negotiated.proto_minor, "max_write", negotiated.max_write, "max_readahead",
                         negotiated.max_readahead, "max_background", negotiated.max_background,
                         "congestion_threshold", negotiated.congestion_threshold, "capable",
                         (unsigned int)negotiated.capable, "want", (unsigned int)negotiated.want);
}

static PyMethodDef module_methods[] = {
    {"configure", (PyCFunction)(void (*)(void))module_configure, METH_VARARGS | METH_KEYWORDS,
     "Set the limits of the next connection."},
    {"start", module_start, METH_O, "Hand requests to dispatch(operation, request, *arguments) from now on."},
    {"stop", module_stop, METH_NOARGS, "Answer pending requests with EIO and hand over no more."},
    {"is_hot", module_is_hot, METH_NOARGS, "Whether the session's requests come through hot threads: start them."},
    {"start_hot", module_start_hot, METH_O, "Start the hot threads on a data plane, given by its capsule."},
    {"stop_hot", module_stop_hot, METH_NOARGS, "End the hot threads; what they had begun is answered."},
    {"hot_counts", module_hot_counts, METH_NOARGS, "Requests that hot threads answered, and left to Python."},
    {"is_interposed", module_is_interposed, METH_NOARGS, "Whether pyfuse3 calls us and not libfuse."},
    {"has_session", module_has_session, METH_NOARGS, "Whether the running session was created through us."},
    {"negotiated", module_negotiated, METH_NOARGS, "What was agreed with the kernel; zeros before the session began."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "incfs._fusext",
    .m_doc = "FUSE operations and connection limits that pyfuse3 lacks.",
    .m_size = -1, /* libfuse calls back without a module, so the state is static */
    .m_methods = module_methods,
};

/* Python loads extensions into a scope of their own; loading what is already loaded once more with
 * RTLD_GLOBAL promotes it.  Done here rather than with sys.setdlopenflags, which would for a moment
 * apply to every import of every thread. */
static int enter_global_scope(void)
{
    Dl_info info;
    if (!dladdr((void *)(uintptr_t)&fuse_session_new, &info) ||
        !dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL)) {
        PyErr_Format(PyExc_ImportError, "cannot enter the global symbol scope: %s", dlerror());
        return -1;
    }
    return 0; /* the handle is kept: the module is never unloaded */
}

PyMODINIT_FUNC PyInit__fusext(void)
{
    char *path = libfuse_path();
    came_late = path != NULL;
    free(path);
    if (enter_global_scope() < 0)
        return NULL;
    PyObject *module = PyModule_Create(&module_definition);
    if (!module)
        return NULL;
    request_type = (PyTypeObject *)PyType_FromSpec(&request_spec);
    if (!request_type || PyModule_AddObjectRef(module, "Request", (PyObject *)request_type) < 0 ||
        PyModule_AddIntMacro(module, FUSE_CAP_SPLICE_READ) < 0 ||
        PyModule_AddIntMacro(module, FUSE_CAP_SPLICE_WRITE) < 0 ||
        PyModule_AddIntMacro(module, FUSE_CAP_SPLICE_MOVE) < 0) {
        Py_CLEAR(request_type);
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
