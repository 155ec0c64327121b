/* incfs._dataplane: the Python type of the native data plane (plane.h), with the interface and the
 * exceptions of incfs/dataplane.py.
 *
 * Threads: the methods run with the GIL held, but for large reads and writes; the plane below has
 * its own locks and may be used by other threads at any time.
 */
#include "_dataplane.h"

#include "crc32c.h"

/* From here on a request is worth the cost of letting go of the GIL and getting it back. */
enum { LONG_BYTES = 131072 };

/* ---- Life --------------------------------------------------------------------------------------- */

static PyObject *plane_type_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"block_bytes", "files", NULL};
    unsigned int block_bytes;
    PyObject *files;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "IO", names, &block_bytes, &files))
        return NULL;
    if (!block_bytes) {
        PyErr_SetString(PyExc_ValueError, "block_bytes must be positive");
        return NULL;
    }
    DataPlane *self = (DataPlane *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->block_bytes = block_bytes;
    self->files = Py_NewRef(files);
    self->plane = plane_new(block_bytes);
    self->lane = self->plane ? lane_new(self->plane) : NULL;
    if (!self->lane) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static int plane_type_traverse(DataPlane *self, visitproc visit, void *arg)
{
    Py_VISIT(self->files);
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static int plane_type_clear(DataPlane *self)
{
    Py_CLEAR(self->files);
    return 0;
}

static void plane_type_dealloc(DataPlane *self)
{
    PyObject_GC_UnTrack(self);
    plane_type_clear(self);
    if (self->lane)
        lane_free(self->lane);
    if (self->plane)
        plane_free(self->plane);
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- Bytes -------------------------------------------------------------------------------------- */

static PyObject *method_read(DataPlane *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"map_id", "first_block", "block_count", "wait", "verify", NULL};
    unsigned long long map_id, first_block;
    Py_ssize_t block_count;
    int wait = 0, verify = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KKn|$pp", names, &map_id, &first_block, &block_count, &wait, &verify))
        return NULL;
    if (block_count < 0 || block_count > PY_SSIZE_T_MAX / self->block_bytes)
        return PyErr_Format(PyExc_ValueError, "cannot read %zd blocks", block_count);
    PyObject *data = PyBytes_FromStringAndSize(NULL, block_count * self->block_bytes);
    if (!data)
        return NULL;
    struct plane_refusal why = {0};
    enum plane_status status;
    PyThreadState *thread = wait || PyBytes_GET_SIZE(data) >= LONG_BYTES ? PyEval_SaveThread() : NULL;
    status = plane_read(self->plane, map_id, first_block, block_count, wait, verify, PyBytes_AS_STRING(data), &why);
    if (thread)
        PyEval_RestoreThread(thread);
    if (status == PLANE_OK)
        return data;
    Py_DECREF(data);
    return raise_status(self, status, map_id, &why);
}

static PyObject *method_write(DataPlane *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"map_id", "offset_bytes", "data", "wait", "keep_zeros", NULL};
    unsigned long long map_id, offset_bytes;
    Py_buffer data;
    int wait = 0, keep_zeros = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KKy*|$pp", names, &map_id, &offset_bytes, &data, &wait, &keep_zeros))
        return NULL;
    struct plane_refusal why = {0};
    enum plane_status status;
    PyThreadState *thread = wait || data.len >= LONG_BYTES ? PyEval_SaveThread() : NULL;
    status = plane_write(self->plane, map_id, offset_bytes, data.buf, data.len, wait, keep_zeros, &why);
    if (thread)
        PyEval_RestoreThread(thread);
    PyBuffer_Release(&data);
    if (status != PLANE_OK)
        return raise_status(self, status, map_id, &why);
    Py_RETURN_NONE;
}

static PyObject *method_write_served(DataPlane *self, PyObject *args)
{
    unsigned long long map_id, offset_bytes;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "KKy*", &map_id, &offset_bytes, &data))
        return NULL;
    struct plane_refusal why = {0};
    enum plane_status status;
    Py_BEGIN_ALLOW_THREADS
    status = plane_write_served(self->plane, map_id, offset_bytes, data.buf, data.len, true, &why);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    if (status != PLANE_OK && status != PLANE_NOT_SERVED)
        return raise_status(self, status, map_id, &why);
    return PyBool_FromLong(status == PLANE_OK);
}

static PyObject *method_discard(DataPlane *self, PyObject *args)
{
    unsigned long long map_id, first_block;
    Py_ssize_t block_count;
    if (!PyArg_ParseTuple(args, "KKn", &map_id, &first_block, &block_count))
        return NULL;
    if (block_count < 0)
        return PyErr_Format(PyExc_ValueError, "cannot discard %zd blocks", block_count);
    struct plane_refusal why = {0};
    enum plane_status status = plane_discard(self->plane, map_id, first_block, block_count, &why);
    if (status != PLANE_OK)
        return raise_status(self, status, map_id, &why);
    Py_RETURN_NONE;
}

/* ---- The module --------------------------------------------------------------------------------- */

static PyObject *module_crc32c(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "y*", &data))
        return NULL;
    PyObject *list = PyList_New(0);
    for (size_t number = 0; list && crc32c_ways(number); number++)
        append_new(list, PyLong_FromUnsignedLong(crc32c_ways(number)(data.buf, (size_t)data.len)));
    PyBuffer_Release(&data);
    return list;
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS

static PyMethodDef plane_methods[] = {
    {"load", KEYWORDS(method_load), "Make a page resident."},
    {"evict", (PyCFunction)method_evict, METH_O, "Forget every page of a table; nothing of it may be unsealed."},
    {"shrink", (PyCFunction)method_shrink, METH_O, "Evict pages that were not used lately; return which."},
    {"is_resident", (PyCFunction)method_is_resident, METH_VARARGS, "Tell whether a page is resident."},
    {"grant", (PyCFunction)method_grant, METH_VARARGS, "Give a table free blocks to write into."},
    {"revoke", (PyCFunction)method_revoke, METH_VARARGS, "Take back unused leased blocks of one table, or of all."},
    {"leased_blocks", (PyCFunction)method_leased_blocks, METH_O, "Unused leased blocks of a table."},
    {"attach", (PyCFunction)method_attach, METH_O, "Take over the descriptors of a storage volume as they are now."},
    {"stripe", (PyCFunction)method_stripe, METH_VARARGS, "Let new blocks of a table come from several leases."},
    {"move", (PyCFunction)method_move, METH_VARARGS, "Let mappings of resident pages name other blocks."},
    {"serve", KEYWORDS(method_serve), "Let other threads read a table up to a size, and write it."},
    {"unserve", (PyCFunction)method_unserve, METH_O, "Let other threads no longer read or write a table."},
    {"freeze", (PyCFunction)method_freeze, METH_NOARGS, "Let other threads no longer write anything."},
    {"watch", (PyCFunction)method_watch, METH_O, "Give a descriptor that is readable when attend() is wanted."},
    {"attend", (PyCFunction)method_attend, METH_NOARGS, "Reset the descriptor; list tables whose leases run low."},
    {"written", (PyCFunction)method_written, METH_NOARGS, "List (table, time in ns) of other threads' writes."},
    {"server", (PyCFunction)method_server, METH_NOARGS, "Give what hot threads need, in a capsule."},
    {"read", KEYWORDS(method_read), "Read whole blocks; holes read as zeros."},
    {"write", KEYWORDS(method_write), "Write a range of bytes; what it lacks of whole blocks is kept."},
    {"write_served", (PyCFunction)method_write_served, METH_VARARGS,
     "Write a range as hot threads do; False when that is not allowed."},
    {"discard", (PyCFunction)method_discard, METH_VARARGS, "Let whole blocks read as zeros."},
    {"mapped_delta", (PyCFunction)method_mapped_delta, METH_O, "Blocks that the table gained since the last seal."},
    {"seal", (PyCFunction)method_seal, METH_NOARGS, "Hand over the mappings appended since the last seal."},
    {"take_committed", (PyCFunction)method_take_committed, METH_NOARGS,
     "Take what was committed without the control plane: (sequence, batch), in order."},
    {"lend", KEYWORDS(method_lend), "Let small commits go through without the control plane: this is the journal's end."},
    {"reopen", (PyCFunction)method_reopen, METH_NOARGS, "Let commits go on after close_journal."},
    {"settle", (PyCFunction)method_settle, METH_NOARGS, "Let no commit begin in the lent journal; wait for the one under way."},
    {"left", (PyCFunction)method_left, METH_NOARGS, "Which of the lent files failed while another has everything: [(position, errno)]."},
    {"stop", (PyCFunction)method_stop, METH_NOARGS, "Let no commit begin in the lent journal, ever; wait for the one under way."},
    {"reclaim", (PyCFunction)method_reclaim, METH_NOARGS, "Take the journal's end back once it is at rest."},
    {"close_journal", (PyCFunction)method_close_journal, METH_NOARGS, "Let no further commit begin in the lent journal."},
    {"set_folded", (PyCFunction)method_set_folded, METH_O, "Say which commit the tables contain."},
    {"_sync", (PyCFunction)method_sync, METH_O, "What a hot thread does at an fsync; whether it could."},
    {"_divert", (PyCFunction)method_divert, METH_VARARGS, "Let commits write and flush by functions at these addresses."},
    {"_inspect", (PyCFunction)method_inspect, METH_NOARGS, "Everything inside: pages, leases, dropped."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef plane_properties[] = {
    {"fresh_count", (getter)get_fresh_count, NULL, "Mappings appended since the last seal.", NULL},
    {"seal_count", (getter)get_seal_count, NULL, "Seals so far.", NULL},
    {"durable_sequence", (getter)get_durable_sequence, NULL, "The last commit in the lent journal whose flush has ended.", NULL},
    {"lent_end_bytes", (getter)get_lent_end_bytes, NULL, "Where the journal that was lent ends.", NULL},
    {"page_count", (getter)get_page_count, NULL, "Resident pages.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot plane_slots[] = {
    {Py_tp_doc, "Block input and output through resident pages, in C."},
    {Py_tp_new, plane_type_new},
    {Py_tp_dealloc, plane_type_dealloc},
    {Py_tp_traverse, plane_type_traverse},
    {Py_tp_clear, plane_type_clear},
    {Py_tp_methods, plane_methods},
    {Py_tp_getset, plane_properties},
    {0, NULL},
};

static PyType_Spec plane_spec = {
    .name = "incfs._dataplane.DataPlane",
    .basicsize = sizeof(DataPlane),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = plane_slots,
};

static PyMethodDef module_methods[] = {
    {"crc32c", module_crc32c, METH_VARARGS, "The checksum by each of the ways that this processor has, for tests."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "incfs._dataplane",
    .m_doc = "The native data plane.",
    .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__dataplane(void)
{
    crc32c_init();
    if (import_python() < 0)
        return NULL;
    PyObject *module = PyModule_Create(&module_definition);
    PyObject *type = module ? PyType_FromSpec(&plane_spec) : NULL;
    if (!type || PyModule_AddObjectRef(module, "DataPlane", type) < 0)
        Py_CLEAR(module);
    Py_XDECREF(type);
    return module;
}
