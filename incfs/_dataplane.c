/* incfs._dataplane: the Python type of the native data plane (plane.h), with the interface and the
 * exceptions of incfs/dataplane.py.
 *
 * Threads: the methods run with the GIL held, but for large reads and writes; the plane below has
 * its own locks and may be used by other threads at any time.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "crc32c.h"
#include "hot.h"
#include "lane.h"
#include "plane.h"

#include <string.h>

/* From here on a request is worth the cost of letting go of the GIL and getting it back. */
enum { LONG_BYTES = 131072 };

typedef struct {
    PyObject_HEAD
    struct plane *plane;
    struct lane *lane;
    uint32_t block_bytes;
    PyObject *files; /* Mapping[StorageId, BlockFile] */
} DataPlane;

/* What the control plane is told with; see incfs/nativeplane.py for `errors`. */
static struct {
    PyObject *not_resident, *lease_exhausted, *read_would_wait, *leg_failed; /* incfs.dataplane */
    PyObject *batch;
    PyTypeObject *appended, *sealed_page; /* incfs.model; named tuples */
} python;

/* ---- Refusals and errors -------------------------------------------------------------------------- */

/* Raises type(*arguments), where type is an exception class; steals arguments. */
static PyObject *raise(PyObject *type, PyObject *arguments)
{
    PyObject *error = arguments ? PyObject_Call(type, arguments, NULL) : NULL;
    if (error)
        PyErr_SetObject(type, error);
    Py_XDECREF(error);
    Py_XDECREF(arguments);
    return NULL;
}

/* Raises what self.method(*arguments) returns; steals arguments. */
static PyObject *raise_made(DataPlane *self, const char *method, PyObject *arguments)
{
    PyObject *maker = PyObject_GetAttrString((PyObject *)self, method);
    PyObject *error = maker && arguments ? PyObject_Call(maker, arguments, NULL) : NULL;
    if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    Py_XDECREF(maker);
    Py_XDECREF(arguments);
    return NULL;
}

static PyObject *file_of(DataPlane *self, uint64_t address)
{
    PyObject *id = PyLong_FromUnsignedLong(address >> 48);
    PyObject *file = id ? PyObject_GetItem(self->files, id) : NULL;
    Py_XDECREF(id);
    return file;
}

static PyObject *raise_would_wait(DataPlane *self, const struct plane_refusal *why)
{
    PyObject *file = file_of(self, why->address);
    if (!file)
        return NULL;
    return raise(python.read_would_wait, Py_BuildValue("(NKK)", file,
                                                       (unsigned long long)why->address & 0xFFFFFFFFFFFFull,
                                                       (unsigned long long)why->block_count));
}

static PyObject *raise_status(DataPlane *self, enum plane_status status, uint64_t map_id,
                              const struct plane_refusal *why)
{
    unsigned long long map = map_id, address = why->address;
    switch (status) {
    case PLANE_NOT_RESIDENT:
        return raise(python.not_resident, Py_BuildValue("(KK)", map, (unsigned long long)why->page_index));
    case PLANE_NO_LEASE:
        return raise(python.lease_exhausted, Py_BuildValue("(KK)", map | (unsigned long long)why->column,
                                                           (unsigned long long)why->block_count));
    case PLANE_WOULD_WAIT:
        return raise_would_wait(self, why);
    case PLANE_MISMATCH:
        return raise_made(self, "_mismatch_error",
                          Py_BuildValue("(KKKII)", map, (unsigned long long)why->virtual_block, address, why->found,
                                        why->expected));
    case PLANE_READ_ERROR:
        return raise_made(self, "_host_error", Py_BuildValue("(sKi)", "read", address, why->host_errno));
    case PLANE_WRITE_ERROR:
        return raise_made(self, "_host_error", Py_BuildValue("(sKi)", "write", address, why->host_errno));
    case PLANE_LEG_ERROR:
        return raise(python.leg_failed, Py_BuildValue("(KIi)", address >> 48, why->leg, why->host_errno));
    default:
        return PyErr_NoMemory();
    }
}

/* ---- Life --------------------------------------------------------------------------------------------- */

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

/* Reads the descriptors of a file, one or a tuple of them; gives how many, 0 with an error set. */
static unsigned parse_descriptors(PyObject *descriptors, int *fds)
{
    PyObject *tuple = PyTuple_Check(descriptors) ? Py_NewRef(descriptors) : PyTuple_Pack(1, descriptors);
    Py_ssize_t count = tuple ? PyTuple_GET_SIZE(tuple) : 0;
    if (tuple && (count < 1 || count > PLANE_MAX_LEGS))
        PyErr_Format(PyExc_ValueError, "a file of %zd descriptors", count);
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); i++)
        fds[i] = (int)PyLong_AsLong(PyTuple_GET_ITEM(tuple, i));
    Py_XDECREF(tuple);
    return PyErr_Occurred() ? 0 : (unsigned)count;
}

/* Makes the image that an address lies in known to the plane, as it is now. */
static int attach_file(DataPlane *self, uint64_t address)
{
    PyObject *file = file_of(self, address);
    PyObject *place = file ? PyObject_CallMethod(file, "descriptor", NULL) : NULL;
    Py_XDECREF(file);
    if (!place)
        return -1;
    PyObject *descriptors;
    unsigned long long offset;
    int fds[PLANE_MAX_LEGS];
    unsigned count = PyArg_ParseTuple(place, "OK", &descriptors, &offset) ? parse_descriptors(descriptors, fds) : 0;
    Py_DECREF(place);
    if (!count)
        return -1;
    if (plane_attach(self->plane, address >> 48, fds, count, offset) != PLANE_OK) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static int need_file(DataPlane *self, uint64_t address)
{
    return plane_is_attached(self->plane, address) ? 0 : attach_file(self, address);
}

/* Appends what was made, unless that failed; the error stays set. */
static void append_new(PyObject *list, PyObject *made)
{
    if (made)
        PyList_Append(list, made);
    Py_XDECREF(made);
}

/* ---- Pages and leases --------------------------------------------------------------------------------------- */

static int fill_mappings(DataPlane *self, PyObject *entries, struct plane_mapping *mappings)
{
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(entries, &position, &key, &value)) {
        size_t index = PyLong_AsSize_t(key);
        if (index >= PLANE_PAGE_BLOCKS || !PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 2) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_ValueError, "not a map page");
            return -1;
        }
        mappings[index].address = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(value, 0));
        mappings[index].checksum = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(value, 1));
        if (PyErr_Occurred() || (mappings[index].address > PLANE_HOLE && need_file(self, mappings[index].address) < 0))
            return -1;
    }
    return 0;
}

static PyObject *method_load(DataPlane *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"map_id", "page_index", "entries", "hole", NULL};
    unsigned long long map_id, page_index, hole = PLANE_INHERIT;
    PyObject *entries;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KKO!|$K", names, &map_id, &page_index, &PyDict_Type, &entries,
                                     &hole))
        return NULL;
    struct plane_mapping mappings[PLANE_PAGE_BLOCKS] = {0};
    if (fill_mappings(self, entries, mappings) < 0)
        return NULL;
    if (plane_is_resident(self->plane, map_id, page_index)) {
        PyErr_SetString(PyExc_AssertionError, "the page is resident");
        return NULL;
    }
    if (plane_load(self->plane, map_id, page_index, mappings, hole) != PLANE_OK)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *method_evict(DataPlane *self, PyObject *arg)
{
    unsigned long long map_id = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    plane_evict(self->plane, map_id);
    Py_RETURN_NONE;
}

static PyObject *method_shrink(DataPlane *self, PyObject *arg)
{
    size_t page_count = PyLong_AsSize_t(arg), evicted_count;
    if (PyErr_Occurred())
        return NULL;
    uint64_t *evicted;
    if (plane_shrink(self->plane, page_count, &evicted, &evicted_count) != PLANE_OK)
        return PyErr_NoMemory();
    PyObject *list = PyList_New(evicted_count);
    for (size_t i = 0; list && i < evicted_count; i++) {
        PyObject *pair =
            Py_BuildValue("(KK)", (unsigned long long)evicted[2 * i], (unsigned long long)evicted[2 * i + 1]);
        if (!pair)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, pair);
    }
    free(evicted);
    return list;
}

static PyObject *method_is_resident(DataPlane *self, PyObject *args)
{
    unsigned long long map_id, page_index;
    if (!PyArg_ParseTuple(args, "KK", &map_id, &page_index))
        return NULL;
    return PyBool_FromLong(plane_is_resident(self->plane, map_id, page_index));
}

static PyObject *method_grant(DataPlane *self, PyObject *args)
{
    unsigned long long map_id, address, block_count;
    if (!PyArg_ParseTuple(args, "KKK", &map_id, &address, &block_count) || need_file(self, address) < 0)
        return NULL;
    if (plane_grant(self->plane, map_id, (struct plane_run){address, block_count}) != PLANE_OK)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *method_revoke(DataPlane *self, PyObject *args)
{
    PyObject *table = Py_None;
    if (!PyArg_ParseTuple(args, "|O", &table))
        return NULL;
    uint64_t map_id = table == Py_None ? 0 : PyLong_AsUnsignedLongLong(table);
    if (PyErr_Occurred())
        return NULL;
    struct plane_run *runs;
    size_t run_count;
    if (plane_revoke(self->plane, table == Py_None ? NULL : &map_id, &runs, &run_count) != PLANE_OK)
        return PyErr_NoMemory();
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < run_count; i++)
        for (uint64_t k = 0; list && k < runs[i].count; k++) {
            PyObject *address = PyLong_FromUnsignedLongLong(runs[i].address + k);
            if (!address || PyList_Append(list, address) < 0)
                Py_CLEAR(list);
            Py_XDECREF(address);
        }
    free(runs);
    return list;
}

static PyObject *method_leased_blocks(DataPlane *self, PyObject *arg)
{
    unsigned long long map_id = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(plane_leased_blocks(self->plane, map_id));
}

static PyObject *method_attach(DataPlane *self, PyObject *arg)
{
    unsigned long long storage_id = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred() || attach_file(self, storage_id << 48) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *method_stripe(DataPlane *self, PyObject *args)
{
    unsigned long long map_id, unit_blocks, columns;
    if (!PyArg_ParseTuple(args, "KKK", &map_id, &unit_blocks, &columns))
        return NULL;
    if (!unit_blocks || !columns || columns > PLANE_MAX_COLUMNS) {
        PyErr_SetString(PyExc_AssertionError, "no such stripes");
        return NULL;
    }
    if (plane_stripe(self->plane, map_id, unit_blocks, columns) != PLANE_OK)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static size_t fill_moves(DataPlane *self, PyObject *list, struct plane_move *moves)
{
    Py_ssize_t count = PyList_GET_SIZE(list);
    for (Py_ssize_t i = 0; i < count; i++) {
        unsigned long long index, old_address, new_address;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, i), "KKK", &index, &old_address, &new_address) ||
            need_file(self, new_address) < 0)
            return 0;
        moves[i] = (struct plane_move){index, old_address, new_address};
    }
    return count;
}

static PyObject *method_move(DataPlane *self, PyObject *args)
{
    PyObject *tables, *list;
    unsigned long long page_index;
    if (!PyArg_ParseTuple(args, "O!KO!", &PyList_Type, &tables, &page_index, &PyList_Type, &list))
        return NULL;
    struct plane_move *moves = malloc((PyList_GET_SIZE(list) + 1) * sizeof *moves);
    if (!moves)
        return PyErr_NoMemory();
    size_t count = fill_moves(self, list, moves);
    for (Py_ssize_t i = 0; !PyErr_Occurred() && i < PyList_GET_SIZE(tables); i++) {
        unsigned long long map_id = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(tables, i));
        if (!PyErr_Occurred())
            plane_move(self->plane, map_id, page_index, moves, count);
    }
    free(moves);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

/* ---- Served requests --------------------------------------------------------------------------------------- */

static PyObject *method_serve(DataPlane *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"map_id", "size_bytes", "facts", "is_writable", NULL};
    unsigned long long map_id, size_bytes, mapped_blocks, accessed_ns, modified_ns, changed_ns;
    struct plane_facts facts;
    int is_writable;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KK(IIIIKKKK)$p", names, &map_id, &size_bytes, &facts.mode,
                                     &facts.uid, &facts.gid, &facts.link_count, &mapped_blocks, &accessed_ns,
                                     &modified_ns, &changed_ns, &is_writable))
        return NULL;
    facts.mapped_blocks = mapped_blocks;
    facts.accessed_ns = accessed_ns;
    facts.modified_ns = modified_ns;
    facts.changed_ns = changed_ns;
    if (plane_serve(self->plane, map_id, size_bytes, is_writable, &facts) != PLANE_OK)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *method_unserve(DataPlane *self, PyObject *arg)
{
    unsigned long long map_id = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    plane_unserve(self->plane, map_id);
    Py_RETURN_NONE;
}

static PyObject *method_freeze(DataPlane *self, PyObject *unused)
{
    (void)unused;
    lane_close(self->lane);
    plane_freeze(self->plane);
    Py_RETURN_NONE;
}

static PyObject *method_watch(DataPlane *self, PyObject *arg)
{
    size_t seal_at = PyLong_AsSize_t(arg);
    if (PyErr_Occurred())
        return NULL;
    int fd = plane_watch(self->plane, seal_at);
    return fd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(fd);
}

static PyObject *method_attend(DataPlane *self, PyObject *unused)
{
    (void)unused;
    uint64_t *tables;
    size_t table_count;
    if (plane_attend(self->plane, &tables, &table_count) != PLANE_OK)
        return PyErr_NoMemory();
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < table_count; i++)
        append_new(list, PyLong_FromUnsignedLongLong(tables[i]));
    free(tables);
    if (PyErr_Occurred())
        Py_CLEAR(list);
    uint64_t address;
    int failure = plane_failure(self->plane, &address);
    if (!list || !failure)
        return list;
    Py_DECREF(list);
    struct plane_refusal why = {.address = address, .host_errno = failure};
    return raise_status(self, PLANE_WRITE_ERROR, 0, &why);
}

static PyObject *method_written(DataPlane *self, PyObject *unused)
{
    (void)unused;
    uint64_t *writes;
    size_t write_count;
    /* What is taken here only a commit of the control plane makes durable. */
    lane_close(self->lane);
    if (plane_written(self->plane, &writes, &write_count) != PLANE_OK)
        return PyErr_NoMemory();
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < write_count; i++)
        append_new(list, Py_BuildValue("(KK)", (unsigned long long)writes[2 * i], (unsigned long long)writes[2 * i + 1]));
    free(writes);
    if (PyErr_Occurred())
        Py_CLEAR(list);
    return list;
}

static bool server_read(void *owner, uint64_t inode, uint64_t offset_bytes, size_t length_bytes, bool can_wait,
                        char *buffer, size_t room, size_t *start, size_t *count)
{
    DataPlane *self = owner;
    return plane_serve_read(self->plane, inode, offset_bytes, length_bytes, can_wait, buffer, room, start, count) ==
           PLANE_OK;
}

static bool server_write(void *owner, uint64_t inode, uint64_t offset_bytes, const void *data, size_t length_bytes)
{
    DataPlane *self = owner;
    return plane_serve_write(self->plane, inode, offset_bytes, data, length_bytes) == PLANE_OK;
}

static bool server_stat(void *owner, uint64_t inode, struct hot_stat *stat)
{
    DataPlane *self = owner;
    struct plane_facts facts;
    if (!plane_serve_stat(self->plane, inode, &facts, &stat->size_bytes))
        return false;
    *stat = (struct hot_stat){
        .mode = facts.mode,
        .uid = facts.uid,
        .gid = facts.gid,
        .link_count = facts.link_count,
        .block_bytes = self->block_bytes,
        .size_bytes = stat->size_bytes,
        .stored_bytes = facts.mapped_blocks * self->block_bytes,
        .accessed_ns = facts.accessed_ns,
        .modified_ns = facts.modified_ns,
        .changed_ns = facts.changed_ns,
    };
    return true;
}

static bool server_set_modified(void *owner, uint64_t inode, uint64_t modified_ns)
{
    DataPlane *self = owner;
    return plane_serve_time(self->plane, inode, modified_ns);
}

static bool server_sync(void *owner, struct hot_waiter *waiter, bool can_wait, const struct hot_answers *answers)
{
    DataPlane *self = owner;
    struct plane_facts facts;
    uint64_t size_bytes;
    return plane_serve_stat(self->plane, waiter->inode, &facts, &size_bytes) &&
           lane_sync(self->lane, waiter, can_wait, answers);
}

static void release_capsule(PyObject *capsule)
{
    free(PyCapsule_GetPointer(capsule, HOT_SERVER_CAPSULE));
    Py_XDECREF((PyObject *)PyCapsule_GetContext(capsule));
}

/* The capsule keeps the plane alive. */
static PyObject *method_server(DataPlane *self, PyObject *unused)
{
    (void)unused;
    struct hot_server *server = malloc(sizeof *server);
    if (!server)
        return PyErr_NoMemory();
    *server = (struct hot_server){self, server_read, server_write, server_stat, server_set_modified, server_sync};
    PyObject *capsule = PyCapsule_New(server, HOT_SERVER_CAPSULE, release_capsule);
    if (!capsule)
        free(server);
    else
        PyCapsule_SetContext(capsule, Py_NewRef((PyObject *)self));
    return capsule;
}

/* ---- Bytes ------------------------------------------------------------------------------------------------------- */

static PyObject *method_read(DataPlane *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"map_id", "first_block", "block_count", "wait", NULL};
    unsigned long long map_id, first_block;
    Py_ssize_t block_count;
    int wait = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KKn|$p", names, &map_id, &first_block, &block_count, &wait))
        return NULL;
    if (block_count < 0 || block_count > PY_SSIZE_T_MAX / self->block_bytes)
        return PyErr_Format(PyExc_ValueError, "cannot read %zd blocks", block_count);
    PyObject *data = PyBytes_FromStringAndSize(NULL, block_count * self->block_bytes);
    if (!data)
        return NULL;
    struct plane_refusal why = {0};
    enum plane_status status;
    PyThreadState *thread = wait || PyBytes_GET_SIZE(data) >= LONG_BYTES ? PyEval_SaveThread() : NULL;
    status = plane_read(self->plane, map_id, first_block, block_count, wait, PyBytes_AS_STRING(data), &why);
    if (thread)
        PyEval_RestoreThread(thread);
    if (status == PLANE_OK)
        return data;
    Py_DECREF(data);
    return raise_status(self, status, map_id, &why);
}

static PyObject *method_write(DataPlane *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"map_id", "offset_bytes", "data", "wait", NULL};
    unsigned long long map_id, offset_bytes;
    Py_buffer data;
    int wait = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KKy*|$p", names, &map_id, &offset_bytes, &data, &wait))
        return NULL;
    struct plane_refusal why = {0};
    enum plane_status status;
    PyThreadState *thread = wait || data.len >= LONG_BYTES ? PyEval_SaveThread() : NULL;
    status = plane_write(self->plane, map_id, offset_bytes, data.buf, data.len, wait, &why);
    if (thread)
        PyEval_RestoreThread(thread);
    PyBuffer_Release(&data);
    if (status != PLANE_OK)
        return raise_status(self, status, map_id, &why);
    Py_RETURN_NONE;
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

/* ---- Seal -------------------------------------------------------------------------------------------------------------- */

/* Makes a named tuple without going through its __new__: a seal makes thousands.  Steals the members. */
static PyObject *make_tuple(PyTypeObject *type, Py_ssize_t count, PyObject **members)
{
    PyObject *tuple = type->tp_alloc(type, count);
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!members[i])
            Py_CLEAR(tuple);
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (tuple)
            PyTuple_SET_ITEM(tuple, i, members[i]);
        else
            Py_XDECREF(members[i]);
    }
    return tuple;
}

static PyObject *make_appended(const struct plane_appended *appended)
{
    PyObject *members[] = {
        PyLong_FromUnsignedLong(appended->index),
        PyLong_FromUnsignedLongLong(appended->address),
        PyLong_FromUnsignedLong(appended->checksum),
        PyLong_FromUnsignedLongLong(appended->old_address),
        PyLong_FromUnsignedLong(appended->old_checksum),
    };
    return make_tuple(python.appended, 5, members);
}

static PyObject *make_sealed_page(const struct plane_sealed_page *page, const struct plane_appended *appended)
{
    PyObject *list = PyList_New(page->count);
    for (size_t i = 0; list && i < page->count; i++) {
        PyObject *mapping = make_appended(&appended[page->first + i]);
        if (!mapping)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, mapping);
    }
    PyObject *members[] = {PyLong_FromUnsignedLongLong(page->map_id), PyLong_FromUnsignedLongLong(page->page_index),
                           list};
    return make_tuple(python.sealed_page, 3, members);
}

static PyObject *make_dropped(const struct plane_batch *batch)
{
    PyObject *dropped = PyList_New(batch->dropped_count);
    for (size_t i = 0; dropped && i < batch->dropped_count; i++) {
        PyObject *address = PyLong_FromUnsignedLongLong(batch->dropped[i]);
        if (!address)
            Py_CLEAR(dropped);
        else
            PyList_SET_ITEM(dropped, i, address);
    }
    return dropped;
}

static PyObject *make_written(const struct plane_batch *batch)
{
    PyObject *written = PyList_New(0);
    for (size_t i = 0; written && i < batch->written_count; i++)
        append_new(written, Py_BuildValue("(KK)", (unsigned long long)batch->written[i].map_id,
                                          (unsigned long long)batch->written[i].written_ns));
    return written;
}

/* Steals `committed`, a list. */
static PyObject *make_batch(const struct plane_batch *batch, PyObject *committed)
{
    PyObject *pages = PyList_New(batch->page_count), *dropped = make_dropped(batch), *written = make_written(batch);
    for (size_t i = 0; pages && i < batch->page_count; i++) {
        PyObject *page = make_sealed_page(&batch->pages[i], batch->appended);
        if (!page)
            Py_CLEAR(pages);
        else
            PyList_SET_ITEM(pages, i, page);
    }
    PyObject *made = pages && dropped && written && committed && !PyErr_Occurred()
                         ? PyObject_CallFunctionObjArgs(python.batch, pages, dropped, written, committed, NULL)
                         : NULL;
    Py_XDECREF(committed);
    Py_XDECREF(pages);
    Py_XDECREF(dropped);
    Py_XDECREF(written);
    return made;
}

/* Makes a list of (sequence, batch), and frees the batches. */
static PyObject *make_committed(struct lane_batch *committed)
{
    PyObject *list = PyList_New(0);
    for (struct lane_batch *batch = committed, *next; batch; batch = next) {
        next = batch->next;
        PyObject *made = list && !PyErr_Occurred() ? make_batch(&batch->batch, PyList_New(0)) : NULL;
        if (made)
            append_new(list, Py_BuildValue("(KN)", (unsigned long long)batch->sequence, made));
        lane_batch_free(batch);
    }
    if (PyErr_Occurred())
        Py_CLEAR(list);
    return list;
}

/* Out of memory in these two, mappings are lost to this process: the caller lets the pool fail. */
static PyObject *method_take_committed(DataPlane *self, PyObject *unused)
{
    (void)unused;
    struct lane_batch *committed;
    lane_take(self->lane, &committed, NULL);
    return make_committed(committed);
}

static PyObject *method_seal(DataPlane *self, PyObject *unused)
{
    (void)unused;
    struct plane_batch rest;
    struct lane_batch *committed;
    if (lane_take(self->lane, &committed, &rest) != PLANE_OK)
        return PyErr_NoMemory();
    PyObject *made = make_batch(&rest, make_committed(committed));
    plane_batch_free(&rest);
    return made;
}

/* ---- The journal's end ------------------------------------------------------------------------------------------ */

static PyObject *method_lend(DataPlane *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "end_bytes", "limit_bytes", "nonce", "sequence", "folded", "most_blocks", NULL};
    int fd;
    unsigned long long end_bytes, limit_bytes, nonce, sequence, folded;
    Py_ssize_t most_blocks;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$iKKKKKn", names, &fd, &end_bytes, &limit_bytes, &nonce, &sequence,
                                     &folded, &most_blocks))
        return NULL;
    lane_lend(self->lane, &(struct lane_journal){fd, end_bytes, limit_bytes, nonce, sequence, folded, most_blocks,
                                                 self->block_bytes});
    Py_RETURN_NONE;
}

static PyObject *method_reopen(DataPlane *self, PyObject *unused)
{
    (void)unused;
    lane_reopen(self->lane);
    Py_RETURN_NONE;
}

static PyObject *method_reclaim(DataPlane *self, PyObject *unused)
{
    (void)unused;
    uint64_t end_bytes;
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = lane_reclaim(self->lane, &end_bytes);
    Py_END_ALLOW_THREADS
    if (error)
        return raise_made(self, "_host_error", Py_BuildValue("(sKi)", "write", 0ull, error));
    return PyLong_FromUnsignedLongLong(end_bytes);
}

static PyObject *method_close_journal(DataPlane *self, PyObject *unused)
{
    (void)unused;
    lane_close(self->lane);
    Py_RETURN_NONE;
}

struct asked {
    struct hot_waiter waiter; /* first */
    bool is_refused;
    int error;
};

static void asked_done(struct hot_waiter *waiter, int error)
{
    ((struct asked *)waiter)->error = error;
}

static void asked_refused(struct hot_waiter *waiter)
{
    ((struct asked *)waiter)->is_refused = true;
}

/* With nobody else about, the answer is there when lane_sync returns. */
static PyObject *method_sync(DataPlane *self, PyObject *arg)
{
    static const struct hot_answers answers = {asked_done, asked_refused};
    struct asked asked = {.waiter.inode = PyLong_AsUnsignedLongLong(arg)};
    if (PyErr_Occurred())
        return NULL;
    bool is_taken = server_sync(self, &asked.waiter, true, &answers);
    if (asked.error)
        return raise_made(self, "_host_error", Py_BuildValue("(sKi)", "write", 0ull, asked.error));
    return PyBool_FromLong(is_taken && !asked.is_refused);
}

static PyObject *method_set_folded(DataPlane *self, PyObject *arg)
{
    unsigned long long folded = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    lane_set_folded(self->lane, folded);
    Py_RETURN_NONE;
}

static PyObject *get_lent_end_bytes(DataPlane *self, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLongLong(lane_end_bytes(self->lane));
}

static PyObject *method_mapped_delta(DataPlane *self, PyObject *arg)
{
    unsigned long long map_id = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromLongLong(plane_mapped_delta(self->plane, map_id));
}

static PyObject *get_fresh_count(DataPlane *self, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(plane_fresh_count(self->plane));
}

static PyObject *get_page_count(DataPlane *self, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(plane_page_count(self->plane));
}

/* ---- For tests ------------------------------------------------------------------------------------------------------------ */

struct seen {
    PyObject *pages, *leases, *dropped;
};

static void put_entry(PyObject *entries, unsigned index, uint64_t address, uint32_t checksum)
{
    PyObject *key = PyLong_FromUnsignedLong(index);
    PyObject *value = Py_BuildValue("(KI)", (unsigned long long)address, (unsigned int)checksum);
    if (entries && key && value)
        PyDict_SetItem(entries, key, value);
    Py_XDECREF(key);
    Py_XDECREF(value);
}

static void see_page(void *context, uint64_t map_id, uint64_t page_index, const uint64_t *addresses,
                     const uint32_t *checksums, const struct plane_appended *fresh, size_t fresh_count)
{
    struct seen *seen = context;
    PyObject *entries = PyDict_New(), *replaced = PyDict_New();
    for (unsigned i = 0; i < PLANE_PAGE_BLOCKS; i++)
        put_entry(entries, i, addresses[i], checksums[i]);
    for (size_t i = 0; i < fresh_count; i++)
        put_entry(replaced, fresh[i].index, fresh[i].old_address, fresh[i].old_checksum);
    if (entries && replaced)
        append_new(seen->pages, Py_BuildValue("(KKOO)", (unsigned long long)map_id, (unsigned long long)page_index,
                                              entries, replaced));
    Py_XDECREF(entries);
    Py_XDECREF(replaced);
}

static void see_lease(void *context, uint64_t map_id, struct plane_run run)
{
    struct seen *seen = context;
    append_new(seen->leases, Py_BuildValue("(KKK)", (unsigned long long)map_id, (unsigned long long)run.address,
                                           (unsigned long long)run.count));
}

static void see_dropped(void *context, uint64_t address)
{
    struct seen *seen = context;
    append_new(seen->dropped, PyLong_FromUnsignedLongLong(address));
}

static PyObject *method_inspect(DataPlane *self, PyObject *unused)
{
    (void)unused;
    struct seen seen = {PyList_New(0), PyList_New(0), PyList_New(0)};
    if (seen.pages && seen.leases && seen.dropped) {
        struct plane_visitor visitor = {&seen, see_page, see_lease, see_dropped};
        plane_inspect(self->plane, &visitor);
    }
    PyObject *all =
        PyErr_Occurred() ? NULL : PyTuple_Pack(3, seen.pages, seen.leases, seen.dropped);
    Py_XDECREF(seen.pages);
    Py_XDECREF(seen.leases);
    Py_XDECREF(seen.dropped);
    return all;
}

static PyObject *module_crc32c(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer data;
    int portable = 0;
    if (!PyArg_ParseTuple(args, "y*|p", &data, &portable))
        return NULL;
    uint32_t crc = portable ? crc32c_portable(data.buf, data.len) : crc32c(data.buf, data.len);
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(crc);
}

/* ---- The module -------------------------------------------------------------------------------------------------------------- */

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
    {"discard", (PyCFunction)method_discard, METH_VARARGS, "Let whole blocks read as zeros."},
    {"mapped_delta", (PyCFunction)method_mapped_delta, METH_O, "Blocks that the table gained since the last seal."},
    {"seal", (PyCFunction)method_seal, METH_NOARGS, "Hand over the mappings appended since the last seal."},
    {"take_committed", (PyCFunction)method_take_committed, METH_NOARGS,
     "Take what was committed without the control plane: (sequence, batch), in order."},
    {"lend", KEYWORDS(method_lend), "Let small commits go through without the control plane: this is the journal's end."},
    {"reopen", (PyCFunction)method_reopen, METH_NOARGS, "Let commits go on after close_journal."},
    {"reclaim", (PyCFunction)method_reclaim, METH_NOARGS, "Take the journal's end back once it is at rest."},
    {"close_journal", (PyCFunction)method_close_journal, METH_NOARGS, "Let no further commit begin in the lent journal."},
    {"set_folded", (PyCFunction)method_set_folded, METH_O, "Say which commit the tables contain."},
    {"_sync", (PyCFunction)method_sync, METH_O, "What a hot thread does at an fsync; whether it could."},
    {"_inspect", (PyCFunction)method_inspect, METH_NOARGS, "Everything inside: pages, leases, dropped."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef plane_properties[] = {
    {"fresh_count", (getter)get_fresh_count, NULL, "Mappings appended since the last seal.", NULL},
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
    {"crc32c", module_crc32c, METH_VARARGS, "crc32c(data, portable=False): the checksum, for tests."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "incfs._dataplane",
    .m_doc = "The native data plane.",
    .m_size = -1,
    .m_methods = module_methods,
};

static int import_names(const char *module_name, int count, const char *const *names, PyObject ***slots)
{
    PyObject *module = PyImport_ImportModule(module_name);
    for (int i = 0; module && i < count; i++)
        if (!(*slots[i] = PyObject_GetAttrString(module, names[i])))
            Py_CLEAR(module);
    if (!module)
        return -1;
    Py_DECREF(module);
    return 0;
}

static int import_python(void)
{
    static const char *const of_dataplane[] = {"NotResident", "LeaseExhausted", "ReadWouldWait", "Batch",
                                              "LegFailed"};
    PyObject **dataplane_slots[] = {&python.not_resident, &python.lease_exhausted, &python.read_would_wait,
                                    &python.batch, &python.leg_failed};
    static const char *const of_model[] = {"Appended", "SealedPage"};
    PyObject **model_slots[] = {(PyObject **)&python.appended, (PyObject **)&python.sealed_page};
    if (import_names("incfs.dataplane", 5, of_dataplane, dataplane_slots) < 0)
        return -1;
    return import_names("incfs.model", 2, of_model, model_slots);
}

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
