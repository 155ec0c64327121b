/* incfs._fusext: what pyfuse3 lacks of libfuse's low-level interface.
 *
 * Owns: the operations lseek, fallocate and copy_file_range, the limits of the connection
 * (max_background, congestion_threshold, max_readahead), what is agreed with the kernel (fuse_init.c),
 * and the way of requests past Python (fuse_hot.c).  pyfuse3 stays the session loop and keeps every other
 * operation.
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
#define _GNU_SOURCE
#include "_fusext.h"

#include <dlfcn.h>
#include <stdlib.h>

/* libfuse was in the process before this module: pyfuse3 is bound to it already (Python loads
 * extensions with RTLD_NOW), and what is defined here does not reach it any more. */
static int came_late;

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

static PyObject *make_durations(const uint64_t *counts, uint64_t sum_ns)
{
    PyObject *list = PyList_New(HOT_BUCKETS);
    for (unsigned bucket = 0; list && bucket < HOT_BUCKETS; bucket++) {
        PyObject *count = PyLong_FromUnsignedLongLong(counts[bucket]);
        if (!count)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, bucket, count);
    }
    return list ? Py_BuildValue("(NK)", list, (unsigned long long)sum_ns) : NULL;
}

static PyObject *module_hot_durations(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    static const char *const names[HOT_OPERATIONS] = {"read", "write", "fsync", "getattr", "setattr", "getxattr"};
    struct hot_durations durations = hot_get_durations();
    PyObject *found = PyDict_New();
    for (unsigned i = 0; found && i < HOT_OPERATIONS; i++) {
        PyObject *made = make_durations(durations.counts[i], durations.sum_ns[i]);
        if (!made || PyDict_SetItemString(found, names[i], made) < 0)
            Py_CLEAR(found);
        Py_XDECREF(made);
    }
    return found;
}

static PyObject *module_leave_syncs(PyObject *module, PyObject *are_left)
{
    (void)module;
    int is_true = PyObject_IsTrue(are_left);
    if (is_true < 0)
        return NULL;
    hot_leave_syncs(is_true);
    Py_RETURN_NONE;
}

static PyObject *module_refuse_writers(PyObject *module, PyObject *are_refused)
{
    (void)module;
    int is_true = PyObject_IsTrue(are_refused);
    if (is_true < 0)
        return NULL;
    hot_refuse_writers(is_true);
    Py_RETURN_NONE;
}

static PyObject *module_is_interposed(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    void *first = dlsym(RTLD_DEFAULT, "fuse_session_new");
    return PyBool_FromLong(!came_late && first == (void *)(uintptr_t)&fuse_session_new);
}

static PyMethodDef module_methods[] = {
    {"configure", (PyCFunction)(void (*)(void))module_configure, METH_VARARGS | METH_KEYWORDS,
     "Set the limits of the next connection."},
    {"start", module_start, METH_O, "Hand requests to dispatch(operation, request, *arguments) from now on."},
    {"stop", module_stop, METH_NOARGS, "Answer pending requests with EIO and hand over no more."},
    {"is_hot", module_is_hot, METH_NOARGS, "Whether the session's requests come through hot threads: start them."},
    {"start_hot", module_start_hot, METH_O, "Start the hot threads on a data plane, given by its capsule."},
    {"stop_hot", module_stop_hot, METH_NOARGS, "End the hot threads; what they had begun is answered."},
    {"leave_syncs", module_leave_syncs, METH_O, "Have hot threads leave every fsync to Python, or not any more."},
    {"refuse_writers", module_refuse_writers, METH_O, "Refuse writers that the kernel caches for, or not any more."},
    {"hot_counts", module_hot_counts, METH_NOARGS, "Requests that hot threads answered, and left to Python."},
    {"hot_durations", module_hot_durations, METH_NOARGS, "How long what hot threads answered took: (buckets, sum in ns)."},
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
    if (module && add_request_type(module) < 0)
        Py_CLEAR(module);
    return module;
}
