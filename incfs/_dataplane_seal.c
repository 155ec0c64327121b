/* Methods of the native data plane: sealed batches as Python sees them; what is inside, for tests. */
#include "_dataplane.h"

#include <endian.h>
#include <stddef.h>
#include <string.h>

/* The mappings of one table in a batch: those of its pages, one behind the other. */
struct sealed {
    const struct plane_batch *batch;
    size_t first_page, page_end, count;
};

/* Makes an array of one member of all mappings. */
#define MAKE_COLUMN(sealed, code, type, member) \
    make_column(sealed, code, sizeof(type), offsetof(struct plane_appended, member))

static PyObject *make_column(const struct sealed *sealed, char code, size_t size, size_t offset)
{
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, sealed->count * size);
    char *target = bytes ? PyBytes_AS_STRING(bytes) : NULL;
    for (size_t p = sealed->first_page; bytes && p < sealed->page_end; p++) {
        const struct plane_sealed_page *page = &sealed->batch->pages[p];
        const char *source = (const char *)(sealed->batch->appended + page->first) + offset;
        for (size_t i = 0; i < page->count; i++, target += size, source += sizeof(struct plane_appended))
            memcpy(target, source, size);
    }
    PyObject *column = bytes ? PyObject_CallFunction(python.array, "CO", code, bytes) : NULL;
    Py_XDECREF(bytes);
    return column;
}

/* Where each page's part of the columns is. */
static PyObject *make_pages(const struct sealed *sealed)
{
    PyObject *list = PyList_New(0);
    size_t first = 0;
    for (size_t p = sealed->first_page; list && p < sealed->page_end; p++) {
        const struct plane_sealed_page *page = &sealed->batch->pages[p];
        append_new(list, Py_BuildValue("(Knn)", (unsigned long long)page->page_index, (Py_ssize_t)first,
                                       (Py_ssize_t)(first + page->count)));
        first += page->count;
    }
    return list;
}

/* Four values for each run of a page, as put_runs in lane.c writes them. */
static void append_runs(PyObject *list, const struct plane_batch *batch, const struct plane_sealed_page *page)
{
    uint32_t checksums[PLANE_PAGE_BLOCKS];
    size_t end = page->first + page->count;
    for (size_t i = page->first, count; i < end && !PyErr_Occurred(); i += count) {
        const struct plane_appended *first = &batch->appended[i];
        count = plane_run_length(batch->appended, i, end);
        for (size_t k = 0; k < count; k++)
            checksums[k] = htole32(first[k].checksum);
        append_new(list, PyLong_FromUnsignedLongLong(page->page_index * PLANE_PAGE_BLOCKS + first->index));
        append_new(list, PyLong_FromSize_t(count));
        append_new(list, PyLong_FromUnsignedLongLong(first->address));
        append_new(list, PyBytes_FromStringAndSize((const char *)checksums, first->address > PLANE_HOLE ? 4 * count : 0));
    }
}

static PyObject *make_runs(const struct sealed *sealed)
{
    PyObject *list = PyList_New(0);
    for (size_t p = sealed->first_page; list && p < sealed->page_end; p++)
        append_runs(list, sealed->batch, &sealed->batch->pages[p]);
    return list;
}

/* `with_runs`: they have to go into the journal. */
static PyObject *make_sealed(const struct sealed *sealed, bool with_runs)
{
    PyObject *members[] = {
        PyLong_FromUnsignedLongLong(sealed->batch->pages[sealed->first_page].map_id),
        make_pages(sealed),
        MAKE_COLUMN(sealed, 'H', uint16_t, index),
        MAKE_COLUMN(sealed, 'Q', uint64_t, address),
        MAKE_COLUMN(sealed, 'I', uint32_t, checksum),
        MAKE_COLUMN(sealed, 'Q', uint64_t, old_address),
        MAKE_COLUMN(sealed, 'I', uint32_t, old_checksum),
        with_runs ? make_runs(sealed) : PyList_New(0),
    };
    enum { COUNT = sizeof members / sizeof *members };
    PyObject *made = PyErr_Occurred() ? NULL : python.sealed->tp_alloc(python.sealed, COUNT);
    for (size_t i = 0; i < COUNT; i++) {
        if (made)
            PyTuple_SET_ITEM(made, i, members[i]);
        else
            Py_XDECREF(members[i]);
    }
    return made;
}

static PyObject *make_tables(const struct plane_batch *batch, bool with_runs)
{
    PyObject *list = PyList_New(0);
    for (size_t p = 0; list && p < batch->page_count && !PyErr_Occurred();) {
        struct sealed sealed = {.batch = batch, .first_page = p};
        for (; p < batch->page_count && batch->pages[p].map_id == batch->pages[sealed.first_page].map_id; p++)
            sealed.count += batch->pages[p].count;
        sealed.page_end = p;
        append_new(list, make_sealed(&sealed, with_runs));
    }
    return list;
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

/* Steals `committed`: a list, or NULL for what is committed itself. */
static PyObject *make_batch(const struct plane_batch *batch, PyObject *committed)
{
    PyObject *tables = make_tables(batch, committed != NULL), *dropped = make_dropped(batch), *written = make_written(batch);
    PyObject *made = tables && dropped && written && !PyErr_Occurred()
                         ? PyObject_CallFunctionObjArgs(python.batch, tables, dropped, written, committed, NULL)
                         : NULL;
    Py_XDECREF(committed);
    Py_XDECREF(tables);
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
        PyObject *made = list && !PyErr_Occurred() ? make_batch(&batch->batch, NULL) : NULL;
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

PyObject *get_seal_count(DataPlane *self, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLongLong(plane_seal_count(self->plane));
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
