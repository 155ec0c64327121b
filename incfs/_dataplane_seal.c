/* Methods of the native data plane: sealed batches as Python sees them; what is inside, for tests. */
#include "_dataplane.h"

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
PyObject *method_take_committed(DataPlane *self, PyObject *unused)
{
    (void)unused;
    struct lane_batch *committed;
    lane_take(self->lane, &committed, NULL);
    return make_committed(committed);
}

PyObject *method_seal(DataPlane *self, PyObject *unused)
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

PyObject *method_mapped_delta(DataPlane *self, PyObject *arg)
{
    unsigned long long map_id = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromLongLong(plane_mapped_delta(self->plane, map_id));
}

PyObject *get_fresh_count(DataPlane *self, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(plane_fresh_count(self->plane));
}

/* ---- For tests ---------------------------------------------------------------------------------- */

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

PyObject *method_inspect(DataPlane *self, PyObject *unused)
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
