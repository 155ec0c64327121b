/* Methods of the native data plane: resident pages, leases, image files. */
#include "_dataplane.h"

#include <string.h>

/* ---- Image files -------------------------------------------------------------------------------- */

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

/* ---- Pages -------------------------------------------------------------------------------------- */

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

PyObject *method_load(DataPlane *self, PyObject *args, PyObject *kwargs)
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

PyObject *method_evict(DataPlane *self, PyObject *arg)
{
    unsigned long long map_id = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    plane_evict(self->plane, map_id);
    Py_RETURN_NONE;
}

PyObject *method_shrink(DataPlane *self, PyObject *arg)
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

PyObject *method_is_resident(DataPlane *self, PyObject *args)
{
    unsigned long long map_id, page_index;
    if (!PyArg_ParseTuple(args, "KK", &map_id, &page_index))
        return NULL;
    return PyBool_FromLong(plane_is_resident(self->plane, map_id, page_index));
}

PyObject *get_page_count(DataPlane *self, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(plane_page_count(self->plane));
}

/* ---- Leases ------------------------------------------------------------------------------------- */

PyObject *method_grant(DataPlane *self, PyObject *args)
{
    unsigned long long map_id, address, block_count;
    if (!PyArg_ParseTuple(args, "KKK", &map_id, &address, &block_count) || need_file(self, address) < 0)
        return NULL;
    if (plane_grant(self->plane, map_id, (struct plane_run){address, block_count}) != PLANE_OK)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyObject *method_revoke(DataPlane *self, PyObject *args)
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

PyObject *method_leased_blocks(DataPlane *self, PyObject *arg)
{
    unsigned long long map_id = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(plane_leased_blocks(self->plane, map_id));
}

PyObject *method_attach(DataPlane *self, PyObject *arg)
{
    unsigned long long storage_id = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred() || attach_file(self, storage_id << 48) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *method_stripe(DataPlane *self, PyObject *args)
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

/* ---- Moves -------------------------------------------------------------------------------------- */

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

PyObject *method_move(DataPlane *self, PyObject *args)
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
