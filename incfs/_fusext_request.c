/* Requests on their way from libfuse to Python, and their answers. */
#include "_fusext.h"

#include <errno.h>
#include <stddef.h>
#include <structmember.h>

/* ---- Request: one kernel request that waits for its reply --------------------------------------- */

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
void close_pending(void)
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

int add_request_type(PyObject *module)
{
    request_type = (PyTypeObject *)PyType_FromSpec(&request_spec);
    if (request_type && PyModule_AddObjectRef(module, "Request", (PyObject *)request_type) == 0)
        return 0;
    Py_CLEAR(request_type);
    return -1;
}

/* ---- From libfuse to Python --------------------------------------------------------------------- */

static PyObject *dispatch; /* called as dispatch(operation, request, *arguments); NULL while stopped */
static int was_started;    /* dispatch has been set since the session was created */

void begin_dispatch(void)
{
    was_started = dispatch != NULL;
}

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

void op_lseek(fuse_req_t req, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *file)
{
    (void)inode;
    hand_over(req, "lseek", "(KLi)", (unsigned long long)file->fh, (long long)offset, whence);
}

void op_fallocate(fuse_req_t req, fuse_ino_t inode, int mode, off_t offset, off_t length,
                  struct fuse_file_info *file)
{
    (void)inode;
    hand_over(req, "fallocate", "(KiLL)", (unsigned long long)file->fh, mode, (long long)offset, (long long)length);
}

void op_copy_file_range(fuse_req_t req, fuse_ino_t inode_in, off_t offset_in, struct fuse_file_info *file_in,
                        fuse_ino_t inode_out, off_t offset_out, struct fuse_file_info *file_out, size_t length,
                        int flags)
{
    (void)inode_in;
    (void)inode_out;
    hand_over(req, "copy_file_range", "(KLKLKi)", (unsigned long long)file_in->fh, (long long)offset_in,
              (unsigned long long)file_out->fh, (long long)offset_out, (unsigned long long)length, flags);
}

PyObject *module_start(PyObject *module, PyObject *callable)
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

PyObject *module_stop(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    close_pending();
    Py_CLEAR(dispatch);
    Py_RETURN_NONE;
}
